"""Everything a run reads, checked before anything is started or written."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import Config, DataConfig, EvaluationSet, PromptConfig, RolloutConfig
from megatron_tropd.config.run import TEACHER, reference_of
from megatron_tropd.convert.checks import check_expert_parallel, check_parallel, check_tensors
from megatron_tropd.convert.companions import CONFIG
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder, naming
from megatron_tropd.convert.megatron_folder import MegatronFolder, open_model
from megatron_tropd.data.contexts import contexts_of
from megatron_tropd.data.conversations import Talk, talk_of
from megatron_tropd.data.golden import GoldenAnswers, golden_answers
from megatron_tropd.data.mixing import Tasks, most_of_a_step
from megatron_tropd.data.prompts import (
    Prompts,
    check_kwargs_are_read,
    check_same_texts,
    indices_of,
    joined,
    load_prompts,
    num_tokens,
    of_one_task,
    task_numbers,
)
from megatron_tropd.data.responses import TeacherResponse, load_responses
from megatron_tropd.data.routes import Routes
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.tokenizers import (
    check_same_tokenizer,
    load_tokenizer,
    num_ids,
    shared_stops,
    stop_token_ids,
)
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill.recordings import load_recorded
from megatron_tropd.distill.routing import by_task, each_teacher, routes_of_prompts, routes_of_run
from megatron_tropd.losses import check_signal
from megatron_tropd.rollout.engines.engine import BLENDED_ON_CUDA, blended_length
from megatron_tropd.rollout.engines.engine_model import check_engine
from megatron_tropd.tasks.grading import grader_of
from megatron_tropd.teacher import signal_of
from megatron_tropd.teacher.cached import check_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ProblemSet:
    """One set of held-out problems."""

    settings: EvaluationSet
    """With all that it leaves to other sections."""
    problems: Sequence[Prompt]
    """At most ``num_problems``."""
    of_teachers: dict[str, Sequence[Prompt]] = field(default_factory=dict)
    """The problems that each teacher answers, as it reads them, if it is measured."""

    @property
    def name(self) -> str:
        """As the settings have it; empty for the only one."""
        return self.settings.name

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""
        assert self.settings.max_new_tokens is not None, "Config.evaluation_sets says it"
        return self.settings.max_new_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest problem, as any model reads it, and its answer."""
        texts = (self.problems, *self.of_teachers.values())
        return max(map(_longest, texts)) + self.max_new_tokens


@dataclass(frozen=True)
class Inputs:
    """The models' folders, the tokenizer and all texts of a run."""

    folders: dict[str, HFFolder | MegatronFolder]
    """Of each model, by what it is to the run: "student"; "teacher", and "reference" if the loss
    reads it; of several teachers "teacher NAME" and "reference NAME"."""
    tokenizer: "PreTrainedTokenizerBase"
    vocab_size: int
    """Columns that are real in all models; what lies above is padding."""
    context: int
    """Longest sequence all models take."""
    stop_token_ids: tuple[int, ...]
    prompts: Sequence[Prompt]
    responses: dict[int, tuple[TeacherResponse, ...]] | None
    recorded: list[list[TokenSequence]] | None
    """The samples of each recorded prompt, graded if the loss reads outcomes; None: the run
    samples."""
    problem_sets: tuple[ProblemSet, ...]
    """Held-out problems; none without evaluation."""
    max_model_len: int
    """Longest sequence the rollout engine will see."""
    shared_stops: tuple[int, ...] = ()
    """Ids by which student and teacher end a response, if they differ and both sample."""
    golden: GoldenAnswers | None = None
    """Those of the prompts, if the loss reads them."""
    routes: Routes | None = None
    """Whose the prompts are, if there are several teachers, and what a teacher reads instead."""
    tasks: Tasks | None = None
    """Which the prompts belong to, if there are several."""
    talk: Talk | None = None
    """How conversations become ids, if there is an environment."""

    @property
    def turn_stops(self) -> tuple[int, ...]:
        """Ids that end a turn of the student."""
        further = self.talk.turn_stops if self.talk else ()
        return tuple(dict.fromkeys((*self.stop_token_ids, *further)))

    @property
    def student(self) -> HFFolder | MegatronFolder:
        """The student's folder."""
        return self.folders["student"]

    def longest_rollout(self, rollout: RolloutConfig) -> int:
        """Tokens of the longest prompt and its response."""
        return _longest(self.prompts) + rollout.max_new_tokens

    def longest_read(self, rollout: RolloutConfig) -> int:
        """The same as teachers read it, who may have longer prompts of their own."""
        contexts = {} if self.routes is None else self.routes.contexts
        read = max([_longest(self.prompts), *map(len, contexts.values())])
        return read + rollout.max_new_tokens


def load_inputs(config: Config) -> Inputs:
    """Read and check models' headers, tokenizers, prompts, responses and problems.

    Raises:
        InputError: a file is missing or unusable; names file and line.
        ConfigError: a setting does not fit the models or the texts.
    """
    models = _open_models(config)
    student, shapes = models["student"], [model_shape(folder.config) for folder in models.values()]
    tokenizer = _tokenizer(models)
    vocab_size = min(shape.vocab for shape in shapes)
    _check_vocabulary(config, tokenizer, vocab_size, list(models))
    context = min(shape.context for shape in shapes)
    prompts, tasks = _prompts_of_tasks(config, tokenizer, context)
    routes = routes_of_run(
        config, prompts, tokenizer, longest_context=context - config.rollout.max_new_tokens
    )
    responses = _responses(config, prompts, tokenizer, routes, tasks)
    contexts = {} if routes is None else routes.contexts
    read = max([_longest(prompts), *map(len, contexts.values())])
    _check_micro_batch(config, read + config.rollout.max_new_tokens)
    for grader in config.graders:
        grader_of(grader)  # refused now, not at the first answer
    sets = tuple(_problem_set(config, each, tokenizer, context) for each in config.evaluation_sets)
    _check_templates(config, prompts, sets, tokenizer, models, routes)
    max_model_len = max(
        [
            *(_longest(mine) + form.max_new_tokens for form, mine in by_task(config, prompts)),
            config.evaluation.max_new_tokens or 0,
            *(each.longest for each in sets),
        ]
    )
    _check_engines(config, models, max_model_len, sets)
    if config.rollout.asks_teacher:
        _check_blend(config, student, models[TEACHER], prompts)
    recorded = load_recorded(config, prompts, tokenizer, vocab_size)
    _check_caches(config, models, tokenizer, vocab_size, routes, recorded or [])
    stops = config.loss.ends(stop_token_ids(student.companions, config.rollout.stop_token_ids))
    talk = talk_of(config.talks_to, tokenizer, config.rollout)
    if talk is not None:
        talk.check(prompts, stops)
    return Inputs(
        folders=models,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        context=context,
        stop_token_ids=stops,
        prompts=prompts,
        responses=responses,
        golden=_golden(config, prompts, tokenizer),
        recorded=recorded,
        tasks=tasks,
        problem_sets=sets,
        max_model_len=max_model_len,
        shared_stops=(
            shared_stops(student.companions, models[TEACHER].companions)
            if config.rollout.asks_teacher
            else ()
        ),
        routes=routes,
        talk=talk,
    )


def _open_models(config: Config) -> dict[str, HFFolder | MegatronFolder]:
    """Open all models of a run, as ``Inputs.folders``, and check that ranks can build them."""
    models = {"student": open_model(config.model.student)}
    layouts = {"student": config.parallel}
    for who, alone in config.by_teacher.items():
        mine = {who: alone.model.teacher, reference_of(who): alone.reference}
        needed = alone.teacher.placement != "served"
        models |= {
            name: open_model(path, weights=needed or name != who)
            for name, path in mine.items()
            if path is not None
        }
        layouts |= dict.fromkeys(mine, alone.teacher_parallel) if alone.loads_teacher else {}
    for who, folder in models.items():
        _check_config(folder, who)
        if isinstance(folder, HFFolder) and folder.names:
            check_tensors(folder)  # the other kind is checked when it is opened
        if who in layouts:
            check_parallel(folder.config, layouts[who], who=who)
    for layout in {id(each): each for each in layouts.values()}.values():
        alike = [model_shape(models[who].config) for who in models if layouts.get(who) is layout]
        check_expert_parallel(layout, alike)
    return models


def _tokenizer(models: dict[str, HFFolder | MegatronFolder]) -> "PreTrainedTokenizerBase":
    """The one that all models of a run share."""
    student, *others = models
    tokenizer = None
    for who in others:
        mine, theirs = models[student].companions, models[who].companions
        tokenizer = check_same_tokenizer(mine, theirs, other=who)
    assert tokenizer is not None, "a run has a teacher"
    return tokenizer


def _prompts_of_tasks(
    config: Config, tokenizer: "PreTrainedTokenizerBase", context: int
) -> tuple[Sequence[Prompt], Tasks | None]:
    """Read the prompts that are sampled, those of several tasks one after the other."""
    if not config.tasks:
        return training_prompts(config.rollout, tokenizer, context), None
    weights, per_step = [task.weight for task in config.tasks], config.rollout.prompts_per_step
    parts = []
    for task, rollout in zip(config.tasks, config.rollouts, strict=True):
        most = most_of_a_step(task.weight, sum(weights), per_step)
        found = training_prompts(replace(rollout, prompts_per_step=most), tokenizer, context)
        assert isinstance(found, Prompts)
        parts.append(found)
    prompts, firsts = joined(parts)
    numbers = task_numbers(prompts)
    places = tuple(np.flatnonzero(numbers == number) for number in range(len(parts)))
    names = tuple(task.name for task in config.tasks)
    return prompts, Tasks(names, tuple(firsts), places, tuple(weights))


def _problem_set(
    config: Config, each: EvaluationSet, tokenizer: "PreTrainedTokenizerBase", context: int
) -> ProblemSet:
    """Read the problems of a set, refuse those that cannot be graded, and find their teachers."""
    form, room = each.prompts_as(config.rollout), each.max_new_tokens
    assert room is not None and each.grader is not None, "Config.evaluation_sets says them"
    key = "rollout" if config.evaluation.max_new_tokens is None else "evaluation"
    problems = _prompts(
        form, each.problems, each.data, tokenizer, context, room, key=f"{key}.max_new_tokens"
    )
    if config.evaluation.task == "exact_match":
        grader = grader_of(each.grader)
        for problem in problems:
            with naming(each.problems):
                grader.check(problem.fields, f"Problem {problem.index} ({problem.place})")
    problems = problems[: each.num_problems]
    of_teachers = _of_teachers(config, each, problems, tokenizer, context - room)
    return ProblemSet(each, problems, of_teachers)


def _of_teachers(
    config: Config,
    each: EvaluationSet,
    problems: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    room: int,
) -> dict[str, Sequence[Prompt]]:
    """The problems that each teacher answers, as it reads them; none if no teacher is measured."""
    if not (config.evaluation.teacher and config.evaluation.task == "exact_match"):
        return {}
    form, found = each.prompts_as(config.rollout), {}
    routes, task = None, config.task_of(each)
    if task is not None and task.teacher is not None:
        names = tuple(teacher.name for teacher in config.teachers)
        number = names.index(task.teacher)
        routes = Routes(names, dict.fromkeys(indices_of(problems), number))
    routes = routes or routes_of_prompts(config, each.problems, problems)
    for who, alone, mine in each_teacher(config, routes, problems):
        found[who], template = mine, alone.teacher.context
        if template is not None:
            given: Any = (each.problems, mine, template, tokenizer, form)
            read = contexts_of(*given, max_tokens=room)
            found[who] = [replace(problem, token_ids=read[problem.index]) for problem in mine]
    return found


def _check_caches(
    config: Config,
    models: dict[str, HFFolder | MegatronFolder],
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    routes: Routes | None,
    recorded: list[list[TokenSequence]],
) -> None:
    """Refuse a cache that is not of its teacher, or lacks one of its sequences."""
    for number, (who, alone) in enumerate(config.by_teacher.items()):
        if alone.teacher.placement == "cached":
            mine = [
                [s if routes is None else routes.as_read(s) for s in group]
                for group in recorded
                if routes is None or routes.of_prompt[group[0].key.prompt] == number
            ]
            check_cache(
                alone.teacher.cache,
                config.loss,
                models[who],
                tokenizer,
                vocab_size,
                reference=models.get(reference_of(who)),
                recorded=mine,
            )


def _check_vocabulary(
    config: Config, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, models: list[str]
) -> None:
    """Compare the columns that all models share with the tokenizer's ids and the loss's."""
    if num_ids(tokenizer) > vocab_size:
        raise InputError(
            f"The tokenizer has {num_ids(tokenizer)} ids, but {' and '.join(models)} share only "
            f"{vocab_size} vocabulary columns. A tokenizer file does not belong to its model, or "
            "its class added a token (name a pad_token in tokenizer_config.json)."
        )
    check_signal(config.loss, signal_of(config), vocab_size=vocab_size)
    if unknown := [i for i in config.loss.mask_first_ids if not 0 <= i < vocab_size]:
        raise ConfigError(
            f"loss.mask_first_ids must be below the vocabulary of {vocab_size} tokens, found "
            f"{unknown}: they would never occur. Look the ids up in the student's tokenizer."
        )


def training_prompts(
    rollout: RolloutConfig, tokenizer: "PreTrainedTokenizerBase", context: int
) -> Sequence[Prompt]:
    """Read the prompts that are sampled, as long as ``context`` leaves room for a response.

    Raises:
        InputError: the file is missing or unusable.
        ConfigError: a setting does not fit the texts.
    """
    prompts = _prompts(
        rollout,
        rollout.prompts,
        rollout.data,
        tokenizer,
        context,
        rollout.max_new_tokens,
        filter_overlong=rollout.filter_overlong_prompts,
    )
    check_kwargs_are_read(prompts, rollout)
    if len(prompts) < rollout.prompts_per_step:
        raise ConfigError(
            f"rollout.prompts_per_step = {rollout.prompts_per_step} exceeds the {len(prompts)} "
            f"prompts of {rollout.prompts}. Lower it or add prompts."
        )
    return prompts


def _responses(
    config: Config,
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    routes: Routes | None,
    tasks: Tasks | None,
) -> dict[int, tuple[TeacherResponse, ...]] | None:
    """Each prompt's, by its own teacher."""
    if tasks is not None:
        return _responses_of_tasks(config, prompts, tokenizer, tasks)
    filtered = config.rollout.filter_overlong_prompts or bool(config.teachers)
    found: dict[int, tuple[TeacherResponse, ...]] = {}
    for _, alone, mine in each_teacher(config, routes, prompts):
        if alone.guidance.responses:
            found |= load_responses(alone.guidance.responses, mine, tokenizer, filtered=filtered)
    return found or None


def _responses_of_tasks(
    config: Config,
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Tasks,
) -> dict[int, tuple[TeacherResponse, ...]] | None:
    """Each prompt's, from the file of its task; those of a task without one have none."""
    assert isinstance(prompts, Prompts)
    found: dict[int, tuple[TeacherResponse, ...]] = {}
    for number, task in enumerate(config.tasks):
        if task.responses is not None:
            first = tasks.firsts[number]
            mine = of_one_task(prompts, number, first)
            filtered = config.rollout.filter_overlong_prompts
            read = load_responses(task.responses, mine, tokenizer, filtered=filtered)
            found |= {index + first: responses for index, responses in read.items()}
    return found or None


def _golden(
    config: Config, prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase"
) -> GoldenAnswers | None:
    field = config.guidance.golden_field
    if field is None:
        return None
    found: dict[int, tuple[int, ...]] = {}
    for rollout, mine in by_task(config, prompts):
        most = rollout.max_new_tokens
        found |= golden_answers(rollout.prompts, mine, field, tokenizer, max_new_tokens=most)
    return found


def _prompts(
    form: PromptConfig,
    path: str,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    room: int,
    *,
    filter_overlong: bool | None = None,
    key: str = "rollout.max_new_tokens",
) -> Sequence[Prompt]:
    if room >= context:
        raise ConfigError(
            f"{key} = {room} leaves no room for a prompt in a "
            f"context of {context} tokens. Lower it."
        )
    return load_prompts(
        path,
        tokenizer,
        form,
        data=data,
        max_prompt_tokens=context - room,
        filter_overlong=filter_overlong,
    )


def _check_templates(
    config: Config,
    prompts: Sequence[Prompt],
    sets: Sequence[ProblemSet],
    tokenizer: "PreTrainedTokenizerBase",
    models: dict[str, HFFolder | MegatronFolder],
    routes: Routes | None,
) -> None:
    """Compare what both models' tokenizers and chat templates make of the same lines."""
    for who, _, mine in each_teacher(config, routes, prompts):
        teachers = load_tokenizer(models[who].companions)
        for rollout, texts in by_task(config, mine):
            check_same_texts(rollout.prompts, texts, tokenizer, teachers, rollout)
        for each in sets:
            answered = each.of_teachers.get(who, []) if config.teachers else each.problems
            form = each.settings.prompts_as(config.rollout)
            check_same_texts(each.settings.problems, answered, tokenizer, teachers, form)


def _check_config(folder: HFFolder | MegatronFolder, who: str) -> None:
    """Refuse a config.json that cannot be read, by the name of its file."""
    try:
        model_shape(folder.config)
    except InputError as error:
        raise InputError(f"{who} {folder.companions / CONFIG}: {error}") from None


def _check_engines(
    config: Config,
    models: dict[str, HFFolder | MegatronFolder],
    max_model_len: int,
    sets: Sequence[ProblemSet],
) -> None:
    """Refuse models that no engine will run; a teacher has one only to be evaluated."""
    measured = {alone.model.teacher: who for who, alone in config.by_teacher.items()}
    sampled = {config.model.student: models["student"]} | {
        path: models[who]
        for path, who in measured.items()
        if any(each.of_teachers.get(who) for each in sets)
    }
    for who, folder in sampled.items():
        check_engine(
            folder.config,
            max_model_len,
            cuda=torch.cuda.is_available(),
            who=who,
            tensor_parallel=config.rollout.engine_tensor_parallel,
        )


def _check_blend(
    config: Config,
    student: HFFolder | MegatronFolder,
    teacher: HFFolder | MegatronFolder,
    prompts: Sequence[Prompt],
) -> None:
    """Refuse what engines that hold student and teacher would refuse later."""
    rollout, cuda = config.rollout, torch.cuda.is_available()
    if cuda:
        raise ConfigError(BLENDED_ON_CUDA)
    longest = blended_length(_longest(prompts) + rollout.max_new_tokens, rollout.draft_tokens)
    for who, folder in ((config.model.student, student), (config.model.teacher, teacher)):
        check_engine(folder.config, longest, cuda=cuda, who=who)
    lengths = num_tokens(prompts)
    if min(lengths) < 2:
        short = prompts[lengths.index(min(lengths))]
        raise InputError(
            f"{rollout.prompts}: prompt {short.index} is one token long; rollout.behaviour = "
            f'"{rollout.behaviour}" needs at least 2. Leave it out, or put BOS before it.'
        )


def _check_micro_batch(config: Config, longest: int) -> None:
    room, alike = config.train.tokens_per_micro_batch, config.megatron.token_multiple
    layouts = [config.parallel, *(alone.teacher_parallel for alone in config.by_teacher.values())]
    needed = max(_up(longest - 1, layout.row_shards * alike) for layout in layouts)
    if needed > room:
        raise ConfigError(
            f"train.tokens_per_micro_batch = {room} is less than the longest possible trajectory: "
            f"prompt and rollout.max_new_tokens make {needed} positions. Raise it or lower "
            "rollout.max_new_tokens."
        )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _longest(prompts: Sequence[Prompt]) -> int:
    return max(num_tokens(prompts), default=0)
