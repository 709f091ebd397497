"""The one record of tokens: for trainer, plug-in, recorded files, checkpoints and examples.

N = tokens of a sequence. A sequence starts with a prompt, its first run of CONTEXT; whatever comes
after that is the response, whoever wrote it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from megatron_tropd.losses.draws import keyed_seed

NO_VERSION = -1
"""``TokenSequence.version_N`` of a token that no trained weights wrote."""


class Writer(IntEnum):
    """Who wrote a token. CONTEXT has no loss: prompts, text of tools; it also marks padding. GOLDEN
    is a reference solution of the prompts' file.
    """

    CONTEXT = 0
    TEACHER = 1
    STUDENT = 2
    GOLDEN = 3


class SampleKey(NamedTuple):
    """Names a sample in every layout: keys draws, caches and examples."""

    step: int
    """Training step that asked for it (0-based)."""
    prompt: int
    """``Prompt.index``."""
    sample: int
    """0-based among the samples of the prompt in this step."""

    @property
    def draw(self) -> int:
        """Key of the sample's mask draws, which are keyed by the step apart from it."""
        return keyed_seed(self.prompt, self.sample)


_TYPES: dict[str, type[np.generic]] = {
    "ids_N": np.int64,
    "writer_N": np.int64,
    "engine_logprobs_N": np.float32,
    "behaviour_logprobs_N": np.float32,
    "weight_N": np.float32,
    "version_N": np.int64,
}
COLUMNS = tuple(_TYPES)
"""Names of the arrays of a :class:`TokenSequence`."""


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens in their order, and of each: who wrote it, how likely it was, how much it weighs."""

    key: SampleKey
    ids_N: NDArray[np.int64]
    writer_N: NDArray[np.int64]
    """:class:`Writer` of each token."""
    engine_logprobs_N: NDArray[np.float32]
    """log q(x) under the student's engine at temperature 1, in nats, nan if unknown: compared with
    the trainer's own (the metrics ``engine_gap``)."""
    behaviour_logprobs_N: NDArray[np.float32]
    """Log-prob under what really sampled the token, in nats, nan if unknown: importance weights."""
    weight_N: NDArray[np.float32]
    """Factor of the token's loss; 0: none."""
    version_N: NDArray[np.int64]
    """Optimizer steps that the writer of the token had seen; ``NO_VERSION`` for others."""
    finish: str
    """Why it ended: "stop" (by itself) or "length" (cut off)."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the prompt's line and the environment said, as JSON holds it."""

    def __post_init__(self) -> None:
        for name, dtype in _TYPES.items():
            column = getattr(self, name)
            if not isinstance(column, np.ndarray) or column.dtype != dtype:
                found = getattr(column, "dtype", type(column).__name__)
                raise TypeError(f"{name} must be an array of {dtype.__name__}, found {found}.")
            if column.shape != (len(self.ids_N),):
                raise ValueError(
                    f"{name} must hold one value for each of the {len(self.ids_N)} ids, found the "
                    f"shape {list(column.shape)}."
                )
        if self.prompt_length == 0:
            raise ValueError("A sequence must start with a token of Writer.CONTEXT, its prompt.")
        if not (self.weight_N >= 0).all() or np.isinf(self.weight_N).any():
            raise ValueError("weight_N must be finite and at least 0.")
        if self.weight_N[self.writer_N == Writer.CONTEXT].any():
            raise ValueError("weight_N must be 0 for tokens of Writer.CONTEXT.")

    @classmethod
    def of_runs(
        cls,
        key: SampleKey,
        *runs: tuple[Writer, Any],
        logprobs: Any = (),
        behaviour_logprobs: Any = None,
        version: int = NO_VERSION,
        finish: str = "stop",
        fields: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a sequence of who wrote which ids.

        Args:
            runs: (writer, ids) in their order.
            logprobs: of the student's ids, in their order, at temperature 1, as the engine said.
            behaviour_logprobs: of the same ids under what sampled them, which importance weights
                compare with; None: ``logprobs``.

        Returns:
            A sequence in which every token weighs 1, but CONTEXT.

        Raises:
            ValueError: the number of log-probs is not that of the student's ids.
        """
        ids_N = np.concatenate([np.asarray(ids, np.int64) for _, ids in runs])
        writer_N = np.repeat([int(who) for who, _ in runs], [len(ids) for _, ids in runs])
        student_N = writer_N == Writer.STUDENT
        if len(logprobs) != (count := int(student_N.sum())):
            raise ValueError(
                f"Expected a log-prob for each of the student's {count} tokens, found "
                f"{len(logprobs)}."
            )
        logprobs_N = np.full(len(ids_N), np.nan, np.float32)
        logprobs_N[student_N] = logprobs
        behaviour_N = logprobs_N
        if behaviour_logprobs is not None:
            behaviour_N = np.full(len(ids_N), np.nan, np.float32)
            behaviour_N[student_N] = behaviour_logprobs
        return cls(
            key=key,
            ids_N=ids_N,
            writer_N=writer_N,
            engine_logprobs_N=logprobs_N,
            behaviour_logprobs_N=behaviour_N,
            weight_N=(writer_N != Writer.CONTEXT).astype(np.float32),
            version_N=np.where(student_N, version, NO_VERSION),
            finish=finish,
            fields=fields or {},
        )

    def __len__(self) -> int:
        return len(self.ids_N)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first that teacher or student wrote."""
        written = self.writer_N != Writer.CONTEXT
        return int(written.argmax()) if written.any() else len(self.ids_N)

    @property
    def response(self) -> slice:
        """Place of everything after the prompt, CONTEXT between turns included."""
        return slice(self.prompt_length, len(self.ids_N))

    @property
    def prompt_ids(self) -> list[int]:
        """Ids of the prompt."""
        ids: list[int] = self.ids_N[: self.prompt_length].tolist()
        return ids

    @property
    def response_ids(self) -> list[int]:
        """Ids after the prompt."""
        ids: list[int] = self.ids_N[self.response].tolist()
        return ids

    @property
    def answer_ids(self) -> list[int]:
        """Ids of the last turn: all of the response, if there is no CONTEXT in it."""
        context = np.flatnonzero(self.writer_N == Writer.CONTEXT)
        ids: list[int] = self.ids_N[context[-1] + 1 :].tolist()
        return ids

    @property
    def writers(self) -> list[Writer]:
        """Writer of each token after the prompt."""
        return [Writer(writer) for writer in self.writer_N[self.response]]

    @property
    def oldest_version(self) -> int:
        """Fewest optimizer steps that a student who wrote here had seen; the own step if none."""
        versions = self.version_N[self.writer_N == Writer.STUDENT]
        return int(versions.min()) if len(versions) else self.key.step

    def by(self, writer: Writer) -> NDArray[np.int64]:
        """Ids that ``writer`` wrote."""
        ids: NDArray[np.int64] = self.ids_N[self.writer_N == writer]
        return ids

    def count(self, writer: Writer) -> int:
        """How many tokens ``writer`` wrote."""
        return int((self.writer_N == writer).sum())

    def after(self, prompt_ids: Sequence[int]) -> Self:
        """Return the same response after another prompt."""
        ids = np.asarray(prompt_ids, np.int64)
        prompt = type(self).of_runs(self.key, (Writer.CONTEXT, ids))
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(prompt, name), getattr(self, name)[self.response]])
            for name in COLUMNS
        }
        return self.replace(**columns)

    def replace(self, **changed: Any) -> Self:
        """Return the sequence with other values in some fields."""
        return dataclasses.replace(self, **changed)
