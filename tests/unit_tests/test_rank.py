"""A rank between its start and its first step: its imports, its orders, its end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.config import Config, load_config
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.launch import launcher as launch
from megatron_tropd.launch.launcher import Ranks, kill_session
from megatron_tropd.launch.nodes import Nodes, Peers
from megatron_tropd.rollout.engines import process
from megatron_tropd.rollout.engines.process import engine_environment

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "configs" / "recipes" / "qwen3_1.7b.toml"
ONE = ("parallel.tensor=1", "parallel.data=1", "rollout.num_engines=1")
LAUNCHER = f"""
import sys, time
from megatron_tropd.config import load_config
from megatron_tropd.launch.launcher import Ranks
from megatron_tropd.launch.nodes import Nodes
config = load_config({str(RECIPE)!r}, {[*ONE, 'rollout.placement="separate"']!r})
with Ranks(config, Nodes()) as ranks:
    ranks.start()
    print(ranks.processes[0].pid, flush=True)
    time.sleep(600)
"""


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "gone"


def _config(*overrides: str) -> Config:
    """Of one rank that prepares no engine."""
    return load_config(RECIPE, [*ONE, 'rollout.placement="separate"', *overrides])


@pytest.fixture
def ranks(tmp_path) -> Iterator[Ranks]:
    with Ranks(_config(f"run.dir={tmp_path / 'run'}"), Nodes()) as ranks:
        yield ranks


def test_a_rank_dies_with_the_launcher():
    """Also while it imports; it leads a session, for whoever kills it kills what it started."""
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        try:
            pid = int(launcher.stdout.readline())
            assert os.getsid(pid) == pid and _state(pid) not in ("gone", "Z")
            time.sleep(0.5)  # it says so first of all
        finally:
            launcher.kill()
    deadline = time.monotonic() + 60
    while _state(pid) not in ("gone", "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_whose_launcher_is_gone_already_ends():
    module = "megatron_tropd.launch.rank"
    script = f"from {module} import die_with; die_with(1); raise SystemExit(3)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 75


def test_nothing_runs_between_fork_and_exec():
    """It may meet a lock that another thread held when the process was forked."""
    package = REPOSITORY / "megatron_tropd"
    assert not [p for p in package.rglob("*.py") if "preexec_fn=" in p.read_text()]


def test_an_engine_is_prepared_where_a_rank_owns_one(monkeypatch):
    monkeypatch.setattr(launch, "_GPU_DEVICES", ())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))

    def threads(*overrides: str) -> list[int]:
        config = load_config(RECIPE, ["parallel.tensor=1", "parallel.data=4", *overrides])
        return [launch._engine_threads(config, rank, 2) for rank in range(4)]

    assert threads("rollout.num_engines=1") == [8, 0, 0, 0]
    assert threads("rollout.num_engines=2") == [8, 0, 8, 0]
    assert threads("rollout.num_engines=4") == [4, 4, 4, 4]
    assert threads("rollout.num_engines=8", 'rollout.placement="separate"') == [0, 0, 0, 0]


def test_inputs_are_refused_before_anything_is_written(ranks, tmp_path, capfd):
    """What the imports print stays away from the terminal."""
    ranks.start()
    config = _config(f"model.student={tmp_path}", f"run.dir={tmp_path / 'run'}")
    assert ranks.check(config) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("tropd: ") and err.count("\n") == 1 and "config.json" in err
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_killed_before_the_run_is_worth_a_restart(ranks):
    ranks.start()
    ranks.processes[0].kill()
    with pytest.raises(TrainingError, match="killed by SIGKILL before the run began"):
        ranks.check(_config())


def test_what_the_imports_say_is_shown_once_when_they_fail(tmp_path, capfd, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('a broken library')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    config = load_config(RECIPE, [*ONE, 'rollout.placement="separate"', "parallel.data=2"])
    folder = RunFolder(tmp_path / "run")
    folder.logs.mkdir(parents=True)
    with Ranks(config, Nodes()) as ranks, Peers(Nodes()) as peers:
        ranks.start()
        assert ranks.check(config) == 1
        assert ranks.run(folder, peers, ranks.port) == 1
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
