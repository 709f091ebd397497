"""The fastest layout that fits: every one with all that saves memory, best first."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import count
from math import inf
from typing import Literal

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import LoraConfig, RolloutConfig, TeacherConfig
from megatron_tropd.config.run import SELF
from megatron_tropd.convert.sizes import stage_chunks
from megatron_tropd.planning.communication import communication
from megatron_tropd.planning.estimate import Estimate, estimate, layout_name
from megatron_tropd.planning.layouts import apart, colocated, laid_out, usable
from megatron_tropd.planning.memory import Memory, beside, engine_memory, fullest_stages
from megatron_tropd.planning.options import Options, Savings, can_be_rehearsed, effort
from megatron_tropd.planning.planned_run import PlannedRun
from megatron_tropd.planning.seconds import fewest_seconds, rollout_seconds, seconds

_EQUAL = 0.05
"""Estimates that differ by less than this share count as equal; the simpler layout is taken."""
_COMPARED = 2.0
"""Times the fastest: layouts that cannot be faster than this are not looked at."""
_MOST_SPLITS = 8
"""Ways to divide the nodes between trainer and engines that are looked at."""
_CONTEXT_EFFORT, _VIRTUAL_EFFORT, _ELSEWHERE_EFFORT = 2, 1, 2
"""Of context parallelism, virtual stages and a teacher in a layout of its own, beside that of what
saves memory."""
_RECOMPUTED = {"none": "nothing", "selective": "modules", "block": "some layers", "uniform": "all"}
_TEACHER = {"none": "on the GPU", "host": "on the host", "host_by_layer": "on the host by layer"}
_Labels = dict[str, str]
"""Choice -> value."""


@dataclass(frozen=True)
class Choice:
    """One thing that the search decides: the fastest that fits with each of its values."""

    name: str
    taken: str
    """Of the recommended layout."""
    seconds: dict[str, float | None]
    """Value -> seconds of a step; None: nothing fits that takes less than twice the fastest's."""


@dataclass(frozen=True)
class Recommendation:
    """The layout to use, or the one that lacks least."""

    best: Estimate
    why: str
    choices: list[Choice] = field(default_factory=list)
    """What was tried; empty if nothing fits."""
    other: Estimate | None = None
    """The best layout with the other ``rollout.steps_ahead``, where there is one that fits."""
    adapters: Estimate | None = None
    """The best layout with ``[model.lora]`` as it is by default, if one fits; None beside adapters
    of the config's own."""


def recommend(run: PlannedRun, gpus: int) -> Recommendation:
    """Rank every layout of a number of GPUs by its expected seconds per step.

    Tensor and context parallelism stay within a node, sequence parallelism goes with the first, the
    optimizer is sharded wherever there are replicas. Each layout is looked at with every
    combination of recomputation, a teacher on the host and an optimizer on the host. Engines are
    either colocated, each GPU belonging to one, or have whole nodes of their own. Everything else
    is as configured. What changes what is learnt, and not only how fast, is named beside: the best
    layout with the other ``rollout.steps_ahead``, and with adapters. An optimizer or activations on
    the host need Transformer Engine, which no rehearsal runs: they are taken if nothing fits
    without. Of layouts whose estimates differ by less than 5 % the one with the fewest options and
    the least parallelism is taken.

    Raises:
        ConfigError: the trainer would accept no layout of so many GPUs.
    """
    ahead = run.rollout.steps_ahead
    asked = _Search(run, gpus, ahead, explain=True)
    other = _Search(run, gpus, 0 if ahead else 1)
    searched = asked if asked.looked_at else other
    if not searched.looked_at:
        raise ConfigError(
            f"No layout of {gpus} GPUs divides the two models and the "
            f"{run.work.trajectories} trajectories of a step. Choose another number of GPUs."
        )
    beside = other.best if searched is asked else None
    adapters = _with_adapters(run, gpus)
    if searched.best is None:
        return Recommendation(*searched.nearest(), other=beside, adapters=adapters)
    return Recommendation(
        searched.best, searched.why(), searched.choices(), other=beside, adapters=adapters
    )


def _with_adapters(run: PlannedRun, gpus: int) -> Estimate | None:
    """The best layout of the same run with adapters; None if it has its own, or none fits."""
    # With adapters the student is its own teacher without a copy: another run.
    if run.lora is not None or any(t.config.teacher.placement == SELF for t in run.teachers):
        return None
    model = replace(run.config.model, lora=LoraConfig())
    adapted = replace(run, config=replace(run.config, model=model))
    return _Search(adapted, gpus, run.rollout.steps_ahead).best


class _Search:
    """Layouts with their ways to save memory, in the order of what they can take at least.

    It ends as soon as no layout that is left can be as fast as what was found, give or take 5 %; to
    explain the choice, as soon as none can be less than twice as slow.
    """

    def __init__(
        self, run: PlannedRun, gpus: int, ahead: Literal[0, 1], *, explain: bool = False
    ) -> None:
        self.looked_at = 0
        """Layouts."""
        self._usable = run.hardware.usable_bytes
        self._fitting: list[Estimate] = []
        self._short: list[Estimate] = []
        """What needs fewest bytes of each layout that does not fit."""
        self._by_value: dict[tuple[str, str], float] = {}
        """(choice, value) -> fewest seconds."""
        self._ways = 0
        self._search(run, gpus, ahead, explain=explain)

    def _search(self, run: PlannedRun, gpus: int, ahead: Literal[0, 1], *, explain: bool) -> None:
        fastest = inf
        for candidate in _in_order(run, gpus, ahead):
            if candidate.bound > fastest * (_COMPARED if explain else 1 + _EQUAL):
                return
            self.looked_at += 1
            self._ways = max(self._ways, len(candidate.ways))
            for key in (*candidate.labels.items(), *candidate.choices):
                self._by_value.setdefault(key, inf)
            if candidate.least.peak > self._usable:
                self._short.append(candidate.least)
                continue
            for number in range(len(candidate.ways)):
                if not self._promises(candidate, number, fastest, explain=explain):
                    continue
                one = candidate.estimate(number)
                if one.fits:
                    self._fitting.append(one)
                    self._note(candidate.labels | candidate.ways[number][1], one.seconds.total)
                    if can_be_rehearsed(one.run.options):
                        fastest = min(fastest, one.seconds.total)

    def _note(self, labels: _Labels, seconds: float) -> None:
        for key in labels.items():
            self._by_value[key] = min(self._by_value[key], seconds)

    def _promises(
        self, candidate: "_Candidate", number: int, fastest: float, *, explain: bool
    ) -> bool:
        """Whether a way may fit, and be as fast as the fastest, or as what is known of its values.

        Cheap questions first.
        """
        labels = (candidate.labels | candidate.ways[number][1]).items()

        def may_count(bound: float) -> bool:
            if bound <= fastest * (1 + _EQUAL):
                return True
            within = explain and bound <= fastest * _COMPARED
            return within and any(self._by_value[key] > bound for key in labels)

        return (
            may_count(candidate.bound)
            and all(candidate.least_with(key).peak <= self._usable for key in labels)
            and may_count(candidate.bound_of(number))
        )

    @cached_property
    def best(self) -> Estimate | None:
        """The simplest of the layouts that are as fast as the fastest."""
        if not self._fitting:
            return None
        limit = self._fastest.seconds.total * (1 + _EQUAL)
        equal = [one for one in self._preferred if one.seconds.total <= limit]
        return min(equal, key=lambda one: (_complexity(one.run), one.seconds.total))

    @cached_property
    def _preferred(self) -> list[Estimate]:
        """Those that fit by means that a rehearsal confirms; if there are none, all that fit."""
        return [e for e in self._fitting if can_be_rehearsed(e.run.options)] or self._fitting

    @cached_property
    def _fastest(self) -> Estimate:
        return min(self._preferred, key=lambda one: one.seconds.total)

    def why(self) -> str:
        """Why the best is the best."""
        best, fastest = self.best, self._fastest
        assert best is not None
        which = "the fastest that fits"
        if min(one.seconds.total for one in self._fitting) < fastest.seconds.total:
            which += " and can be rehearsed"
        if best is not fastest:
            slower = 100 * (best.seconds.total / fastest.seconds.total - 1)
            name = layout_name(fastest.run)
            which = f"within {slower:.1f} % of {which} ({name}) and simpler"
        return (
            f"{which}; {self.looked_at} layouts were tried, each with up to {self._ways} ways to "
            "save memory; others cannot be as fast"
        )

    def choices(self) -> list[Choice]:
        """What was tried of each kind, and how fast it is at best."""
        assert self.best is not None
        taken = _labels_of_layout(self.best.run) | _labels_of_options(self.best.run.options)
        found = [Choice(name, value, {}) for name, value in taken.items()]
        most = _COMPARED * self._fastest.seconds.total
        for choice in found:
            values = [value for name, value in self._by_value if name == choice.name]
            for value in sorted(values, key=lambda v: int(v) if v.isdigit() else 0):
                took = self._by_value[choice.name, value]
                choice.seconds[value] = took if took <= most else None
        return [choice for choice in found if len(choice.seconds) > 1]

    def nearest(self) -> tuple[Estimate, str]:
        """The layout that lacks least, if none fits."""
        nearest = min(self._short, key=lambda one: one.peak)
        return nearest, (
            f"none of {self.looked_at} layouts fits, whatever is computed again or offloaded; this "
            f"one needs least: {nearest.obstacle}. Take more GPUs, or lower "
            "train.tokens_per_micro_batch and rollout.max_new_tokens"
        )


@dataclass(frozen=True)
class _Engines:
    """Engines that a layout may have beside it. How fast they are depends on them alone."""

    rollout: RolloutConfig
    seconds: float
    bytes: float
    """On each of their GPUs."""


class _Candidate:
    """A layout of the trainer, engines beside it, and all ways to save memory."""

    def __init__(self, run: PlannedRun, engines: list[_Engines]) -> None:
        self.ways, self.choices = _ways(_savings(run), run.options)
        self.labels = _labels_of_layout(run)
        self._run, self._engines = run, engines
        self._made: dict[int, Estimate] = {}
        self._bounds: dict[int, float] = {}

    @cached_property
    def bound(self) -> float:
        """Seconds of a step if memory were no matter: nothing that saves some is faster."""
        return self.bound_of(0)

    def bound_of(self, number: int) -> float:
        """Seconds of a way to save memory, with the fastest engines, whether they fit or not."""
        if number not in self._bounds:
            fastest = min(self._engines, key=lambda one: one.seconds, default=None)
            rollout = fastest.rollout if fastest else self._run.rollout
            one = replace(self._run, options=self.ways[number][0], rollout=rollout)
            self._bounds[number] = seconds(one, communication(one)).total
        return self._bounds[number]

    @property
    def least(self) -> Estimate:
        """Of all ways the one that needs the fewest bytes."""
        return self.estimate(len(self.ways) - 1)

    def least_with(self, choice: tuple[str, str]) -> Estimate:
        """The same of all ways that choose so; what no way chooses, the layout has."""
        return self.estimate(self.choices.get(choice, len(self.ways) - 1))

    def estimate(self, number: int) -> Estimate:
        """With one of the ways to save memory, and the engines that then have room."""
        if number not in self._made:
            one = replace(self._run, options=self.ways[number][0])
            stages = fullest_stages(one)
            one = replace(one, rollout=self._best_engines(one, stages))
            self._made[number] = estimate(one, beside(stages, one))
        return self._made[number]

    def _best_engines(self, one: PlannedRun, stages: list[Memory]) -> RolloutConfig:
        """Those that sample fastest in what the trainer leaves: the smallest that are as fast."""
        free = one.hardware.usable_bytes
        if not one.separate:
            free -= max(stage.resident for stage in stages)
        best, least = one.rollout, inf
        for engines in self._engines:
            if engines.seconds < least * (1 - _EQUAL) and engines.bytes <= free:
                best, least = engines.rollout, engines.seconds
        return best


@dataclass(frozen=True)
class _Group:
    """The layouts of a number of GPUs, beside some engines."""

    run: PlannedRun
    """One of them."""
    gpus: int
    """Of the trainer."""
    engines: list[_Engines]

    @property
    def bound(self) -> float:
        """Seconds of a step that no layout of the group can go below."""
        training = fewest_seconds(self.run)
        rollout = min((one.seconds for one in self.engines), default=0.0)
        beside = self.run.separate and self.run.rollout.steps_ahead
        return max(training, rollout) if beside else training + rollout

    def candidates(self) -> Iterator[_Candidate]:
        """All of them."""
        for one in laid_out(self.run, self.gpus, self.run.rollout):
            yield _Candidate(one, self.engines)


def _in_order(run: PlannedRun, gpus: int, ahead: Literal[0, 1]) -> Iterator[_Candidate]:
    """Every layout that the trainer accepts; those first that can be the fastest."""
    number = count()
    heap: list[tuple[float, int, _Group | _Candidate]] = [
        (group.bound, next(number), group) for group in _groups(run, gpus, ahead)
    ]
    heapq.heapify(heap)
    while heap:
        _, _, first = heapq.heappop(heap)
        if isinstance(first, _Candidate):
            yield first
            continue
        for candidate in first.candidates():
            heapq.heappush(heap, (candidate.bound, next(number), candidate))


def _groups(run: PlannedRun, gpus: int, ahead: Literal[0, 1]) -> Iterator[_Group]:
    """Engines on the trainer's GPUs, or on some whole nodes."""
    node = run.hardware.gpus_per_node
    all_nodes = gpus // node if gpus % node == 0 else 1
    step = -(-all_nodes // _MOST_SPLITS)
    beside = [
        (gpus - nodes * node, apart(run, nodes, ahead)) for nodes in range(step, all_nodes, step)
    ]
    if not ahead or run.hardware.layers == "cpu":
        beside.insert(0, (gpus, colocated(run, gpus, ahead)))
    for left, engines in beside:
        if one := next(laid_out(run, left, engines[0]), None):
            yield _Group(one, left, _timed(one, engines))


def _timed(one: PlannedRun, engines: list[RolloutConfig]) -> list[_Engines]:
    return [
        _Engines(rollout, rollout_seconds(run), engine_memory(run).total)
        for rollout, run in usable(one, engines)
    ]


def _savings(run: PlannedRun) -> Savings:
    """What a layout can do to save memory."""
    on_gpu = run.hardware.layers != "cpu"
    # Transformer Engine's copies in low precision would stay on the GPU, and a source of the user's
    # own says itself where its weights are.
    low = any(run.config.megatron.teacher.get(name) for name in ("fp8", "fp4"))
    loaded = [teacher.config.teacher for teacher in run.teachers if teacher.frozen]
    resident = bool(loaded) and all(t.placement in (TeacherConfig.placement, SELF) for t in loaded)
    p = run.parallel
    first = stage_chunks(run.student.shape.layers, p.pipeline, p.virtual_pipeline)[0][0]
    return Savings(
        layers=len(first),
        mixture=run.student.shape.experts is not None,
        offloads=on_gpu,
        teacher=on_gpu and resident and not low,
        one_teacher=len(loaded) == 1,
        optimizer=on_gpu and run.parallel.distributed_optimizer and run.element == 2,
    )


@lru_cache(maxsize=256)
def _ways(
    savings: Savings, configured: Options
) -> tuple[list[tuple[Options, _Labels]], dict[tuple[str, str], int]]:
    """Every way to save memory, and what it chooses; the last that chooses so, of every choice."""
    ways = [(way, _labels_of_options(way)) for way in savings.ways(configured)]
    return ways, {key: n for n, (_, labels) in enumerate(ways) for key in labels.items()}


def _labels_of_layout(run: PlannedRun) -> _Labels:
    p = run.parallel
    sizes = {"TP": p.tensor, "CP": p.context, "PP": p.pipeline, "VPP": p.virtual_pipeline}
    sizes["EP"] = p.expert
    own = run.scoring.parallel
    others = {
        "engines": "on nodes of their own" if run.separate else "colocated",
        "teacher in": f"TP {own.tensor} x PP {own.pipeline}" if run.elsewhere else "the same",
    }
    return {name: str(size) for name, size in sizes.items()} | others


def _labels_of_options(chosen: Options) -> _Labels:
    share = 100 * chosen.states.on_host
    return {
        "recomputed": _RECOMPUTED[chosen.recompute.method],
        "teacher": _TEACHER[chosen.teacher],
        "optimizer": f"{share:g} % on the host" if share else "on the GPU",
        "activations": "attention's on the host" if chosen.offload else "on the GPU",
    }


def _complexity(run: PlannedRun) -> tuple[bool, int, int]:
    p = run.parallel
    # Last, how many ranks a replica's weights are spread over.
    return (
        run.separate,
        effort(run.options)
        + _CONTEXT_EFFORT * (p.context > 1)
        + _ELSEWHERE_EFFORT * run.elsewhere
        + _VIRTUAL_EFFORT * (p.virtual_pipeline > 1),
        p.pipeline * max(p.tensor, p.shards_of_expert * p.expert),
    )
