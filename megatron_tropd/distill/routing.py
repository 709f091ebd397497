"""Whose the prompts of a run are, and what each teacher reads in their place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_tropd.config import Config
from megatron_tropd.config.run import TEACHER
from megatron_tropd.data.contexts import contexts_of
from megatron_tropd.data.routes import Routes, routes_of
from megatron_tropd.data.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def routes_of_run(
    config: Config,
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    longest_context: int,
) -> Routes | None:
    """Find the teacher of each prompt that is sampled, and what it reads.

    Args:
        longest_context: most tokens of a teacher's own prompt, which leave room for a response.

    Returns:
        None: there is one teacher, which reads what the student reads.

    Raises:
        InputError: a line names no teacher, lacks a field, or its context is too long.
    """
    routes = routes_of_prompts(config, config.rollout.prompts, prompts)
    contexts: dict[int, tuple[int, ...]] = {}
    for _, alone, mine in each_teacher(config, routes, prompts):
        if alone.teacher.context is not None:
            contexts |= contexts_of(
                config.rollout.prompts,
                mine,
                alone.teacher.context,
                tokenizer,
                config.rollout,
                max_tokens=longest_context,
            )
    if not contexts:
        return routes
    routes = routes or Routes((TEACHER,), {prompt.index: 0 for prompt in prompts})
    return replace(routes, contexts=contexts)


def routes_of_prompts(config: Config, path: str, prompts: Sequence[Prompt]) -> Routes | None:
    """Whose some prompts are; None: those of the one teacher."""
    return routes_of(path, prompts, config.teachers) if config.teachers else None


def each_teacher(
    config: Config, routes: Routes | None, prompts: Sequence[Prompt]
) -> list[tuple[str, Config, Sequence[Prompt]]]:
    """Every teacher with the run of it alone, and its prompts."""
    return [
        (who, alone, prompts if routes is None else routes.prompts_of(number, prompts))
        for number, (who, alone) in enumerate(config.by_teacher.items())
    ]
