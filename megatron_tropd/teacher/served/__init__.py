"""The teacher behind vLLM's own server: its likeliest ids, asked for over HTTP in every step.

Of each data-parallel replica one rank asks, for the rows of its own; what it gets reaches the
others of the last stage through their process groups. No model of the teacher is in the run.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.files import write_json
from megatron_tropd.base.text_files import read_json_object
from megatron_tropd.config import TeacherConfig
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.batch import MicroBatch, upload
from megatron_tropd.data.collective import run_and_share, run_everywhere
from megatron_tropd.data.dispatch import Dispatch, Patience, ServerError, Words
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.losses import TopKSignal
from megatron_tropd.teacher import TeacherStart
from megatron_tropd.teacher.cached import CachedTeacher
from megatron_tropd.teacher.cached.digest import num_scored, scored_tokens, sequence_digest
from megatron_tropd.teacher.served.probe import Probe, check_same, make_probe, resident_score
from megatron_tropd.teacher.served.server import Connection, Gone, Scored, Server, Wanted

if TYPE_CHECKING:
    from megatron_tropd.mcore.layout import Layout

RECORD = "served_teacher.json"
"""File of a run: what each of its teachers said of the probe at the first start."""
_A_MOMENT = 1.0
"""Seconds to wait for a thread that checks a server; as a rule it takes less."""
_WORDS = Words(
    "teacher server",
    "Start `vllm serve` with the teacher there (docs/teachers.md), and the same command again to "
    "resume.",
)


@dataclass(frozen=True)
class ToScore:
    """The tokens of a sequence that are scored, up to the last of them."""

    ids: tuple[int, ...]
    at: tuple[int, ...]


class Asking:
    """One thread's way to one server, for ``data.dispatch``."""

    def __init__(self, servers: "TeacherServers", server: Server) -> None:
        """Nothing is asked yet."""
        self.number, self._server, self._servers = server.number, server, servers
        self._connection = Connection(server, servers.wanted)
        self._losses = 0

    def state(self) -> str | None:
        """Check who is there, if that is not known: "ready" if it is the teacher.

        None: another thread is finding out.
        """
        server = self._server
        if not server.checking.acquire(timeout=_A_MOMENT):
            return None
        try:
            self._losses = server.losses
            if not server.checked:
                self._servers.check(self._connection)
        except ServerError as error:
            server.lost(error)
            raise
        except (InputError, ConfigError) as error:
            self._servers.refusal = error
            raise
        finally:
            server.checking.release()
        return "ready"

    def make(self, batch: ToScore, *, wanted: Callable[[], bool]) -> Scored:
        """Score a sequence; an answer counts only if nobody else can have given it."""
        server = self._server
        fingerprint = server.fingerprint
        try:
            scored, found = self._connection.score(batch.ids, batch.at)
            if found != fingerprint or server.losses != self._losses:
                raise Gone(f"({server.address}) was replaced: it calls itself {found!r} now")
        except ServerError as error:
            server.lost(error)
            raise
        return scored

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()


class TeacherServers:
    """The servers of one teacher, as one rank sees them."""

    def __init__(
        self,
        addresses: Sequence[str],
        wanted: Wanted,
        probe: Probe,
        patience: Patience,
        *,
        requests: int,
    ) -> None:
        """Nothing is asked yet.

        Args:
            requests: that this rank has under way at each server.
        """
        self.servers = [Server(n, address.rstrip("/")) for n, address in enumerate(addresses)]
        self.wanted, self.probe = wanted, probe
        self.said: NDArray[np.float32] | None = None
        """What the teacher says of the probe; None: it was not asked yet."""
        self.said_when = "what the teacher said before"
        self.refusal: Exception | None = None
        """Who is not the teacher, if one was found when the step was already scored by others."""
        self._patience, self._requests = patience, requests
        self._lock = threading.Lock()

    def check(self, connection: Connection) -> None:
        """Find out whether a server is the teacher: all about it, or whether it still is.

        Raises:
            ServerError: it does not answer, or not as a teacher.
            InputError, ConfigError: somebody else is there.
        """
        server, probe = connection.server, self.probe
        losses, known = server.losses, server.known
        if known:
            scored, found = connection.score(probe.ids, probe.at)
            known = found == server.fingerprint
        if not known:
            scored = probe.check(connection)
        with self._lock:  # or each of two replicas would be compared with itself
            if self.said is None:
                self.said = scored.sampled_M
        check_same(str(server), scored.sampled_M, self.said, self.said_when)
        with server.lock:
            server.known = server.checked = server.losses == losses

    def score(self, work: Sequence[ToScore]) -> list[Scored]:
        """Score sequences on whichever servers are there.

        Raises:
            ServersLost: none has answered for too long.
            InputError, ConfigError: a server is not the teacher, or cannot score them.
        """
        if self.refusal is not None:
            raise self.refusal
        for server in self.servers:
            server.checked = False  # a step ago it was the teacher
        clients = [Asking(self, server) for server in self.servers for _ in range(self._requests)]
        # The longest first, so that none is left alone at the end.
        order = sorted(range(len(work)), key=lambda index: -len(work[index].ids))
        made = Dispatch(
            [work[index] for index in order], clients, self._patience, words=_WORDS
        ).wait()
        return [scored for _, scored in sorted(zip(order, made, strict=True), key=lambda x: x[0])]

    def meet(self) -> NDArray[np.float32]:
        """Wait for a server that is the teacher; what it says of the probe."""
        self.score([ToScore(self.probe.ids, tuple(self.probe.at))])
        assert self.said is not None
        return self.said


class ServedTeacher(CachedTeacher):
    """Asks servers for the signals of a step's rows, where a cached teacher reads files."""

    signal = TopKSignal
    referenced = None
    everywhere = True
    """Its ``signals`` gathers over all ranks: also those that have no rows for it call it."""

    def __init__(self, servers: TeacherServers | None, layout: "Layout", *, top_k: int) -> None:
        """Take servers.

        Args:
            servers: None: another rank asks.
            layout: this rank's place.
            top_k: ids that are asked for.
        """
        super().__init__(None)
        self._servers, self._layout, self._top_k = servers, layout, top_k

    def signals(self, batches: Sequence[MicroBatch]) -> list[TopKSignal]:
        """Have the rows of these micro-batches scored.

        Collectives: a gather of the outcome; on the last stage two broadcasts of what was said.
        """
        rows = sorted({row for batch in batches for row in batch.rows})
        # Equal sequences, such as two empty answers to a prompt, are asked for once.
        unique = {
            sequence_digest(self._sequences[row]): self._sequences[row]
            for row in (rows if self._layout.is_last_stage else ())
        }
        said: list[Tensor] = []

        def ask() -> None:
            if self._servers is not None and unique:
                said.append(_packed(self._servers.score([_to_score(s) for s in unique.values()])))

        run_everywhere(ask)
        if not self._layout.is_last_stage or not batches:
            return []
        shape = num_scored(unique.values()), 1 + 2 * self._top_k
        scores = _Scores(unique, self._shared(said, shape, batches[0].tokens.device))
        return [self._signal(batch, scores) for batch in batches]

    def _shared(self, said: list[Tensor], shape: tuple[int, int], device: torch.device) -> Tensor:
        """What the rank that asked was told, on all that compute the same rows."""
        layout = self._layout
        mine = upload(said[0], device) if said else torch.empty(shape, dtype=torch.int32).to(device)
        groups = [layout.row_group if layout.tp_rank == 0 else None, layout.tp_group]
        for group in groups:
            if group is not None and group.size() > 1:
                dist.broadcast(mine, src=dist.get_global_rank(group, 0), group=group)
        return mine


class _Scores:
    """What was said of some sequences, as columns of a cache."""

    def __init__(self, sequences: Mapping[bytes, TokenSequence], said_Mx: Tensor) -> None:
        counts = [num_scored([sequence]) for sequence in sequences.values()]
        parts = said_Mx.split(counts) if counts else ()
        self._said = dict(zip(sequences, parts, strict=True))

    def read(self, sequence: TokenSequence) -> dict[str, Tensor]:
        """As ``TeacherCache.read``."""
        said_Mx = self._said[sequence_digest(sequence)]
        top_k = said_Mx.shape[1] // 2
        return {
            "sampled_logprobs": said_Mx[:, 0].view(torch.float32),
            "topk_ids": said_Mx[:, 1 : 1 + top_k],
            "topk_logprobs": said_Mx[:, 1 + top_k :].view(torch.float32),
        }


def _packed(scored: Sequence[Scored]) -> Tensor:
    """[M, 1 + 2 K] int32: the token's log-prob, the ids, their log-probs; log-probs as bits."""
    sampled_M, ids_MK, logprobs_MK = (
        np.concatenate([getattr(one, name) for one in scored])
        for name in ("sampled_M", "ids_MK", "logprobs_MK")
    )
    columns = sampled_M[:, None].view(np.int32), ids_MK, logprobs_MK.view(np.int32)
    return torch.from_numpy(np.hstack(columns))


def _to_score(sequence: TokenSequence) -> ToScore:
    at = np.flatnonzero(scored_tokens(sequence))
    stop = int(at.max(initial=0)) + 1
    return ToScore(tuple(sequence.ids_N[:stop].tolist()), tuple(at.tolist()))


def meet_servers(
    settings: TeacherConfig,
    folder: HFFolder | MegatronFolder,
    layout: "Layout",
    *,
    top_k: int,
    vocab_size: int,
    longest: int,
    dtype: torch.dtype,
    minutes: float,
    record: Path | None = None,
) -> TeacherServers | None:
    """Wait for the servers and check them; collective.

    Args:
        settings: addresses, and how to ask there.
        folder: of the teacher; it may hold no weights.
        layout: this rank's place.
        top_k: ids that the loss reads.
        vocab_size: columns that are real in all models.
        longest: tokens of the longest sequence; 0: not known.
        dtype: in which the weights are compared, if they are there.
        minutes: longest that a phase of a step may last.
        record: file of the run that tells later starts who the teacher was; None: nobody is told.

    Returns:
        Those that this rank asks; None: another rank asks.

    Raises:
        ServersLost: no server has answered for too long.
        InputError, ConfigError: a server is not the teacher, or not started as it must be.
    """
    columns = model_shape(folder.config).vocab
    seconds = min(settings.timeout_seconds, 30 * minutes)
    servers = TeacherServers(
        settings.address,
        Wanted(top_k, vocab_size, columns, seconds),
        make_probe(
            load_tokenizer(folder.companions),
            folder,
            served_model=settings.served_model,
            vocab_size=vocab_size,
            longest=longest,
        ),
        Patience.within(60 * minutes),
        requests=max(1, settings.requests // layout.dp_size),
    )

    def meet() -> NDArray[np.float32] | None:
        return _meet(servers, folder, dtype, record) if layout.is_main else None

    [servers.said] = run_and_share(meet, (0,))
    asks = layout.is_last_stage and layout.tp_rank == 0 and layout.cp_rank == 0
    return servers if asks else None


def _meet(
    servers: TeacherServers,
    folder: HFFolder | MegatronFolder,
    dtype: torch.dtype,
    record: Path | None,
) -> NDArray[np.float32]:
    """Wait for the teacher and compare it with what is known of it; what it says of the probe."""
    ids, name = list(servers.probe.ids), str(folder.path)
    every = read_json_object(record) if record is not None and record.exists() else {}
    told = every.get(name, {})
    if told.get("token_ids") == ids:
        servers.said = np.array(told["logprobs"], np.float32)
        servers.said_when = f"what the teacher said when the run began ({record})"
    said = servers.meet()
    addresses = ", ".join(server.address for server in servers.servers)
    print(
        f"teacher: served at {addresses}, k = {servers.wanted.top_k}; no model of it is loaded",
        flush=True,
    )
    if told.get("token_ids") == ids:
        return said
    resident = resident_score(folder, ids, dtype)
    if isinstance(resident, str):
        print(f"teacher: not compared with a resident score: {resident}", flush=True)
    else:
        weights = f"those of the weights in {folder.path}"
        gap = check_same("The served teacher", said, resident, weights)
        print(f"teacher: served and resident log-probs differ by {gap:.2g} nats", flush=True)
    if record is not None:
        write_json(record, every | {name: {"token_ids": ids, "logprobs": said.tolist()}})
    return said


class _OfRun(ServedTeacher):
    """The served teacher that a run's config names."""

    def __init__(self, start: TeacherStart) -> None:
        """Meet its servers."""
        config, top_k = start.config, start.config.signal_top_k
        servers = meet_servers(
            config.teacher,
            start.folder,
            start.layout,
            top_k=top_k,
            vocab_size=start.vocab_size,
            longest=start.longest,
            dtype=start.dtype,
            minutes=config.run.timeout_minutes,
            record=None if start.run_dir is None else start.run_dir / RECORD,
        )
        super().__init__(servers, start.layout, top_k=top_k)


SOURCE = _OfRun
