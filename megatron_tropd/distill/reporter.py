"""What a rank tells of a run: seconds of phases, the bar, records, examples, warnings."""

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, Any, Self

import torch
from tqdm import tqdm

from megatron_tropd.base.files import replace_text
from megatron_tropd.base.progress import Progress, failed_in
from megatron_tropd.config import Config, config_to_dict
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.distill.examples import example_line, example_rows, gather_examples
from megatron_tropd.distill.inputs import Inputs
from megatron_tropd.distill.step_records import Examples
from megatron_tropd.report.metrics import MetricsLog
from megatron_tropd.report.timeline import Timeline
from megatron_tropd.tasks.grading import grader_of


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self, progress: Progress, timeline: Timeline | None = None) -> None:
        """Start the first step; ``progress`` is told every phase, ``timeline`` its times."""
        self._progress, self._timeline = progress, timeline
        self._seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to ``phase``; an error in it carries the phase."""
        start, outer = time.perf_counter(), self._progress.enter(phase)
        try:
            with self._drawn(phase):
                yield
                # Not after an error: a broken device would raise here and hide the cause.
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        except BaseException as error:
            failed_in(error, phase)
            raise
        finally:
            self._seconds[phase] += time.perf_counter() - start
            self._progress.enter(outer)

    def _drawn(self, phase: str) -> AbstractContextManager[None]:
        if self._timeline is None:
            return nullcontext()
        return self._timeline.phase(phase, self._progress.step + 1)

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, by phase and in total; starts the next."""
        now = time.perf_counter()
        lap = {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        lap["seconds_total"] = now - self._start
        self._seconds.clear()
        self._start = now
        return lap


def peak_memory_gib() -> float:
    """Peak device memory of this rank; without CUDA its peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def say(console: IO[str], message: str) -> None:
    """Tell the user something, and the rank's log."""
    print(message, flush=True)
    print(f"tropd: {message}", file=console)


class Reporter:
    """What rank 0 shows and writes of a run; the others measure seconds. A context manager."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        folder: RunFolder,
        *,
        console: IO[str],
        progress: Progress,
        is_main: bool,
    ) -> None:
        """Open the logs; nothing is written yet."""
        drawn = is_main and config.teacher.ranks is not None
        self.clock = Clock(progress, Timeline(folder.root, "student") if drawn else None)
        self.log = _open_log(config, folder) if is_main else None
        self._config, self._inputs, self._folder = config, inputs, folder
        self._console, self._is_main = console, is_main
        self._bar: tqdm | None = None
        self._aside = ThreadPoolExecutor(1, "aside")
        self._examples: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar and the logs; what is being written is completed."""
        if self._bar is not None:
            self._bar.close()
        if self.log is not None:
            self.log.close()
        self._aside.shutdown(cancel_futures=True)

    def say(self, message: str) -> None:
        """Tell the user something."""
        say(self._console, message)

    def aside[T](self, action: Callable[[], T]) -> "Future[T] | None":
        """Do something for the records beside the step, on rank 0; None on the others.

        ``action`` must not be collective. Actions are done one after the other.
        """
        return self._aside.submit(action) if self._is_main else None

    def take_up(self, step: int, *, resumed: bool) -> None:
        """Drop the records of steps that the run has lost.

        Args:
            resumed: whether they are those of a checkpoint.
        """
        if self.log is None:
            return
        # Before the first step nothing but the teacher's evaluation is kept.
        # The last evaluation comes before the last save and is made again with the summary.
        at_the_end = step == self._config.train.steps
        self.log.truncate_after(
            step if resumed else -1,
            evaluations=step - 1 if at_the_end else None,
        )

    def begin(self, step: int) -> None:
        """Show the bar and start the clock of the next step."""
        self._bar = tqdm(
            total=self._config.train.steps,
            initial=step,
            desc="distil",
            unit="step",
            file=self._console,
            disable=not self._is_main,
            dynamic_ncols=True,
        )
        self.clock.lap()

    def write_step(self, step: int, metrics: dict[str, Any], shown: Mapping[str, str]) -> None:
        """Write the metrics of a step that just ended and move the bar.

        Args:
            step: 1-based.
            shown: further results for the bar.
        """
        lap = self.clock.lap()
        tokens = sum(metrics.get(f"tokens_{who}", 0) for who in ("student", "teacher", "golden"))
        record = {
            "step": step,
            **metrics,
            "tokens_per_second": tokens / lap["seconds_total"],
            **lap,
            "peak_memory_gib": peak_memory_gib(),
        }
        if self.log is not None:
            self.log.write(record)
        if self._bar is not None:
            self._bar.set_postfix(_postfix(record, shown), refresh=False)
            self._bar.update()

    def example_rows(self, step: int) -> list[int]:
        """Sequences of a step that are dumped: of the first step, the last, every n-th."""
        every, rollout = self._config.run.trajectories_every, self._config.rollout
        if not every or (step % every and step != self._config.train.steps - 1):
            return []
        samples = rollout.prompts_per_step * rollout.samples_per_prompt
        return example_rows(samples, rollout.samples_per_prompt, self._config.run.num_trajectories)

    def keep_examples(self, step: int, mine: Examples, sequences: Sequence[TokenSequence]) -> None:
        """Begin to write the examples of a step, if there are any; collective.

        Args:
            step: 0-based.
        """
        if not self.example_rows(step):
            return
        examples = gather_examples(mine)
        if not self._is_main:
            return
        self.settle()
        path = self._folder.trajectories / f"step_{step:06d}.jsonl"
        graders = [grader_of(each) for each in self._config.graders]

        def write() -> None:
            lines = [
                example_line(self._inputs, sequences[row], values, graders)
                for row, values in sorted(examples.items())
            ]
            path.parent.mkdir(exist_ok=True)
            replace_text(path, "".join(lines))

        self._examples = self.aside(write)

    def settle(self) -> None:
        """Wait for the dump that is being written: no checkpoint is made before its examples."""
        if self._examples is not None:
            self._examples.result()
            self._examples = None


def _open_log(config: Config, folder: RunFolder) -> MetricsLog:
    return MetricsLog(
        folder.root,
        tensorboard=config.run.tensorboard,
        wandb_project=config.run.wandb_project,
        config=config_to_dict(config),
    )


def _postfix(record: dict[str, Any], shown: Mapping[str, str]) -> dict[str, str]:
    """What the bar shows of a step."""
    values = {"kl": record["reverse_kl"], "outliers": record["outlier_share"]}
    text = {name: f"{value:.3f}" for name, value in values.items() if value is not None}
    return {**text, **shown, "tok/s": f"{record['tokens_per_second']:.0f}"}
