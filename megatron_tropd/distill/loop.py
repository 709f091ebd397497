"""The training loop: rollout, teacher, student, weights back to the engine. Runs on every rank."""

from functools import partial
from typing import IO

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.base.progress import Progress, StopFlag
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.data.packing import count_loss_tokens, pack
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.distill.job import Job
from megatron_tropd.distill.metrics import trajectory_metrics
from megatron_tropd.mcore import platform


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
    metrics = learn(job, trajectories)
    job.poll_save()
    with clock("sync"):
        job.sync_weights(step + 1)
    metrics |= {
        "prefix_alpha": job.prefix_alpha(),
        "max_new_tokens": job.config.rollout.new_tokens_at(step),
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


def learn(job: Job, trajectories: list[TokenSequence]) -> dict[str, object]:
    """Score with the teacher, differentiate the loss, update the student.

    Args:
        job: the run.
        trajectories: the same list on every rank.

    Returns:
        The metrics of the step, equal on every rank.

    Raises:
        TrainingError: loss or gradient is not finite; the weights are unchanged.
    """
    config, ranks, clock = job.config, job.ranks, job.clock
    job.teacher.begin(job.step, trajectories)
    batches = [
        batch.to(job.device)
        for batch in pack(
            trajectories,
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            tokens_per_micro_batch=config.train.tokens_per_micro_batch,
            pad_multiple=config.pad_multiple,
            rounded_to=platform.row_multiple(),
            seed=config.train.seed,
            step=job.step,
            loss=config.loss,
        )
    ]
    counts = count_loss_tokens(trajectories, config.loss)
    with clock("teacher"):
        signals = job.teacher.signals(batches)
    with clock("student"):
        objective = job.objective(batches, signals, trajectories, counts)
        job.student.forward_backward(batches, objective)
        totals = objective.sums.reduce()
    job.check_finite(totals.first_bad_token, trajectories)
    metrics = totals.metrics()
    job.check_engine_gap(metrics, trajectories)
    with clock("optimizer"):
        update = job.update()
    job.keep_examples(objective, trajectories)
    return {
        **metrics,
        "masked_tokens": counts.masked,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "update_skipped": int(update.skipped),
    }
