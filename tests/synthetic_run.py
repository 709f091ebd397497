"""A run folder with the shape of a real one and numbers that were never measured.

For tests of the report, and for looking at it: ``python tests/synthetic_run.py FOLDER``.
"""

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

BUCKETS = 7


def write_synthetic_run(folder: Path, *, steps: int = 200, trajectories: int = 6) -> Path:
    """Write config, metrics, evaluations, trajectories and summary of an invented run."""
    draw = random.Random(0)
    (folder / "trajectories").mkdir(parents=True)
    _write_json(folder / "config.json", _config(folder, steps))
    _write_lines(
        folder / "metrics.jsonl", [_metrics(step, steps, draw) for step in range(1, steps + 1)]
    )
    _write_lines(folder / "evaluations.jsonl", _evaluations(steps))
    for step in range(0, steps + 1, max(1, steps // 8)):
        examples = [_trajectory(step, steps, i, draw) for i in range(trajectories)]
        _write_lines(folder / "trajectories" / f"step_{step:06d}.jsonl", examples)
    _write_json(folder / "summary.json", _summary(steps))
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _config(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "model": {"student": "examples/pair/student", "teacher": "examples/pair/teacher"},
        "rollout": {
            "prompts": "examples/pair/prompts.jsonl",
            "max_new_tokens": 128,
            "prompts_per_step": 32,
            "samples_per_prompt": 4,
            "temperature": 1.0,
        },
        "train": {"steps": steps, "lr": 0.001, "seed": 1234, "clip_grad": 1.0},
        "run": {"dir": str(folder), "checkpoint_every": 50},
        "parallel": {"tensor": 2, "pipeline": 1, "data": 1, "sequence_parallel": True},
        "guidance": {"responses": "examples/pair/responses.jsonl", "beta": 0.001},
        "loss": {"method": "tropd", "outlier": "forward_kl", "top_k": 64},
        "evaluation": {"task": "exact_match", "num_problems": 500, "every": 25},
    }


def _metrics(step: int, steps: int, draw: random.Random) -> dict[str, Any]:
    done = step / steps
    decay = math.exp(-4 * done)

    def noisy(value: float, share: float = 0.06) -> float:
        return value * (1 + draw.gauss(0, share))

    tv = 0.06 + 0.34 * decay
    alpha = (1 + math.cos(math.pi * done)) / 2
    seconds = {
        "rollout": noisy(1.1),
        "teacher": noisy(0.22),
        "student": noisy(0.75),
        "optimizer": noisy(0.08),
        "sync": noisy(0.05),
    }
    length = noisy(46 + 12 * decay, 0.03)
    return {
        "step": step,
        "loss": noisy(0.05 + 0.8 * decay, 0.15),
        "grad_norm": noisy(0.4 + 2.2 * decay, 0.2),
        "lr": 0.001,
        "update_skipped": 0,
        "tokens_student": int(128 * length * (1 - 0.2 * alpha)),
        "tokens_teacher": int(128 * length * 0.2 * alpha),
        "outlier_share": noisy(tv, 0.08),
        "tv": noisy(tv, 0.02),
        "acceptance": 1 - tv,
        "k1": noisy(0.06 + 1.1 * decay, 0.15),
        "reverse_kl": noisy(0.06 + 1.1 * decay, 0.04),
        "forward_kl": noisy(0.09 + 1.5 * decay, 0.05),
        "student_entropy": noisy(0.3 + 0.5 * decay, 0.04),
        "teacher_entropy": noisy(0.25 + 0.3 * decay, 0.04),
        "topk_mass_teacher": 0.9995,
        "topk_mass_student": 0.985 + 0.014 * done,
        "selected_share": 1.0,
        "importance_mean": 1.0,
        "dropped_share": 0.0,
        "masked_tokens": 0,
        "padding_share": noisy(0.08, 0.2),
        "waiting_share": noisy(0.02, 0.3),
        "prefix_share": 0.2 * alpha,
        "prefix_alpha": alpha,
        "max_new_tokens": 64,
        "prefix_longest": int(60 * alpha),
        "response_length": length,
        "truncated_share": max(0.0, noisy(0.05 * decay, 0.3)),
        "repetition_share": max(0.0, noisy(0.03 * decay, 0.3)),
        "engine_gap_mean": noisy(2e-6, 0.3),
        "engine_gap_max": noisy(4e-5, 0.4),
        "engine_ratio_mean": 1.0,
        "staleness": 0,
        "tokens_per_second": 128 * length / sum(seconds.values()),
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "seconds_total": sum(seconds.values()) + 0.06,
        "peak_memory_gib": 3.1,
        "acceptance_by_position": [
            None
            if bucket == BUCKETS - 1 and step % 7 == 0
            else min(1.0, max(0.0, 1 - tv * (0.35 + 0.28 * bucket) + draw.gauss(0, 0.012)))
            for bucket in range(BUCKETS)
        ],
    }


def _evaluation(step: int, model: str, accuracy: float, total: int = 500) -> dict[str, Any]:
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / total)
    return {
        "step": step,
        "model": model,
        "accuracy": accuracy,
        "ci_low": accuracy - half,
        "ci_high": accuracy + half,
        "correct": round(accuracy * total),
        "total": total,
        "examples": [_answer(index, accuracy) for index in range(20)],
    }


def _answer(index: int, accuracy: float) -> dict[str, Any]:
    start, add, times = 17 + 9 * index, 30 + index, 2 + index % 5
    total = start + add
    wrong = (index * 0.37) % 1 > accuracy
    said = total + 10 if wrong else total
    return {
        "prompt_index": index,
        "prompt": f"start {start}, add {add}, times {times}:",
        "response": f"{start}+{add}={said}, {said}*{times}={said * times}. answer {said * times}",
        "answer": str(total * times),
        "correct": not wrong,
        "finish_reason": "stop",
    }


def _evaluations(steps: int) -> list[dict[str, Any]]:
    records = [_evaluation(0, "teacher", 0.982)]
    for step in range(0, steps + 1, max(1, steps // 8)):
        gain = 1 - math.exp(-4 * step / steps)
        records.append(_evaluation(step, "student", round(0.31 + 0.6 * gain, 3)))
    return records


def _summary(steps: int) -> dict[str, Any]:
    return {
        "student_before": 0.31,
        "student_after": 0.899,
        "teacher": 0.982,
        "seconds": 441.0,
        "steps": steps,
        "world_size": 2,
        "tensor_parallel": 2,
        "pipeline_parallel": 1,
    }


def _trajectory(step: int, steps: int, index: int, draw: random.Random) -> dict[str, Any]:
    start, add, take, times = 12 + 7 * index, 31 + index, 8 + 3 * index, 2 + index % 4
    first, second = start + add, start + add - take
    wrong = step < steps / 2 and index % 3 != 2
    if wrong:
        second += draw.choice([-10, 1, 10])
    working = f"{start}+{add}={first}, {first}-{take}={second}, {second}*{times}={second * times}."
    tokens = [*_pieces(f"{working} answer {second * times}"), "</s>"]
    prefix = int(0.45 * len(tokens) * (1 + math.cos(math.pi * step / steps)) / 2)
    segment: list[str] = []
    outlier, trust, tv, k1 = ([] for _ in range(4))  # of numbers, None where there is no loss
    for position in range(len(tokens)):
        segment.append("teacher" if index == 0 and position < prefix else "student")
        hard = (0.5 if wrong and position >= 16 else 0.12) * math.exp(-1.5 * step / steps)
        distance = min(0.97, abs(draw.gauss(0, hard)))
        trust.append(max(0.004, 1 - distance * draw.uniform(0.4, 1.6)))
        outlier.append(
            0 if segment[-1] == "teacher" else int(draw.random() > max(trust[-1], 1 - distance))
        )
        tv.append(distance)
        k1.append(-math.log(trust[-1]))
    if index == 1:  # its first token is left out of the loss
        for values in (outlier, trust, tv, k1):
            values[0] = None
    return {
        "step": step,
        "prompt": f"start {start}, add {add}, take {take}, times {times}:",
        "tokens": tokens,
        "segment": segment,
        "outlier": outlier,
        "trust": trust,
        "tv": tv,
        "k1": k1,
        "correct": not wrong,
    }


def _pieces(text: str) -> list[str]:
    return re.findall(r" ?[a-z]+|.", text)


if __name__ == "__main__":
    print(write_synthetic_run(Path(sys.argv[1])))
