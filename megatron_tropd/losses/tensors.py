"""What each tensor that enters a loss has to be: shape, dtype, device, values.

A field's name says its axes: the letters after the last underscore, as in ``topk_ids_TK``. So a new
field of a record is checked without a line here, unless it holds no floats or only some of them.

Shape suffixes: T = tokens, K = top-k, v = this rank's shard, H = hidden.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import LossSettings
from megatron_tropd.losses.targets import LossTargets

_NO_FLOATS = {
    **dict.fromkeys(("ids_T", "topk_ids_TK"), torch.int64),
    **dict.fromkeys(("is_teacher_T", "is_golden_T"), torch.bool),
}
"""Field -> dtype; every other field is of any floating-point type."""
_REMEDIES = {
    "ids_T": "Pass ids of one flat sequence of tokens, as .long().",
    **dict.fromkeys(
        ("is_teacher_T", "is_golden_T"), "Pass a mask of one flat sequence of tokens, as .bool()."
    ),
    "logits_Tv": "Flatten batch and sequence into tokens, and pass logits, not ids.",
    "hidden_TH": "Flatten batch and sequence into tokens, and pass activations of that very model.",
    "output_weight_vH": "Pass the output layer of that very model.",
    "topk_ids_TK": "Take ids (as .long()) and log-probs from the same answer.",
    "topk_logprobs_TK": "Take ids and log-probs from the same answer.",
}
_REMEDY = "Pass one number per token, of one flat sequence."


@dataclass(frozen=True)
class _Given:
    """A tensor with what its name says: the letters after the last underscore are its axes."""

    owner: str
    field: str
    tensor: Tensor

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.field}"

    @property
    def axes(self) -> str:
        return self.field.rpartition("_")[2]

    @property
    def dtype(self) -> str:
        return str(_NO_FLOATS.get(self.field, "a floating-point type"))

    def wrong(self, expected: str, found: object) -> ValueError:
        return ValueError(
            f"Expected {self.name} {expected}, found {found}. {_REMEDIES.get(self.field, _REMEDY)}"
        )


def check_tensors(**owners: Any) -> None:
    """Shapes, dtypes and devices of every tensor of some records.

    An axis has one size: T everywhere, the others within a record. The first record says how many
    tokens there are and where the tensors lie.

    Args:
        owners: how messages call a record ("student") -> the record, a dataclass whose tensors
            are named after their axes; other objects only have ``num_tokens``.

    Raises:
        ValueError: something does not fit; says what was expected, what was found, what to do.
    """
    given = [part for owner, record in owners.items() for part in _tensors_of(owner, record)]
    for part in given:
        _check_kind(part)
    _check_tokens(given, owners)
    sizes: dict[tuple[str, str], tuple[int, _Given]] = {}
    for part in given:
        for axis, size in zip(part.axes, part.tensor.shape, strict=True):
            known, first = sizes.setdefault((part.owner, axis), (size, part))
            if size != known:
                raise part.wrong(
                    f"[{', '.join(part.axes)}] with {axis} = {known}, as {first.name} has",
                    list(part.tensor.shape),
                )
        if part.tensor.device != given[0].tensor.device:
            device = given[0].tensor.device
            raise ValueError(
                f"Expected {part.name} on {device}, where {given[0].name} is, found "
                f"{part.tensor.device}. Move it there."
            )
    for part in given:
        if part.field == "output_weight_vH":
            _check_multipliable(part, given)


def _tensors_of(owner: str, record: Any) -> list[_Given]:
    if not is_dataclass(record):
        return []
    named = {field.name for field in fields(record) if "Tensor" in str(field.type)}
    return [
        _Given(owner, name, value)
        for name, value in vars(record).items()
        if name in named and value is not None
    ]


def _check_kind(part: _Given) -> None:
    expected = f"[{', '.join(part.axes)}] of {part.dtype}"
    if not isinstance(part.tensor, Tensor):
        raise part.wrong(expected, type(part.tensor).__name__)
    dtype = _NO_FLOATS.get(part.field)
    right = part.tensor.dtype == dtype if dtype else part.tensor.is_floating_point()
    if not right or part.tensor.dim() != len(part.axes):
        raise part.wrong(expected, f"{part.tensor.dtype} {list(part.tensor.shape)}")


def _check_tokens(given: list[_Given], owners: Mapping[str, Any]) -> None:
    """T is the same everywhere."""
    signals = {owner: r.num_tokens for owner, r in owners.items() if hasattr(r, "num_tokens")}
    found = {f"the {owner} signal": num for owner, num in signals.items()}
    for part in given:
        rows = len(part.tensor)
        if part.axes.startswith("T") and rows != signals.get(part.owner):
            found[part.name] = rows
    num = next(iter(found.values()), 0)
    if wrong := {name: count for name, count in found.items() if count != num}:
        raise ValueError(
            f"Expected {num} tokens everywhere, as the student has, found {wrong}. Cut all of them "
            "from the same micro-batch."
        )


def _check_multipliable(weight: _Given, given: list[_Given]) -> None:
    hidden = next(p for p in given if p.owner == weight.owner and p.field == "hidden_TH")
    if hidden.tensor.dtype != weight.tensor.dtype:
        raise ValueError(
            f"Expected {hidden.name} in the output layer's {weight.tensor.dtype}, found "
            f"{hidden.tensor.dtype}. Convert one of them."
        )


# ---- values ----


@dataclass(frozen=True)
class Values:
    """Which numbers a tensor may hold where they are read."""

    words: str
    allowed: Callable[[Tensor], Tensor]
    """[...] -> [...] bool."""
    remedy: str
    read: Callable[[LossSettings], bool] = lambda config: True
    """Whether the loss reads the tensor at all."""
    of_student: bool = False
    """Whether only tokens that the student wrote are read."""


_LOGPROBS = Values(
    "log-probs in nats, not above 0",
    # nan comes through: a broken teacher is seen in the loss. Round-off may exceed 0 a little.
    lambda logprobs: ~(logprobs > 0.01),
    "Pass log-probs, not probabilities or logits.",
)
VALUES = {
    "uniforms_T": Values(
        "draws in [0, 1)",
        lambda uniforms: (uniforms >= 0) & (uniforms < 1),
        "Draw them with keyed_uniform or torch.rand.",
        read=lambda config: config.needs.draws,
        of_student=True,
    ),
    "sampled_logprobs_T": _LOGPROBS,
    "reference_logprobs_T": _LOGPROBS,
    "topk_logprobs_TK": _LOGPROBS,
}
"""Field -> what its numbers have to be.

On a CPU others are an error. A GPU would have to be waited for; there they become nan, and so does
the loss of their token. Ids are looked up as nan if they are not in the vocabulary
(``vocab_parallel.pick_columns``).
"""


def with_allowed_values(
    owner: str,
    record: Any,
    targets: LossTargets,
    *,
    vocab_size: int,
    config: LossSettings,
) -> Any:
    """A record whose numbers may be used. Nobody reads those of a token of weight 0.

    Args:
        owner: how messages call it.
        record: of the targets or the teacher, checked by :func:`check_tensors`.
        targets: say which tokens have no weight, and which the student did not write.
        vocab_size: real columns.
        config: the loss, which may read only some of it.

    Returns:
        The record with its numbers per token in float32, nan where one is not allowed.

    Raises:
        ValueError: one is not allowed, on a CPU; or an id is outside the vocabulary.
    """
    is_teacher_T, weights_T = targets.is_teacher_T, targets.weights_T
    unread_T = torch.zeros_like(is_teacher_T) if weights_T is None else weights_T == 0
    changed: dict[str, Tensor] = {}
    for part in _tensors_of(owner, record):
        tensor, rule = part.tensor, VALUES.get(part.field)
        unread = unread_T.unsqueeze(-1) if part.axes == "TK" else unread_T
        if tensor.dtype == torch.int64:
            what = f"the {owner}'s top-k" if part.field == "topk_ids_TK" else part.name
            check_ids(tensor.masked_fill(unread, 0), vocab_size, what)
        elif part.field not in _NO_FLOATS and part.axes in ("T", "TK"):
            if rule is not None and rule.read(config):
                unread = unread | is_teacher_T if rule.of_student else unread
                tensor = _nan_unless(rule.allowed(tensor) | unread, part, rule)
            changed[part.field] = tensor.float()
    return replace(record, **changed) if changed else record


def _nan_unless(allowed: Tensor, part: _Given, rule: Values) -> Tensor:
    tensor = part.tensor
    if not can_be_asked(tensor):
        return torch.where(allowed, tensor, torch.nan)
    if not bool(allowed.all()):
        at = (~allowed).nonzero()[0].tolist()
        raise ValueError(
            f"Expected {rule.words} in {part.name}, found {float(tensor[tuple(at)])} at {at}. "
            f"{rule.remedy}"
        )
    return tensor


def can_be_asked(tensor: Tensor) -> bool:
    """Whether looking at the values costs nothing: a GPU would have to be waited for."""
    return tensor.is_cpu


def check_ids(ids: Tensor, vocab_size: int, what: str) -> None:
    """Token ids below the vocabulary size; raises ValueError, on a CPU.

    On a GPU a wrong id is looked up as nan.
    """
    if not can_be_asked(ids) or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = (ids < 0) | (ids >= vocab_size)
        raise ValueError(
            f"Expected token ids in 0..{vocab_size - 1} in {what}, found {low}..{high}, first at "
            f"{wrong.nonzero()[0].tolist()}. Leave out tokens without a label (-100) before the "
            "loss, and check the tokenizer of the trajectories against the model."
        )


def check_numbers(*, beta: float, vocab_size: int) -> None:
    """The other arguments of a loss; raises ConfigError."""
    if not 0 <= beta < math.inf:
        raise ConfigError(f"beta must be at least 0 and finite, found {beta}. Correct it.")
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise ConfigError(
            f"vocab_size must be a whole number of at least 1, found {vocab_size!r}. Give the size "
            "of the tokenizer."
        )
