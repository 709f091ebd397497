"""Start this node's share of the ranks and never leave one behind.

Each rank is a child in a session of its own, so that Ctrl-C reaches only this process, which passes
it on as SIGTERM: the ranks finish their step, save and leave. A run on several nodes has one
launcher on each (``nodes.py``); they end together, with one exit code.

Why not torch's elastic agent (``torch.distributed.run``): tried with torch 2.13, files below
``torch/distributed/elastic`` (tests/integration/test_two_nodes.py shows 1 and 2)

1. An agent tells no other of a failure: ``_invoke_run`` stops its own ranks and returns
   (agent/server/api.py:953). A rank of another node that waits in a collective waits on, its agent
   with it, as it does when an agent was killed: keep-alives matter only to the next rendezvous.
2. Killed by SIGKILL it leaves its ranks running (subprocess_handler.py:66 asks for no death
   signal), and whatever the code of a rank, its own is 1.
3. All other ranks have 30 s after the first failure, a constant (multiprocessing/api.py:649, :990),
   of which a rank that stands still takes all.
4. One time limit serves all signals, and a second signal, which Slurm sends, raises out of the wait
   for ranks that save (multiprocessing/api.py:86).

To start processes and to poll them, which remains, is less than its launcher would have to undo.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, Self

from megatron_tropd.base import exits
from megatron_tropd.base.environment import STORE_DESCRIPTOR, variable
from megatron_tropd.base.errors import ConfigError, TrainingError
from megatron_tropd.base.failures import Failure, report
from megatron_tropd.config import Config, config_to_dict
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.launch import forked
from megatron_tropd.launch.nodes import Nodes, Peers
from megatron_tropd.launch.rank import main as be_rank
from megatron_tropd.launch.watchdog import read_beats
from megatron_tropd.rollout.engines.process import engine_threads

GRACE_SECONDS = 300.0
"""Between a signal and SIGKILL: one step and one checkpoint must fit. At the end of a job's time
(SIGUSR1) the job itself is the limit."""
FAILURE_GRACE_SECONDS = 5.0
"""Between the death of one rank and SIGKILL for the others, which wait for it in a collective."""
LEAVE_SECONDS = 60.0
"""How long node 0, its own ranks gone, waits for the other nodes to say the same."""
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
_BACKLOG = 4096
"""Ranks that may call before rank 0 answers."""
_OFTEN = "(SIGKILL without a reason in the logs: often the node ran out of memory.)"

RankProcess = subprocess.Popen | forked.ForkedRank


class Ranks:
    """This node's ranks. A context manager: whoever still runs at its end is killed."""

    def __init__(self, config: Config, nodes: Nodes) -> None:
        """Nothing is started yet.

        Raises:
            ConfigError: the nodes cannot share the ranks equally.
        """
        world = config.world_size
        if world % nodes.count:
            raise ConfigError(
                f"{world} ranks ({config.ranks_in_words}) cannot be shared equally by "
                f"{nodes.count} nodes. Change them or the number of nodes."
            )
        self._config, self._nodes, self._local = config, nodes, world // nodes.count
        self.port = 0
        """Where the ranks meet; known on node 0, whose first rank has the socket."""
        self._socket = -1
        self.processes: list[RankProcess] = []
        self._orders: list[IO[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.processes)
        for orders in self._orders:
            with contextlib.suppress(OSError):
                orders.close()

    def start(self) -> None:
        """Start them, if that has not happened: their imports take seconds."""
        if self.processes:
            return
        with listen(self._nodes) if self._nodes.rank == 0 else nullcontext() as listener:
            if listener is not None:
                self.port, self._socket = listener.getsockname()[1], listener.fileno()
            for number in range(self._local):
                self._start(number, [self._socket] if number == 0 and listener else [])
        # Only rank 0 holds the socket now: whoever looks for it after its end is refused.

    def _start(self, local_rank: int, descriptors: Sequence[int]) -> None:
        rank = self._nodes.rank * self._local + local_rank
        threads = _engine_threads(self._config, rank, self._local)
        run = str(Path(self._config.run.dir).resolve())  # for whoever looks at ``ps``
        place = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        ours, theirs = socket.socketpair()
        with ours, theirs:
            child = _start_rank(
                [str(os.getpid()), str(threads), run],
                rank_environment(self._local, self._nodes) | place,
                theirs.fileno(),
                descriptors,
            )
            self.processes.append(child)
            self._orders.append(ours.makefile("rw"))

    def check(self, config: Config) -> int:
        """Have the inputs of ``config`` read by the first rank; what is wrong with them it prints.

        Returns:
            0, or its exit code.

        Raises:
            TrainingError: it was killed.
        """
        with contextlib.suppress(OSError):
            self._order(0, check=config_to_dict(config))
            if self._orders[0].readline():
                return exits.COMPLETE
        code = self.processes[0].wait()
        if code < 0:
            raise TrainingError(
                f"The first rank of this node was killed by {signal.Signals(-code).name} before "
                f"the run began. Start the same command again. {_OFTEN}",
                kind="killed",
            )
        return code or exits.FAILED

    def run(self, folder: RunFolder, peers: Peers, port: int, job: str = "train") -> int:
        """Let them work, and wait for them and for the other nodes.

        Args:
            folder: an opened run folder; the ranks read its ``config.json`` and log below it.
            job: a key of ``rank.JOBS``.

        Returns:
            The exit code to pass on (``exits.py``).
        """
        self.start()
        for number in range(self._local):
            environment = {"MASTER_PORT": str(port)}
            if number == self._nodes.rank == 0:
                environment[STORE_DESCRIPTOR] = str(self._socket)
            with contextlib.suppress(OSError):  # it has ended, which is seen at once
                self._order(number, run=str(folder.root), environment=environment, job=job)
        return Supervisor(self.processes, folder, peers).run()

    def _order(self, number: int, **order: Any) -> None:
        print(json.dumps(order), file=self._orders[number], flush=True)


def _start_rank(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stdin: int,
    descriptors: Sequence[int],
) -> RankProcess:
    """Start one in a session of its own; by a fork where this process has done its imports."""
    if forked.is_ready() and not _has_gpu():
        return forked.ForkedRank(
            be_rank, arguments, environment=environment, stdin=stdin, descriptors=descriptors
        )
    return subprocess.Popen(
        [sys.executable, "-m", be_rank.__module__, *arguments],
        env=environment,
        stdin=stdin,
        pass_fds=descriptors,
        start_new_session=True,
    )


def listen(nodes: Nodes) -> socket.socket:
    """Where the ranks will meet: rank 0 takes this very socket over.

    A port that was free a moment ago, and is named to others, may be taken when they come.
    """
    if nodes.count == 1:
        return socket.create_server((nodes.address, 0), backlog=_BACKLOG)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=_BACKLOG, dualstack_ipv6=both)


def _engine_threads(config: Config, rank: int, local: int) -> int:
    """Threads of the engine whose process a rank can start before all else; 0: it owns none."""
    rollout, world = config.rollout, config.parallel.world_size
    # With a GPU the engine's devices are known only when the rank has its own.
    if _has_gpu() or rollout.placement == "separate" or config.teaches(rank):
        return 0
    if rank % (world // rollout.num_engines):
        return 0
    return engine_threads(rollout.num_engines, local, world)


def _has_gpu() -> bool:
    return any(Path(device).exists() for device in _GPU_DEVICES)


def rank_environment(local: int, nodes: Nodes) -> dict[str, str]:
    """What all ranks of a node have in common; what the user has set stays."""
    threads = max(1, len(os.sched_getaffinity(0)) // local)
    ours = {
        "OMP_NUM_THREADS": str(threads),
        # Ranks and engines take turns on the same cores: idle threads must not spin on them.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Megatron's overlap of communication relies on the order of CUDA launches.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    if not variable("PYTORCH_CUDA_ALLOC_CONF"):  # the older name
        ours["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # for batches of many lengths
    return {
        **os.environ,
        **{name: variable(name) or value for name, value in ours.items()},
        "WORLD_SIZE": str(local * nodes.count),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": nodes.address,
        # torch's word for: somebody else has opened the store (rank 0, on the socket it was given).
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def kill(ranks: list[RankProcess]) -> None:
    """Kill processes, wait for them and forget them: their numbers may be others' soon."""
    for rank in ranks:
        kill_session(rank.pid)  # its engine goes with it
    for rank in ranks:
        rank.wait()
    ranks.clear()


def kill_session(leader: int) -> None:
    """Kill the process that leads a session, and what it started in it; harmless if it is gone.

    Args:
        leader: its process id. To the system 1 would mean every process, 0 the caller's own group.
    """
    if leader <= 1:
        raise ValueError(f"Expected the process id of a child, found {leader}; nothing was killed.")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


class Supervisor:
    """Waits for this node's ranks; listens to signals and to the other nodes meanwhile."""

    def __init__(self, ranks: list[RankProcess], folder: RunFolder, peers: Peers) -> None:
        """Nothing is watched yet.

        Args:
            ranks: each leads a session; emptied when all have ended.
        """
        self._ranks, self._folder, self._peers = ranks, folder, peers
        self._received: list[int] = []
        self._forwarded = 0
        self._left: dict[int, int] = {}
        self._end: int | None = None
        self._failure = exits.COMPLETE
        self._killed: set[int] = set()
        self._deadline = math.inf

    def run(self) -> int:
        """Wait for the ranks, then for the other nodes.

        Returns:
            The exit code of the run, on which all nodes agree unless one is gone.
        """
        old = {s: signal.signal(s, self._receive) for s in exits.STOP_SIGNALS}
        try:
            # All of them, each time: a death that nobody asks for is not noticed.
            while None in [rank.poll() for rank in self._ranks]:
                self._look_at_ranks()
                self._forward_signals()
                self._listen()
                if self._end is not None or time.monotonic() > self._deadline:
                    break
            self._look_at_ranks()
            kill(self._ranks)
            return self._agree()
        finally:
            kill(self._ranks)
            for number, handler in old.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self._received.append(number)

    def _look_at_ranks(self) -> None:
        ended = {n: r.returncode for n, r in enumerate(self._ranks) if r.returncode}
        for number, code in ended.items():
            if self._received and code == -signal.SIGTERM:
                # Stopped as asked (by us, or by Slurm, which signals every process of a step), but
                # so early that it could not say so to the others.
                self._limit(FAILURE_GRACE_SECONDS)
                continue
            # We have killed nobody yet: whoever ended by another signal did not choose to.
            if code < 0 and number not in self._killed:
                self._killed.add(number)
                rank = self._peers.nodes.rank * len(self._ranks) + number
                _report_killed(rank, signal.Signals(-code), self._folder)
            self._fail(exits.RESTART if code < 0 else code)

    def _listen(self) -> None:
        for node, message in self._peers.messages(0.05):
            if message is None:
                self._miss(node)
            elif "end" in message:
                self._end = int(message["end"])
            elif "left" in message:
                self._left[node] = code = int(message["left"])
                if exits.is_failure(code):
                    self._fail(code)
                elif exits.is_stop(code):
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
        # Slurm sends SIGTERM to this process, and srun passes on its own: that is one request.
        new = set(self._received[self._forwarded :]) - set(self._received[: self._forwarded])
        self._forwarded = len(self._received)
        if self._received.count(signal.SIGINT) > 1:
            self._deadline = 0.0
        if new:
            for rank in self._ranks:
                rank.terminate()
        if new - {exits.TIME_LIMIT_SIGNAL}:
            self._limit(GRACE_SECONDS)

    def _own_code(self) -> int:
        stopped = exits.stopped_by(self._received[0]) if self._received else exits.COMPLETE
        return self._failure or stopped

    def _agree(self) -> int:
        """The worst code of all nodes, which node 0 collects and announces (``Peers.end``)."""
        nodes, deadline = self._peers.nodes, time.monotonic() + LEAVE_SECONDS
        if nodes.rank:
            self._peers.end(self._own_code())
            signals = len(self._received)
            while self._end is None and 0 not in self._left and len(self._received) == signals:
                self._listen()
            return self._own_code() if self._end is None else self._end
        if exits.is_failure(self._own_code()):
            # Their ranks may wait for ours: nobody has to wait for the wait to time out.
            self._peers.send({"end": self._own_code()})
        while len(self._left) < nodes.count - 1 and time.monotonic() < deadline:
            self._listen()
        missing = [exits.RESTART] * (nodes.count - 1 - len(self._left))
        return exits.worst([self._own_code(), *self._left.values(), *missing])


def _report_killed(rank: int, by: signal.Signals, folder: RunFolder) -> None:
    """Write down which rank a signal ended: it could not do so itself."""
    beat = read_beats(folder.heartbeats, [rank]).get(rank)
    step, phase = (beat.step, beat.phase) if beat else (None, None)
    where = f" in {phase!r} of step {step}" if beat else ""
    whose = f" ({beat.whose})" if beat and beat.whose else ""
    message = (
        f"Rank {rank}{whose} was killed by signal {by.value} ({by.name}){where}. Start the same "
        f"command again to resume. {_OFTEN}"
    )
    failure = Failure(kind="killed", message=message, rank=rank, step=step, phase=phase)
    report(folder.failure, failure)
