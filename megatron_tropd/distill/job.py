"""What a rank holds during a run: models, engine, data, logs; and the phases around the step."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.base.environment import number
from megatron_tropd.base.errors import ConfigError, TrainingError
from megatron_tropd.base.files import replace_text, write_json
from megatron_tropd.base.progress import Progress, StopFlag, failed_phase, limits
from megatron_tropd.config import Config, config_to_dict
from megatron_tropd.config.run_folder import RunFolder, started_at
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import LossCounts
from megatron_tropd.data.prefixes import alpha
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.distill.engines import make_engine
from megatron_tropd.distill.evaluation import Evaluator
from megatron_tropd.distill.inputs import load_inputs
from megatron_tropd.distill.metrics import BadToken
from megatron_tropd.distill.reporter import Clock, peak_memory_gib
from megatron_tropd.distill.step_loss import StepObjective, example_rows, gather_examples
from megatron_tropd.distill.token_choices import (
    BatchChoices,
    choose,
    loss_name,
    outcome_rewards,
)
from megatron_tropd.losses import Method, TeacherSignal
from megatron_tropd.losses.trouble import words
from megatron_tropd.mcore import models, parallel, platform, weights
from megatron_tropd.mcore.checkpoint import ANY_LAYOUT, Checkpoints
from megatron_tropd.mcore.options_check import check_options, unreviewed
from megatron_tropd.mcore.step import NotFinite, Student, Update, output_weight
from megatron_tropd.report.metrics import MetricsLog
from megatron_tropd.rollout.collective import run_everywhere
from megatron_tropd.rollout.engines.client import ClientSettings
from megatron_tropd.rollout.engines.device_memory import free_bytes, wait_for_memory
from megatron_tropd.rollout.engines.dispatch import Patience
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.interface import SamplingEngines
from megatron_tropd.rollout.engines.pool import EnginePool
from megatron_tropd.rollout.engines.process import engine_threads
from megatron_tropd.rollout.engines.served import ServerPool
from megatron_tropd.rollout.engines.wire import Model, served_settings
from megatron_tropd.rollout.episodes import EpisodePlan, load_mode
from megatron_tropd.rollout.recorded import RecordedRollouts
from megatron_tropd.rollout.source import RolloutSource, SampledRollouts
from megatron_tropd.rollout.weights.versions import WeightVersions
from megatron_tropd.rollout.weights.weight_sync import Export
from megatron_tropd.teacher import TeacherStart, load_teacher

ENGINE_GAPS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""rollout.max_engine_gap by the models' type, if it is not set."""


class Job:
    """One rank of a run. A context manager: leaving it ends engines and process groups."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        console: IO[str],
        stop: StopFlag,
        progress: Progress | None = None,
    ) -> None:
        """Load everything; nothing is trained yet.

        Args:
            folder: an opened run folder.
            console: where rank 0 shows progress.
            stop: set when the run was asked to stop.
            progress: holds the step and the phase, for the watchdog.
        """
        self.folder = folder
        self.config: Config = folder.read_config()
        self.console = console
        self._stop = stop
        self._progress = progress or Progress()
        self.seconds_before = 0.0
        self.clock = Clock(self._progress)
        self._exit = ExitStack()
        self._compared = False
        self._aside = ThreadPoolExecutor(1, "aside")
        self._examples: Future[None] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._progress.step

    @step.setter
    def step(self, step: int) -> None:
        self._progress.step = step

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._exit = undo
            self._start()
            self._exit = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def _start(self) -> None:
        config, exits = self.config, self._exit
        platform.prepare_platform()
        platform.check_device()
        if config.run.deterministic:
            platform.be_deterministic()
        self.ranks = parallel.initialize(
            config.parallel,
            seed=config.train.seed,
            timeout_seconds=limits(config.run.timeout_minutes).collectives,
        )
        exits.push(_leave_groups)
        exits.callback(self._aside.shutdown, cancel_futures=True)
        self.device = platform.device()
        self.dtype = models.resolve_dtype(config.model.dtype)
        self.inputs = load_inputs(config)
        self.is_main = self.ranks.is_main
        self._check_options()
        self._check_steps_ahead()
        load_mode(config.rollout.mode)  # before engines start
        self.checkpoints = Checkpoints(
            self.folder.checkpoints,
            keep=config.run.keep_checkpoints,
            ranks=self.ranks,
            distributed_optimizer=config.parallel.distributed_optimizer,
            say=self._warn,
        )
        self.hf_folders = self._hf_folders()
        self.log_file = self._open_log()
        self.evaluator = Evaluator(
            config, self.inputs, self.folder, is_main=self.is_main, log=self.log_file
        )
        self._measure_teacher()
        self._say_that_engines_start("student")
        self.engines = self.start_engines("student")
        exits.enter_context(self.engines)
        self.rollouts = self.rollout_source()
        if platform.has_cuda():
            with self.engines.awake():
                pass  # vLLM measures free memory while it starts: nobody else may allocate
        self._build_models()

    def rollout_source(self) -> RolloutSource:
        """Where this run's sequences come from."""
        config, inputs = self.config, self.inputs
        if inputs.recorded is not None:
            per_step = config.rollout.prompts_per_step
            return RecordedRollouts(
                inputs.recorded, prompts_per_step=per_step, seed=config.train.seed
            )
        return SampledRollouts(
            self.engines,
            load_mode(config.rollout.mode),
            inputs.prompts,
            EpisodePlan(
                config.rollout,
                config.guidance,
                config.train.steps,
                config.train.seed,
                inputs.responses,
            ),
            stop_token_ids=inputs.stop_token_ids,
            is_main=self.is_main,
        )

    def _open_log(self) -> MetricsLog | None:
        if not self.is_main:
            return None
        run = self.config.run
        log = MetricsLog(
            self.folder.root,
            tensorboard=run.tensorboard,
            wandb_project=run.wandb_project,
            config=config_to_dict(self.config),
        )
        self._exit.callback(log.close)
        return log

    def _measure_teacher(self) -> None:
        """Grade the teacher while nobody else has models on the devices; once in a run."""
        if not self.evaluator.teacher_is_due():
            return
        self._say_that_engines_start("teacher")
        before = free_bytes()
        with self.clock("evaluation"):
            with self.start_engines("teacher") as engines:
                self.evaluator.measure_teacher(engines)
            run_everywhere(lambda: wait_for_memory(before, "the teacher's engine"))

    def _say_that_engines_start(self, model: Model) -> None:
        """On CUDA that takes a while, in which nothing moves."""
        if not (self.is_main and platform.has_cuda()):
            return
        where = "servers" if self.config.rollout.placement == "separate" else "engines"
        log = self.folder.logs / f"engine_{model}_000.log"
        logged = f" Its log: {log}." if where == "engines" else ""
        self._warn(
            f"waiting for the {model}'s rollout {where}: vLLM compiles and captures graphs when it "
            f"starts, for about a minute, longer the first time.{logged}"
        )

    def _build_models(self) -> None:
        config, inputs = self.config, self.inputs
        if self.is_main and platform.has_cuda() and not models.has_transformer_engine():
            self._warn(
                "Transformer Engine does not import: Megatron-Core's own layers run, with torch's "
                'attention and Adam. Plan with layers = "local", or install it (README.md).'
            )
        self._padded_vocab_size = models.padded_vocab_size(
            *(folder.config for folder in inputs.folders.values()), tensor=config.parallel.tensor
        )
        self.student = Student(
            models.build_model(
                inputs.student,
                ranks=self.ranks,
                parallel=config.parallel,
                dtype=self.dtype,
                padded_vocab_size=self._padded_vocab_size,
                who="student",
                options=config.megatron.model,
            ),
            train=config.train,
            parallel=config.parallel,
            ranks=self.ranks,
            dtype=self.dtype,
            megatron=config.megatron,
        )
        self.teacher = load_teacher(config.teacher.source)(
            TeacherStart(
                config,
                inputs.teacher,
                self.ranks,
                self.dtype,
                self._padded_vocab_size,
                inputs.vocab_size,
                inputs.reference,
            )
        )
        self._exit.callback(self.teacher.close)

    def _hf_folders(self) -> dict[str, Path]:
        """What engines start from: the pair's HF folders, made of Megatron checkpoints if need be.

        Collective. An existing one is from the start of this run, and complete.
        """
        folders = {"student": self.inputs.student, "teacher": self.inputs.teacher}
        paths = {who: folder.path for who, folder in folders.items()}
        for who, folder in folders.items():
            if isinstance(folder, MegatronFolder):
                paths[who] = self.folder.initial_hf / who
                if self.is_main and not paths[who].exists():
                    megatron_to_hf(ToHF(folder.path, paths[who]))
        dist.barrier()
        return paths

    def start_engines(self, model: Model) -> SamplingEngines:
        """Engines for the student or the teacher; returns while they are still starting."""
        rollout = self.config.rollout
        if rollout.placement == "separate":
            return ServerPool(
                ClientSettings(self.folder.servers, served_settings(self.config)),
                WeightVersions(self.folder.weights),
                rank=self.ranks.rank,
                num_servers=rollout.num_engines,
                model=model,
                patience=Patience.within(60 * self.config.run.timeout_minutes),
                stopping=lambda: self._stop.requested,
            )
        local = number("LOCAL_WORLD_SIZE", 1)

        def make(number: int) -> RolloutEngine:
            return make_engine(
                self.config,
                self.inputs,
                self.hf_folders[model],
                threads=engine_threads(rollout.num_engines, local, self.ranks.world_size),
                log_file=self.folder.logs / f"engine_{model}_{number:03d}.log",
                alone=model == "teacher",  # its engines have ended before anything is built
            )

        return EnginePool(
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            num_engines=rollout.num_engines,
            make_engine=make,
            transport=None if model == "teacher" else rollout.weight_transport,
        )

    def _check_options(self) -> None:
        check_options(self.config, **{n: f.config for n, f in self.inputs.folders.items()})
        if not self.is_main:
            return
        for line in self.config.megatron.lines():
            print(f"Megatron's options: {line}", flush=True)
        if new := unreviewed(self.config.megatron):
            self._warn(
                f"{', '.join(new)}: of a Megatron-Core that this version was not made for; nobody "
                "has looked at what they do here."
            )

    def _check_steps_ahead(self) -> None:
        rollout = self.config.rollout
        if not rollout.steps_ahead:
            return
        if rollout.placement == "colocated" and platform.has_cuda():
            raise ConfigError(
                "rollout.steps_ahead = 1 samples while the student trains, but colocated engines "
                'sleep meanwhile to leave the GPU to it. Set rollout.placement = "separate" and '
                "start servers, or steps_ahead = 0."
            )
        if not self.config.loss.needs.rollout_logprobs and self.is_main:
            print(
                "tropd: rollout.steps_ahead = 1 trains on samples of older weights and the loss "
                'does not correct for it; consider loss.importance = "truncated" or "band".',
                file=self.console,
            )

    def resume(self) -> None:
        """Take up the newest complete checkpoint, or the HF weights; fill the engines."""
        extra = self.checkpoints.load_newest(self.student)
        if extra is not None:
            self.step, self.seconds_before = extra["step"], extra["seconds"]
            self.rollouts.restore(self.checkpoints.folder / f"step_{self.step:06d}")
        if self.log_file is not None:
            # Before the first step nothing but the teacher's evaluation is kept.
            # The last evaluation comes before the last save and is made again with the summary.
            at_the_end = self.step == self.config.train.steps
            self.log_file.truncate_after(
                -1 if extra is None else self.step,
                evaluations=self.step - 1 if at_the_end else None,
            )
        self.sync_weights(self.step)
        self._bar = tqdm(
            total=self.config.train.steps,
            initial=self.step,
            desc="distil",
            unit="step",
            file=self.console,
            disable=not self.is_main,
            dynamic_ncols=True,
        )
        self._exit.callback(self._bar.close)
        self.clock.lap()
        self._progress.enter("between phases")

    def sync_weights(self, version: int) -> None:
        """Stream the student's weights, seen ``version`` steps, as HF tensors to every engine."""
        export = partial(
            weights.export_weights,
            self.student.model,
            # Columns that the teacher lacks are not sampled: the loss knows nothing of them.
            self.inputs.student.config | {"vocab_size": self.inputs.vocab_size},
            self.ranks,
            padded_vocab_size=self._padded_vocab_size,
            receivers=self.engines.channel.receivers,
            explicit_lm_head=True,
        )
        self.engines.channel.send(Export(export), version)

    def objective(
        self,
        batches: Sequence[MicroBatch],
        signals: Sequence[TeacherSignal],
        trajectories: Sequence[TokenSequence],
        counts: LossCounts,
    ) -> StepObjective:
        """The loss function of this step; may run the student forward.

        Args:
            batches: of this rank.
            signals: the teacher's, one per micro-batch (last stage).
            trajectories: of the whole step.
            counts: its loss tokens.

        Collectives: none, but for a loss that looks at the whole batch: those of
        ``Student.score`` and ``choices.choose``.
        """
        rollout, run = self.config.rollout, self.config.run
        loss = self.config.loss.at_step(self.step)
        if not counts.teacher + counts.student:
            print(f"step {self.step + 1}: every token is masked, so there is no loss", flush=True)
        rows: list[int] = []
        if self.examples_due():
            samples = rollout.prompts_per_step * rollout.samples_per_prompt
            rows = example_rows(samples, rollout.samples_per_prompt, run.num_trajectories)
        return StepObjective(
            signals,
            config=loss,
            beta=self.config.guidance.beta,
            vocab_size=self.inputs.vocab_size,
            group=self.ranks.tp_group,
            counts=counts,
            counted=self.ranks.is_last_stage and self.ranks.tp_rank == 0,
            device=self.device,
            choices=self._choices(batches, signals, trajectories, loss),
            example_rows=rows,
        )

    def _choices(
        self,
        batches: Sequence[MicroBatch],
        signals: Sequence[TeacherSignal],
        trajectories: Sequence[TokenSequence],
        loss: Method,
    ) -> BatchChoices | None:
        outcomes = outcome_rewards(batches, trajectories) if loss.needs.outcomes else None
        if not loss.needs_student_pass:
            return outcomes
        hidden = self.student.score(batches)
        if not self.ranks.is_last_stage:
            return None
        choices = choose(
            batches,
            trajectories,
            signals,
            hidden,
            output_weight(self.student.model),
            config=loss,
            vocab_size=self.inputs.vocab_size,
            tp_group=self.ranks.tp_group,
            dp_group=self.ranks.dp_group,
        )
        return choices if outcomes is None else replace(choices, rewards=outcomes.rewards)

    def aside[T](self, action: Callable[[], T]) -> "Future[T] | None":
        """Do something for the records beside the step, on rank 0; None on the others.

        ``action`` must not be collective. Actions are done one after the other.
        """
        return self._aside.submit(action) if self.is_main else None

    def prefix_alpha(self) -> float:
        """Longest teacher prefix of this step as a share of the response; 0 without guidance."""
        if self.inputs.responses is None:
            return 0.0
        return alpha(self.step, self.config.train.steps, self.config.guidance.schedule)

    def check_finite(self, bad: BadToken | None, trajectories: list[TokenSequence]) -> None:
        """Stop before the optimizer if a loss is not finite; nothing is overwritten."""
        if bad is None:
            return
        t = trajectories[bad.row]
        writer, place = t.writers[bad.position].name.lower(), t.prompt_length + bad.position
        raise TrainingError(
            f"The loss is not finite in step {self.step + 1}, trajectory {bad.row} (prompt "
            f"{t.key.prompt}, sample {t.key.sample}, {t.count(Writer.TEACHER)} teacher and "
            f"{t.count(Writer.STUDENT)} student tokens), first at its token {bad.position} (id "
            f"{t.ids_N[place]}, written by the {writer}): "
            f"{words(bad.finding)} The weights were not updated. {self._last_checkpoint()}"
        )

    def update(self) -> Update:
        """Change the weights, if the gradient's norm lets it; say so if it does not.

        Raises:
            TrainingError: the gradient is not finite; weights, engines and checkpoints are as they
                were.
        """
        try:
            update = self.student.update()
        except NotFinite as error:
            raise TrainingError(
                f"{error} Step {self.step + 1} ends here; every token's loss was finite. The "
                f"weights were not updated. {self._last_checkpoint()} Lower train.lr, then resume."
            ) from None
        if update.skipped and self.is_main:
            self._warn(
                f"step {self.step + 1}: the gradient norm is {update.grad_norm:.4g}, above "
                "megatron.optimizer.grad_norm_skip_threshold: the weights stay as they were."
            )
        return update

    def check_engine_gap(self, metrics: dict[str, Any], trajectories: list[TokenSequence]) -> None:
        """Stop before the optimizer if engine and trainer do not compute the same model.

        Looked at once in each start, in the first step that trains on samples of its own weights.

        Args:
            metrics: of the step, equal on every rank.
            trajectories: of the step.
        """
        own = all(trajectory.oldest_version == self.step for trajectory in trajectories)
        if self._compared or not own or not metrics["tokens_student"]:
            return
        self._compared = True
        limit = self.config.rollout.max_engine_gap
        if limit is None:
            limit = ENGINE_GAPS[self.dtype]
        if limit == 0:
            return
        gap = metrics["engine_gap_mean"]
        if gap is not None and gap <= limit:
            return
        dtype = str(self.dtype).removeprefix("torch.")
        raise TrainingError(
            f"Engine and trainer do not compute the same model: in step {self.step + 1} the "
            f"log-probs they give the sampled tokens differ by {_number(gap)} nats on average (at "
            f"most {_number(metrics['engine_gap_max'])}), expected at most {limit:g} in {dtype} "
            "(rollout.max_engine_gap). The weights were not updated. Compare the config.json in "
            f"{self.inputs.student.companions} with the one at the top of the engine's log in "
            f"{self.folder.logs}, and both with transformers' log-probs of the same tokens. If "
            "the difference is round-off, raise rollout.max_engine_gap."
        )

    def _last_checkpoint(self) -> str:
        steps = self.checkpoints.steps()
        where = self.folder.checkpoints
        return f"Last good checkpoint: {where}/step_{steps[-1]:06d}." if steps else "No checkpoint."

    def examples_due(self) -> bool:
        """Whether this step dumps example trajectories: the first, the last, every n-th."""
        every = self.config.run.trajectories_every
        return bool(every) and (self.step % every == 0 or self.step == self.config.train.steps - 1)

    def keep_examples(self, objective: StepObjective, trajectories: list[TokenSequence]) -> None:
        """Write the example trajectories of this step, tokens with their per-token values."""
        if not self.examples_due():
            return
        examples = gather_examples(objective.examples)
        if not self.is_main:
            return
        self._settle_examples()
        path = self.folder.trajectories / f"step_{self.step:06d}.jsonl"

        def write() -> None:
            lines = [
                self.evaluator.example_line(trajectories[row], values)
                for row, values in sorted(examples.items())
            ]
            path.parent.mkdir(exist_ok=True)
            replace_text(path, "".join(lines))

        self._examples = self.aside(write)

    def _settle_examples(self) -> None:
        """Wait for the dump that is being written: no checkpoint is made before its examples."""
        if self._examples is not None:
            self._examples.result()
            self._examples = None

    def log(self, metrics: dict[str, Any]) -> None:
        """Write the metrics of the step that just ended and move the progress bar."""
        lap = self.clock.lap()
        tokens = metrics["tokens_student"] + metrics["tokens_teacher"]
        record = {
            "step": self.step + 1,
            **metrics,
            "tokens_per_second": tokens / lap["seconds_total"],
            **lap,
            "peak_memory_gib": peak_memory_gib(),
        }
        if self.log_file is not None:
            self.log_file.write(record)
        self._bar.set_postfix(self._shown(record), refresh=False)
        self._bar.update()

    def _shown(self, record: dict[str, Any]) -> dict[str, str]:
        shown = {"kl": record["reverse_kl"], "outliers": record["outlier_share"]}
        text = {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
        return text | self.evaluator.shown | {"tok/s": f"{record['tokens_per_second']:.0f}"}

    def due(self, every: int) -> bool:
        """Whether something done every ``every`` steps comes after this step (the last: later)."""
        return bool(every) and self.step % every == 0 and self.step < self.config.train.steps

    def stopping(self) -> bool:
        """Whether any rank was asked to stop. Collectives: one all-reduce of [1]."""
        # On the host, over gloo: nobody waits for a GPU to be told.
        flag = torch.tensor([int(self._stop.requested)])
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def stopped_without_samples(self, error: TrainingError) -> bool:
        """Whether the run was asked to stop and its engines, asked too, left before it had samples.

        Nothing of the step was done then, and the steps before it can be saved. Not so with
        ``rollout.steps_ahead``: samples of older weights belong to that state and are lost.

        Collectives: one all-reduce of [1] if engines failed in a rollout, as they do on every rank.
        """
        lost = error.kind == "engine" and failed_phase(error) == "rollout"
        if not lost or self.config.rollout.steps_ahead or not self.stopping():
            return False
        self.rollouts.forget()
        return True

    def evaluate(self) -> None:
        """Measure the student on the held-out problems."""
        self._settle_examples()
        with self.clock("evaluation"):
            self.evaluator.measure_student(
                self.engines,
                step=self.step,
                export=self.export_student,
                teacher=self.hf_folders["teacher"],
            )

    def save(self, *, wait: bool = False) -> None:
        """Begin a checkpoint of the steps done so far; ``wait``: until it is complete."""
        self._settle_examples()
        with self.clock("checkpoint"):
            extra = {"step": self.step, "seconds": self.elapsed()}
            files = self.rollouts.state()
            self.checkpoints.save(
                self.student,
                step=self.step,
                extra=extra,
                files=files,
                # The run may go on under another layout: it ends here, or was asked to.
                sharding=ANY_LAYOUT if wait else self.config.run.checkpoint_sharding,
            )
            if wait:
                self.checkpoints.wait()

    def poll_save(self) -> None:
        """Complete the checkpoint in flight, if its files are written."""
        with self.clock("checkpoint"):
            self.checkpoints.poll()

    def elapsed(self) -> float:
        """Seconds of the job over all its resumptions."""
        return self.seconds_before + time.monotonic() - started_at()

    def _warn(self, message: str) -> None:
        print(message, flush=True)
        print(f"tropd: {message}", file=self.console)

    def finish(self) -> None:
        """Last evaluation, last checkpoint, HF export, summary."""
        self.evaluate()
        self.save(wait=True)
        with self.clock("export"):
            self.export_student(self.folder.student)
        if self.is_main:
            write_json(self.folder.summary, self._summary())
        dist.barrier()

    def export_student(self, out: Path) -> None:
        """Write the student as an HF folder on rank 0; collective."""
        weights.save_hf(
            self.student.model,
            self.inputs.student,
            out,
            self.ranks,
            padded_vocab_size=self._padded_vocab_size,
        )

    def _summary(self) -> dict[str, Any]:
        parallel_config = self.config.parallel
        return {
            **self.evaluator.summary(),
            "seconds": round(self.elapsed(), 1),
            "steps": self.step,
            "world_size": self.ranks.world_size,
            "tensor_parallel": parallel_config.tensor,
            "pipeline_parallel": parallel_config.pipeline,
            "data_parallel": parallel_config.data,
            "seed": self.config.train.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "loss": loss_name(self.config.loss),
            "student": str(self.folder.student),
        }


def _leave_groups(kind: type[BaseException] | None, *_: object) -> None:
    # After an error other ranks may wait for us in a collective. The end of this process frees
    # them; freed earlier, they would report the lost connection before we report its cause.
    if kind is None:
        parallel.shutdown()


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3g}"
