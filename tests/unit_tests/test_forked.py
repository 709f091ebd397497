"""Ranks that are forked behave as those that are started; each test in a process of its own."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.cli.main import main
from megatron_tropd.launch import forked, launcher
from megatron_tropd.launch.rank import die_with
from tests.ranks import run_in_process, run_with_env


def _begin(main: Callable[[], NoReturn], *arguments: str, **changes: str) -> forked.ForkedRank:
    with open(os.devnull) as nothing:
        return forked.ForkedRank(
            main,
            arguments,
            environment={"OMP_NUM_THREADS": "3", **changes},
            stdin=nothing.fileno(),
            descriptors=[],
        )


def _tell() -> NoReturn:
    """Write down what a rank sees of itself."""
    import torch

    opened = {number: _target(number) for number in os.listdir("/proc/self/fd")}
    found = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "leads": os.getsid(0) == os.getpid() == os.getpgid(0),
        "parent": os.getppid(),
        "threads": torch.get_num_threads(),
        "open": [target for target in opened.values() if target],
    }
    Path(sys.argv[1]).write_text(json.dumps(found))
    raise SystemExit(3)


def _target(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def _sleep() -> NoReturn:
    die_with(int(sys.argv[1]))
    Path(sys.argv[2]).touch()
    time.sleep(600)
    raise SystemExit


def _fail() -> NoReturn:
    raise RuntimeError("a mistake")


def _what_it_has(folder: Path) -> None:
    kept = (folder / "kept").open("w")
    forked.import_once()
    opened = (folder / "lock").open("w")  # as the lock of a run folder, which dies with its holder
    child = _begin(_tell, str(folder / "found"), PLACE="here")
    assert (child.wait(60), child.returncode, child.poll()) == (3, 3, 3)
    found = json.loads((folder / "found").read_text())
    assert found["arguments"] == [str(folder / "found")]
    assert found["environment"] == {"OMP_NUM_THREADS": "3", "PLACE": "here"}
    assert found["leads"] and found["parent"] == os.getpid() and found["threads"] == 3
    assert str(kept.name) in found["open"] and str(opened.name) not in found["open"]


def _how_it_ends(folder: Path) -> None:
    forked.import_once()
    assert _begin(_fail).wait(60) == 1
    child = _begin(_sleep, str(os.getpid()), str(folder / "ready"))
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.1)
    launcher.kill_session(child.pid)  # at once: it leads its session already
    assert child.wait(60) == -signal.SIGKILL
    child = _begin(_sleep, str(os.getpid()), str(folder / "ready"))
    child.terminate()
    assert child.wait(60) == -signal.SIGTERM
    child.terminate()  # harmless: its number may be another's


def _leave_one(folder: Path) -> None:
    forked.import_once()
    child = _begin(_sleep, str(os.getpid()), str(folder / "ready"))
    (folder / "pid").write_text(str(child.pid))
    while not (folder / "ready").exists():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("check", [_what_it_has, _how_it_ends])
def test_a_forked_rank_is_as_a_started_one(check, tmp_path):
    assert run_in_process(check, tmp_path) == 0


def test_a_forked_rank_dies_with_the_launcher_even_if_it_stands_still(tmp_path):
    assert run_in_process(_leave_one, tmp_path) == -signal.SIGKILL
    process = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    deadline = time.monotonic() + 60
    while process.exists() and ") Z " not in process.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _distil(words: list[str]) -> NoReturn:
    forked.import_once()
    raise SystemExit(main(["distill", *words]))


def _sweep(folder: Path) -> None:
    """As launch/forked.py shows: the launcher is a fork, its rank a fork of the launcher."""
    recipe = Path(__file__).parents[2] / "configs" / "recipes" / "qwen3_1.7b.toml"
    one = ("parallel.tensor=1", "parallel.data=1", "rollout.num_engines=1")
    placed = ('rollout.placement="separate"', f"run.dir={folder / 'run'}")
    words = [str(recipe), *one, *placed, f"model.student={folder}"]
    subprocess.Popen = None  # type: ignore
    forked.import_once()
    child = get_context("fork").Process(target=_distil, args=(words,))
    child.start()
    child.join()
    assert child.exitcode == 2 and not (folder / "run").exists()


def test_a_forked_rank_refuses_the_inputs_of_a_run(tmp_path):
    assert run_in_process(_sweep, tmp_path) == 0


def _started_by(gpus: tuple[str, ...]) -> None:
    """Ranks are forked after the imports, and never beside a GPU."""
    started: list[str] = []
    launcher._GPU_DEVICES = gpus
    forked.ForkedRank = lambda *_, **__: started.append("forked")  # type: ignore
    subprocess.Popen = lambda *_, **__: started.append("new")  # type: ignore
    launcher._start_rank([], {}, 0, [])
    forked.import_once()
    launcher._start_rank([], {}, 0, [])
    assert started == ["new", "new" if gpus else "forked"]


@pytest.mark.parametrize("gpus", [(), ("/dev/null",)])
def test_ranks_are_forked_where_the_imports_were_done(gpus):
    assert run_in_process(_started_by, gpus) == 0


def _has_frozen_imports() -> None:
    assert gc.get_freeze_count() > 300_000, gc.get_freeze_count()


def test_ranks_of_tests_leave_their_imports_to_no_garbage_collector():
    assert run_in_process(_has_frozen_imports) == 0


def _make_groups() -> None:
    dist.init_process_group("gloo")
    for n in range(5):
        group = dist.new_group([0], timeout=timedelta(seconds=5 + n))
        dist.barrier(group)
        options = group._get_backend(torch.device("cpu")).options
        assert options._timeout.total_seconds() == 5 + n
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert names.count("gloo_tcp_loop\n") == 1, names


def test_groups_of_tests_share_one_thread():
    run_with_env(1, _make_groups)
