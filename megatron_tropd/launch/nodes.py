"""The launchers of a run on several nodes, one on each: how they meet, and notice a dead one.

The launcher of node 0 listens at ``MASTER_ADDR:MASTER_PORT`` and the others keep one connection to
it for as long as they live. Over it go three messages: *start* (node 0 has opened the run folder),
*left* (the ranks of a node have ended), *end* (everybody returns this exit code). A connection that
breaks before its *left* or *end* is a dead node.

Connections of our own, for torch's rendezvous tells no launcher of another's death (launcher.py).
Nor could its store: a call to a store whose machine has vanished returns after a quarter of an
hour, and holds up signals meanwhile.
"""

import contextlib
import hmac
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from megatron_tropd.base.environment import number, variable
from megatron_tropd.base.errors import ConfigError, TrainingError

MEET_SECONDS = 300.0
"""How long launchers wait for each other before the first rank starts: containers load slowly."""
SILENT_SECONDS = 30
"""After this long without an answer from its machine, a node counts as dead."""
LAST_SECONDS = 90.0
"""How long the other launchers wait for node 0, which says why the run ended, to end first."""
_LONGEST_MESSAGE = 65536
_KEEPALIVE = {
    socket.TCP_KEEPIDLE: SILENT_SECONDS // 3,
    socket.TCP_KEEPINTVL: SILENT_SECONDS // 6,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 1000 * SILENT_SECONDS,
}

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

    def given(name: str, advice: str) -> int:
        return number(name, environment=environment, advice=advice)

    if any(variable(name, environment) for name in ("TROPD_NODES", "TROPD_NODE_RANK")):
        advice = "Set TROPD_NODES (how many) and TROPD_NODE_RANK (from 0) on each node, or neither."
        count, rank = given("TROPD_NODES", advice), given("TROPD_NODE_RANK", advice)
    elif variable("SLURM_STEP_ID", environment):
        advice = (
            "srun sets it beside SLURM_STEP_ID. If Slurm did not start this command, or something "
            "emptied it on the way: unset SLURM_STEP_ID (then this machine is alone), or set "
            "TROPD_NODES and TROPD_NODE_RANK."
        )
        count, rank = given("SLURM_STEP_NUM_NODES", advice), given("SLURM_NODEID", advice)
        if (tasks := given("SLURM_STEP_NUM_TASKS", advice)) != count:
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
    port = given("MASTER_PORT", advice)
    if not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT must be 1 to 65535, found {port}. {advice}")
    return Nodes(rank, count, address, port)


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
        self._inbox: list[tuple[int, Message | None]] = []
        self._links: dict[Connection, int | None] = {}
        """Whose they are; None: of somebody who has not said yet who it is."""
        self._names = {0: nodes.address}
        """Hosts of the nodes that have ever come."""
        self._servers: list[socket.socket] = []
        if nodes.count > 1:
            (self._connect if nodes.rank else self._listen)()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def name(self, node: int) -> str:
        """How to call a node in a message: its number and its host."""
        return f"node {node} ({self._names.get(node, 'unknown host')})"

    def gather(self, seconds: float = MEET_SECONDS) -> None:
        """Node 0: wait until every other launcher has come.

        Raises:
            NodeLost: one did not in time.
        """
        deadline = time.monotonic() + seconds
        while absent := [n for n in range(1, self.nodes.count) if n not in self._names]:
            if time.monotonic() > deadline:
                raise NodeLost(
                    f"The launchers of nodes {absent} did not come within {seconds:.0f} s to "
                    f"{self.nodes.address}:{self.nodes.port} (MASTER_ADDR, MASTER_PORT)."
                )
            self._listen_for(0.05)

    def receive(self) -> Message:
        """The next message, for which a node waits as long as its sender lives.

        Raises:
            NodeLost: the sender is gone.
        """
        while not self._inbox:
            self._listen_for(1.0)
        node, message = self._inbox.pop(0)
        if message is None:
            raise NodeLost(f"The launcher of {self.name(node)} died.")
        return message

    def messages(self, seconds: float = 0.0) -> list[tuple[int, Message | None]]:
        """Wait a moment for messages; all that came: (node, message), None if the node is gone."""
        self._listen_for(seconds)
        found, self._inbox = self._inbox, []
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
        deadline = time.monotonic() + LAST_SECONDS
        while 0 in self._links.values() and time.monotonic() < deadline:
            self._listen_for(0.5)

    def send(self, message: Message) -> None:
        """Say something to node 0, or as node 0 to everybody; whoever is gone misses it."""
        for link, node in self._links.items():
            if node is not None:
                with contextlib.suppress(OSError):
                    link.send_bytes(json.dumps(message).encode())

    def close(self) -> None:
        """Hang up; harmless twice."""
        for link in self._links:
            link.close()
        for server in self._servers:
            server.close()
        self._links, self._servers = {}, []

    def _listen(self) -> None:
        try:
            # All interfaces: the name of a node may mean another one here than elsewhere.
            server = socket.create_server(("", self.nodes.port), backlog=self.nodes.count)
        except OSError as error:
            raise NodeLost(f"Cannot listen on MASTER_PORT {self.nodes.port}: {error}.") from None
        self._servers.append(server)

    def _connect(self) -> None:
        deadline = time.monotonic() + MEET_SECONDS
        place = (self.nodes.address, self.nodes.port)
        while not self._links:
            try:
                self._links[_lasting(socket.create_connection(place, timeout=10.0))] = 0
            except OSError as error:
                if time.monotonic() > deadline:
                    raise NodeLost(
                        f"The launcher of node 0 did not answer at {place[0]}:{place[1]} "
                        f"(MASTER_ADDR, MASTER_PORT) for {MEET_SECONDS:.0f} s: {error}."
                    ) from None
                time.sleep(0.2)
        self.send({"node": self.nodes.rank, "host": socket.gethostname(), "token": self._token})

    def _listen_for(self, seconds: float) -> None:
        for ready in wait([*self._servers, *self._links], seconds):
            if isinstance(ready, socket.socket):
                with contextlib.suppress(OSError):  # it has hung up already
                    self._links[_lasting(ready.accept()[0])] = None
            elif isinstance(ready, Connection) and not self._read(ready):
                ready.close()
                if (node := self._links.pop(ready)) is not None:
                    self._inbox.append((node, None))

    def _read(self, link: Connection) -> bool:
        """Take a message; false: the connection broke, talks nonsense, or is a stranger's."""
        try:
            message = dict(json.loads(link.recv_bytes(_LONGEST_MESSAGE)))
        except (EOFError, OSError, ValueError, TypeError):
            return False
        if (node := self._links[link]) is not None:
            self._inbox.append((node, message))
            return True
        # Let a launcher in; anybody else (port scanners exist) is hung up on.
        new: Any = message.get("node")
        token = str(message.get("token")).encode()
        trusted = hmac.compare_digest(token, self._token.encode())
        if not trusted or new not in range(1, self.nodes.count) or new in self._names:
            return False
        self._links[link], self._names[new] = new, str(message.get("host"))
        return True


def _lasting(connection: socket.socket) -> Connection:
    """Wait for messages without limit, but notice when the other machine is not there."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # The rest of a message that has begun does not take long.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 10, 0))
    for option, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return Connection(connection.detach())
