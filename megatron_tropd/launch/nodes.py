"""The launchers of a run on several nodes, one on each: how they meet, and notice a dead one.

The launcher of node 0 listens at ``MASTER_ADDR:MASTER_PORT`` and the others keep one connection to
it for as long as they live. Over it go three messages: *start* (node 0 has opened the run folder),
*left* (the ranks of a node have ended), *end* (everybody returns this exit code). A connection that
breaks before its *left* or *end* is a dead node.
"""

import contextlib
import hmac
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from megatron_tropd.base.environment import number, variable
from megatron_tropd.base.errors import ConfigError, TrainingError

MEET_SECONDS = 300.0
"""How long launchers wait for each other before the first rank starts: containers load slowly."""
SILENT_SECONDS = 30
"""After this long without an answer from its machine, a node counts as dead."""
LAST_SECONDS = 90.0
"""How long the other launchers wait for node 0, which says why the run ended, to end first."""
_HELLO_SECONDS = 10.0
_LONGEST_MESSAGE = 65536

Message = dict[str, Any]


class NodeLost(TrainingError):
    """A node of the run is gone, or did not come."""

    def __init__(self, message: str) -> None:
        """A restart may cure it."""
        super().__init__(message, kind="lost_peer")


@dataclass(frozen=True)
class Nodes:
    """This launcher's place among those of the run."""

    rank: int = 0
    count: int = 1
    address: str = "127.0.0.1"
    """Host name or address of node 0."""
    port: int = 0
    """Where the launcher of node 0 listens for the others."""


def find_nodes(environment: Mapping[str, str] = os.environ) -> Nodes:
    """Read from the environment how many launchers the run has, and which of them this one is.

    ``TROPD_NODES`` and ``TROPD_NODE_RANK`` if set, else what srun says of its step. A process that
    srun did not start (also a batch script itself) is alone.

    Raises:
        ConfigError: half of this is set, srun started several tasks on a node, or nobody says where
            node 0 is.
    """
    if any(variable(name, environment) for name in ("TROPD_NODES", "TROPD_NODE_RANK")):
        count = _given("TROPD_NODES", environment)
        rank = _given("TROPD_NODE_RANK", environment)
    elif variable("SLURM_STEP_ID", environment):
        count = _of_step("SLURM_STEP_NUM_NODES", environment)
        rank = _of_step("SLURM_NODEID", environment)
        tasks = _of_step("SLURM_STEP_NUM_TASKS", environment)
        if tasks != count:
            raise ConfigError(
                f"srun started {tasks} tasks on {count} nodes, expected one on each: "
                "`tropd distill` starts the ranks of its node itself. Give --ntasks-per-node=1."
            )
    else:
        return Nodes()
    if not 0 <= rank < count:
        raise ConfigError(f"Node {rank} of {count} does not exist (TROPD_NODE_RANK counts from 0).")
    if count == 1:
        return Nodes()
    address = variable("MASTER_ADDR", environment)
    if not address:
        raise ConfigError(
            f"The run has {count} nodes, and MASTER_ADDR does not say which is the first. Set "
            "MASTER_ADDR and MASTER_PORT before srun, or let `tropd slurm` write the job."
        )
    advice = "Set MASTER_PORT before srun to a port that is free on the first node."
    port = number("MASTER_PORT", environment=environment, advice=advice)
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT must be 1 to 65535, found {port}. {advice}")
    return Nodes(rank, count, address, port)


def _given(name: str, environment: Mapping[str, str]) -> int:
    advice = "Set TROPD_NODES (how many) and TROPD_NODE_RANK (from 0) on each node, or neither."
    return number(name, environment=environment, advice=advice)


def _of_step(name: str, environment: Mapping[str, str]) -> int:
    advice = (
        "srun sets it beside SLURM_STEP_ID. If Slurm did not start this command, or something "
        "emptied it on the way: unset SLURM_STEP_ID (then this machine is alone), or set "
        "TROPD_NODES and TROPD_NODE_RANK."
    )
    return number(name, environment=environment, advice=advice)


class Peers:
    """The other launchers. A context manager; with one node there are none and nothing happens.

    The environment variable ``TROPD_SERVER_TOKEN``, where set, must be the same on all nodes:
    whoever does not know it is not listened to.
    """

    def __init__(self, nodes: Nodes) -> None:
        """Listen (node 0) or connect to node 0 (the others).

        Raises:
            NodeLost: node 0 cannot be reached, or its port is taken.
        """
        self.nodes = nodes
        self._token = os.environ.get("TROPD_SERVER_TOKEN", "")
        self._inbox: queue.Queue[tuple[int, Message | None]] = queue.Queue()
        self._sockets: dict[int, socket.socket] = {}
        self._names: dict[int, str] = {0: nodes.address}
        self._hung_up = threading.Event()
        self._lock = threading.Lock()
        self._server: socket.socket | None = None
        if nodes.count > 1:
            if nodes.rank == 0:
                self._listen()
            else:
                self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def name(self, node: int) -> str:
        """How to call a node in a message: its number and its host."""
        return f"node {node} ({self._names.get(node, 'unknown host')})"

    def gather(self, seconds: float = MEET_SECONDS) -> None:
        """Node 0: wait until every other launcher is connected.

        Raises:
            NodeLost: one did not come in time.
        """
        deadline = time.monotonic() + seconds
        while absent := [n for n in range(1, self.nodes.count) if n not in self._sockets]:
            if time.monotonic() > deadline:
                raise NodeLost(
                    f"The launchers of nodes {absent} did not come within {seconds:.0f} s to "
                    f"{self.nodes.address}:{self.nodes.port} (MASTER_ADDR, MASTER_PORT)."
                )
            time.sleep(0.05)

    def receive(self) -> Message:
        """The next message, for which a node waits as long as its sender lives.

        Raises:
            NodeLost: the sender is gone.
        """
        node, message = self._inbox.get()
        if message is None:
            raise NodeLost(f"The launcher of {self.name(node)} died.")
        return message

    def messages(self) -> list[tuple[int, Message | None]]:
        """What came since the last call: (node, message), None where a node is gone."""
        found = []
        while not self._inbox.empty():
            found.append(self._inbox.get())
        return found

    def end(self, code: int) -> None:
        """Say how the run ended: node 0 to everybody, the others that their ranks are gone."""
        if self.nodes.rank:
            self.send({"left": code})
            return
        with contextlib.suppress(NodeLost):
            self.gather(SILENT_SECONDS)
        self.send({"end": code})

    def let_node_0_end(self) -> None:
        """Any other node: wait until node 0 hangs up. A bad exit code makes srun kill all tasks."""
        if self.nodes.rank:
            self._hung_up.wait(LAST_SECONDS)

    def send(self, message: Message) -> None:
        """Say something to node 0, or as node 0 to everybody; whoever is gone misses it."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            for connection in self._sockets.values():
                try:
                    connection.sendall(data)
                except OSError:
                    continue

    def close(self) -> None:
        """Hang up; harmless twice."""
        with self._lock:
            for connection in (*self._sockets.values(), self._server):
                if connection is not None:
                    # Its reading thread holds the socket too: close() alone would say nothing.
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
                    connection.close()

    def _listen(self) -> None:
        try:
            # All interfaces: the name of a node may mean another one here than elsewhere.
            self._server = socket.create_server(("", self.nodes.port), backlog=self.nodes.count)
        except OSError as error:
            raise NodeLost(f"Cannot listen on MASTER_PORT {self.nodes.port}: {error}.") from None
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        """Let a launcher in; anybody else (port scanners exist) is hung up on."""
        connection.settimeout(_HELLO_SECONDS)
        file = connection.makefile("rb")
        hello = _read(file) or {}
        node, token = hello.get("node"), str(hello.get("token"))
        trusted = hmac.compare_digest(token.encode(), self._token.encode())
        with self._lock:
            if (
                not trusted
                or not isinstance(node, int)
                or not 0 < node < self.nodes.count
                or node in self._sockets
            ):
                connection.close()
                return
            self._names[node] = str(hello.get("host"))
            self._sockets[node] = _lasting(connection)
        self._listen_to(node, file)

    def _connect(self) -> None:
        deadline = time.monotonic() + MEET_SECONDS
        place = (self.nodes.address, self.nodes.port)
        while True:
            try:
                connection = socket.create_connection(place, timeout=_HELLO_SECONDS)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise NodeLost(
                        f"The launcher of node 0 did not answer at {place[0]}:{place[1]} "
                        f"(MASTER_ADDR, MASTER_PORT) for {MEET_SECONDS:.0f} s: {error}."
                    ) from None
                time.sleep(0.2)
        self._sockets[0] = _lasting(connection)
        self.send({"node": self.nodes.rank, "host": socket.gethostname(), "token": self._token})
        threading.Thread(
            target=self._listen_to, args=(0, connection.makefile("rb")), daemon=True
        ).start()

    def _listen_to(self, node: int, file: Any) -> None:
        while (message := _read(file)) is not None:
            self._inbox.put((node, message))
        self._hung_up.set()
        self._inbox.put((node, None))


def _read(file: Any) -> Message | None:
    """The next message; None if the connection broke or talks nonsense."""
    try:
        message = json.loads(file.readline(_LONGEST_MESSAGE))
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def _lasting(connection: socket.socket) -> socket.socket:
    """Wait for messages without limit, but notice when the other machine is no longer there."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in {
        "TCP_KEEPIDLE": SILENT_SECONDS // 3,
        "TCP_KEEPINTVL": SILENT_SECONDS // 6,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 1000 * SILENT_SECONDS,
    }.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection
