"""Mutations of packing, layout, weight export and hand-over (``mutate.py`` runs them).

Each names one fast test that notices it.
"""

from mutate import Mutation

PACKING = "unit_tests/test_data_packing.py::test"
LAYOUT = "unit_tests/test_platform.py::test_places_and_ranks_are_inverse"
EXPORT = "distributed/test_logits.py::test_tiny_logits_and_export"
FOLDER = "unit_tests/test_weight_sync.py::test"
STEP = "unit_tests/test_step.py::test"
CHOICES = "unit_tests/test_choices.py::test"
CHANNEL = "unit_tests/test_weight_channels.py::test"


def _of(file: str, *rows: tuple[str, str, str, str]) -> tuple[Mutation, ...]:
    """Mutations of a file: (name, old, new, test)."""
    return tuple(
        Mutation(f"{file}: {name}", file, old, new, (test,)) for name, old, new, test in rows
    )


MUTATIONS = (
    *_of(
        "data/batch.py",
        (
            "labels are the tokens themselves",
            "_padded(column[1 : stop + 1], 0, length)",
            "_padded(column[:stop], 0, length)",
            f"{PACKING}_a_row_by_hand",
        ),
        (
            "writers are those of the token before",
            '"writers": sequence.writer_N,',
            '"writers": np.roll(sequence.writer_N, 1),',
            f"{PACKING}_a_row_by_hand",
        ),
        (
            "log-probs one position early",
            'getattr(sequence, f"{name}_N"), np.float32(0))',
            'np.roll(getattr(sequence, f"{name}_N"), -1), np.float32(0))',
            f"{PACKING}_a_row_by_hand",
        ),
        (
            "draws keyed by the place in the list",
            "keyed_uniform(seed, step, k.draw, p) for k, p in zip(keys,",
            "keyed_uniform(seed, step, k, p) for k, p in zip(rows,",
            f"{PACKING}_order_of_the_list_changes_no_draw",
        ),
        (
            "the same draws in every step",
            "keyed_uniform(seed, step, k.draw",
            "keyed_uniform(seed, 0, k.draw",
            f"{PACKING}_draws_differ_by_step_seed_and_trajectory",
        ),
    ),
    *_of(
        "data/packing.py",
        (
            "every replica gets the first one's rows",
            "rows = order[start:stop][dp_rank::dp_size]",
            "rows = order[start:stop][::dp_size]",
            f"{PACKING}_layout_changes_no_token",
        ),
        (
            "no padding to a multiple",
            "return -(-positions // multiple) * multiple",
            "return positions",
            f"{PACKING}_layout_changes_no_token",
        ),
        (
            "one row more than the budget",
            "stop = start + dp_size * (tokens_per_micro_batch // length)",
            "stop = start + dp_size * (tokens_per_micro_batch // length + 1)",
            f"{PACKING}_nothing_lost_and_budget_kept",
        ),
        (
            "rows in the order of the list",
            "key=lambda i: (-len(trajectories[i]), i)",
            "key=lambda i: i",
            f"{PACKING}_sorting_keeps_padding_small",
        ),
        (
            "masked tokens of the teacher count",
            "teacher += int((kept_N & (t.writer_N == Writer.TEACHER)).sum())",
            "teacher += int((t.writer_N == Writer.TEACHER).sum())",
            f"{PACKING}_counts_agree_with_the_masks_of_all_ranks",
        ),
        (
            "an id is masked at its last occurrence",
            "weight_N[places[:1]] = 0",
            "weight_N[places[-1:]] = 0",
            f"{PACKING}_the_first_occurrence_of_an_id_in_a_response_is_masked_whoever_wrote_it",
        ),
    ),
    *_of(
        "mcore/parallel.py",
        (
            "replicas and stages change places",
            "return (pp_rank * self.dp_size + dp_rank) * self.tp_size + tp_rank",
            "return (dp_rank * self.pp_size + pp_rank) * self.tp_size + tp_rank",
            LAYOUT,
        ),
        (
            "shards of an expert count as parts of the experts",
            "return rank // self.etp_size % self.ep_size",
            "return rank % self.ep_size",
            LAYOUT,
        ),
        (
            "a neighbour is the next rank",
            "return rank + (ep_rank - self.ep_rank_of(rank)) * self.etp_size",
            "return rank + (ep_rank - self.ep_rank_of(rank))",
            LAYOUT,
        ),
        (
            "the first stage has the loss",
            "return self.pp_rank == self.pp_size - 1",
            "return self.pp_rank == 0",
            f"{EXPORT}[pp2]",
        ),
    ),
    *_of(
        "mcore/weights.py",
        (
            "every rank reads the first shard",
            "place = (ranks.tp_rank, ranks.tp_size) if",
            "place = (0, ranks.tp_size) if",
            f"{EXPORT}[tp2]",
        ),
        (
            "shards in the wrong order",
            "return everything if ranks.tp_rank in places else None",
            "return everything.flip(0) if ranks.tp_rank in places else None",
            f"{EXPORT}[tp2]",
        ),
        (
            "the tied copy of the last stage is not filled",
            'pairs.append((entries[0], parameters["output_layer.weight"]))',
            'pairs.append((entries[0], torch.nn.Parameter(parameters["output_layer.weight"] + 0)))',
            f"{EXPORT}[pp2]",
        ),
        (
            "every rank has the first experts",
            "first_expert = ranks.ep_rank * shape.experts.count // ranks.ep_size if",
            "first_expert = 0 * shape.experts.count // ranks.ep_size if",
            f"{EXPORT}[ep2]",
        ),
        (
            "experts come from the receiver's own rank",
            "rank if self.home.ep_rank is None else ranks.neighbour(rank, self.home.ep_rank)",
            "rank",
            f"{EXPORT}[ep2]",
        ),
        (
            "files are never full",
            "numbers[name] = number\n            held += size",
            "numbers[name] = number",
            f"{EXPORT}[tp1]",
        ),
    ),
    *_of(
        "distill/step.py",
        (
            "a loss that is no number reaches the weights",
            "    _check_finite(totals.first_bad_token, sequences, step)",
            "    pass",
            f"{STEP}_a_loss_that_is_no_number_leaves_the_weights_alone",
        ),
        (
            "engine and trainer are compared after the update",
            "        parts.engine_gap.check(metrics, sequences, step)",
            "        pass",
            f"{STEP}_an_engine_that_computes_another_model_is_found_before_the_update",
        ),
        (
            "the loss of every step is that of the first",
            "loss = parts.loss.at_step(step)",
            "loss = parts.loss.at_step(0)",
            f"{STEP}_the_loss_is_that_of_the_step",
        ),
    ),
    *_of(
        "distill/step_loss.py",
        (
            "tokens that were left out are trained",
            "return weights_T if selected is None else weights_T * selected[index]",
            "return weights_T",
            f"{CHOICES}_the_gradient_of_entropy_opd",
        ),
        (
            "every token counts as the teacher's in the denominator",
            "weights_T = torch.where(is_teacher_T, teacher, student)",
            "weights_T = torch.where(is_teacher_T, teacher, teacher)",
            f"{CHOICES}_the_gradient_of_entropy_opd",
        ),
    ),
    *_of(
        "distill/token_choices.py",
        (
            "all prompts are one",
            "numbers.setdefault(prompt, len(numbers))",
            "numbers.setdefault(0, len(numbers))",
            f"{CHOICES}_the_gradient_of_top_d",
        ),
    ),
    *_of(
        "rollout/weights/weight_sync.py",
        (
            "a bucket overwrites the one before",
            "bucket, size, count = {}, 0, count + 1",
            "bucket, size, count = {}, 0, count",
            f"{FOLDER}_weights_are_written_in_buckets_one_version_at_a_time",
        ),
        (
            "tensors that share memory are not told apart",
            "bucket[name] = tensor.clone()",
            "pass",
            f"{FOLDER}_tensors_that_share_memory_are_written_each",
        ),
        (
            "the folders of living runs are removed",
            "except BlockingIOError:\n                continue",
            "except BlockingIOError:\n                pass",
            f"{FOLDER}_living_mailboxes_are_kept_and_left_overs_removed",
        ),
    ),
    *_of(
        "rollout/weights/channels.py",
        (
            "each tensor at the start of the buffer",
            "self._buffer[self._used : self._used + flat.numel()].copy_(flat)",
            "self._buffer[: flat.numel()].copy_(flat)",
            f"{CHANNEL}_an_engine_reads_one_buffer_after_the_other",
        ),
        (
            "the last buffer is not handed over",
            "        self._flush()\n        self._tell(lambda engine: engine.finish_weights())",
            "        self._tell(lambda engine: engine.finish_weights())",
            f"{CHANNEL}_an_engine_reads_one_buffer_after_the_other",
        ),
        (
            "all ranks of an engine sit on its first GPU",
            "wanted = (seat.host, seat.device + offset)",
            "wanted = (seat.host, seat.device)",
            f"{CHANNEL}_an_engine_reads_from_the_ranks_on_its_gpus",
        ),
    ),
)
