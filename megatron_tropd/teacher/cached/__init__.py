"""The teacher's signals from files that ``tropd score`` wrote: no model of it anywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.config import LossSettings
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.batch import MicroBatch, upload
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.tokenizers import fingerprint
from megatron_tropd.losses import ReferencedTopKSignal, TopKSignal
from megatron_tropd.teacher import TeacherStart
from megatron_tropd.teacher.cached.digest import model_digest, scored_tokens
from megatron_tropd.teacher.cached.files import TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_tropd.mcore.layout import Layout


def open_cache(path: str | None, layout: "Layout") -> TeacherCache | None:
    """Open a cache on the last stages, and say so in the log; None elsewhere."""
    if not layout.is_last_stage:
        return None
    cache = TeacherCache(Path(str(path)))
    print(f"teacher: {cache.describe()}; no model of it is loaded", flush=True)
    return cache


class Scores(Protocol):
    """Where the scores of sequences are looked up."""

    def read(self, sequence: TokenSequence) -> dict[str, Tensor]:
        """Name of a column -> a row for each scored token, as ``TeacherCache`` has them."""
        ...


class CachedTeacher:
    """Reads the signals of a step's sequences on the last stage; other ranks have nothing to do."""

    signal = TopKSignal
    referenced = ReferencedTopKSignal

    def __init__(self, cache: TeacherCache | None, *, referenced: bool = False) -> None:
        """Take a cache.

        Args:
            cache: of the run's rollouts; None: this rank computes no loss.
            referenced: whether the loss reads the reference's log-probs.
        """
        self._cache, self._referenced = cache, referenced
        self._sequences: Sequence[TokenSequence] = ()

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Keep the step's sequences, which micro-batches name by their places."""
        self._sequences = sequences

    def signals(self, batches: Sequence[MicroBatch]) -> list[TopKSignal]:
        """Look up every loss token; collectives: none."""
        return [] if self._cache is None else [self._signal(b, self._cache) for b in batches]

    def close(self) -> None:
        """Nothing: the files end with the process."""

    def _signal(self, batch: MicroBatch, cache: Scores) -> TopKSignal:
        """The signal of a micro-batch. The host waits for no device: it knows the rows."""
        rows, device = sorted(set(batch.rows)), batch.tokens.device
        taken = [self._sequences[row] for row in rows]
        read = [cache.read(sequence) for sequence in taken]
        # Response positions of all rows, one after the other, and the score of each.
        lengths = [len(sequence) - sequence.prompt_length for sequence in taken]
        first = np.zeros(max(rows, default=0) + 1, np.int64)
        first[rows] = np.cumsum([0, *lengths])[:-1]
        places = np.cumsum(np.concatenate([_scored_response(s) for s in taken])) - 1
        first_of_row = upload(torch.from_numpy(first), device)[batch.loss_rows]
        position_T = batch.of_loss_tokens(batch.response_positions)
        at_T = upload(torch.from_numpy(places), device)[first_of_row + position_T]

        def column(name: str) -> Tensor:
            whole = upload(torch.cat([columns[name] for columns in read]), device)
            return whole.index_select(0, at_T)

        signal: dict[str, Any] = {
            "sampled_logprobs_T": column("sampled_logprobs"),
            "topk_ids_TK": column("topk_ids").long(),
            "topk_logprobs_TK": column("topk_logprobs").float(),
        }
        if not self._referenced:
            return TopKSignal(**signal)
        return ReferencedTopKSignal(**signal, reference_logprobs_T=column("reference_logprobs"))


def _scored_response(sequence: TokenSequence) -> Any:
    """[R] bool, which tokens after the prompt are scored."""
    return scored_tokens(sequence)[sequence.response]


def check_cache(
    path: str | None,
    loss: LossSettings,
    teacher: HFFolder | MegatronFolder,
    tokenizer: "PreTrainedTokenizerBase | None",
    vocab_size: int,
    *,
    reference: HFFolder | MegatronFolder | None = None,
    recorded: Sequence[Sequence[TokenSequence]] = (),
) -> None:
    """Refuse a cache that is not of this run, before anything starts.

    Args:
        path: of the cache.
        teacher: whose scores are wanted.
        tokenizer: of the run; None: it cannot be compared.
        vocab_size: columns that are real in all models.
        reference: of the teacher, if the loss reads it.
        recorded: what will be asked for, as far as it is known.

    Raises:
        InputError: it is missing, not complete, or of another teacher, reference, tokenizer,
            vocabulary or sequence, which is named.
        ConfigError: the loss needs more ids of each token.
    """
    cache = TeacherCache(Path(str(path)))
    cache.check_models(
        teacher=model_digest(teacher),
        reference=None if reference is None else model_digest(reference),
        tokenizer=None if tokenizer is None else fingerprint(tokenizer),
        vocab_size=vocab_size,
    )
    cache.check_top_k(loss.needs.top_k, loss.method_name())
    for group in recorded:
        for sequence in group:
            cache.find(sequence)


class _OfRun(CachedTeacher):
    """The cached teacher that a run's config names."""

    def __init__(self, start: TeacherStart) -> None:
        """Open its cache."""
        cache = open_cache(start.config.teacher.cache, start.layout)
        super().__init__(cache, referenced=start.reference is not None)


SOURCE = _OfRun
