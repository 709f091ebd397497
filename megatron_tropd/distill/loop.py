"""The training loop: rollout, teacher, student, weights back to the engine. Runs on every rank."""

from functools import partial
from typing import IO

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.base.progress import Progress, StopFlag
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.distill.job import Job
from megatron_tropd.distill.metrics import trajectory_metrics
from megatron_tropd.distill.step import StepResult, learn


def train(folder: RunFolder, *, console: IO[str], stop: StopFlag, progress: Progress) -> None:
    """Train the student of the run in ``folder`` to its last step, or until ``stop``.

    Args:
        folder: an opened run folder.
        console: where rank 0 shows progress.
        stop: looked at after every step; a requested stop saves a checkpoint and returns.
        progress: tells the watchdog where this rank is.

    Raises:
        ConfigError, InputError: the run cannot start.
        TrainingError: it cannot go on; the last complete checkpoint is intact.
    """
    with Job(folder, console=console, stop=stop, progress=progress) as job:
        steps = job.config.train.steps
        job.resume()
        if job.step == 0:
            job.evaluate()
        while job.step < steps and not job.stopping():
            try:
                train_step(job)
            except TrainingError as error:
                if not job.stopped_without_samples(error):
                    raise
                break
            job.poll_save()
            if job.due(job.config.evaluation.every):
                job.evaluate()
            if job.due(job.config.run.checkpoint_every):
                job.save()
        if job.step == steps:
            job.finish()
        elif job.step:
            job.save(wait=True)


def train_step(job: Job) -> None:
    """One optimizer step, from prompts to new weights in the engine."""
    step, clock = job.step, job.clock
    with clock("rollout"):
        trajectories = rollout(job)
    told = job.aside(partial(trajectory_metrics, trajectories, step=step))
    # All ranks have just met; a crash from here on finds the checkpoint of the step before.
    job.poll_save()
    metrics = taught(job, trajectories).metrics
    job.poll_save()
    with clock("sync"):
        job.sync_weights(step + 1)
    metrics |= {
        "prefix_alpha": job.prefix_alpha(),
        **(told.result() if told else {}),
    }
    job.log(metrics)
    job.step += 1


def rollout(job: Job) -> list[TokenSequence]:
    """The trajectories of this step, from the engines' newest weights.

    With ``rollout.steps_ahead`` they were asked for a step ago, and the next step's are asked for
    now, to be sampled while this one trains.
    """
    job.rollouts.begin(job.step)
    trajectories = job.rollouts.collect()
    ahead = job.step + job.config.rollout.steps_ahead
    if job.step < ahead < job.config.train.steps:
        job.rollouts.begin(ahead)
    return trajectories


def taught(job: Job, trajectories: list[TokenSequence]) -> StepResult:
    """Learn from the step's trajectories; tell what there is to tell of it."""
    rows = job.example_rows()
    try:
        result = learn(job.step_parts(), trajectories, job.step, example_rows=rows)
    except TrainingError as error:
        if error.kind == "training":
            error.args = (f"{error} {job.last_checkpoint()}",)
        raise
    if not result.counts.teacher + result.counts.student:
        print(f"step {job.step + 1}: every token is masked, so there is no loss", flush=True)
    if result.update.skipped and job.is_main:
        job.warn(
            f"step {job.step + 1}: the gradient norm is {result.update.grad_norm:.4g}, above "
            "megatron.optimizer.grad_norm_skip_threshold: the weights stay as they were."
        )
    job.keep_examples(result.examples, trajectories)
    return result
