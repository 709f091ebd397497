"""Two launchers on this machine are two nodes: one world, one set of numbers, one end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from calm_run import TIMINGS
from hold import Hold
from warm_commands import Command
from warm_engines import environment_of_commands

from megatron_tropd.launch.launcher import LEAVE_SECONDS
from tests.ranks import free_port

pytestmark = pytest.mark.slow

Launcher = subprocess.Popen | Command
AGENT_RANK = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
while not Path(sys.argv[1], "0").exists():
    time.sleep(0.01)
if os.environ["RANK"] == "1":
    os._exit(75)
time.sleep(600)
"""
"""The first stands for a rank that waits in a collective, the second breaks."""


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model) -> Path:
    """TOML of a short run on two replicas."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "prompts.jsonl").write_text('{"prompt": "1 + 1 ="}\n{"prompt": "2 + 2 ="}\n')
    path = folder / "run.toml"
    path.write_text(f"""
        [model]
        student = "{tiny_model("llama")}"
        teacher = "{tiny_model("llama", seed=5)}"
        [parallel]
        data = 2
        [rollout]
        prompts = "prompts.jsonl"
        max_new_tokens = 8
        prompts_per_step = 2
        samples_per_prompt = 2
        engine_cpu_kv_gib = 0.25
        [loss]
        method = "tropd"
        top_k = 16
        [train]
        steps = 12
        [run]
        dir = "unset"
        tensorboard = false
    """)
    return path


@pytest.fixture
def start(config, tmp_path) -> Callable[..., list[Launcher]]:
    """``start(folder, nodes)``: one launcher for each node, none of which survives the test.

    They, their ranks and engines have done their imports before; if ``fresh``, the engines alone.
    """
    started: list[Launcher] = []

    def make(
        folder: Path,
        nodes: int,
        *overrides: str,
        hold: Hold | None = None,
        fresh: bool = False,
    ) -> list[Launcher]:
        held = hold.environment if hold else {}
        warm = environment_of_commands(tmp_path / "warm", held.get("PYTHONPATH", ""))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        place |= {"TROPD_NODES": str(nodes), "OMP_NUM_THREADS": "1"}
        words = ["distill", str(config), f"run.dir={folder}", *overrides]
        launchers = [
            subprocess.Popen(
                [sys.executable, "-m", "megatron_tropd.cli", *words],
                env=held | warm | place | {"TROPD_NODE_RANK": str(node)},
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            if fresh
            else Command(words, environment=held | warm | place | {"TROPD_NODE_RANK": str(node)})
            for node in range(nodes)
        ]
        started.extend(launchers)
        return launchers

    yield make
    for launcher in started:
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()


def _end(launchers: list[Launcher], seconds: float = 500) -> list[tuple[int, str]]:
    texts = ["".join(launcher.communicate(timeout=seconds)) for launcher in launchers]
    return [(run.returncode, text) for run, text in zip(launchers, texts, strict=True)]


def _metrics(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)} for line in lines
    ]


def _wait_for_step(folder: Path, launchers: list[Launcher]) -> None:
    deadline = time.monotonic() + 500
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert all(launcher.poll() is None for launcher in launchers), _end(launchers)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_launchers_are_one_world(start, tmp_path):
    """One of them is told that its time is up: both save, leave, and go on when started again."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert [code for code, _ in _end(start(one, 1))] == [0]
    hold = Hold(tmp_path / "hold", step=1)
    launchers = start(two, 2, hold=hold)
    _wait_for_step(two, launchers)
    launchers[1].send_signal(signal.SIGUSR1)
    hold.release()
    assert [code for code, _ in _end(launchers)] == [138, 138]
    assert list((two / "checkpoints").glob("step_*"))
    (code, text), follower = _end(start(two, 2))
    assert code == 0 and "student_hf" in text, text
    assert follower == (0, "")
    assert _metrics(two) == _metrics(one)
    logs = {path.name for path in (two / "logs").glob("rank*.log")}
    assert logs == {"rank_000.log", "rank_001.log"}


def test_a_killed_launcher_ends_the_other(start, tmp_path):
    folder = tmp_path / "run"
    launchers = start(folder, 2, "train.steps=1000", fresh=True)
    _wait_for_step(folder, launchers)
    launchers[1].kill()
    before = time.monotonic()
    ((code, text),) = _end([launchers[0]], 500)
    assert time.monotonic() - before < LEAVE_SECONDS, "it waited for nobody"
    assert code == 75 and "Lost node 1" in text, (code, text)
    assert json.loads((folder / "failure.json").read_text())["exit_code"] == 75


def test_torchs_agent_does_not_do_this(tmp_path):
    """Why our launcher is not torch's (launch/launcher.py). If this fails, look again."""
    (tmp_path / "rank.py").write_text(AGENT_RANK)
    place = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    command = [sys.executable, "-m", "torch.distributed.run", *place]
    agents = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", str(tmp_path / "rank.py"), str(tmp_path)],
            stderr=subprocess.DEVNULL,
        )
        for node in range(2)
    ]
    try:
        assert agents[1].wait(120) == 1, "the rank's 75 is not passed on"
        rank = int((tmp_path / "0").read_text())
        with pytest.raises(subprocess.TimeoutExpired):
            agents[0].wait(3.0)  # the other node does not hear of it
        agents[0].kill()
        agents[0].wait()
        time.sleep(0.5)
        os.kill(rank, signal.SIGKILL)  # which raises if it is gone: it was left behind
    finally:
        for agent in agents:
            agent.kill()
