"""What a loss may know about the teacher, and from where.

A signal says what it provides; a loss says what it needs (:func:`required_signal`). The two are
compared once at start-up (:func:`check_signal`), so a mismatch never costs a step.

Shape suffixes: T = tokens, V = whole vocabulary, v = this rank's shard, K = top-k, H = hidden.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config.loss import PRESETS, LossSettings, preset
from megatron_tropd.losses import products

SAMPLED = "sampled"
"""log p of the token in the trajectory."""
TOP_K = "top_k"
"""The teacher's k most likely ids and their log p."""
FULL = "full"
"""Every log p: the other two and all sums over the vocabulary follow from it."""
REFERENCE = "reference"
"""The same of the model that the teacher is measured against."""
_IN_WORDS = {
    FULL: "the whole distribution of each token",
    TOP_K: "its most likely ids",
    SAMPLED: "the log-prob of each sampled token",
    REFERENCE: "a reference model",
}


class TeacherSignal(Protocol):
    """Knowledge about the teacher at T positions."""

    provides: ClassVar[frozenset[str]]
    """Subset of {"sampled", "top_k", "full", "reference"}."""

    @property
    def num_tokens(self) -> int:
        """T."""
        ...


@runtime_checkable
class FullSignal(TeacherSignal, Protocol):
    """A signal that can produce the teacher's logits, some rows at a time."""

    @property
    def vocab_size(self) -> int:
        """Real columns; the same for student and teacher."""
        ...

    @property
    def width(self) -> int:
        """v, columns of this rank's shard, padding included."""
        ...

    @property
    def bounds(self) -> tuple[int, ...] | None:
        """R + 1 column ids where the ranks' shards start and end; None: shards of equal width."""
        ...

    def write_logits(self, rows: slice, out_tv: Tensor) -> None:
        """Write the first columns of the shard at those tokens into ``out_tv``, float32."""
        ...


@dataclass(frozen=True)
class HiddenStatesSignal:
    """A teacher on the same ranks: its last hidden states and its output layer."""

    hidden_TH: Tensor
    """[T, H] after the final norm, whole on every rank of the group."""
    output_weight_vH: Tensor
    """[v, H] this rank's rows of the output layer."""
    vocab_size: int
    """Real rows of the whole output layer."""
    bounds: tuple[int, ...] | None = None
    """As for :class:`FullSignal`."""
    provides: ClassVar[frozenset[str]] = frozenset({SAMPLED, TOP_K, FULL})

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_TH.shape[0]

    @property
    def width(self) -> int:
        """V."""
        return self.output_weight_vH.shape[0]

    def write_logits(self, rows: slice, out_tv: Tensor) -> None:
        """Multiply hidden states and output layer for some tokens.

        Args:
            rows: which of the T tokens.
            out_tv: [t, real columns] float32, overwritten.
        """
        weight_vH = self.output_weight_vH[: out_tv.shape[1]]
        products.write_logits(self.hidden_TH[rows], weight_vH, out_tv)


@dataclass(frozen=True)
class LogitsSignal:
    """A teacher whose logits are already there."""

    logits_Tv: Tensor
    """[T, v] any float dtype, this rank's shard."""
    vocab_size: int
    """Real columns of the whole vocabulary."""
    bounds: tuple[int, ...] | None = None
    """As for :class:`FullSignal`."""
    provides: ClassVar[frozenset[str]] = frozenset({SAMPLED, TOP_K, FULL})

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.logits_Tv.shape[0]

    @property
    def width(self) -> int:
        """V."""
        return self.logits_Tv.shape[1]

    def write_logits(self, rows: slice, out_tv: Tensor) -> None:
        """Copy the logits of some tokens.

        Args:
            rows: which of the T tokens.
            out_tv: [t, real columns] float32, overwritten.
        """
        out_tv.copy_(self.logits_Tv[rows, : out_tv.shape[1]])


@dataclass(frozen=True)
class TopKSignal:
    """A teacher anywhere: other ranks, a server, a file. The same on every rank of the group."""

    sampled_logprobs_T: Tensor
    """[T] float32 log p of the token in the trajectory, over the whole vocabulary, in nats."""
    topk_ids_TK: Tensor
    """[T, K] int64 most likely ids, most likely first."""
    topk_logprobs_TK: Tensor
    """[T, K] float32 their log p over the whole vocabulary (not renormalised), in nats."""
    provides: ClassVar[frozenset[str]] = frozenset({SAMPLED, TOP_K})

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.sampled_logprobs_T.shape[0]


@dataclass(frozen=True)
class ReferencedTopKSignal(TopKSignal):
    """The same with the reference's log-prob of the token in the trajectory."""

    reference_logprobs_T: Tensor
    """[T] float32 log p_ref of the token in the trajectory, in nats."""
    provides: ClassVar[frozenset[str]] = TopKSignal.provides | {REFERENCE}


@dataclass(frozen=True)
class ReferencedSignal:
    """A teacher and the model it is measured against, both over the whole vocabulary."""

    teacher: FullSignal
    reference: FullSignal
    provides: ClassVar[frozenset[str]] = frozenset({SAMPLED, TOP_K, FULL, REFERENCE})

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.teacher.num_tokens


@dataclass(frozen=True)
class RoutedSignal:
    """Several teachers, each over the whole vocabulary, of which every token has one."""

    parts: tuple[FullSignal, ...]
    """Of each teacher, for its own tokens alone; their columns are sharded alike."""
    pieces: tuple[tuple[int, int, int], ...]
    """The T tokens in their order: number of a part, the first of its tokens, how many follow."""
    provides: ClassVar[frozenset[str]] = frozenset({SAMPLED, TOP_K, FULL})

    def __post_init__(self) -> None:
        columns = {(part.vocab_size, part.width, part.bounds) for part in self.parts}
        if len(columns) != 1:
            raise ValueError(
                "Expected teachers with one vocabulary and the same columns on this rank, found "
                f"(size, width, bounds) {sorted(columns, key=str)}. Move their output layers once "
                "with align_output_weight."
            )

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(count for _, _, count in self.pieces)

    @property
    def vocab_size(self) -> int:
        """Real columns, the same for all."""
        return self.parts[0].vocab_size

    @property
    def width(self) -> int:
        """V."""
        return self.parts[0].width

    @property
    def bounds(self) -> tuple[int, ...] | None:
        """As for :class:`FullSignal`."""
        return self.parts[0].bounds

    def write_logits(self, rows: slice, out_tv: Tensor) -> None:
        """Write each token's logits as its teacher has them.

        Args:
            rows: which of the T tokens.
            out_tv: [t, real columns] float32, overwritten.
        """
        begin = 0
        for number, first, count in self.pieces:
            low, high = max(rows.start, begin), min(rows.stop, begin + count)
            if low < high:
                mine = slice(first + low - begin, first + high - begin)
                self.parts[number].write_logits(mine, out_tv[low - rows.start : high - rows.start])
            begin += count


def split_reference(signal: TeacherSignal) -> tuple[TeacherSignal, FullSignal | None]:
    """The teacher's own signal, and the reference's if it has one over the vocabulary."""
    if isinstance(signal, ReferencedSignal):
        return signal.teacher, signal.reference
    return signal, None


def tensors_of(signal: TeacherSignal) -> list[Tensor]:
    """The tensors that a signal holds."""
    if isinstance(signal, ReferencedSignal):
        return [*tensors_of(signal.teacher), *tensors_of(signal.reference)]
    if isinstance(signal, RoutedSignal):
        return [tensor for part in signal.parts for tensor in tensors_of(part)]
    held = getattr(signal, "__dict__", {})
    return [value for value in held.values() if isinstance(value, Tensor)]


def with_tokens[S: TeacherSignal](
    signals: Sequence[S], change: Callable[[Sequence[Tensor]], Tensor]
) -> S:
    """Make one signal of several of a kind, by what becomes of each tensor per token.

    Args:
        signals: at least one; dataclasses whose tensors are named after their axes.
        change: the same tensor of each signal, [T, ...], -> that of the result.

    Returns:
        The signal; what is not per token, such as an output layer, is the first one's.
    """
    first: Any = signals[0]
    if isinstance(first, ReferencedSignal):
        both = ([getattr(s, who) for s in signals] for who in ("teacher", "reference"))
        made: Any = ReferencedSignal(*(with_tokens(parts, change) for parts in both))
        pair: S = made
        return pair
    per_token = [f.name for f in fields(first) if f.name.rpartition("_")[2].startswith("T")]
    changed = {name: change([getattr(s, name) for s in signals]) for name in per_token}
    whole: S = replace(first, **changed)
    return whole


def required_signal(config: LossSettings) -> frozenset[str]:
    """What a loss must know about the teacher.

    Args:
        config: the loss.

    Returns:
        Subset of {"sampled", "top_k", "full", "reference"}.
    """
    needed = {SAMPLED}
    if config.needs.top_k:
        needed.add(TOP_K)
    if config.needs.sums or config.needs.student_top_k or config.merge_ids:
        needed.add(FULL)
    if config.needs.reference:
        needed.add(REFERENCE)
    return frozenset(needed)


def methods_for(signal: type[TeacherSignal] | TeacherSignal) -> list[str]:
    """The presets that need no more than a signal provides."""
    return [name for name in PRESETS if required_signal(preset(name)) <= signal.provides]


def check_signal(
    config: LossSettings, signal: type[TeacherSignal] | TeacherSignal, *, vocab_size: int
) -> None:
    """Refuse a loss that the teacher signal or the vocabulary cannot serve. Call it at start-up.

    Args:
        config: the loss.
        signal: the signal that training will use, or its class.
        vocab_size: real columns of the vocabulary.

    Raises:
        ConfigError: the loss needs something the signal does not provide, or its top-k exceeds
            the vocabulary.
    """
    loss = f"loss.method = {config.method_name()!r}"
    if missing := required_signal(config) - signal.provides:
        raise ConfigError(
            f"{loss} needs of the teacher {_in_words(missing)}, found one that gives only "
            f"{_in_words(signal.provides)}. Choose another teacher.placement, or a method that "
            f"works with this one: {', '.join(methods_for(signal))}."
        )
    if max(config.merge_ids, default=0) >= vocab_size:
        raise ConfigError(
            f"loss.merge_ids must lie in the vocabulary of {vocab_size} tokens, found "
            f"{list(config.merge_ids)}."
        )
    if config.needs.top_k > vocab_size:
        raise ConfigError(
            f"{loss} needs loss.top_k <= the vocabulary of {vocab_size} tokens, found "
            f"{config.needs.top_k}. Set loss.top_k to at most {vocab_size}."
        )


def _in_words(parts: Collection[str]) -> str:
    return " and ".join(words for part, words in _IN_WORDS.items() if part in parts)
