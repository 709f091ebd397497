"""The first steps of a run, in which another distribution than the student's samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

from megatron_tropd.config import RolloutConfig
from megatron_tropd.data.samples import Blend, Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines.interface import SamplingEngines
from megatron_tropd.rollout.weights.interface import NamedTensor, WeightChannel


def sampling_of_step(
    rollout: RolloutConfig, step: int, *, stops: Sequence[int], shared_stops: Sequence[int] = ()
) -> Sampling:
    """How the responses of a step are sampled.

    Args:
        rollout: says from what, and how fast that becomes the student.
        step: 0-based.
    """
    temperature, blend = rollout.temperature, None
    left = warmup_left(rollout, step)
    if rollout.behaviour == "cooled":
        temperature -= left * (rollout.temperature - rollout.warmup_temperature)
    elif left and rollout.asks_teacher:
        far = {"blended": rollout.epsilon, "mixture": rollout.teacher_share}
        blend = Blend(
            rollout.behaviour,  # type: ignore[arg-type]
            strength=left * far.get(rollout.behaviour, 0.0),
            top_k=rollout.teacher_top_k,
            stops=tuple(shared_stops),
        )
    return Sampling(
        temperature=temperature, top_p=rollout.top_p, stop_token_ids=tuple(stops), blend=blend
    )


def warmup_left(rollout: RolloutConfig, step: int) -> float:
    """How much of the warm-up is left in a step: 1 at first, 0 when it is over.

    Source: epsilon_k = epsilon_0 (1 - k / K) of TRB, arXiv 2605.31159.
    """
    if step >= rollout.warmup_steps:
        return 0.0
    return 1.0 if rollout.warmup_schedule == "constant" else 1 - step / rollout.warmup_steps


class WarmupEngines:
    """The student's engines, and during the warm-up engines that hold student and teacher.

    They are :class:`~megatron_tropd.rollout.engines.interface.SamplingEngines`. What asks for a
    ``Sampling.blend`` goes to the latter, everything else to the former, so evaluations are those
    of a run without a warm-up. Both sample from requests and weights alone: a resumed run, which
    starts them again, gets the same samples.
    """

    def __init__(
        self,
        student: SamplingEngines,
        open_blended: Callable[[], SamplingEngines],
        warmup_steps: int,
    ) -> None:
        """Start nothing yet.

        Args:
            open_blended: starts the others, on the same ranks; collective.
            warmup_steps: from these weights on only the student samples.
        """
        self._student, self._open_blended = student, open_blended
        self._blended: SamplingEngines | None = None
        self._warmup_steps = warmup_steps
        self._exit = ExitStack()
        self._asked: SamplingEngines = student
        self.channel: WeightChannel = _WarmupChannel(self)

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        """Give all engines weights; those of the warm-up start and end here. Collective."""
        self._student.channel.send(tensors, version)
        if version >= self._warmup_steps:
            self._close_blended()
            return
        if self._blended is None:
            self._blended = self._exit.enter_context(self._open_blended())
        self._blended.channel.send(tensors, version)

    @property
    def student_channel(self) -> WeightChannel:
        """The way to the student's engines."""
        return self._student.channel

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Keep the memory of all engines."""
        with self._student.awake():
            if self._blended is None:
                yield
                return
            with self._blended.awake():
                yield

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """As the protocol says."""
        return self._engines(sampling).generate(requests, sampling)

    def start(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """As the protocol says."""
        self._asked = self._engines(sampling)
        self._asked.start(requests, sampling)

    def finish(self) -> list[Sample]:
        """As the protocol says."""
        return self._asked.finish()

    def arrived(self) -> list[Sample] | None:
        """As the protocol says."""
        return self._asked.arrived()

    def __enter__(self) -> Self:
        self._student.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._close_blended()
        self._student.__exit__(*error)

    def _engines(self, sampling: Sampling) -> SamplingEngines:
        if sampling.blend is None:
            return self._student
        assert self._blended is not None, "a blend was asked for after the warm-up"
        return self._blended

    def _close_blended(self) -> None:
        self._exit.close()
        self._blended = None


class _WarmupChannel:
    """The way of weights to all engines of a warm-up."""

    def __init__(self, engines: WarmupEngines) -> None:
        self._engines = engines

    @property
    def receivers(self) -> tuple[int, ...]:
        """The owners of engines; those of the warm-up have the same."""
        return self._engines.student_channel.receivers

    @property
    def version(self) -> int:
        """Of the student's engines."""
        return self._engines.student_channel.version

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        """Give every engine the weights."""
        self._engines.send(tensors, version)
