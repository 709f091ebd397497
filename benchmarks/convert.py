"""Conversion of a large checkpoint in little memory, beside a plain copy of its files.

    python benchmarks/convert.py --scratch DIR --out benchmarks/results/convert-NAME.json

Writes a synthetic Llama checkpoint of at least ``--gigabytes`` to DIR (three times that is needed),
then copies it, converts it to Megatron and back, each in a process of its own whose private memory
is limited (RLIMIT_DATA: a process that asks for more fails). Before every timing the files it reads
are pushed out of the page cache; every timing ends when the output is on disk.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.convert.families import plan
from megatron_tropd.convert.safetensors_writer import SafetensorsWriter, Spec
from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron

HIDDEN, FFN, VOCABULARY = 4096, 14336, 32000
FILE_BYTES = 2 * 10**9
PHASES = ("copy", "to_megatron", "to_hf")


def config(layers: int) -> dict[str, Any]:
    """config.json of the synthetic model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def specs(layers: int) -> dict[str, Spec]:
    """Type and shape of every tensor."""
    return {
        name: Spec(torch.bfloat16, shape)
        for entry in plan(config(layers))
        for name, shape in entry.operation.hf_shapes().items()
    }


def layers_for(gigabytes: float) -> int:
    """The fewest layers that make a checkpoint of this size."""
    size = [sum(spec.nbytes for spec in specs(n).values()) for n in (1, 2)]
    return max(1, -(-(int(gigabytes * 1e9) - size[0]) // (size[1] - size[0])) + 1)


def make_model(folder: Path, layers: int) -> int:
    """Write the checkpoint; returns its bytes. Weights are random bits without NaN."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    tensors = specs(layers)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 2**14, (2**22,), generator=generator).to(torch.int16)
    with SafetensorsWriter(folder, tensors, FILE_BYTES) as writer:
        for number, (name, spec) in enumerate(tensors.items()):
            count = torch.Size(spec.shape).numel()
            values = (noise + number).repeat(-(-count // noise.numel()))[:count]
            writer.write(name, values.view(torch.bfloat16).view(spec.shape))
        writer.finish()
    return sum(spec.nbytes for spec in tensors.values())


def run_phase(phase: str, scratch: Path, workers: int) -> None:
    """One timed phase; called in a process of its own."""
    model, copy = scratch / "model", scratch / "copy"
    megatron, back = scratch / "megatron", scratch / "back"
    if phase == "copy":
        copy.mkdir()
        for path in sorted(model.iterdir()):
            shutil.copyfile(path, copy / path.name)
            _sync(copy / path.name)
    elif phase == "to_megatron":
        hf_to_megatron(ToMegatron(model, megatron, workers=workers))
    else:
        megatron_to_hf(ToHF(megatron, back, max_shard_bytes=FILE_BYTES, workers=workers))


def measure(phase: str, scratch: Path, workers: int, limit_bytes: int) -> dict[str, float]:
    """Seconds and memory of a phase under the limit; the parent calls this in a child."""
    _forget(scratch / ("megatron" if phase == "to_hf" else "model"))
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    peaks: dict[str, float] = {"rss_anon_gb": 0.0, "data_gb": 0.0}
    seconds = _watched(lambda: run_phase(phase, scratch, workers), peaks)
    return {"seconds": round(seconds, 2), **{k: round(v, 3) for k, v in peaks.items()}}


def _watched(work: Callable[[], None], peaks: dict[str, float]) -> float:
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            kib = {
                line.split(":")[0]: line.split()[1] for line in status.splitlines() if "kB" in line
            }
            for peak, field in (("rss_anon_gb", "RssAnon"), ("data_gb", "VmData")):
                peaks[peak] = max(peaks[peak], int(kib[field]) * 1024 / 1e9)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        thread.join()
    return seconds


def _forget(folder: Path) -> None:
    """Push the files of a folder out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return names == sorted(path.name for path in other.glob("*.safetensors")) and all(
        subprocess.run(["cmp", "-s", one / name, other / name]).returncode == 0 for name in names
    )


def _child(arguments: argparse.Namespace, phase: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--scratch", str(arguments.scratch), "--phase", phase]
    command += ["--limit-gb", str(arguments.limit_gb), "--workers", str(arguments.workers)]
    # As the commands set it, before torch is imported.
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"{phase} failed:\n{run.stderr}")
    result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    print(phase, result, flush=True)
    return result


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the model, run the phases in turn, ``rounds`` times; the best round of each counts."""
    scratch = arguments.scratch
    layers = layers_for(arguments.gigabytes)
    size = make_model(scratch / "model", layers)
    largest = max(spec.nbytes for spec in specs(layers).values())
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / 1e9:.3f} GB", flush=True)
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(arguments.rounds):
        for name in ("copy", "megatron", "back"):
            shutil.rmtree(scratch / name, ignore_errors=True)
        rounds.append({})
        for phase in PHASES:
            rounds[-1][phase] = _child(arguments, phase)
            shutil.rmtree(scratch / "copy", ignore_errors=True)
    best = {phase: min(r[phase]["seconds"] for r in rounds) for phase in PHASES}
    return {
        "checkpoint_bytes": size,
        "largest_tensor_bytes": largest,
        "tensors": len(specs(layers)),
        "layers": layers,
        "limit_of_private_memory_bytes": int(arguments.limit_gb * 1e9),
        "workers": arguments.workers,
        "rounds": rounds,
        "best_seconds": best,
        "best_gb_per_second": {p: round(size / 1e9 / s, 3) for p, s in best.items()},
        "time_in_copies": {p: round(best[p] / best["copy"], 2) for p in PHASES},
        "files_equal_after_there_and_back": _same_files(scratch / "model", scratch / "back"),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "cpus": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    """Parse the arguments; run everything, or one phase as a child."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="folder with room for 3 copies")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--limit-gb", type=float, default=2.0, help="private memory of a process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        limit = int(arguments.limit_gb * 1e9)
        print(json.dumps(measure(arguments.phase, arguments.scratch, arguments.workers, limit)))
        return
    result = benchmark(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(arguments.scratch)


if __name__ == "__main__":
    main()
