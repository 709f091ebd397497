"""Micro-batches: rows of token sequences as a forward pass takes them.

B = rows of a micro-batch, S = padded length, T = labels with a loss, U = those the student wrote.
Position s of a row predicts the token at s + 1: ``labels``, ``writers`` and all per-token values
at s belong to that next token.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.losses.draws import keyed_uniform


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, right-padded; causal attention keeps padding harmless."""

    tokens: Tensor
    """[B, S] int64 input ids, 0 in padding."""
    labels: Tensor
    """[B, S] int64 next token, 0 if there is none."""
    writers: Tensor
    """[B, S] int64 :class:`~megatron_tropd.data.sequence.Writer` of the label."""
    position_ids: Tensor
    """[B, S] int64 place in the whole row."""
    response_positions: Tensor
    """[B, S] int64 index of the label after the prompt, 0 elsewhere."""
    engine_logprobs: Tensor
    """[B, S] float32 the engine's log q(label); 0 if the student did not write the label, nan if
    unknown."""
    behaviour_logprobs: Tensor
    """[B, S] float32 log-prob of the label under what sampled it; 0 if the student did not."""
    uniforms: Tensor
    """[B, S] float32 in [0, 1), keyed by (seed, step, sample, position): the mask draws."""
    weights: Tensor
    """[B, S] float32 factor of the label's loss, 0 if it has none."""
    loss_at: Tensor
    """[T] int64 b x S + s of each label that takes part in the loss, ascending."""
    loss_rows: Tensor
    """[T] int64 index of its sequence in the list that was packed."""
    student_at: Tensor
    """[U] int64 those of the T labels that the student wrote."""
    rows: tuple[int, ...]
    """[B] index of each row's sequence in the list that was packed."""
    keys: tuple[SampleKey, ...]
    """[B] key of each row's sequence."""
    loss_counts: tuple[int, ...]
    """[B] how many of the T labels are in each row: the host knows it without waiting."""
    attention_mask: Tensor | None = None
    """[B, 1, S, whole row] bool, true where nothing is to be seen; None: causal."""

    @property
    def loss_mask(self) -> Tensor:
        """[B, S] bool, true if the label takes part in the loss.

        On a GPU an index of places (``loss_at``), never this mask: the host would have to wait for
        the number of them, which the packer knows.
        """
        return self.weights != 0

    def of_loss_tokens(self, values_BS: Tensor) -> Tensor:
        """[T] the values at the labels that take part in the loss."""
        return values_BS.flatten().index_select(0, self.loss_at)

    def at(self, positions: Tensor) -> "MicroBatch":
        """The same rows at some of their positions, on the host.

        Every value stays what it was at its token: labels are the next tokens of the whole row.

        Args:
            positions: [P] of the S, ascending.

        Returns:
            A batch of S = P.
        """
        length = self.tokens.shape[1]
        place_S = torch.full((length,), -1)
        place_S[positions] = torch.arange(len(positions))
        place_T = place_S[self.loss_at % length]
        kept = (place_T >= 0).nonzero().flatten()
        of_student = torch.zeros_like(self.loss_at, dtype=torch.bool)
        of_student[self.student_at] = True
        columns: dict[str, Any] = {
            f.name: value.index_select(1, positions)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
            and value.shape == self.tokens.shape
        }
        mask = self.attention_mask
        return dataclasses.replace(
            self,
            **columns,
            loss_at=(self.loss_at // length * len(positions) + place_T)[kept],
            loss_rows=self.loss_rows[kept],
            loss_counts=_counts((self.loss_at // length)[kept].numpy(), len(self.rows)),
            student_at=of_student[kept].nonzero().flatten(),
            attention_mask=None if mask is None else mask.index_select(2, positions),
        )

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch with its tensors on ``device``."""
        tensors: dict[str, Any] = {
            f.name: upload(value, device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


def row_of(
    sequence: TokenSequence, length: int, weight_N: NDArray[np.float32] | None = None
) -> dict[str, NDArray[Any]]:
    """Make the columns of one row; N tokens make N - 1 positions, cut at ``length``.

    Args:
        sequence: of N tokens.
        length: S.
        weight_N: factors of the tokens' losses; None: the sequence's own.

    Returns:
        Field of :class:`MicroBatch` -> [S] of this row, for those that the sequence alone decides.
    """
    stop = min(len(sequence) - 1, length)
    # The label at s is token s + 1, so the response starts one position early.
    start = min(sequence.prompt_length - 1, stop)
    weight_N = sequence.weight_N if weight_N is None else weight_N
    columns: dict[str, NDArray[Any]] = {
        "labels": sequence.ids_N,
        "writers": sequence.writer_N,
        "weights": weight_N,
    }
    # Losses read log-probs of the student's tokens alone; nan of others would spread.
    student_N = sequence.writer_N == Writer.STUDENT
    for name in ("engine_logprobs", "behaviour_logprobs"):
        columns[name] = np.where(student_N, getattr(sequence, f"{name}_N"), np.float32(0))
    row = {name: _padded(column[1 : stop + 1], 0, length) for name, column in columns.items()}
    row["tokens"] = _padded(sequence.ids_N[:stop], 0, length)
    row["position_ids"] = np.arange(length)
    row["response_positions"] = _padded(np.arange(stop - start), start, length)
    return row


def micro_batch(
    columns: Mapping[str, NDArray[Any]],
    keys: Sequence[SampleKey],
    rows: Sequence[int],
    *,
    seed: int,
    step: int,
    attention_mask: Tensor | None = None,
) -> MicroBatch:
    """Make a micro-batch on the host of what :func:`row_of` says of each of its rows.

    Args:
        columns: field -> [B, S].
        keys: [B].
        rows: [B] places of the sequences in the step's list.
        seed: ``train.seed``; keys the mask draws.
        step: training step; keys the mask draws.
        attention_mask: see :class:`MicroBatch`.
    """
    writers_BS, positions_BS = columns["writers"], columns["response_positions"]
    draws = [keyed_uniform(seed, step, k.draw, p) for k, p in zip(keys, positions_BS, strict=True)]
    # Counted here, where a number costs nothing: a GPU would have to be waited for.
    loss_at = np.flatnonzero(columns["weights"])
    at_student = writers_BS.flat[loss_at] == Writer.STUDENT
    loss_rows = np.array(rows, np.int64)[loss_at // writers_BS.shape[1]]
    return MicroBatch(
        **{name: torch.from_numpy(column) for name, column in columns.items()},
        uniforms=torch.from_numpy(np.stack(draws)),
        loss_at=torch.from_numpy(loss_at),
        loss_rows=torch.from_numpy(loss_rows),
        student_at=torch.from_numpy(np.flatnonzero(at_student)),
        rows=tuple(rows),
        keys=tuple(keys),
        loss_counts=_counts(loss_at // writers_BS.shape[1], len(keys)),
        attention_mask=attention_mask,
    )


def _counts(row_T: NDArray[Any], rows: int) -> tuple[int, ...]:
    return tuple(np.bincount(row_T, minlength=rows).tolist())


def _padded(values: NDArray[Any], start: int, length: int) -> NDArray[Any]:
    row = np.zeros(length, values.dtype)
    row[start : start + len(values)] = values
    return row


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; the host does not wait for the copy."""
    if device.type != "cuda" or not values.is_cpu:
        return values.to(device)
    # From memory that can be paged out, the driver copies while the host stands still.
    return values.pin_memory().to(device, non_blocking=True)
