"""How fast prompts are read, and the memory that takes: a long file of lines, and Parquet.

    python benchmarks/read_prompts.py --tokenizer FOLDER --out FILE.json

Makes a file of a million JSON lines and a Parquet file of about 200 MB, reads each as a run does
(`load_prompts`, in a process of its own), then takes the prompts of some steps. Anonymous memory is
what a process must hold; resident memory counts the mapped pages too, which the system may drop.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LINES = 1_000_000
PARQUET_MB = 200
STEPS, PER_STEP = 20, 128
_WORDS = 20_000


def main() -> None:
    """Measure all sources, or in a child one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--tokenizer", required=True, help="HF folder with a tokenizer")
    add("--out", type=Path, help="JSON file of the results")
    add("--read", help="(of a child) read this source and print what it took")
    options = parser.parse_args()
    if options.read:
        print(json.dumps(_read(options.read, options.tokenizer)))
        return
    found = {
        "machine": f"{platform.processor() or platform.machine()}, Python {sys.version.split()[0]}",
        "tokenizer": Path(options.tokenizer).name,
        "sources": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for make in (_nothing, _lines, _parquet):
            path = make(Path(folder))
            command = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--read", path]
            for again in (False, True) if make is _parquet else (False,):
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                result = json.loads(output.stdout.splitlines()[-1]) | {"read_before": again}
                found["sources"].append(result)
                print(json.dumps(result), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _nothing(folder: Path) -> str:
    """One prompt: the memory of the imports and the tokenizer."""
    path = folder / "one.jsonl"
    path.write_text(json.dumps({"prompt": "a b", "answer": "1"}) + "\n")
    return str(path)


def _lines(folder: Path) -> str:
    path, draw = folder / "lines.jsonl", random.Random(0)
    with path.open("w") as file:
        for number in range(LINES):
            prompt = f"Question {number}: {_text(draw, 5)}?"
            file.write(json.dumps({"prompt": prompt, "answer": str(number)}) + "\n")
    return str(path)


def _parquet(folder: Path) -> str:
    """Rows of long texts in row groups of the writer's default; words that hardly compress."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, draw = folder / "rows.parquet", random.Random(1)
    writer = None
    while writer is None or path.stat().st_size < PARQUET_MB * 1e6:
        rows = [
            {
                "question": _text(draw, 20),
                "solution": draw.randbytes(2000).hex(),
                "reward_model": {"ground_truth": str(i)},
            }
            for i in range(5000)
        ]
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
    return str(path)


def _text(draw: random.Random, words: int) -> str:
    return " ".join(f"w{draw.randrange(_WORDS)}" for _ in range(words))


def _read(source: str, tokenizer_folder: str) -> dict[str, object]:
    from megatron_tropd.config import DataConfig
    from megatron_tropd.data.prompts import load_prompts, num_tokens, prompts_of_step
    from megatron_tropd.data.tokenizers import load_tokenizer

    fields = {"prompt": "question", "answer": "reward_model.ground_truth"}
    data = DataConfig(fields=fields if source.endswith(".parquet") else {})
    tokenizer = load_tokenizer(tokenizer_folder)
    peak = _Peak()
    began, cpu = time.perf_counter(), time.process_time()
    prompts = load_prompts(source, tokenizer, data=data)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    taken = time.process_time()
    for step in range(STEPS if len(prompts) >= PER_STEP else 0):
        for index in prompts_of_step(len(prompts), PER_STEP, step, 1):
            assert prompts[index].token_ids
    per_step = (time.process_time() - taken) / STEPS
    return {
        "source": Path(source).name,
        "megabytes": round(Path(source).stat().st_size / 1e6, 1),
        "prompts": len(prompts),
        "tokens": sum(num_tokens(prompts)),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "prompts_per_cpu_second": round(len(prompts) / cpu_seconds),
        f"cpu_ms_of_{PER_STEP}_prompts": round(1000 * per_step, 1),
        **peak.end(),
    }


class _Peak:
    """The most memory that this process holds, looked at ten times a second."""

    def __init__(self) -> None:
        self._over, self._most = threading.Event(), {"RssAnon": 0, "VmRSS": 0}
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        over = False
        while not over:
            over = self._over.wait(0.1)
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self._most:
                    self._most[name] = max(self._most[name], int(value.split()[0]))

    def end(self) -> dict[str, int]:
        """MiB of anonymous and of resident memory."""
        self._over.set()
        self._thread.join()
        names = {"RssAnon": "peak_anonymous_mib", "VmRSS": "peak_resident_mib"}
        return {names[name]: round(value / 1024) for name, value in self._most.items()}


if __name__ == "__main__":
    main()
