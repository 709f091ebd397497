"""Time, memory and collectives of the losses, ours beside a dense one and the peers', on CPU.

    python benchmarks/loss.py             # a table
    python benchmarks/loss.py --json      # its rows as JSON, nothing else on stdout
    python benchmarks/loss.py --write     # and benchmarks/results/loss-<hardware>.json

Every row does the same job on the same inputs: from the student's and the teacher's hidden states
and output layers to the gradients of the student's two. Rows named ``hidden`` are entrance (b);
rows of losses that take logits (entrance (a), the dense ones, most peers) have both models' logits
made by matrix products inside the clock and inside the memory counted, and with several ranks the
gradient of the hidden states summed over them. ``exact``: over the whole vocabulary. Tokens are
all the student's, none is masked; metrics are off unless the name says so, as the peers have none.

Each row runs in fresh processes, one per rank, one thread each:

- ``grad_error``: gradients at a small size against the dense float64 definition, relative L2;
- ``peak_mib``, ``peak_u``: rise of the peak resident memory in the first full-sized call, beyond
  the inputs, minus the gradients returned (of a row whose peak comes before it has them that is
  too little, never too much); u is one float32 buffer of [tokens, vocab / tp]. Largest rank;
- ``collectives_forward``, ``collectives_backward``: calls of torch.distributed in one call;
- ``seconds``, ``ratio``: median over rounds, slowest rank; the ratio is that of a round's row to
  the same round's four bare matrix products (student and teacher logits, gradients of hidden
  states and weight) in the same process, in the tiling that was fastest at the start of the run.

Peers come from the registry into an environment made here from ``requirements-loss-peers.txt``.
``computes`` says what each does; one that cannot run keeps its row, with the reason as ``note``.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loss_cases import PRODUCTS, Case, all_cases
from loss_peers import PACKAGES
from step import commit, describe_hardware, peer_environment, shown_path

RESULTS = Path(__file__).with_name("results")
REQUIREMENTS = Path(__file__).with_name("requirements-loss-peers.txt")
WORKER = Path(__file__).with_name("loss_worker.py")
COLUMNS = 32768
"""Default vocabulary of a rank."""
LARGE_TOKENS = 4096
"""Tokens of the memory target; run at TP 2 by default, for the rows it is about."""
QUICK = {"tokens": [64], "vocab": 1024, "hidden": 32, "rounds": 1, "large_tokens": 0}
LARGEST_ERROR = 0.05
"""Relative error of a gradient that bfloat16 may explain."""
EXACT = ("tropd", "reverse_kl", "forward_kl", "jsd")
"""Methods of the targets, as ``ours hidden exact <method>``."""
TARGETS = {"ratio": 1.25, "peak_u": 0.15, "growth": 1.10}
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Sizes of a run of rows."""

    tp: int
    tokens: int
    vocab: int
    hidden: int
    dtype: str
    large: bool = False
    """Of the memory target: only the rows that target is about."""

    @property
    def columns(self) -> int:
        """Of a rank."""
        return self.vocab // self.tp

    @property
    def unit_mib(self) -> float:
        """u: one float32 buffer of [tokens, columns]."""
        return 4 * self.tokens * self.columns / 2**20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The parsed values.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", help=f"T (default 1024; and {LARGE_TOKENS} at TP 2)")
    add("--vocab", type=int, help=f"V, the whole vocabulary (default {COLUMNS} x TP)")
    add("--hidden", type=int, help="H (default 512)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        nargs="+",
        default=["float32"],
        help="of all inputs; bfloat16 logits have ties at the end of a top-k (default float32)",
    )
    add("--tp", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes (default 1 2)")
    add("--rows", type=re.compile, default="", help="only rows whose name this pattern finds")
    add("--rounds", type=int, help="timed calls (default 3; dense and peers: one less)")
    add("--quick", action="store_true", help="tiny sizes, one round: does everything run?")
    add("--peers", action=argparse.BooleanOptionalAction, default=True, help="also run peers")
    add("--timeout", type=int, default=300, help="seconds after which a row is given up")
    add("--json", action="store_true", help="print the rows as JSON, progress to stderr")
    add("--write", nargs="?", const="", metavar="PATH", help="write the result (default: results/)")
    options = parser.parse_args(arguments)
    set_sizes(options)
    if any(options.vocab % tp for tp in options.tp if options.vocab):
        parser.error("--vocab must be a multiple of every --tp.")
    return options


def set_sizes(options: argparse.Namespace) -> None:
    """Fill in the sizes that were not given."""
    options.large_tokens = 0 if options.tokens or options.vocab else LARGE_TOKENS
    defaults = {"tokens": [1024], "hidden": 512, "rounds": 3}
    if options.quick:
        options.large_tokens, defaults = 0, QUICK
    for name, value in defaults.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    options = parse_arguments(arguments)
    started, load = time.time(), os.getloadavg()
    name, hardware = describe_hardware()
    interpreters = {"ours": sys.executable}
    if options.peers:
        interpreters["peers"] = str(peer_environment("loss-peers", REQUIREMENTS))
    rows = measure(options, interpreters)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(rows))
    if options.write is None:
        return
    result = {
        "hardware": hardware | {"load_average_before": round(load[0], 2)},
        "command": shown_command(sys.argv[1:] if arguments is None else arguments),
        **commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "settings": shown_settings(options),
        "versions": versions(interpreters),
        "rows": rows,
        "aims": aims(rows),
        "seconds": round(time.time() - started, 1),
    }
    path = Path(options.write) if options.write else RESULTS / f"loss-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    say(f"Written to {path}")


def say(text: str) -> None:
    """Progress, where it does not mix with the result."""
    print(text, file=sys.stderr, flush=True)


def sizes(options: argparse.Namespace) -> list[Size]:
    """Every size to run, in order."""
    found = [
        Size(tp, tokens, options.vocab or tp * COLUMNS, options.hidden, dtype)
        for dtype in options.dtype
        for tp in options.tp
        for tokens in options.tokens
    ]
    if options.large_tokens and 2 in options.tp:
        sizes_of = (options.large_tokens, 2 * COLUMNS, options.hidden)
        found += [Size(2, *sizes_of, dtype, True) for dtype in options.dtype]
    return found


def cases_of(size: Size, options: argparse.Namespace) -> list[Case]:
    """The rows of a size, the bare products first."""
    return [
        case
        for case in all_cases()
        if (size.tp == 1 or case.sharded)
        and (case.large or not size.large)
        and (options.peers or case.source in ("ours", "dense"))
        and (case.name == PRODUCTS or re.search(options.rows, case.name))
    ]


def measure(options: argparse.Namespace, interpreters: dict[str, str]) -> list[Row]:
    """Run everything, one row at a time.

    Args:
        options: the command line.
        interpreters: Python of "ours" and of "peers".

    Returns:
        The rows.
    """
    rows: list[Row] = []
    tiles: dict[tuple[Any, ...], list[int]] = {}
    for size in sizes(options):
        # Long runs keep the tiling of the short ones.
        key = size.tp, size.columns, size.hidden, size.dtype
        for case in cases_of(size, options):
            start = time.time()
            python = interpreters["ours" if case.source in ("ours", "dense") else "peers"]
            answer = run_case(case, size, options, python, tiles.get(key))
            tiles.setdefault(key, answer.get("tile", [size.tokens, size.columns]))
            rows.append(row_of(case, size, answer))
            say(f"{line(rows[-1])}  [{time.time() - start:.0f} s]")
    return rows


def run_case(
    case: Case, size: Size, options: argparse.Namespace, python: str, tile: list[int] | None
) -> dict[str, Any]:
    """One row, one process per rank.

    Args:
        case: which row.
        size: at what size.
        options: the command line.
        python: the interpreter that has its packages.
        tile: of the bare products; None: find it.

    Returns:
        What ``loss_worker.py`` wrote, or a ``note`` that says why it did not.
    """
    with tempfile.TemporaryDirectory(prefix="tropd-loss-") as folder:
        here = Path(folder)
        job = {
            "name": case.name,
            "tp": size.tp,
            "tokens": size.tokens,
            "columns": size.columns,
            "hidden": size.hidden,
            "dtype": size.dtype,
            "rounds": rounds_of(case, size, options.rounds),
            "tile": tile,
            "store": str(here / "store"),
        }
        (here / "job.json").write_text(json.dumps(job))
        failed = run_ranks(python, here, size.tp, options.timeout)
        path = here / "result.json"
        return json.loads(path.read_text()) if path.exists() and not failed else {"note": failed}


def rounds_of(case: Case, size: Size, rounds: int) -> int:
    """Timed calls of a row: one where memory is the point, one less than asked for of peers."""
    if size.large:
        return 1
    return rounds if case.source == "ours" or case.name == PRODUCTS else max(1, rounds - 1)


def run_ranks(python: str, here: Path, ranks: int, timeout: int) -> str | None:
    """Run the worker on every rank. Returns what went wrong, in a line; None: nothing did."""
    paths = [str(here / "job.json"), str(here / "result.json")]
    logs = [here / f"log-{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        command = [python, str(WORKER), *paths, str(rank)]
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(command, stdout=file, stderr=file, env=worker_variables())
            )
    end, failed = time.time() + timeout, None
    while failed is None and any(process.poll() is None for process in processes):
        time.sleep(0.05)
        if any(process.poll() for process in processes):
            failed = ""
        elif time.time() > end:
            failed = f"not finished after {timeout} s"
    for process in processes:
        process.kill()
        process.wait()
    if failed is None and not any(process.returncode for process in processes):
        return None
    return failed or last_error([log.read_text() for log in logs])


def worker_variables() -> dict[str, str]:
    """The environment of a worker: one thread, no GPU, no network, malloc as it comes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def last_error(logs: Sequence[str]) -> str:
    """The exception a log ends with, without what is private to this machine."""
    lines = [line for log in logs for line in log.splitlines()]
    errors = [
        line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)
    ]
    text = errors[-1] if errors else (lines or ["ended without a message"])[-1]
    text = re.sub(r"^\[rank\d+\]: ", "", text)
    return re.sub(r"/[^\s:'\"]*/", "", text)[:300]


def row_of(case: Case, size: Size, answer: dict[str, Any]) -> Row:
    """One row of the result; null where there is no number."""
    seconds, products = answer.get("seconds") or [], answer.get("products") or []
    ratios = [mine / bare for mine, bare in zip(seconds, products, strict=True)]
    peak = answer["peak"] / 2**20 if "peak" in answer else None
    collectives = answer.get("collectives")
    return {
        "name": case.name,
        "source": case.source,
        "tp": size.tp,
        "tokens": size.tokens,
        "vocab": size.vocab,
        "hidden": size.hidden,
        "dtype": size.dtype,
        "seconds": median(seconds, 5),
        "products_seconds": median(products, 5),
        "ratio": median(ratios, 3),
        "ratio_of_rounds": [round(ratio, 3) for ratio in ratios],
        "peak_u": None if peak is None else round(peak / size.unit_mib, 4),
        "peak_mib": None if peak is None else round(peak, 2),
        "collectives_forward": collectives and sum(collectives["forward"].values()),
        "collectives_backward": collectives and sum(collectives["backward"].values()),
        "collectives": collectives,
        "grad_error": answer.get("grad_error"),
        "computes": case.computes,
        "note": answer.get("note") or gradient_note(answer.get("grad_error")),
    } | ({"tile": answer["tile"]} if "tile" in answer else {})


def gradient_note(error: float | None) -> str | None:
    """What to say of a gradient that rounding does not explain."""
    if error is None or error < LARGEST_ERROR:
        return None
    return f"gradient differs from the definition by {error:.0%}"


def median(values: Sequence[float], digits: int) -> float | None:
    """Rounded median; None of nothing."""
    return round(statistics.median(values), digits) if values else None


def aims(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The targets beside what was measured, of the worst of the exact methods from hidden states.

    ``growth``: peak at the larger number of tokens over that at the smaller, after one float32
    buffer of the hidden states' size is taken off each.
    """
    exact = {f"ours hidden exact {method}" for method in EXACT}
    ours = [row for row in rows if row["name"] in exact and row["peak_mib"] is not None]
    ours = [row for row in ours if row["dtype"] == "float32"]
    short = [row["ratio"] for row in ours if row["tokens"] == 1024]
    long = [row["peak_u"] for row in ours if row["tokens"] == LARGE_TOKENS and row["tp"] == 2]
    values = {
        "exact_hidden_ratio": (max(short, default=None), TARGETS["ratio"]),
        "exact_hidden_peak_u": (max(long, default=None), TARGETS["peak_u"]),
        "exact_hidden_growth": (max(growths(ours), default=None), TARGETS["growth"]),
    }
    return {
        name: {"value": value, "kind": "max", "aim": aim, "met": value is not None and value <= aim}
        for name, (value, aim) in values.items()
    }


def growths(rows: list[Row]) -> list[float]:
    """Of each method at TP 2: peak at four times the tokens over the peak, hidden states apart."""
    found = []
    for small in rows:
        for large in rows:
            keys = ("name", "tp", "vocab", "hidden", "dtype")
            same = all(small[key] == large[key] for key in keys)
            if same and large["tokens"] == 4 * small["tokens"]:
                found.append(round(working_set(large) / working_set(small), 3))
    return found


def working_set(row: Row) -> float:
    """Peak in MiB without one float32 buffer of the hidden states' size."""
    return row["peak_mib"] - 4 * row["tokens"] * row["hidden"] / 2**20


def table(rows: list[Row]) -> str:
    """The rows as text, and the targets where they were measured."""
    head = (
        f"{'':<36}{'TP':>3}{'T':>6}{'V':>7}{'H':>5}{'seconds':>9}{'ratio':>7}{'peak u':>8}"
        f"{'MiB':>9}{'coll. fwd':>10}{'bwd':>4}{'grad err':>9}"
    )
    lines = [head, *map(line, rows)]
    for name, aim in aims(rows).items():
        if aim["value"] is not None:
            verdict = "met" if aim["met"] else "not met"
            lines.append(f"{name}: {aim['value']} (aim <= {aim['aim']}: {verdict})")
    return "\n".join(lines)


def line(row: Row) -> str:
    """One row as text."""
    name = row["name"] + ("" if row["dtype"] == "float32" else ", bf16")
    left = f"{name:<36}{row['tp']:>3}{row['tokens']:>6}{row['vocab']:>7}{row['hidden']:>5}"
    if row["peak_mib"] is None:
        return f"{left}  {row['note']}"
    error = "-" if row["grad_error"] is None else f"{row['grad_error']:.0e}"
    return (
        f"{left}{shown(row['seconds'], 9, 3)}{shown(row['ratio'], 7, 2)}"
        f"{shown(row['peak_u'], 8, 3)}{shown(row['peak_mib'], 9, 1)}"
        f"{row['collectives_forward']:>10}{row['collectives_backward']:>4}{error:>9}"
        f"  {row['note'] or ''}"
    ).rstrip()


def shown(value: float | None, width: int, digits: int) -> str:
    """A number in a column, or a dash."""
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def versions(interpreters: dict[str, str]) -> dict[str, Any]:
    """Of torch on our side and of every peer."""
    found: dict[str, Any] = {"ours": {"torch": version("torch"), "python": sys.version.split()[0]}}
    if "peers" in interpreters:
        code = (
            "import json, sys; from importlib.metadata import version;"
            "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
        )
        command = [interpreters["peers"], "-c", code, *PACKAGES]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found["peers"] = json.loads(answer)
    return found


def shown_command(arguments: list[str]) -> str:
    """The command line, paths shortened."""
    parts = [shown_path(part) if "/" in part else part for part in arguments]
    return " ".join(["python", "benchmarks/loss.py", *parts])


def shown_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Every option that changes what is measured."""
    names = ("tokens", "vocab", "hidden", "dtype", "tp", "rounds", "large_tokens", "quick", "peers")
    pattern = getattr(options.rows, "pattern", options.rows)
    return {name: getattr(options, name) for name in names} | {"rows": pattern, "threads": 1}


if __name__ == "__main__":
    main()
