"""What a machine may lack, and how a test gets at it.

``@pytest.mark.needs("chromium")`` skips a test where there is no Chromium. A test that does not ask
does not find it: its ``PATH`` has none of :data:`PROGRAMS`. So a forgotten mark fails on every
machine, and not only on one that lacks the program. ``TROPD_TEST_HIDE=slurm,data`` (or ``all``)
plays a machine without these.
"""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_tropd.tasks import sandbox
from slurm.testcluster import cluster
from slurm.testcluster.runs import small_file_system

HIDE = "TROPD_TEST_HIDE"
REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "chromium": r"chromium(-browser)?|google-chrome(-stable)?",
    # With triplets and versions: x86_64-linux-gnu-g++-12.
    "compiler": r"(\w+-linux-gnu-)?(cc|c\+\+|c[89]9|cpp|[gp]\+\+|gcc|clang(\+\+)?|as|ld|nvcc|ptxas"
    r"|cuobjdump|nvdisasm)(-[\d.]+)?",
    "git": r"git",
    "shellcheck": r"shellcheck",
    "slurm": r"s(batch|run|control|queue|info|cancel|alloc|acct|attach|bcast)|slurm\w*|munged?",
}
"""Programs of each name, as patterns."""
_USUAL = {"chromium": ("chromium", "google-chrome"), "compiler": ("cc", "gcc", "clang")}
"""One of these must be there; else the program of that name."""
_DATA = ("hf-meta", "models", "tinystories")
_COMPILER_VARIABLES = ("CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH")


def data_folder() -> Path:
    """Folder of the optional real models and data sets; it may be absent."""
    return Path(os.environ.get("TROPD_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


def chromium() -> str:
    """The browser, for a test that needs it."""
    return next(path for path in map(shutil.which, _USUAL["chromium"]) if path)


def why_not(name: str) -> str | None:
    """Why this machine cannot give a test what it needs; None: it can."""
    if name in hidden_names():
        return f"{name} is hidden by {HIDE}"
    return _GATES[name]()


def everybody_needs() -> frozenset[str]:
    """With a GPU a C compiler: Triton builds the launchers of its kernels with it."""
    return frozenset({"compiler"} if Path("/dev/nvidiactl").exists() else ())


def hidden_names() -> frozenset[str]:
    """What ``TROPD_TEST_HIDE`` names."""
    names = frozenset(filter(None, os.environ.get(HIDE, "").split(",")))
    if unknown := names - {*_GATES, "all"}:
        raise pytest.UsageError(
            f"{HIDE} names {', '.join(sorted(unknown))}; it knows {', '.join(_GATES)} and all."
        )
    return frozenset(_GATES) if "all" in names else names


def _program(name: str) -> str | None:
    usual = _USUAL.get(name, (name,))
    return None if any(map(shutil.which, usual)) else f"no {' or '.join(usual)} on PATH"


def _data() -> str | None:
    folder = data_folder()
    # The default may be there and be somebody else's.
    lacking = [name for name in _DATA if not (folder / name).is_dir()]
    text = f"no {lacking} at {folder}; set TROPD_TEST_DATA to a folder that has the test data"
    return text if lacking else None


@cache
def _mount() -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_file_system(Path(folder) / "mounted", "64k"):
                return None
        except OSError as error:
            return f"mounting a small file system takes root ({error})"


def _namespaces() -> str | None:
    found = sandbox.network_is_off()
    return None if found else "this system gives a user no network of his own (unshare)"


_GATES: dict[str, Callable[[], str | None]] = {
    "chromium": lambda: _program("chromium"),
    "compiler": lambda: _program("compiler"),
    "data": _data,
    "git": lambda: _program("git"),
    "mount": _mount,
    "namespaces": _namespaces,
    "shellcheck": lambda: _program("shellcheck"),
    "slurm": cluster.missing,
}


class Surroundings:
    """The environment of tests: everything that they need, and nothing else of :data:`PROGRAMS`."""

    def __init__(self) -> None:
        self._links = tempfile.TemporaryDirectory(prefix="tropd-path-")
        self._path = os.environ.get("PATH", os.defpath)
        self._paths: dict[frozenset[str], str] = {}

    def close(self) -> None:
        """Remove what was made for it."""
        self._links.cleanup()

    @contextmanager
    def of(self, needed: Iterable[str]) -> Iterator[None]:
        """The environment for a test with these needs, until the block ends."""
        shown = frozenset({*needed, *everybody_needs()}) & PROGRAMS.keys() - hidden_names()
        before = {name: os.environ.get(name) for name in ("PATH", *_COMPILER_VARIABLES)}
        os.environ["PATH"] = self._path_with(shown)
        if "compiler" not in shown:
            for name in _COMPILER_VARIABLES:
                os.environ.pop(name, None)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def _path_with(self, shown: frozenset[str]) -> str:
        if shown not in self._paths:
            hide = re.compile("|".join(PROGRAMS[name] for name in sorted(PROGRAMS.keys() - shown)))
            root = Path(tempfile.mkdtemp(dir=self._links.name))
            folders = self._path.split(os.pathsep)
            self._paths[shown] = os.pathsep.join(
                _without(hide, folder, root / str(number)) for number, folder in enumerate(folders)
            )
        return self._paths[shown]


def _without(hide: re.Pattern[str], folder: str, links: Path) -> str:
    """The folder itself if it has nothing to hide, else one of links to the rest of it."""
    try:
        names = os.listdir(folder)
    except OSError:
        return folder
    # An interpreter finds its environment by the folder it is started from.
    own = Path(folder).resolve() == Path(sys.executable).parent.resolve()
    if own or not any(map(hide.fullmatch, names)):
        return folder
    links.mkdir()
    for name in names:
        if not hide.fullmatch(name):
            (links / name).symlink_to(Path(folder).absolute() / name)
    return str(links)


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """Take the CPU platform's patches of torch's factories away: "cuda" means CUDA, if only fake.

    Importing ``megatron_tropd.mcore`` patches them for the process, as an earlier test may have.
    """
    import torch

    from megatron_tropd.mcore import cpu

    owners = [(torch, name) for name in cpu.FACTORIES] + [(torch.Tensor, "to")]
    with ExitStack() as undo:
        for owner, name in owners:
            function = getattr(owner, name)
            original = getattr(function, "__wrapped__", function)
            undo.enter_context(patch.object(owner, name, original))
        yield
