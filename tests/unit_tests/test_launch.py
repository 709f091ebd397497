"""The launcher's watch over its ranks, with small programs of shell as ranks."""

import os
import signal
import socket
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.failures import Failure, read, report
from megatron_tropd.cli.main import _lead_alone, main
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
def run(folder, tmp_path, monkeypatch):
    """``run(*ranks)``: the exit code of a launcher of one node whose ranks are these."""

    def start(local: int, *_: object) -> list[subprocess.Popen]:
        return [
            subprocess.Popen(
                ["bash", "-c", text],
                env=os.environ
                | {"READY": str(tmp_path / f"ready_{rank}"), "SENT": str(tmp_path / "sent")},
                start_new_session=True,
            )
            for rank, text in enumerate(ranks)
        ]

    ranks: list[str] = []
    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.setattr(launch, "FAILURE_GRACE_SECONDS", 0.3)

    def make(*texts: str) -> int:
        ranks[:] = texts
        with Peers(Nodes()) as peers:
            return launch.lead(len(texts), folder, peers)

    make.ranks = ranks
    return make


def _signal(tmp_path: Path, *numbers: int) -> threading.Thread:
    """Send them to this process once two ranks are ready; then there is a file ``sent``."""

    def send() -> None:
        deadline = time.monotonic() + PATIENCE
        while not all((tmp_path / f"ready_{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
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


def test_ranks_that_lose_each_other_when_stopped_leave_no_failure(run, folder, tmp_path):
    """A job that found one would requeue a run that somebody has stopped."""

    def lose_and_stop() -> None:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "ready_1").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        report(folder.failure, Failure(kind="lost_peer", message="Connection closed by peer"))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=lose_and_stop)
    thread.start()
    run.ranks[:] = ["touch $READY; exec sleep 600", "touch $READY; exec sleep 600"]
    with Peers(Nodes()) as peers:
        assert _lead_alone(_config(folder, 2), peers) == 143
    thread.join()
    assert not folder.failure.exists()


def test_the_end_of_node_0_is_the_end_of_all(run, folder, tmp_path, monkeypatch):
    """By its word, and by its death."""
    config = _config(folder, 4)
    monkeypatch.setattr(launch, "wait_until_open", lambda _: folder)
    port = free_port()
    for last, code in ({"end": 1}, 1), (None, 75):
        with (
            Peers(Nodes(0, 2, "127.0.0.1", port)) as first,
            Peers(Nodes(1, 2, "127.0.0.1", port)) as second,
        ):
            first.gather(PATIENCE)
            first.send({"start": 1})
            speak = (lambda first=first, last=last: first.send(last)) if last else first.close
            timer = threading.Timer(0.5, speak)
            timer.start()
            run.ranks[:] = [HEEDS, HEEDS]
            assert launch.follow(config, second) == code
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


@pytest.mark.parametrize("nodes", [Nodes(), Nodes(0, 2, "127.0.0.1", 1)])
def test_rank_0_alone_is_given_the_socket(nodes, folder, monkeypatch):
    started: list[tuple[dict[str, str], list[int]]] = []
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda _, env, pass_fds, **__: started.append((env, pass_fds)),
    )
    with launch.listen(nodes) as listener:
        launch._start(2, folder, nodes, listener, None)
        launch._start(2, folder, Nodes(1, 2), listener.getsockname()[1], None)
        (first, given), *others = started
        assert first["TROPD_STORE_FD"] == str(listener.fileno()) and given == [listener.fileno()]
        ports = {env["MASTER_PORT"] for env, _ in started}
        assert ports == {str(listener.getsockname()[1])}
    assert [env["RANK"] for env, _ in started] == ["0", "1", "2", "3"]
    assert all("TROPD_STORE_FD" not in env and not passed for env, passed in others)


def test_ranks_are_shared_equally():
    assert launch.ranks_per_node(8, Nodes(0, 4)) == 2
    with pytest.raises(ConfigError, match=r"6 ranks .* shared equally by 4 nodes"):
        launch.ranks_per_node(6, Nodes(0, 4))


def test_a_failing_node_0_tells_the_others_at_once(run, folder):
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
    run.ranks[:] = ["exit 75"]
    before = time.monotonic()
    with Peers(Nodes(0, 2, "127.0.0.1", port)) as peers:
        assert launch.lead(2, folder, peers) == 75
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
