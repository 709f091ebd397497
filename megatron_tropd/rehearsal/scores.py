"""A cached or served teacher without files or servers: signals of the right shapes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.config import Config
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.losses import ReferencedTopKSignal, TopKSignal
from megatron_tropd.teacher import TeacherStart


class MadeUpScores:
    """Gives every token the same most likely ids."""

    signal = TopKSignal
    referenced = ReferencedTopKSignal

    def __init__(self, start: TeacherStart) -> None:
        """Read how many ids, and whether there is a reference."""
        self._reads, self._referenced = start.layout.is_last_stage, start.reference is not None
        self._top_k = start.config.signal_top_k

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Nothing."""

    def signals(self, batches: Sequence[MicroBatch]) -> list[TopKSignal]:
        """Make up the signal of each micro-batch."""
        return [self._signal(batch) for batch in batches] if self._reads else []

    def close(self) -> None:
        """Nothing."""

    def _signal(self, batch: MicroBatch) -> TopKSignal:
        tokens, device = len(batch.loss_at), batch.tokens.device

        def numbers(*shape: int) -> Tensor:
            return torch.full((tokens, *shape), -1.0, dtype=torch.float32, device=device)

        ids_TK = torch.zeros(tokens, self._top_k, dtype=torch.int64, device=device)
        signal: dict[str, Any] = {
            "sampled_logprobs_T": numbers(),
            "topk_ids_TK": ids_TK,
            "topk_logprobs_TK": numbers(self._top_k),
        }
        if not self._referenced:
            return TopKSignal(**signal)
        return ReferencedTopKSignal(**signal, reference_logprobs_T=numbers())


def with_made_up_scores(config: Config) -> Config:
    """The settings with :class:`MadeUpScores` in the place of teachers that are not loaded."""
    made_up = f"{__name__}:{MadeUpScores.__name__}"
    if not config.teachers:
        if config.loads_teacher:
            return config
        return replace(config, teacher=replace(config.teacher, placement=made_up))
    loaded = [alone.loads_teacher for alone in config.by_teacher.values()]
    teachers = (
        teacher if is_loaded else replace(teacher, placement=made_up, address=(), cache=None)
        for teacher, is_loaded in zip(config.teachers, loaded, strict=True)
    )
    return replace(config, teachers=tuple(teachers))
