"""How the launchers of several nodes find and lose each other, without any rank."""

import contextlib
import socket
import threading
import time

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.exits import (
    CONFIG,
    FAILED,
    RESTART,
    is_failure,
    is_stop,
    stopped_by,
    worst,
)
from megatron_tropd.launch import nodes
from megatron_tropd.launch.nodes import NodeLost, Nodes, Peers, find_nodes

SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NODEID": "3",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "20123",
}


def test_slurm_says_which_node_this_is():
    assert find_nodes(SRUN) == Nodes(3, 4, "first", 20123)


def test_who_is_not_in_a_step_is_alone():
    """A batch script has Slurm's variables of the job too."""
    batch = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_NODEID": "0"}
    assert find_nodes(batch) == find_nodes({}) == Nodes()
    one = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    assert find_nodes(SRUN | one) == Nodes()


def test_two_launchers_on_one_machine():
    explicit = {"TROPD_NODES": "2", "TROPD_NODE_RANK": "1"}
    assert find_nodes(SRUN | explicit) == Nodes(1, 2, "first", 20123)


def test_a_variable_set_to_nothing_is_not_set():
    """As schedulers, wrappers and containers leave them."""
    nothing = dict.fromkeys((*SRUN, "TROPD_NODES", "TROPD_NODE_RANK"), "")
    assert find_nodes(nothing) == Nodes()
    assert find_nodes(SRUN | {"TROPD_NODES": "", "TROPD_NODE_RANK": " "}) == find_nodes(SRUN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "32"}, "32 tasks on 4 nodes.*--ntasks-per-node=1"),
        ({"MASTER_ADDR": ""}, "4 nodes, and MASTER_ADDR does not say"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a number, found 'http'. Set MASTER_PORT"),
        ({"MASTER_PORT": ""}, "MASTER_PORT must be a number, found nothing. Set MASTER_PORT"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be 1 to 65535, found 70000. Set MASTER_PORT"),
        ({"SLURM_NODEID": ""}, "SLURM_NODEID must be a number, found nothing.*unset SLURM_STEP_ID"),
        ({"SLURM_STEP_NUM_NODES": ""}, "found nothing. srun sets it beside SLURM_STEP_ID"),
        ({"SLURM_STEP_NUM_TASKS": "4(x2)"}, "found '4\\(x2\\)'. srun sets it beside"),
        ({"TROPD_NODES": "2", "TROPD_NODE_RANK": "2"}, "Node 2 of 2 does not exist"),
        ({"TROPD_NODES": "2"}, "TROPD_NODE_RANK must be a number, found nothing. Set TROPD_NODES"),
        ({"TROPD_NODE_RANK": "1"}, "TROPD_NODES must be a number, found nothing.*on each node"),
        ({"TROPD_NODES": "-2", "TROPD_NODE_RANK": "0"}, "TROPD_NODES must be a number, found '-2'"),
    ],
)
def test_contradictions_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        find_nodes(SRUN | change)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture
def meet(port, monkeypatch):
    """``meet(count)``: connected launchers of as many nodes, as threads of this process."""
    monkeypatch.setenv("TROPD_SERVER_TOKEN", "secret")
    met: list[Peers] = []

    def make(count: int) -> list[Peers]:
        met.extend(Peers(Nodes(rank, count, "127.0.0.1", port)) for rank in range(count))
        met[0].gather(60)
        return met

    yield make
    for peers in met:
        peers.close()


def _next(peers: Peers) -> tuple[int, nodes.Message | None]:
    deadline = time.monotonic() + 60
    while not (found := peers.messages(0.1)):
        assert time.monotonic() < deadline
    (message,) = found
    return message


def test_node_0_speaks_to_all_and_hears_each(meet):
    first, second, third = meet(3)
    first.send({"start": 5})
    assert second.receive() == third.receive() == {"start": 5}
    third.end(FAILED)
    assert _next(first) == (2, {"left": FAILED})
    first.end(FAILED)
    assert second.receive() == {"end": FAILED}


def test_a_dead_launcher_is_noticed(meet):
    first, second = meet(2)
    first.close()
    with pytest.raises(NodeLost, match=r"node 0 \(127.0.0.1\) died"):
        second.receive()


def test_the_others_stay_until_node_0_hangs_up(meet):
    first, second = meet(2)
    waiting = threading.Thread(target=second.let_node_0_end)
    waiting.start()
    first.end(FAILED)  # srun would end node 0 if the other left now
    waiting.join(0.3)
    assert waiting.is_alive()
    first.let_node_0_end()  # waits for nobody
    first.close()
    waiting.join(60)
    assert not waiting.is_alive()


def test_node_0_notices_too_and_knows_the_host(meet):
    first, second = meet(2)
    second.close()
    assert _next(first) == (1, None)
    assert first.name(1) == f"node 1 ({socket.gethostname()})"


def test_strangers_are_hung_up_on(meet, port, monkeypatch):
    first = Peers(Nodes(0, 2, "127.0.0.1", port))
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    stranger.settimeout(0.05)
    with pytest.raises(TimeoutError):
        stranger.recv(100)  # nobody has read it yet
    assert [first.messages(0.1) for _ in range(5)] == [[]] * 5
    with contextlib.suppress(ConnectionResetError):
        assert stranger.recv(100) == b""
    monkeypatch.setenv("TROPD_SERVER_TOKEN", "guessed")
    other = Peers(Nodes(1, 2, "127.0.0.1", port))
    with pytest.raises(NodeLost, match=r"nodes \[1\] did not come within 0 s"):
        first.gather(0.3)
    with pytest.raises(NodeLost):
        other.receive()
    for peers in (first, other):
        peers.close()
    stranger.close()


def test_a_port_in_use_is_worth_a_restart(meet, port):
    with socket.create_server(("", port)), pytest.raises(NodeLost, match=f"MASTER_PORT {port}"):
        Peers(Nodes(0, 2, "127.0.0.1", port))


def test_nobody_listens(port, monkeypatch):
    monkeypatch.setattr(nodes, "MEET_SECONDS", 0.1)
    with pytest.raises(NodeLost, match=f"did not answer at 127.0.0.1:{port}"):
        Peers(Nodes(1, 2, "127.0.0.1", port))


def test_one_node_has_no_peers():
    with Peers(Nodes()) as peers:
        peers.gather()
        peers.end(0)
        assert peers.messages() == []


def test_exit_codes():
    assert (stopped_by(2), stopped_by(15), stopped_by(10)) == (130, 143, 138)
    assert is_stop(138) and not is_stop(0) and not is_stop(137)
    assert is_failure(137) and is_failure(1) and not is_failure(0) and not is_failure(143)
    assert worst([0, 143, RESTART, FAILED]) == FAILED
    assert worst([143, RESTART]) == RESTART
    assert worst([CONFIG, FAILED]) == CONFIG
    assert worst([0, 143]) == 143 and worst([0, 0]) == worst([]) == 0
