"""Training steps of a real size on one device, with random weights: seconds and memory.

    python benchmarks/gpu_step.py                  # Qwen3-1.7B <- Qwen3-4B, layers as in a run
    python benchmarks/gpu_step.py --layers local   # Megatron's own, even if there are others
    python benchmarks/gpu_step.py --layers te      # refused without Transformer Engine

Everything of a step but the rollout: the teacher scores, the student runs forward and backward with
exact TrOPD, the optimizer steps, the weights are exported. The models are those of a run, from
their config.json alone. Layers of any kind get the same weights, so that the first losses of two
runs can be compared. Without a GPU it runs on the CPU, which small models are for.

The last line of the output is one JSON object.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from megatron_tropd.config import (
    Config,
    GuidanceConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_tropd.config.loss import preset
from megatron_tropd.convert.hf_folder import read_config
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.distill.pair import step_parts
from megatron_tropd.distill.step import learn
from megatron_tropd.distill.step_parts import StepParts
from megatron_tropd.mcore import dense, models, parallel, platform
from megatron_tropd.mcore.layout import Layout

MODELS = Path(__file__).resolve().parents[1] / "configs" / "recipes" / "models"
LOSS = preset("tropd_exact")


def main() -> None:
    """Run, and print the figures."""
    options = parse_arguments()
    layers = chosen_layers(options.layers)
    with patch.object(models, "has_transformer_engine", lambda: layers == "te"):
        print(json.dumps(measure(options) | {"layers": layers}))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; None: that of the process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--student", type=Path, default=MODELS / "Qwen3-1.7B", help="folder of a config.json")
    add("--teacher", type=Path, default=MODELS / "Qwen3-4B", help="folder of a config.json")
    add("--layers", choices=("auto", "local", "te"), default="auto")
    add("--steps", type=int, default=3, help="the last one is reported (default 3)")
    add("--samples", type=int, default=16, help="of a step (default 16)")
    add("--tokens", type=int, default=2048, help="new ones of a sample (default 2048)")
    add("--micro-batch", type=int, default=8192, help="tokens (default 8192)")
    return parser.parse_args(arguments)


def chosen_layers(wanted: str) -> str:
    """``te`` or ``local``; what a run takes, if it is ``auto``."""
    there = models.has_transformer_engine()
    if wanted == "te" and not there:
        raise SystemExit("Transformer Engine does not import here, or there is no GPU.")
    return ("te" if there else "local") if wanted == "auto" else wanted


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of the last step, and the loss of the first."""
    layout = parallel.initialize(ParallelConfig(), seed=1)
    parts = _parts(options, layout)
    losses = []
    for step in range(options.steps):
        phases = _Phases()
        parts = replace(parts, clock=phases)
        metrics = learn(parts, random_sequences(options, parts.vocab_size, step), step).metrics
        with phases("export"):
            _export(parts)
        losses.append(metrics["loss"])
    parallel.shutdown()
    tokens = options.samples * options.tokens
    total = sum(phases.seconds.values())
    return {
        "device": torch.cuda.get_device_name() if platform.has_cuda() else "cpu",
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "losses": losses,
        "grad_norm": metrics["grad_norm"],
        "seconds": phases.seconds | {"total": total},
        "peak_gib": phases.peaks,
        "loss_tokens_per_second": tokens / total,
    }


def _parts(options: argparse.Namespace, layout: Layout) -> StepParts:
    """What a step is made with."""
    config = Config(
        model=ModelConfig(student=str(options.student), teacher=str(options.teacher)),
        rollout=RolloutConfig(prompts="none", max_new_tokens=options.tokens),
        guidance=GuidanceConfig(beta=0.0),
        loss=LOSS,
        train=TrainConfig(
            steps=options.steps, lr=1e-5, tokens_per_micro_batch=options.micro_batch, seed=7
        ),
        run=RunConfig(dir="."),
    )
    paths = {"student": options.student, "teacher": options.teacher}
    folders: dict[str, Any] = {
        who: SimpleNamespace(config=read_config(path)) for who, path in paths.items()
    }
    with patch.object(dense, "load_weights", draw_weights):
        return step_parts(config, folders, layout)


def draw_weights(parameters: dict[str, torch.Tensor], *_: Any, **__: Any) -> None:
    """In place of loading: the same for any kind of layers, whatever their parameters' order."""
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            draw = torch.Generator(parameter.device).manual_seed(parameter.numel())
            parameter.normal_(std=0.02, generator=draw)


def _export(parts: StepParts) -> None:
    for _ in parts.student.model.exported():
        pass


def random_sequences(
    options: argparse.Namespace, vocab_size: int, step: int
) -> list[TokenSequence]:
    """``options.samples`` of 64 random tokens and as many new ones as ``options.tokens``."""
    draw = torch.Generator().manual_seed(step)
    return [
        TokenSequence.of_runs(
            SampleKey(step, number // 4, number % 4),
            (Writer.CONTEXT, tuple(torch.randint(vocab_size, (64,), generator=draw).tolist())),
            (
                Writer.STUDENT,
                tuple(torch.randint(vocab_size, (options.tokens,), generator=draw).tolist()),
            ),
            logprobs=(-1.0,) * options.tokens,
            version=step,
        )
        for number in range(options.samples)
    ]


class _Phases:
    """Seconds and peak memory of the phases of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cuda = platform.has_cuda()
        wait: Callable[[], object] = torch.cuda.synchronize if cuda else (lambda: None)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        wait()
        start = time.perf_counter()
        yield
        wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if cuda:
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main()
