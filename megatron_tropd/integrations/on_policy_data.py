"""On-policy data for Megatron's training loop: the student of now samples every global batch.

:class:`OnPolicyData` pushes the student's weights into our engines and samples the next prompts. It
is what ``megatron_lm.distillation(rollouts=...)`` takes; :mod:`.on_policy_iterator` makes a data
iterator of it for training loops with a step function of their own.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from megatron_tropd.base.environment import number
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import GuidanceConfig, RolloutConfig
from megatron_tropd.config.run import MULTI_TURN
from megatron_tropd.config.settings import Anything, Count, Settings
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import open_model
from megatron_tropd.data.prompts import check_same_texts, is_templated, num_tokens
from megatron_tropd.data.recorded import training_item
from megatron_tropd.data.responses import load_responses
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.templates import reads_clock
from megatron_tropd.data.tokenizers import load_tokenizer, stop_token_ids
from megatron_tropd.distill.inputs import training_prompts
from megatron_tropd.integrations import startup
from megatron_tropd.mcore.dense import DenseModel
from megatron_tropd.mcore.layout import current_layout
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.pool import EnginePool
from megatron_tropd.rollout.engines.process import engine_threads
from megatron_tropd.rollout.episodes import EpisodePlan, load_mode
from megatron_tropd.rollout.source import SampledRollouts
from megatron_tropd.rollout.weights.interface import RepeatableExport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OnPolicySettings(Settings):
    """What is sampled, and by whom."""

    student: Path
    """HF folder of the architecture that is trained: config, tokenizer, and weights the engine
    starts with (it gets the trained ones before it samples)."""
    rollout: RolloutConfig
    """Prompts, samples and engines; prompts_per_step x samples_per_prompt is the global batch."""
    log_folder: Path
    """Where the engines' logs go."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Teacher prefixes; none without ``guidance.responses``."""


@dataclass(frozen=True)
class LoopSettings(Settings):
    """What rollouts must know of the training loop."""

    seq_length: Count
    """S, positions of a row."""
    seed: Anything
    """Keys prompts and samples."""
    steps: Count
    """Of the whole training: teacher prefixes fall to nothing over them."""
    vocab_size: Count | None = None
    """Columns that the loss knows, the first ones: only these are sampled. None: all of the
    student's."""
    teachers: tuple[Path, ...] = ()
    """Their folders, to compare what their chat templates and the student's make of the prompts."""


class OnPolicyData:
    """Samples of the student of now, on all ranks.

    A context manager: leaving it, also by an error, ends the engines and removes what is left in
    shared memory. Not with context parallelism, virtual pipeline stages or
    ``--overlap-param-gather``, with which weights are not complete between two steps.
    """

    def __init__(self, settings: OnPolicySettings) -> None:
        """Remember the settings; nothing is started yet."""
        self.settings = settings
        self._started = False
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine of this rank; not collective, harmless twice. Can be started again."""
        self._started = False
        self._exit.close()

    def __call__(self, model: torch.nn.Module, iteration: int) -> list[dict[str, Tensor]]:
        """The global batch of one iteration of ``pretrain``; the first call starts the engines.

        Args:
            model: this rank's GPTModel, not wrapped.
            iteration: 0-based.

        Returns:
            Items of :func:`megatron_tropd.data.recorded.training_item`, the same on every rank.

        Raises:
            As :meth:`start` and :meth:`sample`; ConfigError: Megatron's arguments exclude live
            rollouts.

        Collectives: those of :meth:`start` and :meth:`sample`.
        """
        if not self._started:
            self.start_for_pretrain(model)
        sequences = self.sample(model, iteration)
        return [training_item(t, self._loop.seq_length) for t in sequences]

    def start_for_pretrain(self, model: torch.nn.Module) -> Any:
        """:meth:`start` with what Megatron's arguments say; returns them."""
        from megatron.training import get_args, get_tokenizer

        args = get_args()
        check_arguments(args, self.settings.rollout)
        # Our loss ends where the tokenizer does; Megatron's counts padded columns as tokens.
        teacher = getattr(args, "tropd_teacher_load", None)
        loop = LoopSettings(
            seq_length=args.seq_length,
            seed=args.seed,
            steps=args.train_iters,
            vocab_size=int(get_tokenizer().vocab_size) if teacher else None,
            teachers=startup.teacher_folders(args) if teacher else (),
        )
        self.start(loop, dtype=next(model.parameters()).dtype)
        return args

    def start(self, loop: LoopSettings, *, dtype: torch.dtype) -> None:
        """Start the engines. Collective; Megatron's parallel state is set up.

        Raises:
            InputError: the student's folder, the prompts or the responses are unusable.
            ConfigError: prompts, engines or layout do not fit.
            TrainingError: an engine did not start.

        Collectives: gathers of the outcome on all ranks.
        """
        self._loop, self._layout = loop, current_layout()
        self._make_episode = load_mode(self.settings.rollout.mode)
        self._read_texts()
        self._check()
        self._engines = self._exit.enter_context(self._start_engines(dtype))
        with self._engines.awake():
            pass  # models are on the devices already; what is free now stays free
        self._source = self._make_source()
        self._started = True

    def sample(self, model: torch.nn.Module, step: int) -> list[TokenSequence]:
        """Sample the global batch of a step with the weights of now.

        Collective, on every rank and outside of the pipeline's schedule.

        Args:
            model: this rank's GPTModel, not wrapped.
            step: 0-based; keys prompts and samples, so that a resumed run goes on alike.

        Returns:
            ``prompts_per_step x samples_per_prompt`` trajectories, the same on every rank.

        Raises:
            TrainingError: an engine died, or there is no room for the weights.

        Collectives: those of ``export_weights``, gathers of outcome and samples on all ranks.
        """
        self._push_weights(model, step)
        self._source.begin(step)
        return self._source.collect()

    def _make_source(self) -> SampledRollouts:
        settings, loop = self.settings, self._loop
        return SampledRollouts(
            self._engines,
            self._make_episode,
            self._prompts,
            EpisodePlan(
                settings.rollout, settings.guidance, loop.steps, loop.seed, self._responses
            ),
            stop_token_ids=stop_token_ids(settings.student, settings.rollout.stop_token_ids),
            is_main=self._layout.is_main,
        )

    def _read_texts(self) -> None:
        folder, rollout = self.settings.student, self.settings.rollout
        self._folder, tokenizer = HFFolder(folder), load_tokenizer(folder)
        columns = model_shape(self._folder.config).vocab
        self._columns = min(self._loop.vocab_size or columns, columns)
        self._prompts = training_prompts(rollout, tokenizer, self._loop.seq_length + 1)
        self._check_template(tokenizer)
        responses = self.settings.guidance.responses
        self._responses = None
        if responses:
            filtered = rollout.filter_overlong_prompts
            self._responses = load_responses(responses, self._prompts, tokenizer, filtered=filtered)

    def _check_template(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        rollout, prompts = self.settings.rollout, self._prompts
        if not any(is_templated(prompt.fields, rollout) for prompt in prompts):
            return
        if rollout.chat_template_date is None and reads_clock(tokenizer):
            raise ConfigError(
                "The chat template reads the clock, so that prompts would be others when the "
                'training resumes. Give the rollouts a date: chat_template_date="2026-01-31".'
            )
        for folder in self._loop.teachers:
            teacher = load_tokenizer(open_model(folder).companions)
            check_same_texts(rollout.prompts, prompts, tokenizer, teacher, rollout)

    def _check(self) -> None:
        rollout, layout = self.settings.rollout, self._layout
        if self.settings.guidance.golden_field is not None:
            raise ConfigError(
                "No method of the plug-in has a loss for golden answers. Leave "
                "guidance.golden_field out, or use the trainer (tropd distill)."
            )
        if rollout.placement != "colocated" or rollout.steps_ahead:
            raise ConfigError(
                "Live rollouts are sampled by engines beside the trainer, for the step at hand. "
                'Leave rollout.placement = "colocated" and rollout.steps_ahead = 0.'
            )
        if rollout.mode == MULTI_TURN:
            raise ConfigError(
                f'rollout.mode = "{MULTI_TURN}" is not built for live rollouts, which have no '
                "[environment]. Use the trainer (tropd distill)."
            )
        if rollout.asks_teacher:
            raise ConfigError(
                f'rollout.behaviour = "{rollout.behaviour}" is not built for live rollouts. Set '
                'rollout.behaviour = "student", or "cooled".'
            )
        if layout.tp_size * layout.pp_size * layout.dp_size != layout.world_size:
            raise ConfigError(
                f"Live rollouts need tensor x pipeline x data = {layout.world_size} ranks, found "
                f"{layout.tp_size} x {layout.pp_size} x {layout.dp_size}. Switch context "
                "parallelism off."
            )
        if layout.world_size % rollout.num_engines:
            raise ConfigError(
                f"rollout.num_engines must divide the {layout.world_size} ranks, found "
                f"{rollout.num_engines}."
            )

    def _start_engines(self, dtype: torch.dtype) -> EnginePool:
        rollout, layout = self.settings.rollout, self._layout
        local = number("LOCAL_WORLD_SIZE", 1)
        longest = max(num_tokens(self._prompts))

        def make(number: int) -> RolloutEngine:
            return RolloutEngine(
                self.settings.student,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=longest + rollout.max_new_tokens,
                vocab_size=self._columns,
                gpu_share=rollout.engine_gpu_share,
                cpu_kv_gib=rollout.engine_cpu_kv_gib,
                tensor_parallel=rollout.engine_tensor_parallel,
                max_num_seqs=rollout.max_num_seqs,
                max_num_batched_tokens=rollout.max_num_batched_tokens,
                threads=engine_threads(rollout.num_engines, local, layout.world_size),
                log_file=self.settings.log_folder / f"engine_{number:03d}.log",
            )

        return EnginePool(
            rank=layout.rank,
            world_size=layout.world_size,
            num_engines=rollout.num_engines,
            make_engine=make,
            transport=rollout.weight_transport,
        )

    def _push_weights(self, model: torch.nn.Module, step: int) -> None:
        export = partial(
            DenseModel([model], self._folder.config, self._layout).exported,
            self._engines.channel.receivers,
            vocab_size=self._columns,
            explicit_lm_head=True,
        )
        self._engines.channel.send(RepeatableExport(export), step)


def check_arguments(
    args: Any, rollout: RolloutConfig, more: Sequence[tuple[bool, str]] = ()
) -> None:
    """Refuse arguments of Megatron that exclude live rollouts.

    Args:
        rollout: says how large a global batch is.
        more: further (whether it is wrong, what is needed).

    Raises:
        ConfigError: names all that have to change.
    """
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    problems = [
        *more,
        (args.global_batch_size != batch, f"--global-batch-size {batch} (prompts x samples)"),
        (args.rampup_batch_size is not None, "no --rampup-batch-size"),
        (
            getattr(args, "step_batch_size_schedule", None) is not None,
            "no --step-batch-size-schedule",
        ),
        (bool(getattr(args, "iterations_to_skip", None)), "no --iterations-to-skip"),
        (args.overlap_param_gather, "no --overlap-param-gather"),
        (args.context_parallel_size != 1, "--context-parallel-size 1"),
        (chunks != 1, "no virtual pipeline stages"),
        (args.train_iters is None, "--train-iters"),
    ]
    missing = [text for wrong, text in problems if wrong]
    if missing:
        raise ConfigError(f"Live rollouts need {'; '.join(missing)}. Change Megatron's arguments.")
