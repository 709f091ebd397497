"""The story of a run on every rank: open, resume, step, evaluate, save, finish."""

import time
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from megatron_tropd.base.environment import number
from megatron_tropd.base.errors import TrainingError
from megatron_tropd.base.files import write_json
from megatron_tropd.base.progress import Progress, StopFlag, failed_phase
from megatron_tropd.config.loss import loss_name
from megatron_tropd.config.run import TEACHER
from megatron_tropd.config.run_folder import RunFolder, started_at
from megatron_tropd.data.prefixes import alpha
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.distill.metrics import sequence_metrics
from megatron_tropd.distill.pair import send_weights
from megatron_tropd.distill.session import Session, open_session
from megatron_tropd.distill.step import StepResult, learn
from megatron_tropd.distill.teaching import teach
from megatron_tropd.mcore import models
from megatron_tropd.mcore.checkpoint import ANY_LAYOUT
from megatron_tropd.mcore.export import save_adapter, save_hf
from megatron_tropd.mcore.lora import LoraModel


def train(folder: RunFolder, *, console: IO[str], stop: StopFlag, progress: Progress) -> None:
    """Train the student of the run in ``folder`` to its last step, or until ``stop``.

    On the ranks of a separate teacher: score for those that train.

    Args:
        stop: looked at after every step; a requested stop saves a checkpoint and returns.
        progress: tells the watchdog where this rank is.

    Raises:
        ConfigError, InputError: the run cannot start.
        TrainingError: it cannot go on; the last complete checkpoint is intact.
    """
    if folder.read_config().teaches(number("RANK", 0)):
        teach(folder, progress=progress)
        return
    with open_session(folder, console=console, stop=stop, progress=progress) as run:
        steps = run.config.train.steps
        resume(run)
        if progress.step == 0 and run.config.evaluation.before:
            evaluate(run)
        while progress.step < steps and not stopping(stop):
            try:
                train_step(run)
            except TrainingError as error:
                if not stopped_without_samples(run, error):
                    raise
                break
            poll_save(run)
            if due(run, run.config.evaluation.every):
                evaluate(run)
            if due(run, run.config.run.checkpoint_every):
                save(run)
        if progress.step == steps:
            finish(run)
        elif progress.step:
            save(run, wait=True)


def resume(run: Session) -> None:
    """Take up the newest complete checkpoint, or the HF weights; fill the engines."""
    progress = run.progress
    extra = run.checkpoints.load_newest(run.parts.student)
    if extra is not None:
        progress.step, progress.seconds_before = extra["step"], extra["seconds"]
        run.rollouts.restore(run.checkpoints.folder / f"step_{progress.step:06d}")
    run.reporter.take_up(progress.step, resumed=extra is not None)
    sync_weights(run, progress.step)
    run.reporter.begin(progress.step)
    progress.enter("between phases")


def train_step(run: Session) -> None:
    """One optimizer step, from prompts to new weights in the engine."""
    step, reporter = run.progress.step, run.reporter
    with reporter.clock("rollout"):
        sequences = rollout(run)
    told = reporter.aside(partial(sequence_metrics, sequences, step=step, tasks=run.inputs.tasks))
    # All ranks have just met; a crash from here on finds the checkpoint of the step before.
    poll_save(run)
    result = learn_from(run, sequences)
    poll_save(run)
    with reporter.clock("sync"):
        sync_weights(run, step + 1)
    longest = alpha(step, run.config.train.steps, run.config.guidance.schedule)
    metrics = result.metrics | {
        "prefix_alpha": 0.0 if run.inputs.responses is None else longest,
        "max_new_tokens": run.config.rollout.new_tokens_at(step),
    }
    metrics |= told.result() if told else {}
    reporter.write_step(step + 1, metrics, run.evaluator.shown)
    run.progress.step += 1


def rollout(run: Session) -> list[TokenSequence]:
    """The sequences of this step, from the engines' newest weights.

    With ``rollout.steps_ahead`` they were asked for a step ago, and the next step's are asked for
    now, to be sampled while this one trains.
    """
    step = run.progress.step
    run.rollouts.begin(step)
    sequences = run.rollouts.collect()
    ahead = step + run.config.rollout.steps_ahead
    if step < ahead < run.config.train.steps:
        run.rollouts.begin(ahead)
    return sequences


def learn_from(run: Session, sequences: list[TokenSequence]) -> StepResult:
    """Learn from the step's sequences, and tell what there is to tell of it."""
    step, reporter = run.progress.step, run.reporter
    try:
        result = learn(run.parts, sequences, step, example_rows=reporter.example_rows(step))
    except TrainingError as error:
        if error.kind == "training":
            error.args = (f"{error} {last_checkpoint(run)}",)
        raise
    if not result.counts.total:
        print(f"step {step + 1}: every token is masked, so there is no loss", flush=True)
    if result.update.skipped and run.layout.is_main:
        reporter.say(
            f"step {step + 1}: the gradient norm is {result.update.grad_norm:.4g}, above "
            "megatron.optimizer.grad_norm_skip_threshold: the weights stay as they were."
        )
    reporter.keep_examples(step, result.examples, sequences)
    return result


def last_checkpoint(run: Session) -> str:
    """Say where a failed run can start again."""
    steps = run.checkpoints.steps()
    where = run.folder.checkpoints
    return f"Last good checkpoint: {where}/step_{steps[-1]:06d}." if steps else "No checkpoint."


def sync_weights(run: Session, version: int) -> None:
    """Stream the student's weights, seen ``version`` steps, to every engine."""
    send_weights(run.parts, run.engines.channel, version=version)


def due(run: Session, every: int) -> bool:
    """Whether something done every ``every`` steps comes after this step (the last: later)."""
    step = run.progress.step
    return bool(every) and step % every == 0 and step < run.config.train.steps


def stopping(stop: StopFlag) -> bool:
    """Whether any rank was asked to stop. Collectives: one all-reduce of [1]."""
    # On the host, over gloo: nobody waits for a GPU to be told.
    flag = torch.tensor([int(stop.requested)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def stopped_without_samples(run: Session, error: TrainingError) -> bool:
    """Whether the run was asked to stop and its engines, asked too, left before it had samples.

    Nothing of the step was done then, and the steps before it can be saved. Not so with
    ``rollout.steps_ahead``: samples of older weights belong to that state and are lost.

    Collectives: one all-reduce of [1] if engines failed in a rollout, as they do on every rank.
    """
    lost = error.kind == "engine" and failed_phase(error) == "rollout"
    if not lost or run.config.rollout.steps_ahead or not stopping(run.stop):
        return False
    run.rollouts.forget()
    return True


def evaluate(run: Session) -> None:
    """Measure the student on the held-out problems."""
    run.reporter.settle()
    with run.reporter.clock("evaluation"):
        run.evaluator.measure_student(
            run.engines,
            step=run.progress.step,
            export=partial(export_student, run),
            teacher=run.hf_folders.get(TEACHER),
        )


def save(run: Session, *, wait: bool = False) -> None:
    """Begin a checkpoint of the steps done so far; ``wait``: until it is complete."""
    run.reporter.settle()
    with run.reporter.clock("checkpoint"):
        extra = {"step": run.progress.step, "seconds": elapsed(run)}
        run.checkpoints.save(
            run.parts.student,
            step=run.progress.step,
            extra=extra,
            files=run.rollouts.state(),
            # The run may go on under another layout: it ends here, or was asked to.
            sharding=ANY_LAYOUT if wait else run.config.run.checkpoint_sharding,
        )
        if wait:
            run.checkpoints.wait()


def poll_save(run: Session) -> None:
    """Complete the checkpoint in flight, if its files are written."""
    with run.reporter.clock("checkpoint"):
        run.checkpoints.poll()


def elapsed(run: Session) -> float:
    """Seconds of the run over all its resumptions."""
    return run.progress.seconds_before + time.monotonic() - started_at()


def finish(run: Session) -> None:
    """Last evaluation, last checkpoint, HF export, summary."""
    if run.config.evaluation.after:
        evaluate(run)
    save(run, wait=True)
    with run.reporter.clock("export"):
        export_student(run, run.folder.student)
        student = run.parts.student.model
        if isinstance(student, LoraModel):
            save_adapter(student, run.hf_folders["student"], run.folder.adapter)
    if run.layout.is_main:
        write_json(run.folder.summary, summary(run))
    dist.barrier()


def export_student(run: Session, out: Path) -> None:
    """Write the student as an HF folder on rank 0; collective."""
    save_hf(run.parts.student.model, run.inputs.student, out)


def summary(run: Session) -> dict[str, Any]:
    """What summary.json holds."""
    config = run.config
    return {
        **run.evaluator.summary(),
        "seconds": round(elapsed(run), 1),
        "steps": run.progress.step,
        "world_size": run.layout.world_size,
        "tensor_parallel": config.parallel.tensor,
        "context_parallel": config.parallel.context,
        "pipeline_parallel": config.parallel.pipeline,
        "data_parallel": config.parallel.data,
        "seed": config.train.seed,
        "dtype": str(models.resolve_dtype(config.model.dtype)).removeprefix("torch."),
        "loss": loss_name(config.loss),
        "student": str(run.folder.student),
    }
