"""What crosses from data to the other rooms: frozen records, shapes on every field.

B = rows of a micro-batch, S = padded length, T = labels with a loss, U = those the student wrote.
Position s of a row predicts the token at s + 1: ``labels``, ``segments`` and all per-token values
at s belong to that next token.
"""

import dataclasses
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Segment(IntEnum):
    """Who wrote a token. Losses skip PROMPT, which also marks padding."""

    PROMPT = 0
    TEACHER = 1
    STUDENT = 2


@dataclass(frozen=True)
class Prompt:
    """One line of the prompts file."""

    index: int
    """0-based among the prompts of the file; keys every random draw made for this prompt."""
    text: str
    """The prompt as the model sees it (after the chat template, if any)."""
    token_ids: tuple[int, ...]
    """[L] ids of ``text``, special tokens included."""
    fields: dict[str, Any]
    """The line as read (``answer`` and whatever else the grader wants)."""
    line: int = 0
    """1-based line in the file, for errors."""


@dataclass(frozen=True)
class Trajectory:
    """A prompt, perhaps a teacher prefix, and what the student wrote after it."""

    step: int
    """Training step that asked for it (0-based)."""
    prompt_index: int
    """``Prompt.index``."""
    sample_index: int
    """0-based among the samples of the prompt in this step."""
    prompt_ids: tuple[int, ...]
    """[P] prompt tokens."""
    prefix_ids: tuple[int, ...]
    """[F] teacher tokens, empty for a fully on-policy sample."""
    response_ids: tuple[int, ...]
    """[R] student tokens; ends with the stop token when ``finish_reason`` is "stop"."""
    rollout_logprobs: tuple[float, ...]
    """[R] the engine's log q(x) at temperature 1, in nats."""
    finish_reason: str
    """"stop" (ended by itself) or "length" (cut off)."""
    weights_version: int
    """Step whose weights sampled it: the number of optimizer steps they had seen."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, right-padded; causal attention keeps padding harmless."""

    tokens: Tensor
    """[B, S] int64 input ids, 0 in padding."""
    labels: Tensor
    """[B, S] int64 next token, 0 where there is none."""
    segments: Tensor
    """[B, S] int64 :class:`Segment` of the label."""
    position_ids: Tensor
    """[B, S] int64 0..S-1 in every row."""
    response_positions: Tensor
    """[B, S] int64 index of the label within prefix + response, 0 elsewhere."""
    rollout_logprobs: Tensor
    """[B, S] float32 the engine's log q(label); 0 where the student did not write the label."""
    uniforms: Tensor
    """[B, S] float32 in [0, 1), keyed by (seed, step, trajectory, position): the mask draws."""
    masked: Tensor
    """[B, S] bool, true where a teacher's or student's label is left out of the loss
    (``loss.mask_first_ids``, ``loss.mask_truncated``)."""
    loss_at: Tensor
    """[T] int64 b x S + s of each label that takes part in the loss, ascending."""
    loss_rows: Tensor
    """[T] int64 index of its trajectory in the list that was packed."""
    student_at: Tensor
    """[U] int64 those of the T labels that the student wrote."""
    rows: tuple[int, ...]
    """[B] index of each row's trajectory in the list that was packed."""

    @property
    def loss_mask(self) -> Tensor:
        """[B, S] bool, true where the label takes part in the loss.

        On a GPU an index of places (``loss_at``), never this mask: the host would have to wait for
        the number of them, which the packer knows.
        """
        return (self.segments != Segment.PROMPT) & ~self.masked

    def of_loss_tokens(self, values_BS: Tensor) -> Tensor:
        """[T] the values at the labels that take part in the loss."""
        return values_BS.flatten().index_select(0, self.loss_at)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch with its tensors on ``device``."""
        tensors: dict[str, Any] = {
            f.name: upload(value, device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; the host does not wait for the copy."""
    if device.type != "cuda" or not values.is_cpu:
        return values.to(device)
    # From memory that can be paged out, the driver copies while the host stands still.
    return values.pin_memory().to(device, non_blocking=True)
