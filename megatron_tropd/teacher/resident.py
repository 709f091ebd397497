"""The teacher on the student's own ranks, in the student's layout: hidden states, never logits."""

from collections.abc import Sequence

from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import HiddenStatesSignal
from megatron_tropd.teacher import TeacherStart


class ResidentTeacher:
    """A frozen Megatron model that lives beside the student."""

    signal = HiddenStatesSignal

    def __init__(self, scorer: "Teacher") -> None:
        """``scorer``: of :func:`frozen_model`."""
        self.scorer = scorer

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Nothing: its ranks are the student's, and busy."""

    def signals(self, batches: Sequence[MicroBatch]) -> Sequence[HiddenStatesSignal]:
        """Run it forward; collectives: those of the schedule."""
        return self.scorer.score(batches)

    def close(self) -> None:
        """Nothing: the model ends with the process."""


def frozen_model(
    folder: HFFolder | MegatronFolder,
    *,
    ranks: "Ranks",
    parallel: ParallelConfig,
    dtype: "torch.dtype",
    padded_vocab_size: int,
    vocab_size: int,
    options: Mapping[str, Any] | None = None,
) -> "Teacher":
    """Build a model that scores on the student's ranks; collective.

    Args:
        folder: its architecture and weights.
        ranks: this rank's place.
        parallel: the layout.
        dtype: of its parameters.
        padded_vocab_size: columns of the student's output layer, over all tensor-parallel ranks.
        vocab_size: columns that are real in both models.
        options: fields of Megatron's TransformerConfig that the user set.

    Returns:
        The model, known to no optimizer, DDP or checkpoint. Its output layer lies on the student's
        columns, even if the model has more.

    Collectives: those of ``build_model``; 1 all-to-all if the model has more columns.
    """
    # Megatron only where a run trains: a dry run and the engines look at ``signal`` alone.
    from megatron_tropd.mcore import models
    from megatron_tropd.mcore.step import Teacher, output_weight

    own = max(padded_vocab_size, models.padded_vocab_size(folder.config, tensor=ranks.tp_size))
    model = models.build_model(
        folder,
        ranks=ranks,
        parallel=parallel,
        dtype=dtype,
        padded_vocab_size=own,
        who="teacher",
        options=options,
    )
    weight_vH = None
    if ranks.is_last_stage and own != padded_vocab_size:
        weight_vH = align_output_weight(
            output_weight(model).detach(),
            have=equal_bounds(own, ranks.tp_size),
            want=equal_bounds(padded_vocab_size, ranks.tp_size),
            group=ranks.tp_group,
        )
    return Teacher(model, ranks=ranks, vocab_size=vocab_size, weight_vH=weight_vH)


class _OfRun(ResidentTeacher):
    """The resident teacher that a run's config names."""

    def __init__(self, start: TeacherStart) -> None:
        """Build it."""
        super().__init__(
            frozen_model(
                start.folder,
                ranks=start.ranks,
                parallel=start.config.parallel,
                dtype=start.dtype,
                padded_vocab_size=start.padded_vocab_size,
                vocab_size=start.vocab_size,
                options=start.config.megatron.teacher,
            )
        )


SOURCE = _OfRun
