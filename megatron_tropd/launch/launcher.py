"""Start this node's share of the ranks and never leave one behind.

Under torchrun (``RANK`` and ``WORLD_SIZE`` set) nothing is started: the calling process is a rank
already. Otherwise each rank is a child in a session of its own, so that Ctrl-C reaches only this
process, which passes it on as SIGTERM: the ranks finish their step, save and leave. A run on
several nodes has one launcher on each (``nodes.py``); they end together, with one exit code.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tropd.base import exits
from megatron_tropd.base.environment import STORE_DESCRIPTOR, variable
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.failures import Failure, report
from megatron_tropd.config import Config
from megatron_tropd.config.run_folder import RunFolder, wait_until_open
from megatron_tropd.launch.first_rank import FirstRank, Rank, kill_session
from megatron_tropd.launch.nodes import Nodes, Peers
from megatron_tropd.launch.watchdog import read_beats
from megatron_tropd.rollout.engines.process import engine_threads

GRACE_SECONDS = 300.0
"""Between a signal and SIGKILL: one step and one checkpoint must fit. At the end of a job's time
(SIGUSR1) the job itself is the limit."""
FAILURE_GRACE_SECONDS = 5.0
"""Between the death of one rank and SIGKILL for the others, which wait for it in a collective."""
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
_BACKLOG = 4096
"""Ranks that may call before rank 0 answers."""
LEAVE_SECONDS = 60.0
"""How long node 0, its own ranks gone, waits for the other nodes to say the same."""


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or our own launcher already made this process a rank."""
    return all(variable(name, environment) for name in ("RANK", "WORLD_SIZE"))


def start_first(config: Config, nodes: Nodes) -> FirstRank:
    """Start this node's first rank, which prepares while the launcher does."""
    local = max(1, config.parallel.world_size // nodes.count)
    threads = _engine_threads(config, local, nodes)
    run = str(Path(config.run.dir).resolve())
    return FirstRank(
        _environment(local, nodes),
        engine_threads=threads,
        shown=run,
        listener=listen(nodes) if nodes.rank == 0 else None,
    )


def listen(nodes: Nodes) -> socket.socket:
    """Where the ranks will meet: rank 0 takes this very socket over.

    A port that was free a moment ago, and is named to others, may be taken when they come.
    """
    how: dict[str, Any] = {"backlog": _BACKLOG}
    if nodes.count == 1:
        return socket.create_server((nodes.address, 0), **how)
    if socket.has_dualstack_ipv6():
        how |= {"family": socket.AF_INET6, "dualstack_ipv6": True}
    return socket.create_server(("", 0), **how)


def _engine_threads(config: Config, local: int, nodes: Nodes) -> int:
    """Threads of the engine that this node's first rank can start at once; 0: none."""
    rollout, world = config.rollout, config.parallel.world_size
    # With a GPU the engine's devices are known only when the rank has its own.
    gpu = any(Path(device).exists() for device in _GPU_DEVICES)
    if gpu or rollout.placement == "separate":
        return 0
    owns = nodes.rank * local % (world // rollout.num_engines) == 0
    return engine_threads(rollout.num_engines, local, world) if owns else 0


def lead(world_size: int, folder: RunFolder, peers: Peers, first: FirstRank | None = None) -> int:
    """Run the ranks of a run, those of node 0 here, and wait for all of them.

    Args:
        world_size: number of processes on all nodes.
        folder: an opened run folder; the ranks read its ``config.json`` and log below it.
        peers: the launchers of the other nodes.
        first: from :func:`start_first`; None: every rank imports for itself.

    Returns:
        The exit code to pass on (``exits.py``).

    Raises:
        ConfigError: the nodes cannot share the ranks equally.
        NodeLost: a node did not come.
    """
    local = ranks_per_node(world_size, peers.nodes)
    peers.gather()
    with (first and first.listener) or listen(peers.nodes) as listener:
        peers.send({"start": listener.getsockname()[1]})
        return _run(local, folder, peers, listener, first)


def follow(config: Config, peers: Peers, first: FirstRank | None = None) -> int:
    """What the launcher of any other node does: run its share once node 0 has opened the folder.

    Returns:
        The exit code that node 0 has decided on.

    Raises:
        ConfigError: the run folder is not to be seen here, or the ranks cannot be shared.
        NodeLost: node 0 is gone.
    """
    message = peers.receive()
    if "start" not in message:
        return int(message["end"])
    folder = wait_until_open(config)
    local = ranks_per_node(config.parallel.world_size, peers.nodes)
    return _run(local, folder, peers, message["start"], first)


def ranks_per_node(world_size: int, nodes: Nodes) -> int:
    """How many ranks each node has.

    Raises:
        ConfigError: the nodes cannot share the ranks equally.
    """
    if world_size % nodes.count:
        raise ConfigError(
            f"{world_size} ranks (tensor x pipeline x data) cannot be shared equally by "
            f"{nodes.count} nodes. Change parallel.* or the number of nodes."
        )
    return world_size // nodes.count


def _run(
    local: int,
    folder: RunFolder,
    peers: Peers,
    meeting: socket.socket | int,
    first: FirstRank | None,
) -> int:
    """``meeting``: where the ranks meet, on node 0 the socket, else its port."""
    if first is not None:
        first.wait_ready()  # while a signal still ends us at once
    received: list[int] = []
    previous = {
        s: signal.signal(s, lambda number, _: received.append(number)) for s in exits.STOP_SIGNALS
    }
    ranks = _start(local, folder, peers.nodes, meeting, first)
    if isinstance(meeting, socket.socket):
        meeting.close()  # only rank 0 holds it now: whoever looks for it after its end is refused
    try:
        return _Supervisor(ranks, received, peers, folder).run()
    finally:
        _kill(ranks)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(
    local: int,
    folder: RunFolder,
    nodes: Nodes,
    meeting: socket.socket | int,
    first: FirstRank | None,
) -> list[Rank]:
    port = meeting if isinstance(meeting, int) else meeting.getsockname()[1]
    places = [
        {
            "RANK": str(nodes.rank * local + local_rank),
            "LOCAL_RANK": str(local_rank),
            "MASTER_PORT": str(port),
        }
        for local_rank in range(local)
    ]
    descriptors = []
    if isinstance(meeting, socket.socket):
        descriptors = [meeting.fileno()]
        places[0][STORE_DESCRIPTOR] = str(meeting.fileno())
    ranks: list[Rank] = first.run(folder, places) if first else []
    command = [
        sys.executable,
        "-m",
        "megatron_tropd.launch.rank",
        str(folder.root),
        str(os.getpid()),
    ]
    shared = _environment(local, nodes)
    for place in places[len(ranks) :]:
        passed = descriptors if STORE_DESCRIPTOR in place else []
        ranks.append(
            subprocess.Popen(command, env=shared | place, pass_fds=passed, start_new_session=True)
        )
    return ranks


def _environment(local: int, nodes: Nodes) -> dict[str, str]:
    """What all ranks of a node have in common."""
    threads = max(1, len(os.sched_getaffinity(0)) // local)
    return os.environ | {
        "WORLD_SIZE": str(local * nodes.count),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": nodes.address,
        # torch's word for: somebody else has opened the store (rank 0, on the socket it was given).
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": variable("OMP_NUM_THREADS") or str(threads),
        # Ranks and engines take turns on the same cores: idle threads must not spin on them.
        "OMP_WAIT_POLICY": variable("OMP_WAIT_POLICY") or "PASSIVE",
        # Megatron's overlap of communication relies on the order of CUDA launches.
        "CUDA_DEVICE_MAX_CONNECTIONS": variable("CUDA_DEVICE_MAX_CONNECTIONS") or "1",
        **_allocator(),
    }


def _allocator() -> dict[str, str]:
    """Segments that grow, for micro-batches of many lengths; a user's own setting stays."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return {} if any(map(variable, names)) else {names[0]: "expandable_segments:True"}


class _Supervisor:
    """Waits for this node's ranks; listens to signals and to the other nodes meanwhile."""

    def __init__(
        self,
        ranks: Sequence[Rank],
        received: list[int],
        peers: Peers,
        folder: RunFolder,
    ) -> None:
        self._ranks = ranks
        self._folder = folder
        self._received = received
        self._forwarded = 0
        self._peers = peers
        self._left: dict[int, int] = {}
        self._end: int | None = None
        self._failure = exits.COMPLETE
        self._killed = 0
        self._deadline = math.inf

    def run(self) -> int:
        # All of them, each time: a death that nobody asks for is not noticed.
        while None in [rank.poll() for rank in self._ranks]:
            self._look_at_ranks()
            self._listen()
            self._forward_signals()
            if self._end is not None or time.monotonic() > self._deadline:
                break
            time.sleep(0.05)
        self._look_at_ranks()
        _kill(self._ranks)
        return self._agree()

    def _look_at_ranks(self) -> None:
        codes = [rank.returncode for rank in self._ranks]
        if self._received and -signal.SIGTERM in codes:
            # Stopped as asked (by us, or by Slurm, which signals every process of a step), but so
            # early that it could not say so to the others.
            self._limit(FAILURE_GRACE_SECONDS)
            codes = [0 if code == -signal.SIGTERM else code for code in codes]
        # We have killed nobody yet: whoever ended by another signal did not choose to.
        killed = sum(code is not None and code < 0 for code in codes)
        if killed > self._killed:
            self._killed = killed
            report_killed(codes, self._folder, self._peers.nodes.rank * len(codes))
        if failure := exits.worst(exits.RESTART if code < 0 else code for code in codes if code):
            self._fail(failure)

    def _listen(self) -> None:
        for node, message in self._peers.messages():
            if message is None:
                self._miss(node)
            elif "end" in message:
                self._end = int(message["end"])
            elif "left" in message:
                self._left[node] = int(message["left"])
                if exits.is_failure(self._left[node]):
                    self._fail(self._left[node])
                elif exits.is_stop(self._left[node]):
                    self._limit(GRACE_SECONDS)

    def _miss(self, node: int) -> None:
        if node in self._left or self._end is not None:
            return  # it had said goodbye
        self._left[node] = exits.RESTART
        text = f"Lost {self._peers.name(node)}: its launcher was killed, or its machine is gone."
        print(f"tropd: {text}", file=sys.stderr, flush=True)
        report(self._folder.failure, Failure(kind="killed", message=text))
        self._fail(exits.RESTART)

    def _fail(self, code: int) -> None:
        self._failure = exits.worst([self._failure, code])
        self._limit(FAILURE_GRACE_SECONDS)

    def _limit(self, seconds: float) -> None:
        """End what still runs after so long, or when an earlier limit says so."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _forward_signals(self) -> None:
        if len(self._received) == self._forwarded:
            return
        # Slurm sends SIGTERM to this process, and srun passes on its own: that is one request.
        new = set(self._received[self._forwarded :]) - set(self._received[: self._forwarded])
        self._forwarded = len(self._received)
        if self._received.count(signal.SIGINT) > 1:
            self._deadline = 0.0
        if not new:
            return
        for rank in self._ranks:
            rank.terminate()
        if new != {exits.TIME_LIMIT_SIGNAL}:
            self._limit(GRACE_SECONDS)

    def _own_code(self) -> int:
        stopped = exits.stopped_by(self._received[0]) if self._received else exits.COMPLETE
        return self._failure or stopped

    def _agree(self) -> int:
        """The worst code of all nodes, which node 0 collects and announces (``Peers.end``)."""
        nodes, deadline = self._peers.nodes, time.monotonic() + LEAVE_SECONDS
        if nodes.rank:
            self._peers.end(self._own_code())
            while self._end is None and 0 not in self._left and not self._signalled_again():
                self._listen()
                time.sleep(0.05)
            return self._own_code() if self._end is None else self._end
        if exits.is_failure(self._own_code()):
            # Their ranks may wait for ours: nobody has to wait for the wait to time out.
            self._peers.send({"end": self._own_code()})
        while len(self._left) < nodes.count - 1 and time.monotonic() < deadline:
            self._listen()
            time.sleep(0.05)
        missing = [exits.RESTART] * (nodes.count - 1 - len(self._left))
        return exits.worst([self._own_code(), *self._left.values(), *missing])

    def _signalled_again(self) -> bool:
        return len(self._received) > self._forwarded


def report_killed(codes: Sequence[int | None], folder: RunFolder, first_rank: int = 0) -> None:
    """Write down which rank a signal ended: it could not do so itself.

    Args:
        codes: of this node's ranks; None: still running.
        folder: of the run.
        first_rank: of this node.
    """
    beats = read_beats(folder.heartbeats, range(first_rank, first_rank + len(codes)))
    for rank, code in enumerate(codes, first_rank):
        if code is None or code >= 0:
            continue
        beat = beats.get(rank)
        where = f" in {beat.phase!r} of step {beat.step}" if beat else ""
        message = (
            f"Rank {rank} was killed by signal {-code} ({signal.Signals(-code).name}){where}. "
            "Start the same command again to resume. (SIGKILL without a reason in the logs: often "
            "the node ran out of memory.)"
        )
        report(
            folder.failure,
            Failure(
                kind="killed",
                message=message,
                rank=rank,
                step=beat.step if beat else None,
                phase=beat.phase if beat else None,
            ),
        )


def _kill(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        kill_session(rank.pid)  # its engine goes with it
    for rank in ranks:
        rank.wait()
