"""Mutations of the losses (``mutate.py`` runs them).

The tests are those of one rank, or for mistakes that one rank cannot make those of several.
"""

from dataclasses import dataclass

import mutate

ONE_RANK = (
    "tests/unit_tests/test_chunks.py",
    "tests/unit_tests/test_loss_safety.py",
    "tests/distributed/test_losses.py::test_losses_tp1",
    "tests/unit_tests/test_objective.py",
)
SETTINGS = ("tests/unit_tests/test_settings.py", "tests/unit_tests/test_loss_config.py")
METRICS = ("tests/unit_tests/test_step_metrics.py",)
REFERENCES = (
    "tests/distributed/test_references.py::test_one_rank",
    "tests/distributed/test_references.py::test_an_anchor_ignores_what_the_teacher_excludes",
)
GOLDEN = ("tests/unit_tests/test_golden.py::test_the_step_divides_their_loss_by_their_number",)
SEVERAL_RANKS = ("tests/distributed/test_losses.py::test_losses_tp2_and_tp4",)


@dataclass(frozen=True)
class Mutation(mutate.Mutation):
    """One mistake in a file of the losses."""

    several_ranks: bool = False
    """Whether one rank alone computes the same with it."""

    @property
    def path(self) -> str:
        """Of the file in the repository."""
        return f"megatron_tropd/losses/{self.file}"

    def suite(self) -> tuple[str, ...]:
        """The tests to run on it: those of the losses, if it names no others."""
        return self.tests or (SEVERAL_RANKS if self.several_ranks else ONE_RANK)


MUTATIONS = (
    # Formulas.
    Mutation(
        "draw turned round",
        "terms.py",
        "trusted_T = (~((uniforms_T >= trust_T) & (trust_T < 1))).float()",
        "trusted_T = ((uniforms_T >= trust_T) & (trust_T < 1)).float()",
    ),
    Mutation(
        "trust may exceed 1",
        "terms.py",
        "return log_ratio_T.clamp(max=0.0).exp()",
        "return log_ratio_T.exp()",
    ),
    Mutation(
        "missing factor: reward not weighted by the trust",
        "terms.py",
        "earned_T = times(trusted_T, reward_T)",
        "earned_T = reward_T",
    ),
    Mutation(
        "sign of the threshold",
        "methods/static.py",
        "terms.above(statistics.log_ratio_T, self.reward_floor, keeps",
        "terms.above(statistics.log_ratio_T, -self.reward_floor, keeps",
    ),
    Mutation(
        "sign of the forward KL's gradient",
        "terms.py",
        "term = _term(statistics, value_T=value_T, topk_TK=-p_TK)",
        "term = _term(statistics, value_T=value_T, topk_TK=p_TK)",
    ),
    Mutation(
        "renormalisation: forward KL renormalised on the top-k",
        "terms.py",
        "p_TK = statistics.topk_teacher_logprobs_TK.exp()",
        "p_TK = statistics.topk_teacher_logprobs_TK.softmax(dim=-1)",
    ),
    Mutation(
        "renormalisation: local support without the student's",
        "terms.py",
        "log_q_TK, log_p_TK = log_q_TK.log_softmax(dim=-1), log_p_TK.log_softmax(dim=-1)",
        "log_p_TK = log_p_TK.log_softmax(dim=-1)",
    ),
    Mutation(
        "wrong stop-gradient: local support's weights held constant",
        "terms.py",
        "topk_TK=times(q_TK, ratio_TK))",
        "topk_TK=q_TK)",
    ),
    Mutation(
        "detach lost: the reward is differentiated",
        "terms.py",
        "term = _term(statistics, value_T=-earned_T, sampled_T=-earned_T)",
        "term = _term(\n        statistics, value_T=-earned_T, "
        "sampled_T=-earned_T + statistics.student_logprob_T\n    )",
    ),
    Mutation(
        "wrong stop-gradient: score function everywhere",
        "terms.py",
        "sampled_T=torch.full_like(value_T, -beta))",
        "sampled_T=value_T)",
    ),
    Mutation(
        "sign of the score function",
        "terms.py",
        "    value_T = beta * statistics.log_ratio_T",
        "    value_T = -beta * statistics.log_ratio_T",
    ),
    Mutation(
        "missing factor: total variation",
        "terms.py",
        "forward_kl_outlier(statistics, top_k, tv_T)",
        "forward_kl_outlier(statistics, top_k, torch.ones_like(tv_T))",
    ),
    Mutation(
        "softmax part of the gradient forgets the top-k",
        "terms.py",
        "total_T = self.sampled_T + self.topk_TK.sum(dim=-1) + self.teacher_T",
        "total_T = self.sampled_T + self.teacher_T",
    ),
    Mutation(
        "weights of the JSD exchanged",
        "terms.py",
        "reward_T=torch.full_like(value_T, share - 1)",
        "reward_T=torch.full_like(value_T, -share)",
    ),
    Mutation(
        "entropy turned round",
        "terms.py",
        'uncertain_T = statistics.sum_of("teacher_entropy") > nats',
        'uncertain_T = statistics.sum_of("teacher_entropy") < nats',
    ),
    Mutation(
        "PPO clips one side only",
        "terms.py",
        "clipped_T = ((reward_T > 0) & (rho_T > high)) | ((reward_T < 0) & (rho_T < low))",
        "clipped_T = (reward_T > 0) & (rho_T > high)",
    ),
    Mutation(
        "rho not truncated",
        "terms.py",
        "term.scaled(rho_T.clamp(max=high))",
        "term.scaled(rho_T)",
    ),
    Mutation(
        "band open below",
        "terms.py",
        "outside_T = (rho_T < low) | (rho_T > high)",
        "outside_T = rho_T > high",
    ),
    Mutation(
        "zero times infinity",
        "terms.py",
        "value_T=times(factor_T, self.value_T),",
        "value_T=factor_T * self.value_T,",
    ),
    Mutation(
        "missing factor: beta in the value",
        "terms.py",
        "value_T = -beta * statistics.student_logprob_T",
        "value_T = -statistics.student_logprob_T",
    ),
    Mutation(
        "floor of the other rule",
        "../config/loss.py",
        "return math.log(share) / (1 - share)",
        "return math.log(share)",
    ),
    Mutation(
        "sign of the power reward",
        "terms.py",
        "return (power * statistics.teacher_logprob_T).exp() - (",
        "return -(power * statistics.teacher_logprob_T).exp() + (",
    ),
    Mutation(
        "power reward without its weight q",
        "dense_inplace.py",
        "return torch.sub(of_teacher, of_student, out=out).mul_(self.q)",
        "return torch.sub(of_teacher, of_student, out=out)",
    ),
    Mutation(
        "Veto's target without the student",
        "statistics.py",
        "teacher_Tv.add_(student_Tv, alpha=powers.student)",
        "pass",
    ),
    Mutation(
        "StableOPD's anchor without its weight",
        "methods/stable_opd.py",
        "terms.reverse_kl(statistics).scaled(weight)",
        "terms.reverse_kl(statistics)",
        tests=REFERENCES,
    ),
    Mutation(
        "StableOPD: both KLs lose their common factor",
        "methods/stable_opd.py",
        "terms.tilted_kl(statistics).scaled(1 + weight)",
        "terms.tilted_kl(statistics)",
        tests=REFERENCES,
    ),
    Mutation(
        "StableOPD: the anchor keeps what the teacher excludes",
        "statistics.py",
        "        if not powers.teacher:  # 0 x -inf would be nan",
        "        if False:",
        tests=REFERENCES,
    ),
    Mutation(
        "golden answers share the student's denominator",
        "../distill/step_loss.py",
        "weights_T = torch.where(writers_T == Writer.GOLDEN, golden, weights_T)",
        "pass",
        tests=GOLDEN,
    ),
    Mutation(
        "golden answers count as the teacher's",
        "../distill/metrics.py",
        "len(loss_T) - len(student)) - golden_T.sum(),",
        "len(loss_T) - len(student)),",
        tests=GOLDEN,
    ),
    Mutation(
        "IW-OPD counts the token itself as before it",
        "selection.py",
        "1 - before[rows_T, positions_T] / total_T",
        "1 - before[rows_T, positions_T + 1] / total_T",
        tests=("tests/unit_tests/test_choices.py",),
    ),
    Mutation(
        "an event's gradient goes to each of its ids whole",
        "merged.py",
        "shared_t = times(grad_t, self.log_share_tm[:, column].exp())",
        "shared_t = grad_t",
        tests=("tests/distributed/test_merged_ids.py",),
    ),
    # Importance, what is dropped, the score function, the floor itself.
    Mutation(
        "importance: EOPD's forward KL escapes it",
        "terms.py",
        """    if divergence is not None:
        term = _add(term, divergence)
    if how in ("truncated", "band"):
        term = _weighted_by_importance(term, rho_T, how, low, high)
""",
        """    if how in ("truncated", "band"):
        term = _weighted_by_importance(term, rho_T, how, low, high)
    if divergence is not None:
        term = _add(term, divergence)
""",
    ),
    Mutation(
        "importance: a token that moves counts as dropped",
        "terms.py",
        "dropped_T=first.dropped_T & ~moved_T,",
        "dropped_T=first.dropped_T,",
    ),
    Mutation(
        "importance: band hides a rho of nan",
        "terms.py",
        "outside_T = (rho_T < low) | (rho_T > high)",
        "outside_T = ~((rho_T >= low) & (rho_T <= high))",
    ),
    Mutation(
        "an infinite reward reaches the loss",
        "terms.py",
        "infinite_T = earned_T.isinf() | unwritten_T",
        "infinite_T = unwritten_T",
    ),
    Mutation(
        "score function: the prefix without log p",
        "terms.py",
        "    value_T = beta * statistics.log_ratio_T",
        "    value_T = -beta * statistics.student_logprob_T",
    ),
    Mutation(
        "score function: sign of the outlier's reward",
        "methods/_trust_region.py",
        "earned_T = earned_T - terms.times(outlier_T, kl_T)",
        "earned_T = earned_T + terms.times(outlier_T, kl_T)",
    ),
    Mutation(
        "floor: REOPOLD drops R = c",
        "methods/static.py",
        "keeps_floor = self.floor is not None",
        "keeps_floor = False",
    ),
    Mutation(
        "floor: the static test keeps r = tau",
        "methods/static.py",
        "keeps_floor = self.floor is not None",
        "keeps_floor = True",
    ),
    # What enters a loss.
    Mutation(
        "input: an id of no rank is a likely token",
        "vocab_parallel.py",
        ".masked_fill_(~known_TK, torch.nan)",
        "",
    ),
    Mutation(
        "input: an id of no rank is nan on one rank",
        "vocab_parallel.py",
        "known_TK = (ids_TK >= 0) & (ids_TK < shard.vocab_size)",
        "known_TK = (ids_TK >= 0) & (ids_TK < max(shard.stop, shard.start + 1))",
        several_ranks=True,
    ),
    Mutation(
        "input: top_k_signal does not look at ids",
        "reduction.py",
        'check_ids(ids_T, signal.vocab_size, "targets.ids_T")',
        "pass",
    ),
    Mutation(
        "input: [T, 1] passes for [T]",
        "tensors.py",
        "if not right or part.tensor.dim() != len(part.axes):",
        "if not right:",
    ),
    Mutation(
        "input: every type passes",
        "tensors.py",
        "right = part.tensor.dtype == dtype if dtype else part.tensor.is_floating_point()",
        "right = True",
    ),
    Mutation(
        "input: every device passes",
        "tensors.py",
        "if part.tensor.device != given[0].tensor.device:",
        "if False:",
    ),
    Mutation(
        "input: a top-k of other tokens passes",
        "tensors.py",
        'if part.axes.startswith("T") and rows != signals.get(part.owner):',
        'if part.axes == "T" and rows != signals.get(part.owner):',
    ),
    Mutation(
        "input: numbers keep their type",
        "tensors.py",
        "changed[part.field] = tensor.float()",
        "changed[part.field] = tensor",
    ),
    Mutation(
        "input: draws of 1 pass",
        "tensors.py",
        "lambda uniforms: (uniforms >= 0) & (uniforms < 1),",
        "lambda uniforms: (uniforms >= 0) & (uniforms <= 1),",
    ),
    Mutation(
        "input: a draw of nan is trusted on a GPU",
        "terms.py",
        "return torch.where(uniforms_T.isnan(), torch.nan, trusted_T)",
        "return trusted_T",
    ),
    Mutation(
        "input: a draw that rounds to 1 excludes a certain token",
        "terms.py",
        "((uniforms_T >= trust_T) & (trust_T < 1))",
        "(uniforms_T >= trust_T)",
    ),
    Mutation(
        "input: numbers of tokens without weight are looked at",
        "tensors.py",
        "rule.allowed(tensor) | unread, part",
        "rule.allowed(tensor), part",
    ),
    Mutation(
        "input: ids of tokens without weight are looked at",
        "tensors.py",
        "check_ids(tensor.masked_fill(unread, 0), vocab_size, what)",
        "check_ids(tensor, vocab_size, what)",
    ),
    # Settings made in Python.
    Mutation(
        "settings: any name passes for a choice",
        "../config/settings.py",
        "if not any(type(value) is type(choice) and value == choice for choice in choices):",
        "if False:",
        tests=SETTINGS,
    ),
    Mutation(
        "settings: no nearest name",
        "../config/settings.py",
        "close = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=likeness)",
        "close: list[str] = []",
        tests=SETTINGS,
    ),
    Mutation(
        "settings: nan and infinity lie in every range",
        "../config/settings.py",
        "return above and below and _is_finite(value)",
        "return not _is_finite(value) or (above and below)",
        tests=SETTINGS,
    ),
    Mutation(
        "settings: ranges are not looked at",
        "../config/settings.py",
        "    if isinstance(given, Range):",
        "    if isinstance(given, str):",
        tests=SETTINGS,
    ),
    Mutation(
        "settings: a number without a range",
        "../config/run.py",
        "num_problems: Count = 500",
        "num_problems: int = 500",
        tests=SETTINGS,
    ),
    # Which token is no number.
    Mutation(
        "naming: the teacher is called the student",
        "trouble.py",
        "(teacher_T, _TEACHER),",
        "(teacher_T, _STUDENT),",
        tests=METRICS,
    ),
    Mutation(
        "naming: the place in the trajectory is lost",
        "../distill/metrics.py",
        "| (positions_T << BITS) | found_T",
        "| found_T",
        tests=METRICS,
    ),
    Mutation(
        "naming: the last trajectory is named",
        "../distill/metrics.py",
        "(batch.loss_rows << _POSITION_BITS)",
        "((99 - batch.loss_rows) << _POSITION_BITS)",
        tests=METRICS,
    ),
    Mutation(
        "naming: the host waits for every micro-batch",
        "../distill/metrics.py",
        "        key_T = torch.where(found_T > 0, key_T, _NOTHING)",
        "        assert (found_T >= 0).all().item()\n"
        "        key_T = torch.where(found_T > 0, key_T, _NOTHING)",
        tests=METRICS,
    ),
    # Passes over the vocabulary.
    Mutation(
        "fp16 sum",
        "dense_inplace.py",
        "columns = [student_max, student.sum(dim=-1),",
        "columns = [student_max, student.half().sum(dim=-1).float(),",
    ),
    Mutation(
        "overlap is the maximum",
        "dense.py",
        "return torch.minimum(self.p, self.q, out=self._spare)",
        "return torch.maximum(self.p, self.q, out=self._spare)",
    ),
    Mutation(
        "floor lost in the exact clip",
        "dense_inplace.py",
        "floored = torch.clamp(self.ratio, min=spec.reward_floor, out=self._other)",
        "floored = torch.clamp(self.ratio, min=-torch.inf, out=self._other)",
    ),
    Mutation(
        "mixture of the other share",
        "dense.py",
        "return torch.sub(share, 1.0, out=out).mul_(mix).log1p_()",
        "return torch.sub(share, 1.0, out=out).mul_(1 - mix).log1p_()",
    ),
    Mutation(
        "the teacher is lost where the student's exponential is 0",
        "dense_inplace.py",
        "raised = student.clamp(min=_LOWEST)",
        "raised = student.clamp(min=-1e4)",
    ),
    Mutation(
        "the teacher is lost where the student's whole shard is far below",
        "dense_inplace.py",
        "log_q = _log_factor(self._maxima[:, 0], student_norm_T2).clamp(min=lowest)",
        "log_q = _log_factor(self._maxima[:, 0], student_norm_T2)",
        several_ranks=True,
    ),
    Mutation(
        "top-k: a group too few",
        "vocab_parallel.py",
        "_keys(largest_TG, numbers_G, 0).topk(k, dim=-1, sorted=False)",
        "_keys(largest_TG, numbers_G, 0).topk(max(k - 1, 1), dim=-1, sorted=False)",
    ),
    Mutation(
        "top-k: the last columns are in no group",
        "vocab_parallel.py",
        "    if whole < columns_Tv.shape[-1]:",
        "    if False:",
    ),
    Mutation(
        "top-k: columns that do not exist",
        "vocab_parallel.py",
        ".masked_fill(columns_TK >= num, _LOWEST_KEY)",
        "",
    ),
    Mutation(
        "padded columns take part",
        "vocab_parallel.py",
        "real = tuple(min(bound, vocab_size) for bound in bounds)",
        "real = tuple(bounds)",
    ),
    Mutation(
        "digits: a small share of the mixture",
        "dense.py",
        "    if mix <= 0.5:  # 1 - b would swallow a small b",
        "    if mix < 0.0:",
    ),
    Mutation(
        "digits: a large share of the mixture",
        "dense_inplace.py",
        "        if mix <= 0.5:",
        "        if mix <= 1.0:",
    ),
    Mutation(
        "digits: float16 without a common size",
        "products.py",
        "exponent_T1 = torch.where(usable_T1, exponent_T1, 0)",
        "exponent_T1 = torch.where(usable_T1, 0, 0)",
    ),
    Mutation(
        "digits: hidden gradient rounded before the loss scale",
        "objective.py",
        "dtype = torch.promote_types(student.hidden_TH.dtype, torch.float32)",
        "dtype = student.hidden_TH.dtype",
    ),
    # Rows without weight.
    Mutation(
        "without weight: nan times zero, in place",
        "dense_inplace.py",
        "        coefficients.silence(out_Tv)",
        "        pass",
    ),
    Mutation(
        "without weight: nan times zero, plain",
        "dense.py",
        "    coefficients.silence(out_Tv)",
        "    pass",
    ),
    Mutation(
        "without weight: the teacher's coefficient",
        "terms.py",
        "teacher_T=times(factor_T, self.teacher_T),",
        "teacher_T=factor_T * self.teacher_T,",
    ),
    Mutation(
        "without weight: the reward's coefficient",
        "terms.py",
        "return total_T + times(self.reward_T, reward_sum_T)",
        "return total_T + self.reward_T * reward_sum_T",
    ),
    Mutation(
        "without weight: hidden states in the output layer's gradient",
        "objective.py",
        "hidden_tH = _silenced(student.hidden_TH[rows], targets.weights_T)",
        "hidden_tH = student.hidden_TH[rows]",
    ),
    Mutation(
        "without weight: rows with weight as well",
        "dense.py",
        "silent_T = (self.student_T == 0) & (self.reward_T == 0) & (self.teacher_T == 0)",
        "silent_T = self.student_T == 0",
    ),
    Mutation(
        "nan hides outside the band",
        "terms.py",
        "outside_T = (rho_T < low) | (rho_T > high)",
        "outside_T = ~((rho_T >= low) & (rho_T <= high))",
    ),
    # What callers change.
    Mutation(
        "in place: reported values are what backward reads",
        "objective.py",
        "return {name: value_T.clone() for name, value_T in values.items()}",
        "return values",
    ),
    Mutation(
        "in place: no version check of the teacher",
        "objective.py",
        "ctx.save_for_backward(student_logits_Tv, pair.ids_T, *teacher)",
        "ctx.save_for_backward(student_logits_Tv, pair.ids_T)",
    ),
    Mutation(
        "in place: no version check of the tokens",
        "objective.py",
        "ctx.save_for_backward(student_logits_Tv, pair.ids_T, *teacher)",
        "ctx.save_for_backward(student_logits_Tv, *teacher)",
    ),
    Mutation(
        "default dtype of the scratch",
        "dense.py",
        "return torch.empty(shape, dtype=torch.float32, device=self._device)",
        "return torch.empty(shape, device=self._device)",
    ),
    Mutation(
        "default device of the chunks",
        "chunks.py",
        "torch.empty(shape, dtype=torch.float32, device=pair.device)",
        "torch.empty(shape, dtype=torch.float32)",
    ),
    Mutation(
        "second derivatives are zero",
        "first_order.py",
        "        if not torch.is_grad_enabled():  # the rule: nobody asked for create_graph",
        "        if True:",
    ),
    # Chunks, gradients, sums.
    Mutation(
        "every chunk gets the first one's statistics",
        "chunks.py",
        "rows_of(statistics, rows), event)",
        "rows_of(statistics, slice(0, rows.stop - rows.start)), event)",
    ),
    Mutation(
        "the caller's logits are overwritten",
        "objective.py",
        "grad_Tv = torch.zeros_like(logits_Tv)",
        "grad_Tv = logits_Tv.detach().zero_()",
    ),
    Mutation(
        "missing factor: upstream gradient of the output layer",
        "objective.py",
        "weight_vH = weight_vH.mul_(grad)",
        "weight_vH = weight_vH",
    ),
    Mutation(
        "mean of means",
        "objective.py",
        'return self.values()["loss"].sum()',
        'return self.values()["loss"].mean()',
    ),
    Mutation(
        "main_grad is overwritten",
        "objective.py",
        "maker.main_grad.add_(weight_vH)",
        "maker.main_grad.copy_(weight_vH)",
    ),
    Mutation(
        "rounded: a column named twice gets the last part alone",
        "chunks.py",
        "sums_tv.gather(-1, local_tK).to(out_tv.dtype)",
        "(dense_tK + pushes_tK).to(out_tv.dtype)",
    ),
    Mutation(
        "shifted shard: columns of other ranks are pushed here",
        "chunks.py",
        "pushes_tK = torch.where(mine_tK, pushes_tK, 0.0)",
        "pushes_tK = pushes_tK + 0.0",
        several_ranks=True,
    ),
    Mutation(
        "output layer's gradient in half precision",
        "products.py",
        "high = grad_Tv.float().t(), hidden_TH.float()",
        "high = grad_Tv.bfloat16().float().t(), hidden_TH.float()",
    ),
    # Ranks.
    Mutation(
        "agreement: rows of a chunk from this rank's columns",
        "chunks.py",
        "_row_stride(pair.shard.widest, pair.device)",
        "_row_stride(pair.shard.real, pair.device)",
    ),
    Mutation(
        "agreement: scratch of this rank's columns",
        "chunks.py",
        "budget=_budget(pair), widest=shard.widest)",
        "budget=_budget(pair))",
        several_ranks=True,
    ),
    Mutation(
        "shifted shard",
        "vocab_parallel.py",
        "local_TK = ids_TK - start",
        "local_TK = ids_TK - start - int(start > 0)",
        several_ranks=True,
    ),
    Mutation(
        "missing reduction: sums over the vocabulary",
        "statistics.py",
        "vp.AllReduceSum(passes.second(student_norm_T2, teacher_norm_T2), group=shard.group)",
        "vp.AllReduceSum(passes.second(student_norm_T2, teacher_norm_T2), group=None)",
        several_ranks=True,
    ),
    Mutation(
        "normalisers added without their maxima",
        "vocab_parallel.py",
        "log_sum_T = (sum_RT * (max_RT - max_T).exp()).sum(dim=0).log()",
        "log_sum_T = sum_RT.sum(dim=0).log()",
        several_ranks=True,
    ),
    Mutation(
        "moments of the ranks not summed",
        "dense_inplace.py",
        "columns.append(sign * torch.where(factor == 0, 0.0, part).sum(dim=0))",
        "columns.append(sign * torch.where(factor == 0, 0.0, part)[0])",
        several_ranks=True,
    ),
    Mutation(
        "missing reduction: gradient of the hidden states",
        "sharded_rows.py",
        "dist.all_reduce(total_TH, group=ctx.group)",
        "pass",
        several_ranks=True,
    ),
    Mutation(
        "mean over the ranks: gradient of sequence-parallel rows",
        "sharded_rows.py",
        "dist.reduce_scatter_tensor(mine_tH, grad_TH, group=ctx.group)",
        "dist.reduce_scatter_tensor(mine_tH, grad_TH / ctx.group.size(), group=ctx.group)",
        several_ranks=True,
    ),
    Mutation(
        "top-k values of the wrong rank",
        "vocab_parallel.py",
        "values = values_RTK.transpose(0, 1).flatten(1, 2).gather(-1, merged.indices)",
        "values = values_RTK[0].gather(-1, merged.indices % k)",
        several_ranks=True,
    ),
    Mutation(
        "re-sharded columns in the wrong place",
        "align.py",
        "aligned[columns.start - wanted.start : columns.stop - wanted.start] = rows",
        "aligned[: len(rows)] = rows",
        several_ranks=True,
    ),
)
