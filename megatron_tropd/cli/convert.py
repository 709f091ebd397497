"""The two conversion commands: arguments, progress, dry run, verification.

Only what runs imports torch: the arguments are known without.
"""

import argparse
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config.hub import model_argument

if TYPE_CHECKING:
    from megatron_tropd.convert.preview import Preview

DEFAULT_PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd convert``."""
    directions = parser.add_subparsers(required=True, metavar="DIRECTION")
    for direction, (what, add) in _DIRECTIONS.items():
        add(directions.add_parser(direction, help=what))


def run(arguments: argparse.Namespace) -> int:
    """Convert in the direction that was asked for."""
    return arguments.convert(arguments)


def _tool(direction: str, argv: Sequence[str] | None = None) -> int:
    what, add = _DIRECTIONS[direction]
    parser = argparse.ArgumentParser(description=f"{what}.")
    add(parser)
    return run(parser.parse_args(argv))


main_to_megatron = partial(_tool, "to-megatron")
"""``tools/hf_to_megatron.py``; returns the exit code."""
main_to_hf = partial(_tool, "to-hf")
"""``tools/megatron_to_hf.py``; returns the exit code."""


def _add_to_megatron(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hf", type=model_argument, required=True, help="HF folder to read, or hf://OWNER/NAME")
    add("--megatron", type=Path, required=True, help="folder to write: what --load takes")
    add(
        "--tensor-parallel",
        type=int,
        default=1,
        help="only pads the vocabulary to 128 x this; the checkpoint loads at any size",
    )
    add("--pipeline-parallel", type=int, default=1, help="only noted in the checkpoint")
    add(
        "--skip-download-digests",
        dest="check_downloads",
        action="store_false",
        help="do not hash weight files whose download left their SHA-256 beside them",
    )
    add(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model.bin if there are no safetensors (tensors only, no code runs)",
    )
    _add_common(parser, _to_megatron)


def _add_to_hf(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--megatron",
        type=Path,
        required=True,
        help="what Megatron's --load takes, or one checkpoint (release, iter_*, step_*)",
    )
    add("--hf", type=Path, required=True, help="HF folder to write")
    add(
        "--hf-config",
        type=Path,
        help="HF folder of config and tokenizer, for checkpoints that carry none",
    )
    add(
        "--max-shard-size",
        dest="max_shard_bytes",
        type=_size,
        default=5 * 10**9,
        help="of a weight file (default 5GB)",
    )
    _add_common(parser, _to_hf)


def _add_common(
    parser: argparse.ArgumentParser, convert: Callable[[argparse.Namespace], int]
) -> None:
    add = parser.add_argument
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="convert the weights (default: bit for bit)",
    )
    add("--dry-run", action="store_true", help="print the complete plan, read no weights, stop")
    add("--force", action="store_true", help="replace an existing output once the new is complete")
    add("--workers", type=_positive, default=2, help="threads (default 2)")
    add("--verify", action="store_true", help="then compare every tensor, and logits of prompts")
    add("--prompt", action="append", help="prompt for --verify; may be repeated")
    parser.set_defaults(convert=_guarded(convert))


_DIRECTIONS = {
    "to-megatron": ("HF folder to Megatron checkpoint", _add_to_megatron),
    "to-hf": ("Megatron checkpoint to HF folder", _add_to_hf),
}


def _to_megatron(arguments: argparse.Namespace) -> int:
    from megatron_tropd.convert.preview import preview_to_megatron
    from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron

    arguments.check_downloads &= not arguments.dry_run
    job = _job(ToMegatron, arguments)
    plan = preview_to_megatron(job)
    return _convert(arguments, plan, partial(hf_to_megatron, job), job.hf, written="megatron")


def _to_hf(arguments: argparse.Namespace) -> int:
    from megatron_tropd.convert.megatron_folder import NoCompanions, companions_of
    from megatron_tropd.convert.preview import preview_to_hf
    from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf

    job = _job(ToHF, arguments)
    try:
        plan = preview_to_hf(job)
    except NoCompanions as error:
        raise InputError(f"{error} Or give --hf-config and that folder.") from None
    companions = job.hf_config or companions_of(job.megatron)
    return _convert(arguments, plan, partial(megatron_to_hf, job), companions, written="hf")


def _job(kind: type, arguments: argparse.Namespace) -> Any:
    """The arguments as a ``ToMegatron`` or ``ToHF``."""
    import torch

    values = {field.name: getattr(arguments, field.name) for field in fields(kind)}
    return kind(**values | {"dtype": getattr(torch, arguments.dtype) if arguments.dtype else None})


def _convert(
    arguments: argparse.Namespace,
    plan: "Preview",
    convert: Callable[[Callable[[str, int], None]], None],
    companions: Path,
    *,
    written: Literal["hf", "megatron"],
) -> int:
    """Print the plan, or convert and verify.

    Args:
        plan: what ``convert`` will do.
        convert: takes the function that it tells its progress.
        written: which of the two folders the conversion makes.
    """
    if arguments.dry_run:
        print(plan.text())
        return 0
    for warning in plan.warnings:
        print(f"note: {warning}", file=sys.stderr)
    # Before the conversion, so that a prompt can be refused.
    prompts = _prompts(arguments, companions) if arguments.verify else []
    _with_progress(convert, plan.total_bytes)
    label = {"hf": "HF folder", "megatron": "Megatron checkpoint"}[written]
    print(f"{label}: {getattr(arguments, written)}")
    if not arguments.verify:
        return 0
    from megatron_tropd.mcore.verify import verify

    result = verify(
        arguments.hf,
        arguments.megatron,
        prompts=prompts,
        hf_config=getattr(arguments, "hf_config", None),
        written=written,
        allow_pickle=getattr(arguments, "allow_pickle", False),
    )
    print(result.text())
    return 0 if result.passed else 1


def _prompts(arguments: argparse.Namespace, folder: Path) -> list[list[int]]:
    """Token ids of what --verify asks."""
    from megatron_tropd.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids = [tokenizer(prompt)["input_ids"] for prompt in arguments.prompt or DEFAULT_PROMPTS]
    if not all(ids):
        raise InputError("Expected prompts of at least one token, found an empty one.")
    return ids


def _with_progress(work: Callable[[Callable[[str, int], None]], None], total: int) -> None:
    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True) as bar:

        def progress(name: str, size: int) -> None:
            with lock:
                bar.set_postfix_str(name, refresh=False)
                bar.update(size)

        work(progress)


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Users' mistakes, full disks and Ctrl-C are one line, not a traceback."""

    def guarded(arguments: argparse.Namespace) -> int:
        # Large pages: if a page fault is dear, conversion is two to four times as fast. torch
        # reads this at its first allocation.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        try:
            return run(arguments)
        except (ConfigError, InputError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            # What is read was opened before: without a name it is the output.
            what = error.filename or "the output could not be written"
            print(f"error: {what}: {error.strerror or error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted: what was being written is removed", file=sys.stderr)
            return 130

    return guarded


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size like 5GB or 500MiB, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)
