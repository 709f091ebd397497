"""Which teacher scores which prompt, and what it reads in the prompt's place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tropd.base.errors import InputError
from megatron_tropd.config import NamedTeacher
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.types import Prompt

FIELD, SOURCE = "teacher", "source"
"""Of a prompt's line: the name of its teacher; what a teacher's ``sources`` speak of."""


@dataclass(frozen=True)
class Routes:
    """The teachers of a run and the prompts of each."""

    names: tuple[str, ...]
    """Of the teachers, as metrics call them."""
    of_prompt: Mapping[int, int]
    """``Prompt.index`` -> number of its teacher."""
    contexts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """``Prompt.index`` -> ids that the teacher reads in the place of the prompt, if others."""

    def teachers_of(self, sequences: Sequence[TokenSequence]) -> list[int]:
        """Find the number of each sequence's teacher."""
        return [self.of_prompt[sequence.key.prompt] for sequence in sequences]

    def as_read(self, sequence: TokenSequence) -> TokenSequence:
        """Return what the teacher reads: the response, after a prompt of its own if it has one."""
        context = self.contexts.get(sequence.key.prompt)
        return sequence if context is None else sequence.after(context)

    def prompts_of(self, number: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those of the prompts that a teacher scores."""
        return [prompt for prompt in prompts if self.of_prompt[prompt.index] == number]


def routes_of(
    path: str | Path, prompts: Sequence[Prompt], teachers: Sequence[NamedTeacher]
) -> Routes:
    """Find the teacher of each prompt: the one that its line names, or that its source goes to.

    Args:
        path: of the prompts, for messages.
        teachers: at least one.

    Raises:
        InputError: a line names no teacher of the run, and none takes its source.
    """
    names = tuple(teacher.name for teacher in teachers)
    of_prompt = {}
    for prompt in prompts:
        number = next((n for n, one in enumerate(teachers) if scores(one, prompt)), None)
        if number is None:
            taken = [source for teacher in teachers for source in teacher.sources]
            named, source = prompt.fields.get(FIELD), prompt.fields.get(SOURCE)
            raise InputError(
                f'{path}, line {prompt.line}: expected "{FIELD}" with one of {", ".join(names)}, '
                f'or a "{SOURCE}" that one of them takes ({", ".join(taken) or "none takes any"}), '
                f"found {FIELD} {named!r:.60} and {SOURCE} {source!r:.60}. Add it to the line, or "
                "to teachers.sources."
            )
        of_prompt[prompt.index] = number
    return Routes(names, of_prompt)


def scores(teacher: NamedTeacher, prompt: Prompt) -> bool:
    """Tell whether a prompt is a teacher's: its line names it, or only a source that it takes."""
    named = prompt.fields.get(FIELD)
    if named is not None:
        return bool(named == teacher.name)
    return prompt.fields.get(SOURCE) in teacher.sources
