"""Runs of the example scripts through the real ``megatron.training.pretrain`` on gloo ranks.

Starting Python and importing Megatron costs more than a run, so several runs share the ranks: each
is a script with its command line, and Megatron's globals are destroyed in between.
"""

import contextlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.ranks import run_with_env, save_without_manager

SCRIPTS = Path(__file__).resolve().parents[1] / "examples" / "megatron_lm"
CHECKOUT = Path(__file__).resolve().parent / "checkout" / "pretrain_gpt.py"
"""Laid out like the script of Megatron's repository, with siblings that it imports."""
PAGE = SCRIPTS.parents[1] / "docs" / "megatron_lm.md"
PLAIN, TROPD = SCRIPTS / "pretrain_gpt.py", SCRIPTS / "pretrain_gpt_tropd.py"
SEQUENCE, ROWS, MICRO_BATCHES = 32, 2, 4
MODEL = """
--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4 --kv-channels 32
--group-query-attention --num-query-groups 2 --max-position-embeddings 256 --swiglu
--position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear
--hidden-dropout 0 --attention-dropout 0
"""
"""The tiny Llama of tiny_models, with tied embeddings."""
TRAINING = f"""
--seq-length {SEQUENCE} --micro-batch-size {ROWS} --global-batch-size {ROWS * MICRO_BATCHES}
--lr 1e-2 --lr-decay-style constant --weight-decay 0 --clip-grad 1.0 --adam-beta2 0.95
--tokenizer-type NullTokenizer --vocab-size 259 --make-vocab-size-divisible-by 64
--split 100,0,0 --num-workers 0 --eval-iters 0 --eval-interval 1000 --log-interval 1
--ckpt-format torch_dist --save-interval 1000 --calculate-per-token-loss
"""
NO_GPU = """
--distributed-backend gloo --transformer-impl local --use-cpu-initialization
--no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion
--no-bias-dropout-fusion --no-rope-fusion --no-masked-softmax-fusion
"""


@dataclass(frozen=True)
class Run:
    """One command line."""

    name: str
    arguments: str
    script: Path = TROPD
    before: Callable[[], Any] | None = None
    """Called on every rank before the run; what it returns is called after it."""


def run_all(world_size: int, runs: list[Run], out: Path) -> dict[str, str]:
    """Run one after the other on the same ranks.

    Returns:
        Name -> what the last rank printed. A run that failed ends in its error.
    """
    run_with_env(world_size, _run_all, runs, out)
    return {run.name: (out / f"{run.name}.log").read_text() for run in runs}


def command_line(script: Path, arguments: str) -> list[str]:
    """``sys.argv`` of a run; later options win."""
    return [str(script), *f"{MODEL} {TRAINING} {NO_GPU} {arguments}".split()]


def history(log: str, name: str) -> torch.Tensor:
    """[iterations] float64 a value of Megatron's log, as far as it is printed."""
    found = re.findall(rf"iteration +\d+/ .*\| {name}: +([-+.0-9E]+)", log)
    assert found, f"no {name} in {log[-2000:]}"
    values = torch.tensor([float(value) for value in found], dtype=torch.float64)
    if name != "grad norm" and len(values) > 1:
        # Megatron's second line is the mean of the first two iterations.
        values[1] = 2 * values[1] - values[0]
    return values


def with_readme_diff(source: str) -> str:
    """Change a script as docs/megatron_lm.md shows; each must have one place in it."""
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for hunk in diff.split("\n\n"):
        lines = hunk.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert source.count(before) == 1, f"the page's diff has {source.count(before)} places"
        source = source.replace(before, after)
    return source


def error_of(log: str) -> str:
    """The last line of a failed run."""
    return log.strip().splitlines()[-1]


def _run_all(runs: list[Run], out: Path) -> None:
    from megatron_tropd.mcore import platform

    platform.prepare_training()
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    rank = dist.get_rank()
    for run in runs:
        name = run.name if rank == dist.get_world_size() - 1 else f"{run.name}.rank{rank}"
        with (
            (out / f"{name}.log").open("w") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            _run(run)


def _run(run: Run) -> None:
    from megatron.training.training import destroy_global_state

    save_without_manager()
    sys.argv = command_line(run.script, run.arguments)
    after = run.before() if run.before else None
    try:
        runpy.run_path(str(run.script), run_name="__main__")
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        if after is not None:
            after()
        destroy_global_state()
        dist.barrier()
