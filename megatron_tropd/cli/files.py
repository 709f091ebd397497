"""``tropd files``: where the docs, configs, examples and site file lie that texts name."""

import argparse
import shutil
from pathlib import Path

from megatron_tropd.base.errors import InputError

FOLDER = Path(__file__).resolve().parents[1] / "shipped"
"""In a checkout: links to its folders; in a wheel: the files themselves."""
HIDDEN = ("__pycache__", "testcluster")
"""Folders that no wheel has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd files``."""
    add = parser.add_argument
    add("name", nargs="?", default="", help="as texts name it: docs/losses.md; default: list all")
    add("--copy", type=Path, metavar="TO", help="copy the file or folder to this new path")


def run(arguments: argparse.Namespace) -> int:
    """Print the path of a file or folder, or the names of all files; copy it if asked."""
    path = (FOLDER / arguments.name).resolve()
    if not path.exists():
        raise InputError(
            f"No file named {arguments.name!r} comes with megatron_tropd. `tropd files` lists them."
        )
    if arguments.copy:
        _copy(path, arguments.copy)
        print(arguments.copy)
    elif arguments.name:
        print(path)
    else:
        print("\n".join(shipped()))
    return 0


def shipped() -> list[str]:
    """List the names of all files, as texts give them."""
    found = (
        (FOLDER.joinpath(top.name, path.relative_to(top.resolve())), path)
        for top in FOLDER.iterdir()
        for path in top.resolve().rglob("*")
    )
    return sorted(
        str(name.relative_to(FOLDER))
        for name, path in found
        if path.is_file() and not any(part in HIDDEN or part[0] == "." for part in name.parts)
    )


def _copy(path: Path, to: Path) -> None:
    if to.exists():
        raise InputError(f"{to} exists already. Remove it or give another path.")
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, to, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(path, to)
