"""Make a teacher and a student that calculate with a tool, from those of ``examples/arithmetic``.

The numbers are too large for what these two have learned by heart, so each step is a call of the
calculator (``calculator.py``) and its result is copied. Both are trained by cross entropy on the
turns of solved problems; what the tool writes carries no loss. The student stops early.

    python examples/tool_use/make_models.py --out examples/tool_use
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

HERE = Path(__file__).resolve().parent
ARITHMETIC = HERE.parent / "arithmetic"
sys.path[:0] = [str(HERE), str(ARITHMETIC)]

import make_pair  # noqa: E402
from calculator import Calculator  # noqa: E402

from megatron_tropd.data.batch import MicroBatch  # noqa: E402
from megatron_tropd.data.packing import pack  # noqa: E402
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer  # noqa: E402

NUM_PROMPTS, NUM_HELD_OUT = 4000, 500
LARGEST = 9999
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}"
    "{% elif message.role == 'tool' %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""A prompt as the arithmetic example has it; a turn ends by EOS, a result by a new line."""
RECIPES = {
    "teacher": replace(make_pair.RECIPES["teacher"], steps=350, lr=1.5e-3, warmup_steps=20, seed=1),
    "student": replace(
        make_pair.RECIPES["student"], steps=350, lr=2e-3, warmup_steps=20, stop_loss=0.08, seed=2
    ),
}


@dataclass(frozen=True)
class Solved:
    """A problem and how it is solved."""

    prompt: str
    calls: tuple[str, ...]
    answer: int


def solved(rng: random.Random) -> Solved:
    """Draw a problem of two to four operations."""
    value = rng.randint(10, 99)
    words, calls = [f"start {value}"], []
    for _ in range(rng.randint(2, 4)):
        word, sign, operand, value = operation(value, rng)
        words.append(f"{word} {operand}")
        calls.append(f"{sign}{operand}=")
    return Solved(" ".join(words) + ":", tuple(calls), value)


def operation(value: int, rng: random.Random) -> tuple[str, str, int, int]:
    """A word, a sign, a second number and the result, which has at most four digits."""
    if value <= LARGEST // 9 and rng.random() < 0.5:
        factor = rng.randint(2, min(99, LARGEST // value))
        return "times", "*", factor, value * factor
    least, most = 10, min(999, value - 10)
    if (most >= least and rng.random() < 0.5) or value + 999 > LARGEST:
        operand = rng.randint(least, most)
        return "take", "-", operand, value - operand
    operand = rng.randint(least, 999)
    return "add", "+", operand, value + operand


def problems(split: str, seed: int) -> Iterator[Solved]:
    """Endless stream of different problems of a split, to which the prompt's hash assigns it."""
    rng, seen = random.Random(f"tools {split} {seed}"), set()
    while True:
        one = solved(rng)
        held_out = hashlib.sha256(one.prompt.encode()).digest()[0] % 16 == 0
        if held_out == (split == "heldout") and one.prompt not in seen:
            seen.add(one.prompt)
            yield one


def sequence(one: Solved, tokenizer: Any, rng: random.Random, slips: float, key: SampleKey) -> Any:
    """The episode of somebody who calls the tool, and with slips goes on from what it says."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    tool = Calculator()
    tool.reset({"answer": one.answer})
    value, runs, weights = one.prompt.split()[1], [(Writer.CONTEXT, ids(one.prompt))], []
    for call in one.calls:
        slip = rng.random() < slips
        text = value + (slipped(call, rng) if slip else call)
        turn = [*ids(text), make_pair.EOS_ID]
        value = tool.step(text)[0][0]["content"]
        runs += [(Writer.STUDENT, turn), (Writer.CONTEXT, ids(value + "\n"))]
        weights += [float(not slip)] * len(turn)
    runs.append((Writer.STUDENT, [*ids(f"answer {value}"), make_pair.EOS_ID]))
    weights += [1.0] * len(runs[-1][1])
    made = TokenSequence.of_runs(key, *runs, logprobs=[0.0] * len(weights), version=0)
    weight_N = made.weight_N.copy()
    weight_N[made.writer_N == Writer.STUDENT] = weights
    return made.replace(weight_N=weight_N)


def slipped(call: str, rng: random.Random) -> str:
    """Another second number than the problem has."""
    return f"{call[0]}{max(2, int(call[1:-1]) + rng.choice((-10, -1, 1, 10)))}="


def batches(tokenizer: Any, recipe: Any, tokens: int) -> Iterator[list[MicroBatch]]:
    """In the place of ``make_pair.batches``: optimizer steps of new episodes."""
    stream, rng = problems("train", make_pair.TRAINING_SEED), random.Random(recipe.seed)
    for step in count():
        rows = []
        for i, one in enumerate(islice(stream, make_pair.BATCH)):
            slips = recipe.slip_share if rng.random() < 0.5 else 0.0
            rows.append(sequence(one, tokenizer, rng, slips, SampleKey(step, i, 0)))
        yield pack(rows, dp_rank=0, dp_size=1, tokens_per_micro_batch=tokens, seed=0, step=step)


def train(rank: int, *how: Any) -> None:
    """One rank of the training, as ``make_pair`` does it, on episodes."""
    make_pair.batches = batches
    make_pair.train_rank(rank, *how)


def write_files(out: Path) -> None:
    """Write prompts to distil on and held-out problems."""
    for split, number, name in (
        ("train", NUM_PROMPTS, "prompts.jsonl"),
        ("heldout", NUM_HELD_OUT, "heldout.jsonl"),
    ):
        drawn = islice(problems(split, seed=0), number)
        lines = [{"prompt": one.prompt, "answer": str(one.answer)} for one in drawn]
        (out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def first_of(name: str, folder: Path) -> Path:
    """The arithmetic example's model with a chat template."""
    shutil.copytree(ARITHMETIC / name, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": TEMPLATE}
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def make(name: str, out: Path) -> dict[str, Any]:
    """Train one model; what it took."""
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        scratch, began = Path(folder), time.perf_counter()
        first, log = first_of(name, scratch / "first"), scratch / "log.jsonl"
        mp.spawn(train, (first, out / name, recipe, 1, log), nprocs=1)
        seconds = round(time.perf_counter() - began)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {"recipe": asdict(recipe), "seconds": seconds, "log": lines}


def main() -> None:
    """Make everything and record it in models.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train one model, keep the other")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_files(args.out)
    record = args.out / "models.json"
    made = json.loads(record.read_text()) if args.only and record.exists() else {}
    for name in RECIPES if args.only is None else (args.only,):
        made[name] = make(name, args.out)
    record.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
