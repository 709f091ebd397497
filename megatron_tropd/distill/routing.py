"""Whose the prompts of a run are, and what each teacher reads in their place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_tropd.config import Config, RolloutConfig
from megatron_tropd.config.run import TEACHER
from megatron_tropd.data.contexts import contexts_of
from megatron_tropd.data.prompts import chosen, indices_of, task_numbers
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
    routes = _training_routes(config, prompts)
    contexts: dict[int, tuple[int, ...]] = {}
    for _, alone, mine in each_teacher(config, routes, prompts):
        if alone.teacher.context is not None:
            for rollout, texts in by_task(config, mine):
                room = config.rollout.max_new_tokens - rollout.max_new_tokens
                contexts |= contexts_of(
                    rollout.prompts,
                    texts,
                    alone.teacher.context,
                    tokenizer,
                    rollout,
                    max_tokens=longest_context + room,
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


def by_task(
    config: Config, prompts: Sequence[Prompt]
) -> list[tuple[RolloutConfig, Sequence[Prompt]]]:
    """Split prompts by task: how it is sampled, and those of them that are its own."""
    if not config.tasks:
        return [(config.rollout, prompts)]
    numbers = task_numbers(prompts)
    indices = np.array(indices_of(prompts))
    mine = [set(indices[numbers == number].tolist()) for number in range(len(config.tasks))]
    return [
        (rollout, chosen(prompts, own.__contains__))
        for rollout, own in zip(config.rollouts, mine, strict=True)
    ]


def _training_routes(config: Config, prompts: Sequence[Prompt]) -> Routes | None:
    """Whose the prompts are: of the teacher that their task names, or else their line."""
    if not (config.teachers and config.tasks):
        return routes_of_prompts(config, config.rollout.prompts, prompts)
    names = tuple(teacher.name for teacher in config.teachers)
    of_prompt: dict[int, int] = {}
    for task, (rollout, mine) in zip(config.tasks, by_task(config, prompts), strict=True):
        of_prompt |= (
            routes_of(rollout.prompts, mine, config.teachers).of_prompt
            if task.teacher is None
            else dict.fromkeys(indices_of(mine), names.index(task.teacher))
        )
    return Routes(names, of_prompt)
