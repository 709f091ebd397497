"""The two conversion commands: arguments, progress, dry run, verification.

Only what runs imports torch: the arguments are known without.
"""

import argparse
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from megatron_tropd.base.errors import ConfigError, InputError

DEFAULT_PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd convert``."""
    directions = parser.add_subparsers(required=True, metavar="DIRECTION")
    add_to_megatron(directions.add_parser("to-megatron", help="HF folder to Megatron checkpoint"))
    add_to_hf(directions.add_parser("to-hf", help="Megatron checkpoint to HF folder"))


def run(arguments: argparse.Namespace) -> int:
    """Convert in the direction that was asked for."""
    return arguments.convert(arguments)


def add_to_megatron(parser: argparse.ArgumentParser) -> None:
    """Arguments of HF -> Megatron."""
    parser.add_argument("--hf", type=Path, required=True, help="HF folder to read")
    parser.add_argument(
        "--megatron", type=Path, required=True, help="folder to write: what --load takes"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        help="only pads the vocabulary to 128 x this; the checkpoint loads at any size",
    )
    parser.add_argument(
        "--pipeline-parallel", type=int, default=1, help="only noted in the checkpoint"
    )
    parser.add_argument(
        "--skip-download-digests",
        action="store_true",
        help="do not hash weight files whose download left their SHA-256 beside them",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model.bin where there are no safetensors (tensors only, no code runs)",
    )
    _add_common(parser)
    parser.set_defaults(convert=_guarded(to_megatron))


def add_to_hf(parser: argparse.ArgumentParser) -> None:
    """Arguments of Megatron -> HF."""
    parser.add_argument(
        "--megatron",
        type=Path,
        required=True,
        help="what Megatron's --load takes, or one checkpoint (release, iter_*, step_*)",
    )
    parser.add_argument("--hf", type=Path, required=True, help="HF folder to write")
    parser.add_argument(
        "--hf-config",
        type=Path,
        default=None,
        help="HF folder of config and tokenizer, for checkpoints that carry none",
    )
    parser.add_argument(
        "--max-shard-size", type=_size, default=5 * 10**9, help="of a weight file (default 5GB)"
    )
    _add_common(parser)
    parser.set_defaults(convert=_guarded(to_hf))


def _add_common(parser: argparse.ArgumentParser) -> None:
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


def main_to_megatron(argv: Sequence[str] | None = None) -> int:
    """``tools/hf_to_megatron.py``; returns the exit code."""
    parser = argparse.ArgumentParser(description="Convert an HF folder to a Megatron checkpoint.")
    add_to_megatron(parser)
    arguments = parser.parse_args(argv)
    return run(arguments)


def main_to_hf(argv: Sequence[str] | None = None) -> int:
    """``tools/megatron_to_hf.py``; returns the exit code."""
    parser = argparse.ArgumentParser(description="Convert a Megatron checkpoint to an HF folder.")
    add_to_hf(parser)
    arguments = parser.parse_args(argv)
    return run(arguments)


def to_megatron(arguments: argparse.Namespace) -> int:
    """Run HF -> Megatron."""
    from megatron_tropd.convert.preview import preview_to_megatron
    from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron

    job = ToMegatron(
        hf=arguments.hf,
        megatron=arguments.megatron,
        dtype=_dtype(arguments),
        tensor_parallel=arguments.tensor_parallel,
        pipeline_parallel=arguments.pipeline_parallel,
        force=arguments.force,
        allow_pickle=arguments.allow_pickle,
        check_downloads=not (arguments.skip_download_digests or arguments.dry_run),
        workers=arguments.workers,
    )
    plan = preview_to_megatron(job)
    if arguments.dry_run:
        print(plan.text())
        return 0
    _say(plan.warnings)
    prompts = _prompts(arguments, job.hf)
    _with_progress(lambda progress: hf_to_megatron(job, progress), plan.total_bytes)
    print(f"Megatron checkpoint: {job.megatron}")
    return _verify(arguments, prompts, written="megatron")


def to_hf(arguments: argparse.Namespace) -> int:
    """Run Megatron -> HF."""
    from megatron_tropd.convert.megatron_folder import NoCompanions, companions_of
    from megatron_tropd.convert.preview import preview_to_hf
    from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf

    job = ToHF(
        megatron=arguments.megatron,
        hf=arguments.hf,
        dtype=_dtype(arguments),
        max_shard_bytes=arguments.max_shard_size,
        hf_config=arguments.hf_config,
        force=arguments.force,
        workers=arguments.workers,
    )
    try:
        plan = preview_to_hf(job)
    except NoCompanions as error:
        raise InputError(f"{error} Or give --hf-config and that folder.") from None
    if arguments.dry_run:
        print(plan.text())
        return 0
    _say(plan.warnings)
    prompts = _prompts(arguments, job.hf_config or companions_of(job.megatron))
    _with_progress(lambda progress: megatron_to_hf(job, progress), plan.total_bytes)
    print(f"HF folder: {job.hf}")
    return _verify(arguments, prompts, written="hf")


def _say(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"note: {warning}", file=sys.stderr)


def _verify(
    arguments: argparse.Namespace, prompts: list[list[int]], *, written: Literal["hf", "megatron"]
) -> int:
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
    """Token ids of what --verify will ask; before the conversion, so that it can be refused."""
    if not arguments.verify:
        return []
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
        # Large pages: where a page fault is dear, conversion is two to four times as fast. torch
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


def _dtype(arguments: argparse.Namespace) -> Any:
    import torch

    return getattr(torch, arguments.dtype) if arguments.dtype else None


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size like 5GB or 500MiB, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)
