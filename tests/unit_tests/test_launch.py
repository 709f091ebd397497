"""The launcher's watch over its ranks, with small programs of shell as ranks."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.failures import Failure, read, report
from megatron_tropd.cli.distill import _train
from megatron_tropd.cli.main import main
from megatron_tropd.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.launch import launcher as launch
from megatron_tropd.launch.launcher import Ranks, Supervisor
from megatron_tropd.launch.nodes import Nodes, Peers
from tests.ranks import free_port

HEEDS = "trap 'exit 0' TERM; touch $READY; while :; do sleep 0.05; done"
PATIENCE = 60.0
"""Seconds nothing here takes, on a machine however busy."""
IGNORES = "trap '' TERM; touch $READY; while :; do sleep 0.05; done"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.logs.mkdir(parents=True)
    return folder


@pytest.fixture
def start(tmp_path, monkeypatch):
    """``start(*texts)``: small programs of shell, each in a session of its own."""
    monkeypatch.setattr(launch, "FAILURE_GRACE_SECONDS", 0.3)

    def make(*texts: str) -> list[subprocess.Popen]:
        return [
            subprocess.Popen(
                ["bash", "-c", text],
                env=os.environ
                | {"READY": str(tmp_path / f"ready_{rank}"), "SENT": str(tmp_path / "sent")},
                start_new_session=True,
            )
            for rank, text in enumerate(texts)
        ]

    return make


@pytest.fixture
def run(folder, start):
    """``run(*texts)``: the exit code of a launcher of one node whose ranks are these."""

    def make(*texts: str) -> int:
        with Peers(Nodes()) as peers:
            return Supervisor(start(*texts), folder, peers).run()

    return make


class ShellRanks:
    """In the place of a launcher's own ranks."""

    port = 1

    def __init__(self, start: Callable, *texts: str) -> None:
        self._start, self._texts = start, texts

    def start(self) -> None:
        """They start when they run."""

    def run(self, folder: RunFolder, peers: Peers, port: int) -> int:
        return Supervisor(self._start(*self._texts), folder, peers).run()


def _signal(
    tmp_path: Path, *numbers: int, first: Callable[[], object] = lambda: None
) -> threading.Thread:
    """Send them to this process once it and two ranks listen; then there is a file ``sent``."""
    before = signal.getsignal(signal.SIGUSR1)

    def listening() -> bool:
        ready = all((tmp_path / f"ready_{rank}").exists() for rank in range(2))
        return ready and signal.getsignal(signal.SIGUSR1) != before

    def send() -> None:
        deadline = time.monotonic() + PATIENCE
        while not listening():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first()
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.15)
        (tmp_path / "sent").touch()

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("ranks", "code"),
    [
        (("exit 0", "exit 0"), 0),
        (("exit 0", "exit 1"), 1),
        (("exit 75", "sleep 600"), 75),
        (("sleep 600", "exit 75"), 75),
        (("kill -9 $$", IGNORES), 75),
    ],
)
def test_the_code_is_that_of_the_cause(run, ranks, code):
    before = time.monotonic()
    assert run(*ranks) == code
    assert time.monotonic() - before < PATIENCE


def test_nobody_is_killed_twice(start, folder, monkeypatch):
    """The number of a process that was waited for may be another's by then."""
    killed, kill = [], os.killpg
    monkeypatch.setattr(os, "killpg", lambda *target: killed.append(target) or kill(*target))
    ranks = start("exit 0", "sleep 600", "exit 75")
    numbers = {(rank.pid, signal.SIGKILL) for rank in ranks}
    with Peers(Nodes()) as peers:
        assert Supervisor(ranks, folder, peers).run() == 75
    assert set(killed) == numbers and len(killed) == 3
    assert not ranks


def test_the_worst_code_is_that_of_all(run, monkeypatch):
    monkeypatch.setattr(launch, "FAILURE_GRACE_SECONDS", PATIENCE)
    assert run("exit 75", "exit 1") == 1


def test_a_killed_rank_is_named(run, folder):
    assert run("exit 0", "kill -9 $$") == 75
    failure = read(folder.failure)
    assert failure is not None and (failure.kind, failure.rank) == ("killed", 1)
    assert "SIGKILL" in failure.message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_passed_on_as_sigterm(run, tmp_path, number):
    thread = _signal(tmp_path, number)
    assert run(HEEDS, HEEDS) == 128 + number
    thread.join()


def test_a_rank_that_cannot_listen_yet_is_stopped_all_the_same(run, folder, tmp_path):
    thread = _signal(tmp_path, signal.SIGTERM)
    assert run(HEEDS, "touch $READY; exec sleep 600") == 143
    assert not folder.failure.exists()
    thread.join()


def test_sigterm_from_two_sides_is_one_request(run, tmp_path):
    save = "until [ -e $SENT ]; do sleep 0.05; done; touch $READY.saved; exit 0"
    slow = HEEDS.replace("exit 0", save)
    thread = _signal(tmp_path, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
    assert run(slow, slow) == 143
    assert (tmp_path / "ready_1.saved").exists()
    thread.join()


def test_the_second_interrupt_is_impatient(run, tmp_path):
    thread = _signal(tmp_path, signal.SIGINT, signal.SIGINT)
    before = time.monotonic()
    assert run(IGNORES, IGNORES) == 130
    assert time.monotonic() - before < PATIENCE < launch.GRACE_SECONDS
    thread.join()


def _config(folder: RunFolder, ranks: int) -> Config:
    return Config(
        model=ModelConfig(student="s", teacher="t"),
        rollout=RolloutConfig(prompts="p", max_new_tokens=8),
        train=TrainConfig(steps=4),
        run=RunConfig(dir=str(folder.root)),
        parallel=ParallelConfig(data=ranks),
    )


def test_ranks_that_lose_each_other_when_stopped_leave_no_failure(start, folder, tmp_path):
    """A job that found one would requeue a run that somebody has stopped."""
    thread = _signal(
        tmp_path,
        signal.SIGTERM,
        first=lambda: report(folder.failure, Failure(kind="lost_peer", message="Broken pipe")),
    )
    ranks = ShellRanks(start, *2 * ["touch $READY; exec sleep 600"])
    with Peers(Nodes()) as peers:
        assert _train(_config(folder, 2), ranks, peers) == 143
    thread.join()
    assert not folder.failure.exists()


def test_the_end_of_node_0_is_the_end_of_all(start, folder):
    """By its word, and by its death."""
    port = free_port()
    for last, code in ({"end": 1}, 1), (None, 75):
        with (
            Peers(Nodes(0, 2, "127.0.0.1", port)) as first,
            Peers(Nodes(1, 2, "127.0.0.1", port)) as second,
        ):
            first.gather(PATIENCE)
            speak = (lambda first=first, last=last: first.send(last)) if last else first.close
            timer = threading.Timer(0.5, speak)
            timer.start()
            assert Supervisor(start(HEEDS, HEEDS), folder, second).run() == code
            timer.join()
    failure = read(folder.failure)
    assert failure is not None and "Lost node 0" in failure.message


def test_nobody_else_gets_the_port_at_which_the_ranks_meet(monkeypatch):
    """From its choice on it belongs to the launcher, and then to rank 0; early ranks wait."""
    import torch.distributed as dist

    from megatron_tropd.mcore import parallel

    listener = launch.listen(Nodes())
    address, port = listener.getsockname()
    assert address == "127.0.0.1", "a run of one node is nobody else's"
    with pytest.raises(OSError, match="in use"):
        socket.create_server((address, port))
    early = socket.create_connection((address, port), PATIENCE)
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("TROPD_STORE_FD", str(listener.detach()))
    parallel._open_store(timedelta(seconds=PATIENCE))
    assert "TROPD_STORE_FD" not in os.environ, "engines have no use for it"
    for value in (b"1", b"2"):
        client = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        client.set("key", value)
        assert parallel._store.get("key") == value
    early.close()
    parallel._store = None


@pytest.mark.parametrize("count", [1, 2])
def test_rank_0_alone_is_given_the_socket(count, folder, monkeypatch):
    started: list[tuple[dict[str, str], list[int]]] = []
    orders: list[dict] = []
    child = subprocess.Popen

    def start(command, env, pass_fds, **options):
        started.append((env, pass_fds))
        return child(["true"], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(Supervisor, "run", lambda _: 0)
    monkeypatch.setattr(Ranks, "_order", lambda _, number, **order: orders.append(order))
    config, port = _config(folder, 2 * count), 0
    for node in range(count):
        with Ranks(config, Nodes(node, count, "127.0.0.1", 1)) as ranks, Peers(Nodes()) as peers:
            ranks.start()
            port = ranks.port or port  # of node 0
            assert ranks.run(folder, peers, port) == 0
    assert [env["RANK"] for env, _ in started] == list(map(str, range(2 * count)))
    assert [len(descriptors) for _, descriptors in started] == [1] + [0] * (2 * count - 1)
    given = [order["environment"] for order in orders]
    assert {environment["MASTER_PORT"] for environment in given} == {str(port)}
    (descriptor,) = started[0][1]
    assert given[0]["TROPD_STORE_FD"] == str(descriptor)
    assert not any("TROPD_STORE_FD" in environment for environment in given[1:])


def test_ranks_are_shared_equally(folder):
    assert Ranks(_config(folder, 8), Nodes(0, 4))._local == 2
    with pytest.raises(ConfigError, match=r"8 ranks .* shared equally by 3 nodes"):
        Ranks(_config(folder, 8), Nodes(0, 3))


def test_a_failing_node_0_tells_the_others_at_once(start, folder):
    """Their ranks wait for ours in a collective; they must not wait until that gives up."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    heard: list[float] = []

    def follower() -> None:
        with Peers(Nodes(1, 2, "127.0.0.1", port)) as peers:
            while "end" not in peers.receive():
                continue
            heard.append(time.monotonic())
            peers.end(75)

    thread = threading.Thread(target=follower)
    thread.start()
    before = time.monotonic()
    with Peers(Nodes(0, 2, "127.0.0.1", port)) as peers:
        peers.gather()
        assert Supervisor(start("exit 75"), folder, peers).run() == 75
    thread.join()
    assert heard[0] - before < launch.LEAVE_SECONDS / 2


def test_a_lost_node_leaves_its_reason_in_the_run_folder(tmp_path, monkeypatch, capsys):
    with socket.create_server(("", 0)) as taken:
        values = {"TROPD_NODES": "2", "TROPD_NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (values | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "run").mkdir()
        recipe = Path(__file__).parents[2] / "configs" / "recipes" / "qwen3_1.7b.toml"
        assert main(["distill", str(recipe), f"run.dir={tmp_path / 'run'}"]) == 75
    failure = read(tmp_path / "run" / "failure.json")
    assert failure is not None and (failure.kind, failure.exit_code) == ("lost_peer", 75)
    assert "MASTER_PORT" in capsys.readouterr().err
