"""Everything a run reads, checked before anything is started or written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import Config, DataConfig, RolloutConfig
from megatron_tropd.convert.checks import check_expert_parallel, check_parallel, check_tensors
from megatron_tropd.convert.companions import CONFIG
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder, naming
from megatron_tropd.convert.megatron_folder import MegatronFolder, open_model
from megatron_tropd.data.golden import GoldenAnswers, golden_answers
from megatron_tropd.data.prompts import (
    check_kwargs_are_read,
    check_same_texts,
    load_prompts,
    num_tokens,
)
from megatron_tropd.data.responses import TeacherResponse, load_responses
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
from megatron_tropd.losses import check_signal
from megatron_tropd.rollout.engines.engine import BLENDED_ON_CUDA, blended_length
from megatron_tropd.rollout.engines.engine_model import check_engine
from megatron_tropd.tasks.grading import grader_of
from megatron_tropd.teacher import signal_of
from megatron_tropd.teacher.cached import check_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """The models' folders, the tokenizer and all texts of a run."""

    student: HFFolder | MegatronFolder
    teacher: HFFolder | MegatronFolder
    reference: HFFolder | MegatronFolder | None
    """What the teacher is measured against, if the loss reads it."""
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
    problems: Sequence[Prompt]
    """Held-out problems, at most evaluation.num_problems; empty without evaluation."""
    max_model_len: int
    """Longest sequence the rollout engine will see."""
    shared_stops: tuple[int, ...] = ()
    """Ids by which student and teacher end a response, if they differ and both sample."""
    golden: GoldenAnswers | None = None
    """Those of the prompts, if the loss reads them."""

    def longest_rollout(self, rollout: RolloutConfig) -> int:
        """Tokens of the longest prompt and its response."""
        return _longest(self.prompts) + rollout.max_new_tokens

    @property
    def folders(self) -> dict[str, HFFolder | MegatronFolder]:
        """Of each model, by what it is to the run."""
        named = {"student": self.student, "teacher": self.teacher, "reference": self.reference}
        return {who: folder for who, folder in named.items() if folder is not None}


def load_inputs(config: Config) -> Inputs:
    """Read and check models' headers, tokenizers, prompts, responses and problems.

    Raises:
        InputError: a file is missing or unusable; names file and line.
        ConfigError: a setting does not fit the models or the texts.
    """
    student, teacher = open_model(config.model.student), open_model(config.model.teacher)
    reference = None if config.reference is None else open_model(config.reference)
    models = {"student": student, "teacher": teacher}
    if reference is not None:
        models["reference"] = reference
    for who, folder in models.items():
        _check_config(folder, who)
        if isinstance(folder, HFFolder):  # the other kind is checked when it is opened
            check_tensors(folder)
        if who == "student" or config.loads_teacher:
            check_parallel(folder.config, config.parallel, who=who)
    shapes = [model_shape(folder.config) for folder in models.values()]
    check_expert_parallel(config.parallel, shapes if config.loads_teacher else shapes[:1])
    tokenizer = check_same_tokenizer(student.companions, teacher.companions)
    if reference is not None:
        check_same_tokenizer(student.companions, reference.companions, other="reference")
    vocab_size = min(shape.vocab for shape in shapes)
    _check_vocabulary(config, tokenizer, vocab_size, list(models))
    context = min(shape.context for shape in shapes)
    prompts = training_prompts(config.rollout, tokenizer, context)
    responses = _responses(config, prompts, tokenizer)
    _check_micro_batch(config, _longest(prompts) + config.rollout.max_new_tokens)
    grader_of(config.grader)  # refused now, not at the first answer
    problems = _problems(config, tokenizer, context)
    _check_templates(config, prompts, problems, tokenizer, teacher)
    max_model_len = max(
        _longest(prompts) + config.rollout.max_new_tokens,
        _longest(problems) + config.max_answer_tokens,
    )
    _check_engines(config, student, teacher, max_model_len, evaluated=bool(problems))
    if config.rollout.asks_teacher:
        _check_blend(config, student, teacher, prompts)
    recorded = load_recorded(config, prompts, tokenizer, vocab_size)
    if not config.loads_teacher:
        check_cache(
            config.teacher.cache,
            config.loss,
            teacher,
            tokenizer,
            vocab_size,
            reference=reference,
            recorded=recorded or (),
        )
    return Inputs(
        student=student,
        teacher=teacher,
        reference=reference,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        context=context,
        stop_token_ids=config.loss.ends(
            stop_token_ids(student.companions, config.rollout.stop_token_ids)
        ),
        prompts=prompts,
        responses=responses,
        golden=_golden(config, prompts, tokenizer),
        recorded=recorded,
        problems=problems,
        max_model_len=max_model_len,
        shared_stops=(
            shared_stops(student.companions, teacher.companions)
            if config.rollout.asks_teacher
            else ()
        ),
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
    config: Config, prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase"
) -> dict[int, tuple[TeacherResponse, ...]] | None:
    path = config.guidance.responses
    if not path:
        return None
    filtered = config.rollout.filter_overlong_prompts
    return load_responses(path, prompts, tokenizer, filtered=filtered)


def _golden(
    config: Config, prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase"
) -> GoldenAnswers | None:
    field, rollout = config.guidance.golden_field, config.rollout
    if field is None:
        return None
    most = rollout.max_new_tokens
    return golden_answers(rollout.prompts, prompts, field, tokenizer, max_new_tokens=most)


def _prompts(
    rollout: RolloutConfig,
    path: str,
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    room: int,
    *,
    filter_overlong: bool | None = None,
) -> Sequence[Prompt]:
    if room >= context:
        raise ConfigError(
            f"rollout.max_new_tokens = {room} leaves no room for a prompt in a "
            f"context of {context} tokens. Lower it."
        )
    return load_prompts(
        path,
        tokenizer,
        rollout,
        data=data,
        max_prompt_tokens=context - room,
        filter_overlong=filter_overlong,
    )


def _check_templates(
    config: Config,
    prompts: Sequence[Prompt],
    problems: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    teacher: HFFolder | MegatronFolder,
) -> None:
    """Compare what both models' tokenizers and chat templates make of the same lines."""
    teachers = load_tokenizer(teacher.companions)
    for path, texts in ((config.rollout.prompts, prompts), (config.evaluation.problems, problems)):
        check_same_texts(str(path), texts, tokenizer, teachers, config.rollout)


def _problems(
    config: Config, tokenizer: "PreTrainedTokenizerBase", context: int
) -> Sequence[Prompt]:
    path = config.evaluation.problems
    if path is None:
        return []
    data, room = config.evaluation.data, config.max_answer_tokens
    problems = _prompts(config.rollout, path, data, tokenizer, context, room)
    if config.evaluation.task == "exact_match":
        grader = grader_of(config.grader)
        for problem in problems:
            with naming(path):
                grader.check(problem.fields, f"Problem {problem.index} ({problem.place})")
    return problems[: config.evaluation.num_problems]


def _check_config(folder: HFFolder | MegatronFolder, who: str) -> None:
    """Refuse a config.json that cannot be read, by the name of its file."""
    try:
        model_shape(folder.config)
    except InputError as error:
        raise InputError(f"{who} {folder.companions / CONFIG}: {error}") from None


def _check_engines(
    config: Config,
    student: HFFolder | MegatronFolder,
    teacher: HFFolder | MegatronFolder,
    max_model_len: int,
    *,
    evaluated: bool,
) -> None:
    """Refuse models that no engine will run; the teacher has one only to be evaluated."""
    sampled = {config.model.student: student}
    if evaluated and config.evaluation.task == "exact_match" and config.evaluation.teacher:
        sampled[config.model.teacher] = teacher
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
    room, multiple = config.train.tokens_per_micro_batch, config.pad_multiple
    needed = -(-(longest - 1) // multiple) * multiple
    if needed > room:
        raise ConfigError(
            f"train.tokens_per_micro_batch = {room} is less than the longest possible trajectory: "
            f"prompt and rollout.max_new_tokens make {needed} positions. Raise it or lower "
            "rollout.max_new_tokens."
        )


def _longest(prompts: Sequence[Prompt]) -> int:
    return max(num_tokens(prompts), default=0)
