"""A plan as a table for a person, or as JSON."""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from megatron_tropd.config import LoraConfig
from megatron_tropd.config.run import TEACHER
from megatron_tropd.config.teacher_cache import bytes_per_token
from megatron_tropd.convert.families import describe
from megatron_tropd.planning.estimate import Estimate, layout_name, slow_phases
from megatron_tropd.planning.memory import (
    EngineMemory,
    Memory,
    cache_tokens,
    checkpoint_bytes,
    engine_host_bytes,
    engine_memory,
    host_bytes,
    saving_host_bytes,
)
from megatron_tropd.planning.options import tables
from megatron_tropd.planning.plan import Plan
from megatron_tropd.planning.planned_run import PlannedRun, PlannedTeacher
from megatron_tropd.planning.recommend import Choice
from megatron_tropd.planning.seconds import concurrent_sequences

WIDTH = 100
"""Columns of the table."""
SCHEMA = 1
"""Of the JSON object; raised if a key changes its meaning or goes away."""
_ITEMS = {
    "student weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "teacher weights": "teacher_weights",
    "teacher hidden states": "teacher_hidden",
    "teacher forward pass": "teacher_forward",
    "teacher, visiting": "teacher_visiting",
    "teacher, in the student's order": "teacher_copies",
    "teacher's output layer": "teacher_output",
    "student hidden states": "student_hidden",
    "activations": "activations",
    "backward pass": "backward",
    "recomputed": "recomputed",
    "loss": "loss",
    "engine weights": "engine_weights",
    "engine workspace": "engine_workspace",
    "KV cache": "kv_cache",
}
SERVED_ROWS = 1024
"""Tokens whose logits vLLM 0.32 holds at once for ``prompt_logprobs`` (``CHUNK_SIZE`` of its V2
model runner, which is CUDA's)."""
_OF_ENGINE = {"engine_weights": "weights", "engine_workspace": "workspace", "kv_cache": "cache"}
"""Item -> the same of an engine that has GPUs of its own."""
_OF_TOP_K = {"teacher_hidden": "teacher's {} top-k"}
"""Item -> its label if the teacher is cached or served."""
_SENT = {
    "tensor parallel, teacher": "tensor_teacher",
    "tensor parallel, student": "tensor_student",
    "context parallel, teacher": "context_teacher",
    "context parallel, student": "context_student",
    "expert parallel, teacher": "expert_teacher",
    "expert parallel, student": "expert_student",
    "pipeline, teacher": "pipeline_teacher",
    "pipeline, student": "pipeline_student",
    "data parallel": "data",
    "tied embedding": "tied_embedding",
    "weights to the engine": "weight_sync",
}
_UNKNOWN = "not counted below: {}"
UNCALIBRATED = "estimate, not calibrated"
"""Said beside all seconds, and what follows from them, until a run on GPUs calibrates them."""
_PHASES = ("rollout", "teacher", "student", "optimizer", "sync")


def plan_table(plan: Plan) -> str:
    """Aligned lines for a terminal."""
    run = plan.asked.run
    blocks = [
        "planned, not run: bytes follow from the config.json of both models; seconds and\n"
        f"recommendation: {UNCALIBRATED}",
        _heading(run),
        _memory_block(plan.asked),
        _sent_block(plan.asked),
        _seconds_block(plan.asked),
        _recommended_block(plan),
    ]
    return "\n\n".join(blocks)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The same and more as plain values; bytes and seconds. docs/planning.md lists the keys."""
    run, other = plan.asked.run, plan.recommended.other
    adapted = plan.recommended.adapters
    return {
        "schema": SCHEMA,
        "seconds_and_recommendation": UNCALIBRATED,
        **{
            model.who: {"parameters": model.parameters, "describe": describe(model.config)}
            for model in run.named
        },
        "trained_parameters": run.trained,
        "teacher_cache": _of_each(run, _cache_json),
        "teacher_served": _of_each(run, _served_json),
        "hardware": asdict(run.hardware),
        "step": asdict(run.work),
        "asked": _estimate_json(plan.asked),
        "recommended": _estimate_json(plan.recommended.best) | {"why": plan.recommended.why},
        "choices": {
            one.name: {"taken": one.taken, "seconds": one.seconds}
            for one in plan.recommended.choices
        },
        "other_steps_ahead": _estimate_json(other) if other else None,
        "with_adapters": _estimate_json(adapted) if adapted else None,
    }


def _estimate_json(one: Estimate) -> dict[str, Any]:
    run, engine = one.run, engine_memory(one.run)
    names = ["placement", "num_engines", "engine_tensor_parallel", "steps_ahead"]
    names += ["engine_gpu_share", "engine_cpu_kv_gib"]
    return {
        "parallel": asdict(run.parallel),
        "rollout": {name: getattr(run.rollout, name) for name in names}
        | {"concurrent_sequences": concurrent_sequences(run), "cache_tokens": cache_tokens(run)},
        "training_nodes": run.training_nodes,
        "engine_nodes": run.engine_nodes,
        "megatron": tables(run.options),
        "teacher_offload": run.options.teacher,
        "teacher_parallel": None if (own := run.config.teacher.parallel) is None else asdict(own),
        "fits": one.fits,
        "obstacle": one.obstacle,
        "memory_bytes": [asdict(s) | {"phases": s.phases, "peak": s.peak} for s in one.memory],
        "engine_bytes": asdict(engine) | {"total": engine.total},
        "host_bytes": host_bytes(run),
        "saving_host_bytes": saving_host_bytes(run),
        "checkpoint_bytes": checkpoint_bytes(run),
        "sent_bytes": asdict(one.communication),
        "seconds": asdict(one.seconds) | {"total": one.seconds.total},
        "warnings": slow_phases(one),
    }


def _heading(run: PlannedRun) -> str:
    h, work = run.hardware, run.work
    rates = (
        f"{h.tflops:g} TFLOP/s x {h.achieved_flops:g} achieved (experts "
        f"{h.achieved_flops_experts:g}); memory {h.memory_gb_s:g}, in a node "
        f"{h.intra_node_gb_s:g}, network {h.network_gb_s:g} GB/s x {h.achieved_bandwidth:g}"
    )
    step = (
        f"{work.trajectories} trajectories; prompt {work.prompt}, response "
        f"{work.mean_response:g} tokens on average, {work.longest_response} at most; "
        f"{work.micro_batches} micro-batches of at most {work.most_positions} positions per replica"
    )
    return _lines(
        [
            *[(model.who, describe(model.config)) for model in run.named],
            *([("adapters", _adapters(run, run.lora))] if run.lora else []),
            *_sources(run),
            ("cluster", _cluster(run)),
            ("rates", rates),
            ("step", step),
            ("layout", layout_name(run)),
            *[("unknown", _UNKNOWN.format(", ".join(run.options.uncounted)))]
            * bool(run.options.uncounted),
        ]
    )


def _adapters(run: PlannedRun, lora: LoraConfig) -> str:
    share = 100 * run.trained / run.student.parameters
    return (
        f"rank {lora.rank} beside {', '.join(lora.targets)}: {run.trained:,} parameters are "
        f"trained, {share:.2g} % of the student's, which are frozen"
    )


def _of_each(
    run: PlannedRun, describe: Callable[[PlannedRun, PlannedTeacher], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """What is said of a run's teacher; of several, by what messages call them."""
    said = {one.model.who: text for one in run.teachers if (text := describe(run, one))}
    return said.get(TEACHER) if len(run.teachers) == 1 else said or None


def _cache_json(run: PlannedRun, teacher: PlannedTeacher) -> dict[str, Any] | None:
    """What `tropd score` writes of each token; None: the run reads no scores of this teacher."""
    config = teacher.config
    if config.teacher.placement != "cached":
        return None
    k, dtype = config.cached_top_k, config.teacher.cache_dtype
    each = bytes_per_token(k, dtype, reference=teacher.reference is not None)
    return {"top_k": k, "dtype": dtype, "bytes_per_token": each}


def _cache(run: PlannedRun, teacher: PlannedTeacher) -> list[str]:
    """A line about a teacher if it is cached."""
    kept = _cache_json(run, teacher)
    if kept is None:
        return []
    return [
        f"cached by `tropd score`, {kept['bytes_per_token']} bytes a token (k = {kept['top_k']}, "
        f"{kept['dtype']}) and 64 a sequence; no teacher is loaded"
    ]


def _served_json(run: PlannedRun, teacher: PlannedTeacher) -> dict[str, Any] | None:
    """What a teacher is asked for if it is served, and what that takes there."""
    config = teacher.config
    if config.teacher.placement != "served":
        return None
    return {
        "top_k": config.signal_top_k,
        "requests": config.teacher.requests,
        "logits_bytes": SERVED_ROWS * teacher.model.shape.vocab * run.element,
    }


def _served(run: PlannedRun, teacher: PlannedTeacher) -> list[str]:
    """A line about a teacher if it is served."""
    asked = _served_json(run, teacher)
    if asked is None:
        return []
    return [
        f"served at {len(teacher.config.teacher.address)} addresses, k = {asked['top_k']}, at most "
        f"{asked['requests']} sequences under way at each; a server's logits of prompts take "
        f"{_gb(asked['logits_bytes'])} GB, of {SERVED_ROWS} tokens at a time (docs/teachers.md); "
        "no teacher is loaded"
    ]


def _sources(run: PlannedRun) -> list[tuple[str, str]]:
    """What is said of teachers that are no models of their own on the ranks; of their prompts."""
    lines = []
    for one in run.teachers:
        texts = [*_cache(run, one), *_served(run, one)]
        if one.is_student:
            what = "an average of its trained weights" if one.averages else "without its adapters"
            texts.append(f"the student scores, {what}")
        several = f"{one.model.who}: " if len(run.teachers) > 1 else ""
        lines += [("scores", f"{several}{text}") for text in texts]
    if run.context_tokens is not None:
        lines.append(("context", f"a teacher reads {run.context_tokens} tokens as a prompt"))
    if len(run.teachers) > 1:
        share = "equal shares of the time, memory as if each scored all; one at a time on the GPU"
        lines.append(("teachers", f"{len(run.teachers)}: {share}"))
    return lines


def _cluster(run: PlannedRun) -> str:
    h, world = run.hardware, run.parallel.world_size
    nodes = run.training_nodes + run.engine_nodes
    each = h.gpus_per_node if run.separate else min(world, h.gpus_per_node)
    text = f"{nodes} x {each} {h.name} of {h.memory_gb:g} GB"
    if run.separate:
        text += f": {run.training_nodes} to train, {run.engine_nodes} to sample"
    return text


def _memory_block(one: Estimate) -> str:
    run, shown = one.run, _shown_stages(one.memory)
    engine = engine_memory(run) if run.separate else None
    heads = [f"stage {stage.stage}" for stage in shown] + (["engine"] if engine else [])
    rows = [["GB on each GPU", *heads]]
    for label, name in _ITEMS.items():
        if not run.gives_states:
            placements = {one.config.teacher.placement for one in run.teachers}
            label = _OF_TOP_K.get(name, label).format(" and ".join(sorted(placements)))
        values = [getattr(stage, name) for stage in shown] + _of_engine(engine, name)
        if any(values):
            rows.append([f"  {label}", *map(_gb, values)])
    for phase in shown[0].phases:
        values = [stage.phases[phase] for stage in shown]
        if engine:
            values.append(engine.total if phase == "rollout" else 0.0)
        rows.append([f"peak of {phase}", *map(_gb, values)])
    usable, total = run.hardware.usable_bytes, run.hardware.memory_gb
    verdict = "fits" if one.fits else f"DOES NOT FIT ({one.obstacle})"
    text = (
        f"{verdict}: {one.peak / 1e9:.1f} of {usable / 1e9:.1f} GB ({total:g} less "
        f"{100 * run.hardware.reserve:g} % reserve); the cache of an engine holds "
        f"{cache_tokens(run)} tokens, {concurrent_sequences(run)} sequences together. "
        f"{_elsewhere(run)}"
    )
    return f"{aligned(rows)}\n{textwrap.fill(text, WIDTH)}"


def _of_engine(engine: EngineMemory | None, item: str) -> list[float]:
    if engine is None:
        return []
    return [getattr(engine, _OF_ENGINE[item]) if item in _OF_ENGINE else 0.0]


def _elsewhere(run: PlannedRun) -> str:
    """What is not on a GPU."""
    kept = run.config.run.keep_checkpoints
    disk = f"A checkpoint is about {checkpoint_bytes(run) / 1e9:.3g} GB on disk, {kept} are kept."
    engines = engine_host_bytes(run)
    takers = {
        "engines": engines,
        "what is offloaded": host_bytes(run) - engines,
        "a save": saving_host_bytes(run),
    }
    host = [f"{who} {size / 1e9:.3g} GB" for who, size in takers.items() if size]
    return f"Of each node's own memory: {', '.join(host)}. {disk}"


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
    return aligned(rows)


def _seconds_block(one: Estimate) -> str:
    rows = [[f"seconds of a step ({UNCALIBRATED})", ""]]
    rows += [[f"  {name}", f"{getattr(one.seconds, name):.2f}"] for name in _PHASES]
    steps = one.run.config.train.steps
    beside = " (the rollout beside the rest)" if one.seconds.overlapped else ""
    rows.append([f"  total{beside}", f"{one.seconds.total:.2f}"])
    rows.append(
        [f"hours of {steps} steps ({UNCALIBRATED})", f"{steps * one.seconds.total / 3600:.1f}"]
    )
    warnings = [textwrap.fill(f"WARNING: {text}", WIDTH) for text in slow_phases(one)]
    return "\n".join([aligned(rows), *warnings])


def _recommended_block(plan: Plan) -> str:
    best, other, adapted = (getattr(plan.recommended, n) for n in ("best", "other", "adapters"))
    asked = plan.asked.seconds.total
    lines = [
        ("recommended", f"{layout_name(best.run)} ({UNCALIBRATED})"),
        ("why", plan.recommended.why),
        (
            "expected",
            f"{best.seconds.total:.1f} s a step (this layout: {asked:.1f}), "
            f"{best.peak / 1e9:.1f} GB at most on a training GPU ({UNCALIBRATED})",
        ),
    ]
    if options := _overrides(best.run):
        lines.append(("options", options))
    lines += [("WARNING", f"here {text}") for text in slow_phases(best)]
    if other:
        when = "one step ahead" if other.run.rollout.steps_ahead else "on policy"
        lines.append((when, _beside(other)))
    if adapted:
        lora = adapted.run.lora
        lines.append(
            (
                "adapters",
                f"with [model.lora] rank = {lora.rank}, which changes what is trained: "
                f"{_beside(adapted)}, {adapted.peak / 1e9:.1f} GB at most",
            )
        )
    return "\n\n".join([_lines(lines), *_tried(plan.recommended.choices)])


def _beside(one: Estimate) -> str:
    return f"{layout_name(one.run)}: {one.seconds.total:.1f} s a step ({UNCALIBRATED})"


def _tried(choices: Sequence[Choice]) -> list[str]:
    """Seconds of the fastest that fits, by what it chooses."""
    if not choices:
        return []
    head = (
        f"fastest that fits with each choice, seconds a step ({UNCALIBRATED}); * recommended, "
        "- none below twice the fastest"
    )
    rows = [(f"  {choice.name}", ", ".join(_values(choice))) for choice in choices]
    return [f"{textwrap.fill(head, WIDTH)}\n{_lines(rows)}"]


def _values(choice: Choice) -> list[str]:
    return [
        f"{value}{'*' if value == choice.taken else ''}: {'-' if took is None else f'{took:.1f}'}"
        for value, took in choice.seconds.items()
    ]


def _overrides(run: PlannedRun) -> str:
    """What saves memory, as words of the command line; and what to take out of the config."""
    chosen = {
        f"megatron.{table}.{name}": value
        for table, values in tables(run.options).items()
        for name, value in values.items()
    }
    if run.config.teachers:
        pass  # each has its own table
    elif run.options.teacher != run.config.teacher.offload or run.options.teacher != "none":
        chosen["teacher.offload"] = run.options.teacher
    own = run.config.teacher.parallel
    for field in fields(own) if own is not None else ():
        if (value := getattr(own, field.name)) != field.default:
            chosen[f"teacher.parallel.{field.name}"] = value
    words = [f"{name}={json.dumps(value, separators=(',', ':'))}" for name, value in chosen.items()]
    surplus = [
        name
        for name in ("recompute_granularity", "recompute_method", "recompute_num_layers")
        if name in run.config.megatron.model and f"megatron.model.{name}" not in chosen
    ]
    if surplus:
        words.append(f"without megatron.model.{', '.join(surplus)}")
    return " ".join(words)


def _lines(pairs: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in pairs) + 2
    return "\n".join(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"{name:<{width}}",
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
        for name, text in pairs
    )


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1, gap: int = 3) -> str:
    """Rows of cells as lines of text; the first ``left`` columns begin at their left edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if number < left else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * gap).join(cells).rstrip())
    return "\n".join(lines)


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}" if value == 0 or abs(value) >= 1e7 else f"{value / 1e9:.0e}"
