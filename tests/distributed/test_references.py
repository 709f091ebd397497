"""Losses that measure the teacher against a reference: float64 formulas, at TP 1, 2 and 4.

The formulas below are written from the papers' rewards, and torch differentiates them; the losses
never do. One spawn of four ranks serves TP 4 (all of them) and TP 2 (two pairs).
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.losses import (
    HiddenStatesSignal,
    LogitsSignal,
    LossTargets,
    ReferencedSignal,
    ReferencedTopKSignal,
    TopKSignal,
    check_signal,
    preset,
    top_k_signal,
    tropd_loss,
    tropd_loss_from_hidden,
)
from tests.ranks import run_on_ranks

BETA, TOKENS, VOCAB, HIDDEN = 0.3, 220, 507, 8
WIDTH = 512
"""Columns with padding: 128 on each of four ranks."""
FROZEN = ("teacher", "reference")
MERGED = (400, 2, 130)
"""On four ranks: of the last, the first and the second."""
_EXACT = dict(over="vocabulary", importance="none")
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "exopd": ("exopd", dict(scale=1.5)),
    "exopd, towards the reference": ("exopd", dict(scale=0.5)),
    "exopd, truncated": ("exopd", dict(importance="truncated", importance_high=1.1)),
    "exopd, exact": ("exopd", dict(scale=1.5) | _EXACT),
    "exopd of 1, exact": ("exopd", dict(scale=1.0) | _EXACT),
    "delta": ("delta", {}),
    "delta, exact": ("delta", _EXACT),
    "erpd": ("erpd", {}),
    "erpd, bernoulli": ("erpd", dict(region="bernoulli")),
    "erpd, expected": ("erpd", dict(region="expected", importance="none")),
    "erpd, exact": ("erpd", _EXACT),
    "erpd_teacher": ("erpd_teacher", dict(scale=0.7)),
    "stable_opd": ("stable_opd", dict(reference_weight=0.3, golden_weight=0.7)),
    "stable_opd, ppo": ("stable_opd", dict(importance="ppo", importance_low=0.8)),
    "stable_opd, exact": ("stable_opd", dict(reference_weight=0.3, golden_weight=0.7) | _EXACT),
    "stable_opd, no anchor": ("stable_opd", dict(reference_weight=0.0)),
    "stable_opd, no answers": ("stable_opd", dict(golden_weight=0.0)),
}
STABLE = ("stable_opd", "stable_opd, exact")


@dataclass
class Case:
    """Three models at the same tokens, as hidden states and output layers in float32."""

    models: dict[str, tuple[Tensor, Tensor]]
    targets: LossTargets

    def logits(self, who: str) -> Tensor:
        """[T, WIDTH] float64."""
        hidden, weight = self.models[who]
        return hidden.double() @ weight.double().t()


def _case(name: str = "delta") -> Case:
    """The tokens as the loss of that name takes them."""
    case, needs = _plain_case(), _config(name).needs
    if needs.outcomes:
        case.targets = replace(case.targets, rewards_T=torch.linspace(-1, 1, TOKENS))
    if needs.golden:
        is_golden_T = (torch.arange(TOKENS) % 5 == 0) & ~case.targets.is_teacher_T
        case.targets = replace(case.targets, is_golden_T=is_golden_T)
    return case


def _config(name: str) -> Any:
    method, settings = LOSSES[name]
    return preset(method, **settings)


def _plain_case() -> Case:
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        # Exact in float32, and so are the products, in whatever order they are summed.
        return (torch.randn(*shape, generator=draw).clamp(-2, 2) * 16).round() / 16

    models = {}
    for who, padding in (("student", 60.0), ("teacher", -60.0), ("reference", 60.0)):
        weight = torch.full((WIDTH, HIDDEN), padding)
        weight[:VOCAB] = normal(VOCAB, HIDDEN)
        models[who] = normal(TOKENS, HIDDEN), weight
    case = Case(models, LossTargets(*[torch.zeros(0)] * 3))
    student = case.logits("student")[:, :VOCAB]
    ids = student.softmax(-1).multinomial(1, generator=draw).squeeze(-1)
    logprob = student.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    case.targets = LossTargets(
        ids_T=ids,
        is_teacher_T=torch.rand(TOKENS, generator=draw) < 0.2,
        uniforms_T=torch.rand(TOKENS, generator=draw),
        weights_T=torch.rand(TOKENS, generator=draw),
        rollout_logprobs_T=(logprob + 0.2 * torch.randn(TOKENS, generator=draw)).float(),
    )
    return case


# ---- the formulas ----


def _expected(case: Case, name: str) -> tuple[Tensor, Tensor]:
    """([T] value of each token, [T, VOCAB] gradient of the weighted sum), float64."""
    method, settings = LOSSES[name]
    z = case.logits("student")[:, :VOCAB].requires_grad_()
    log_q = z.log_softmax(-1)
    log_p, log_r = (case.logits(who)[:, :VOCAB].log_softmax(-1) for who in ("teacher", "reference"))
    targets = case.targets

    def at(log: Tensor) -> Tensor:
        return log.gather(-1, targets.ids_T.unsqueeze(-1)).squeeze(-1)

    if method == "erpd_teacher":
        loss = (settings["scale"] * (at(log_q) - at(log_p)) - targets.rewards_T.double()) ** 2
        value = loss.detach()
    elif settings.get("over") == "vocabulary":
        loss = -(log_q.exp() * _reward(method, settings, log_p, log_r, log_q)).sum(-1)
        value = loss.detach()
    else:
        reward = _reward(method, settings, at(log_p), at(log_r), at(log_q)).detach()
        loss, value = _policy_gradient(method, settings, reward, at(log_q), at(log_p), targets)
        if method == "stable_opd":
            kl = (log_q.exp() * (log_q - log_r)).sum(-1)
            anchor = settings.get("reference_weight", 0.1) * kl
            loss, value = loss + anchor, value + anchor.detach()
    given = [(targets.is_teacher_T, BETA)]
    if targets.is_golden_T is not None:
        given.append((targets.is_golden_T, settings.get("golden_weight", 0.1)))
    for is_given_T, weight in given:
        loss = torch.where(is_given_T, -weight * at(log_q), loss)
        value = torch.where(is_given_T, -weight * at(log_q).detach(), value)
    (targets.weights_T.double() * loss).sum().backward()
    return value, z.grad


def _reward(method: str, settings: dict, log_p: Tensor, log_r: Tensor, log_q: Tensor) -> Tensor:
    if method == "exopd":
        return settings.get("scale", 1.25) * (log_p - log_r) + (log_r - log_q)
    if method == "stable_opd":
        anchor = settings.get("reference_weight", 0.1) if "over" in settings else 0.0
        return log_p - log_q - anchor * (log_q - log_r)
    return log_p - log_r


def _policy_gradient(
    method: str, settings: dict, reward: Tensor, log_q: Tensor, log_p: Tensor, targets: LossTargets
) -> tuple[Tensor, Tensor]:
    trust = (log_p - log_q).detach().exp().clamp(max=1)
    region = settings.get("region", "none")
    if region == "bernoulli":
        reward = reward * (targets.uniforms_T.double() < trust)
    if region == "expected":
        reward = reward * trust
    rho = (log_q - targets.rollout_logprobs_T.double()).exp()
    importance = settings.get("importance", "ppo" if method == "erpd" else "none")
    if importance == "ppo":
        high = 1.2 if method == "erpd" else 2.0
        loss = -torch.minimum(reward * rho, reward * rho.clamp(0.8, high))
        return loss, loss.detach()
    factor = rho.detach().clamp(max=1.1) if importance == "truncated" else 1.0
    return -factor * reward * log_q, -factor * reward


# ---- the losses ----


def _columns(group: dist.ProcessGroup | None) -> slice:
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    return slice(rank * WIDTH // size, (rank + 1) * WIDTH // size)


def _run(case: Case, name: str, group: dist.ProcessGroup | None, how: str) -> tuple[Any, Tensor]:
    """(values, [T, v] gradient of the student's logits, or [T, H] of its hidden states)."""
    config, columns = _config(name), _columns(group)
    given = dict(config=config, vocab_size=VOCAB, group=group, beta=BETA, memory_mib=1)
    if how == "hidden":
        signals = {
            who: HiddenStatesSignal(hidden, weight[columns].contiguous(), VOCAB)
            for who, (hidden, weight) in case.models.items()
        }
        student = signals.pop("student")
        hidden, weight = student.hidden_TH.clone(), student.output_weight_vH.clone()
        hidden.requires_grad_(), weight.requires_grad_()
        out = tropd_loss_from_hidden(hidden, weight, case.targets, _signal(signals), **given)
        out.loss.backward()
        return out.values, hidden.grad
    logits = {who: case.logits(who)[:, columns].float() for who in case.models}
    z = logits["student"].requires_grad_()
    signals = {who: LogitsSignal(logits[who], VOCAB) for who in ("teacher", "reference")}
    signal = _top_k(case, signals, group) if how == "top_k" else _signal(signals)
    out = tropd_loss(z, case.targets, signal, **given)
    out.loss_T.sum().backward()
    return out.values, z.grad


def _signal(signals: dict[str, Any]) -> ReferencedSignal:
    return ReferencedSignal(signals["teacher"], signals["reference"])


def _top_k(case: Case, signals: dict[str, Any], group: Any) -> ReferencedTopKSignal:
    teacher, reference = (
        top_k_signal(signals[who].logits_Tv, case.targets.ids_T, 4, vocab_size=VOCAB, group=group)
        for who in ("teacher", "reference")
    )
    return ReferencedTopKSignal(**vars(teacher), reference_logprobs_T=reference.sampled_logprobs_T)


def _check(group: dist.ProcessGroup | None) -> None:
    for name in LOSSES:
        case, columns, needs = _case(name), _columns(group), _config(name).needs
        value, grad = _expected(case, name)
        wide = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
        wide[:, :VOCAB] = grad
        for how in ("logits", "hidden", *(() if needs.sums else ("top_k",))):
            values, found = _run(case, name, group, how)
            said = f"{name}, {how}"
            assert torch.allclose(values["term"].double(), value, rtol=2e-5, atol=2e-5), said
            expected = wide @ case.models["student"][1].double() if how == "hidden" else wide
            expected = expected if how == "hidden" else expected[:, columns]
            assert torch.allclose(found.double(), expected, rtol=1e-4, atol=2e-6), said
            for who in ("teacher", "reference"):
                if f"{who}_logprob" in values:
                    log = case.logits(who)[:, :VOCAB].log_softmax(-1)
                    log = log.gather(-1, case.targets.ids_T.unsqueeze(-1)).squeeze(-1)
                    assert torch.allclose(values[f"{who}_logprob"].double(), log, atol=2e-5), said
            if how != "top_k":  # which carries it whether it is read or not
                assert ("reference_logprob" in values) == needs.reference, said


def test_one_rank():
    _check(None)
    _check_merged(None)


def _on_rank(group: dist.ProcessGroup) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for some in (group, pairs[dist.get_rank() // 2]):
        _check(some)
        _check_merged(some)


def _one_event(logits_Tv: Tensor) -> Tensor:
    """[T, VOCAB - 3 + 1]: the merged ids as one column, the last."""
    others = [number for number in range(VOCAB) if number not in MERGED]
    event_T1 = logits_Tv[:, list(MERGED)].logsumexp(-1, keepdim=True)
    return torch.cat([logits_Tv[:, others], event_T1], dim=-1)


def _check_merged(group: dist.ProcessGroup | None) -> None:
    """Merged ids are one id to all three models: as in the vocabulary that has one."""
    columns, fewer = _columns(group), VOCAB - len(MERGED) + 1
    others = [number for number in range(VOCAB) if number not in MERGED]
    place = torch.full((VOCAB,), fewer - 1).scatter(0, torch.tensor(others), torch.arange(fewer))
    for name in (*("exopd, exact", "delta, exact", "exopd", "delta", "erpd, expected"), *STABLE):
        case = _case(name)
        ids_T = case.targets.ids_T.clone()
        ids_T[:6] = torch.tensor(MERGED * 2)
        targets = replace(case.targets, ids_T=ids_T)
        small = replace(targets, ids_T=place[ids_T])
        whole = case.logits("student").float().requires_grad_()
        given = dict(vocab_size=fewer, group=None, beta=BETA)
        merged = {who: LogitsSignal(_one_event(case.logits(who).float()), fewer) for who in FROZEN}
        config = _config(name)
        expected = tropd_loss(_one_event(whole), small, _signal(merged), config=config, **given)
        expected.loss_T.sum().backward()

        z = case.logits("student")[:, columns].float().requires_grad_()
        signals = {who: LogitsSignal(case.logits(who)[:, columns].float(), VOCAB) for who in FROZEN}
        config = replace(config, merge_ids=MERGED)
        given = dict(vocab_size=VOCAB, group=group, beta=BETA)
        found = tropd_loss(z, targets, _signal(signals), config=config, **given)
        found.loss_T.sum().backward()
        for key in ("term", "teacher_logprob", "reference_logprob", "reverse_kl"):
            pair = found.values[key], expected.values[key]
            assert torch.allclose(*pair, rtol=1e-4, atol=2e-5), (name, key)
        assert torch.allclose(z.grad, whole.grad[:, columns], rtol=1e-3, atol=5e-6), name


@pytest.mark.slow
def test_two_and_four_ranks():
    run_on_ranks(4, _on_rank)


def test_a_scale_of_1_is_opd_in_value_and_gradient():
    case = _case()
    values, grad = _run(case, "exopd of 1, exact", None, "logits")
    z = case.logits("student").float().requires_grad_()
    teacher = LogitsSignal(case.logits("teacher").float(), VOCAB)
    config = preset("minillm_single_step")
    plain = tropd_loss(
        z, case.targets, teacher, config=config, vocab_size=VOCAB, group=None, beta=BETA
    )
    plain.loss_T.sum().backward()
    assert torch.allclose(values["loss"], plain.values["loss"], atol=2e-5)
    assert torch.allclose(grad, z.grad, atol=1e-6)


def test_a_reference_that_the_signal_lacks_is_missed_by_name():
    with pytest.raises(ConfigError, match="'exopd' needs of the teacher a reference model, found"):
        check_signal(preset("exopd"), HiddenStatesSignal, vocab_size=9)
    with pytest.raises(ConfigError, match=r"'delta' needs of the teacher the whole .* and a ref"):
        check_signal(preset("delta", over="vocabulary"), TopKSignal, vocab_size=9)
    with pytest.raises(ConfigError, match="samples nothing and needs"):
        preset("exopd", over="vocabulary", importance="ppo")


def test_a_column_that_one_model_excludes_takes_no_part():
    """Of -inf less -inf comes no number: such a column stays excluded."""
    case = _case()
    logits = {who: case.logits(who).float() for who in case.models}
    for who in logits:
        logits[who][:, 3] = -torch.inf
    targets = replace(
        case.targets, ids_T=torch.where(case.targets.ids_T == 3, 4, case.targets.ids_T)
    )
    signals = {who: LogitsSignal(logits[who], VOCAB) for who in ("teacher", "reference")}
    for method in ("exopd", "delta"):
        z = logits["student"].clone().requires_grad_()
        out = tropd_loss(
            z,
            targets,
            _signal(signals),
            config=preset(method, over="vocabulary"),
            vocab_size=VOCAB,
            group=None,
        )
        out.loss_T.sum().backward()
        assert out.loss_T.isfinite().all() and z.grad.isfinite().all()
        assert (z.grad[:, 3] == 0).all()


def test_golden_answers_are_given_exactly_if_the_loss_reads_them():
    case = _case("stable_opd")
    case.targets = replace(case.targets, is_golden_T=None)
    with pytest.raises(ValueError, match=r"'stable_opd' has a loss for golden answers.*None. Pass"):
        _run(case, "stable_opd", None, "logits")
    with pytest.raises(ValueError, match=r"'delta' has no loss for golden answers.*Leave it out"):
        _run(_case("stable_opd"), "delta", None, "logits")


def test_an_anchor_ignores_what_the_teacher_excludes():
    """KL(q || p_ref) reads p nowhere: 0 x -inf is no number."""
    case = _case("stable_opd")
    logits = {who: case.logits(who).float() for who in case.models}
    logits["teacher"][:, 3] = -torch.inf
    signals = {who: LogitsSignal(logits[who], VOCAB) for who in FROZEN}
    z = logits["student"].requires_grad_()
    given = dict(config=_config("stable_opd"), vocab_size=VOCAB, group=None)
    out = tropd_loss(z, case.targets, _signal(signals), **given)
    out.loss_T.sum().backward()
    log_q, log_r = (logits[who][:, :VOCAB].log_softmax(-1) for who in ("student", "reference"))
    kl_T = (log_q.exp() * (log_q - log_r)).sum(-1).detach()
    assert torch.allclose(out.values["reverse_kl"], kl_T, atol=2e-5)
    assert z.grad.isfinite().all() and (z.grad[:, 3] != 0).any()
