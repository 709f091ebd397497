"""A plan as a table for a person, or as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_tropd.convert.families import describe
from megatron_tropd.planning.estimate import Estimate, layout_name
from megatron_tropd.planning.memory import Memory, cache_tokens, engine_memory
from megatron_tropd.planning.recommend import Recommendation
from megatron_tropd.planning.seconds import concurrent_sequences
from megatron_tropd.planning.setup import Setup

_ITEMS = {
    "student weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "teacher weights": "teacher_weights",
    "teacher hidden states": "teacher_hidden",
    "teacher forward pass": "teacher_forward",
    "activations": "activations",
    "backward pass": "backward",
    "loss": "loss",
    "engine weights": "engine_weights",
    "KV cache": "kv_cache",
}
_SENT = {
    "tensor parallel, teacher": "tensor_teacher",
    "tensor parallel, student": "tensor_student",
    "expert parallel, teacher": "expert_teacher",
    "expert parallel, student": "expert_student",
    "pipeline, teacher": "pipeline_teacher",
    "pipeline, student": "pipeline_student",
    "data parallel": "data",
    "weights to the engine": "weight_sync",
}
_PHASES = ("rollout", "teacher", "student", "optimizer", "sync")


@dataclass(frozen=True)
class Plan:
    """A config's own layout, and the recommended one."""

    asked: Estimate
    recommended: Recommendation


def plan_table(plan: Plan) -> str:
    """Aligned lines for a terminal."""
    made = plan.asked.made
    blocks = [
        "planned, not run: seconds are estimates from the rates below, bytes from the config.json "
        "of both models",
        _heading(made),
        _memory_block(plan.asked),
        _sent_block(plan.asked),
        _seconds_block(plan.asked),
        _recommended_block(plan),
    ]
    return "\n\n".join(blocks)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The same and more as plain values; bytes and seconds."""
    made = plan.asked.made
    return {
        "student": {
            "parameters": made.student.parameters,
            "describe": describe(made.student.config),
        },
        "teacher": {
            "parameters": made.teacher.parameters,
            "describe": describe(made.teacher.config),
        },
        "hardware": asdict(made.hardware),
        "step": asdict(made.work),
        "asked": _estimate_json(plan.asked),
        "recommended": _estimate_json(plan.recommended.best) | {"why": plan.recommended.why},
    }


def _estimate_json(one: Estimate) -> dict[str, Any]:
    rollout = one.made.rollout
    return {
        "parallel": asdict(one.made.parallel),
        "rollout": {
            "placement": rollout.placement,
            "num_engines": rollout.num_engines,
            "engine_tensor_parallel": rollout.engine_tensor_parallel,
            "engine_memory": rollout.engine_memory,
            "concurrent_sequences": concurrent_sequences(one.made),
        },
        "fits": one.fits,
        "memory_bytes": [asdict(s) | {"phases": s.phases, "peak": s.peak} for s in one.memory],
        "sent_bytes": asdict(one.communication),
        "seconds": asdict(one.seconds) | {"total": one.seconds.total},
    }


def _heading(made: Setup) -> str:
    h, work, world = made.hardware, made.work, made.parallel.world_size
    nodes = -(-world // h.gpus_per_node)
    rates = (
        f"{h.tflops:g} TFLOP/s x {h.achieved_flops:g} achieved; memory {h.memory_gb_s:g}, in a "
        f"node {h.intra_node_gb_s:g}, network {h.network_gb_s:g} GB/s x {h.achieved_bandwidth:g}"
    )
    step = (
        f"{work.trajectories} trajectories; prompt {work.prompt}, response "
        f"{work.mean_response:g} tokens on average, {work.longest_response} at most; "
        f"{work.micro_batches} micro-batches of up to {work.most_positions} positions per replica"
    )
    return _lines(
        [
            ("student", describe(made.student.config)),
            ("teacher", describe(made.teacher.config)),
            ("cluster", f"{nodes} x {min(world, h.gpus_per_node)} {h.name} of {h.memory_gb:g} GB"),
            ("rates", rates),
            ("step", step),
            ("layout", layout_name(made)),
            *([("servers", _servers(made))] if made.separate else []),
        ]
    )


def _servers(made: Setup) -> str:
    weights, cache = engine_memory(made)
    gpus = made.rollout.num_engines * made.rollout.engine_tensor_parallel
    return (
        f"{gpus} further GPUs, each with {weights / 1e9:.1f} GB of the student's weights and "
        f"{cache / 1e9:.1f} GB of cache"
    )


def _memory_block(one: Estimate) -> str:
    shown = _shown_stages(one.memory)
    rows = [["GB on each GPU", *(f"stage {stage.stage}" for stage in shown)]]
    for label, name in _ITEMS.items():
        rows.append([f"  {label}", *(_gb(getattr(stage, name)) for stage in shown)])
    for phase in shown[0].phases:
        rows.append([f"peak of {phase}", *(_gb(stage.phases[phase]) for stage in shown)])
    usable, total = one.made.hardware.usable_bytes, one.made.hardware.memory_gb
    verdict = "fits" if one.fits else "DOES NOT FIT"
    line = (
        f"{verdict}: {one.peak / 1e9:.1f} of {usable / 1e9:.1f} GB ({total:g} less "
        f"{100 * one.made.hardware.reserve:g} % reserve); the cache holds "
        f"{cache_tokens(one.made)} tokens, {concurrent_sequences(one.made)} sequences together"
    )
    return f"{_table(rows)}\n{line}"


def _shown_stages(stages: Sequence[Memory]) -> list[Memory]:
    """First, fullest and last."""
    fullest = max(stages, key=lambda stage: stage.peak)
    numbers = sorted({0, fullest.stage, len(stages) - 1})
    return [stages[number] for number in numbers]


def _sent_block(one: Estimate) -> str:
    rows = [["GB sent by each GPU in a step", ""]]
    for label, name in _SENT.items():
        if value := getattr(one.communication, name):
            rows.append([f"  {label}", _gb(value)])
    return _table(rows)


def _seconds_block(one: Estimate) -> str:
    rows = [["seconds of a step (estimates)", ""]]
    rows += [[f"  {name}", f"{getattr(one.seconds, name):.2f}"] for name in _PHASES]
    steps = one.made.config.train.steps
    overlap = ", rollout beside the rest" if one.seconds.steps_ahead else ""
    rows.append([f"  total{overlap}", f"{one.seconds.total:.2f}"])
    rows.append([f"hours of {steps} steps", f"{steps * one.seconds.total / 3600:.1f}"])
    return _table(rows)


def _recommended_block(plan: Plan) -> str:
    best = plan.recommended.best
    return _lines(
        [
            ("recommended", layout_name(best.made)),
            ("why", plan.recommended.why),
            (
                "expected",
                f"{best.seconds.total:.1f} s a step (this layout: {plan.asked.seconds.total:.1f}), "
                f"{best.peak / 1e9:.1f} GB at most",
            ),
        ]
    )


def _lines(pairs: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in pairs) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in pairs)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        numbers = "".join(f"{o:>{w + 3}}" for o, w in zip(others, widths[1:], strict=True))
        lines.append(f"{first:<{widths[0]}}{numbers}".rstrip())
    return "\n".join(lines)


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}" if value == 0 or abs(value) >= 1e7 else f"{value / 1e9:.0e}"
