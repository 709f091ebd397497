"""The process that imports for all ranks of a node, and those that it forks for the launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tropd.base.errors import InputError, TrainingError
from megatron_tropd.config import load_config
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.launch import launcher as launch
from megatron_tropd.launch.first_rank import FirstRank, ForkedRank, _adopting, kill_session
from megatron_tropd.launch.nodes import Nodes
from megatron_tropd.rollout.engines import process
from megatron_tropd.rollout.engines.process import engine_environment

REPOSITORY = Path(__file__).parents[2]
FORKING = """
import os, signal, sys, time
from functools import partial
from megatron_tropd.launch.first_rank import _fork_for
new_session = os.setsid
os.setsid = lambda: time.sleep(0.2) or new_session()
ends = (
    partial(os._exit, 7),
    partial(os.kill, 0, signal.SIGKILL),
    partial(time.sleep, 600),
)
print(*(_fork_for(int(sys.argv[1]), end) for end in ends), flush=True)
"""
LAUNCHER = f"""
import os, subprocess, sys, time
from megatron_tropd.launch.first_rank import _adopting
with _adopting():
    command = [sys.executable, "-c", {FORKING!r}, str(os.getpid())]
    subprocess.run(command, start_new_session=True)
time.sleep(600)
"""


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "gone"


@pytest.fixture
def forked() -> list[ForkedRank]:
    """Ranks that end with code 7, by SIGKILL to all of their process group, and never."""
    with _adopting() as adopting:
        assert adopting
        command = [sys.executable, "-c", FORKING, str(os.getpid())]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as forking:
            assert forking.stdout is not None
            pids = forking.stdout.readline().split()
    return [ForkedRank(int(pid)) for pid in pids]


def test_forked_ranks_are_children_of_the_launcher(forked):
    failed, killed, lives = forked
    assert os.getsid(lives.pid) == lives.pid  # from the first: whoever kills it kills its session
    assert failed.wait() == 7
    assert killed.wait() == -signal.SIGKILL  # and nobody else: it has a session of its own
    assert lives.poll() is None
    lives.terminate()
    assert lives.wait() == -signal.SIGTERM == lives.returncode
    lives.terminate()  # harmless: nobody has its number now


def test_forked_ranks_die_with_the_launcher():
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        try:
            pid = int(launcher.stdout.readline().split()[2])
            assert _state(pid) not in ("gone", "Z")
        finally:
            launcher.kill()
    deadline = time.monotonic() + 60
    while _state(pid) not in ("gone", "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


FIRST = """
import os, time
from megatron_tropd.launch.first_rank import FirstRank
first = FirstRank(os.environ)
first.wait_ready()
print(first.process.pid, flush=True)
time.sleep(600)
"""


def test_the_first_rank_dies_with_the_launcher():
    with subprocess.Popen([sys.executable, "-c", FIRST], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        try:
            pid = int(launcher.stdout.readline())
            assert os.getsid(pid) == pid and _state(pid) not in ("gone", "Z")
        finally:
            launcher.kill()
    deadline = time.monotonic() + 60
    while _state(pid) not in ("gone", "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_whose_launcher_is_gone_already_ends():
    module = "megatron_tropd.launch.parent"
    script = f"from {module} import die_with; die_with(1); raise SystemExit(3)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 75


def test_nothing_runs_between_fork_and_exec():
    """It may meet a lock that another thread held when the process was forked."""
    package = REPOSITORY / "megatron_tropd"
    assert not [p for p in package.rglob("*.py") if "preexec_fn=" in p.read_text()]


def test_who_adopts_nobody_is_given_no_ranks():
    command = [sys.executable, "-c", FORKING, "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["None"] * 3


def test_an_engine_is_prepared_where_the_first_rank_owns_one(monkeypatch):
    monkeypatch.setattr(launch, "_GPU_DEVICES", ())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))

    def threads(node: int, *overrides: str) -> int:
        config = load_config(REPOSITORY / "configs" / "recipes" / "qwen3_1.7b.toml", overrides)
        return launch._engine_threads(config, 2, Nodes(rank=node, count=2))

    ranks = ("parallel.tensor=1", "parallel.data=4")
    assert [threads(node, *ranks, "rollout.num_engines=1") for node in (0, 1)] == [8, 0]
    assert [threads(node, *ranks, "rollout.num_engines=4") for node in (0, 1)] == [4, 4]
    assert threads(0, *ranks, "rollout.num_engines=8", 'rollout.placement="separate"') == 0


def test_the_imports_leave_a_process_that_can_be_forked(tmp_path, capfd):
    """One thread, also where libraries may have several; it tells the launcher what is wrong."""
    config = load_config(
        REPOSITORY / "configs" / "recipes" / "qwen3_1.7b.toml", [f"model.student={tmp_path}"]
    )
    with FirstRank(os.environ | {"OMP_NUM_THREADS": "4"}) as first:
        first.wait_ready()
        assert len(list(Path(f"/proc/{first.process.pid}/task").iterdir())) == 1
        with pytest.raises(InputError, match=r"config\.json"):
            first.check(config)
        assert capfd.readouterr() == ("", "")
        first.process.kill()
        with pytest.raises(TrainingError, match="killed by SIGKILL before the run began"):
            first.check(config)


def test_what_the_imports_say_is_shown_when_they_fail(tmp_path, capfd):
    (tmp_path / "numpy.py").write_text("raise ImportError('a broken library')")
    config = load_config(REPOSITORY / "configs" / "recipes" / "qwen3_1.7b.toml")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    with FirstRank(os.environ | {"PYTHONPATH": path}) as first:
        first.wait_ready()
        assert first.check(config) == 1
        assert [rank.wait() for rank in first.run(RunFolder(tmp_path), [])] == [1]
    assert capfd.readouterr().err.count("ImportError: a broken library") == 1


def test_a_prepared_process_is_taken_where_it_fits() -> None:
    process.prepare(2)
    prepared = process._prepared
    assert prepared is not None
    fits = engine_environment(os.environ, threads=2, cuda_devices=None)
    taken = process.take(fits | {"SET_BY_AN_IMPORT": "1"})
    assert taken is prepared
    process.prepare(2)
    prepared = process._prepared
    assert prepared is not None
    other = process.take(engine_environment(os.environ, threads=2, cuda_devices="0"))
    assert other.environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert prepared.child.returncode == -signal.SIGKILL
    for started in (taken, other):
        started.child.kill()
        started.child.wait()


@pytest.mark.parametrize("leader", [1, 0, -1])
def test_nobody_kills_every_process(leader: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(os, "killpg", lambda *arguments: asked.append(arguments))
    with pytest.raises(ValueError, match="nothing was killed"):
        kill_session(leader)
    assert not asked
