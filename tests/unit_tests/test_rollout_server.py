"""Rollout servers and their clients over real HTTP, with an engine that only counts.

What needs real samples is in tests/integration/test_served_rollouts.py.
"""

import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from megatron_tropd.base.errors import ConfigError, InputError, ServersLost, TrainingError
from megatron_tropd.cli.main import main
from megatron_tropd.data.dispatch import Dispatch, Patience
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines import keeper as keeper_module
from megatron_tropd.rollout.engines import wire
from megatron_tropd.rollout.engines.client import ClientSettings, ServerClient
from megatron_tropd.rollout.engines.keeper import EngineKeeper
from megatron_tropd.rollout.engines.pool import cut_batches, merge_batches
from megatron_tropd.rollout.engines.served import ROLLOUT_SERVERS
from megatron_tropd.rollout.engines.server import RolloutServer, ServerAddress
from megatron_tropd.rollout.weights.versions import WeightsName, WeightVersions

WEIGHTS = WeightsName(3, "trainer")
PATIENCE = 60.0
"""Seconds nothing here takes, on a machine however busy."""
QUICK = Patience(lost_seconds=PATIENCE, first_pause=0.01, longest_pause=0.1, batch_failures=3)
"""Servers are soon asked again; :func:`lose` ends the wait for one."""


class CountingEngine:
    """Answers with the request's seed; ``behave`` may block or raise before it does."""

    pid = 0

    def __init__(self, behave: Callable[["CountingEngine"], None]) -> None:
        self.behave = behave
        self.killed = threading.Event()
        self.loaded: list[Path] = []
        self.has_weights = True

    def wait_ready(self) -> None:
        pass

    def generate(self, requests: tuple[SampleRequest, ...], _: Sampling) -> list[Sample]:
        self.behave(self)
        return [Sample((request.seed,), (0.1 * request.seed,), "stop") for request in requests]

    def load_weights(self, folder: Path) -> None:
        self.loaded.append(folder)
        self.has_weights = True

    def kill(self) -> None:
        self.killed.set()

    def sleep(self) -> None:
        self.has_weights = False

    close = sleep


class Running:
    """A server in threads of this process."""

    def __init__(self, root: Path, number: int, behave: Callable[[CountingEngine], None]) -> None:
        self.stops = 0
        self.engines: list[CountingEngine] = []
        self.error: BaseException | None = None

        def make(_: wire.Model) -> CountingEngine:
            self.engines.append(CountingEngine(behave))
            return self.engines[-1]

        def keep(wait: Callable[[float], object]) -> EngineKeeper:
            versions = WeightVersions(root / "weights")
            return EngineKeeper(make, versions, wait=wait, first_pause=0.01)  # type: ignore

        self.server = RolloutServer(
            ServerAddress(root / "servers", number, "127.0.0.1", 0, None),
            keep,
            settings="same",
            pid=os.getpid(),
        )
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.server.run(complete=lambda: False, told_to_stop=lambda: self.stops)
        except Exception as error:
            self.error = error

    def stop(self) -> None:
        self.stops = 2
        self.thread.join(PATIENCE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """``start(number, behave)``: a server of the run folder ``tmp_path``, whose weights exist."""
    WeightVersions(tmp_path / "weights").write(WEIGHTS, iter([("a", torch.zeros(2))]))
    started: list[Running] = []

    def make(number: int = 0, behave: Callable[[CountingEngine], None] = lambda _: None) -> Running:
        started.append(Running(tmp_path, number, behave))
        path = wire.announcement_path(tmp_path / "servers", number)
        while not path.exists():
            time.sleep(0.01)
        return started[-1]

    yield make
    for running in started:
        running.stop()


def client(root: Path, number: int = 0, **known: object) -> ServerClient:
    """Of a server in ``root``."""
    settings = ClientSettings(root / "servers", "same", answer_seconds=PATIENCE)
    return ServerClient(dataclasses.replace(settings, **known), number)


def batches(count: int, **fields: object) -> list[wire.RequestBatch]:
    """Three requests each, seeds 0, 1, ... over all of them."""
    requests = [SampleRequest((1, 2), 4, seed) for seed in range(3 * count)]
    return [
        dataclasses.replace(
            wire.RequestBatch(f"u{i}", "student", WEIGHTS, tuple(part), Sampling(), 30.0), **fields
        )
        for i, part in enumerate(cut_batches(requests, count))
    ]


def asked(*given: Any) -> Dispatch[wire.RequestBatch, wire.BatchSamples]:
    """Rollout servers at work."""
    return Dispatch(*given, words=ROLLOUT_SERVERS)


def lose(dispatch: Dispatch[Any, Any], trouble: str, *, match: str = "") -> None:
    """End the patience of a dispatch once its server has this trouble, which it then must name."""
    deadline = time.monotonic() + PATIENCE
    while not any(re.search(trouble, text) for text in dispatch._now.troubles.values()):
        assert time.monotonic() < deadline, dispatch._now.troubles
        time.sleep(0.01)
    dispatch._now.last_answer -= 2 * PATIENCE
    with pytest.raises(ServersLost, match=match or trouble):
        dispatch.wait()


def seeds(made: list[wire.BatchSamples]) -> list[int]:
    """The seeds that came back, in the order of the requests."""
    return [sample.token_ids[0] for sample in merge_batches([batch.samples for batch in made])]


def test_units_are_cut_by_index_and_merge_to_what_they_were() -> None:
    assert cut_batches("abcdefg", 3) == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    for count in (1, 2, 3, 9):
        assert merge_batches(cut_batches(range(7), count)) == list(range(7))


def test_messages_survive_exactly_and_others_are_refused() -> None:
    batch = batches(1)[0]
    assert wire.decode(wire.encode(batch), wire.RequestBatch) == batch
    made = wire.BatchSamples("u", WEIGHTS, (Sample((2**31,), (-0.1 / 3,), "length"),))
    assert wire.decode(wire.encode(made), wire.BatchSamples) == made
    with pytest.raises(InputError, match="Expected a msgpack RequestBatch"):
        wire.decode(b"\x80", wire.RequestBatch)
    with pytest.raises(InputError, match=r"Expected `int`.*requests"):
        bad = dataclasses.replace(batch, requests=(SampleRequest(("x",), 1, 1),))  # type: ignore
        wire.decode(wire.encode(bad), wire.RequestBatch)


def test_only_loopback_needs_no_token(tmp_path: Path) -> None:
    def place(host: str, token: str | None = None) -> ServerAddress:
        return ServerAddress(tmp_path, 0, host, 0, token)

    def server(where: ServerAddress) -> None:
        RolloutServer(where, lambda wait: None, settings="", pid=1)  # type: ignore

    for host in ("192.0.2.1", "8.8.8.8"):
        with pytest.raises(ConfigError, match="TROPD_SERVER_TOKEN"):
            server(place(host))
    with pytest.raises(ConfigError, match="one address"):
        server(place("0.0.0.0", "secret"))
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        server(place("192.0.2.1", "secret"))
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_what_cannot_be_served(tmp_path: Path, capsys) -> None:
    toml = tmp_path / "tropd.toml"
    toml.write_text(
        f"""
        model = {{student = "s", teacher = "t"}}
        rollout = {{prompts = "p", max_new_tokens = 8, num_engines = 3, placement = "separate"}}
        train = {{steps = 1}}
        run = {{dir = "{tmp_path}/run"}}
        """
    )
    for words, message in (
        (["--number", "3"], "--number must be in 0..2 (rollout.num_engines servers), found 3"),
        (["--number", "0", "--host", "192.0.2.1"], "TROPD_SERVER_TOKEN must hold"),
        (
            ["--number", "0", "rollout.placement=colocated", "rollout.num_engines=1"],
            'needs rollout.placement = "separate"',
        ),
    ):
        assert main(["serve", str(toml), *words]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"steps": 1}')
    assert main(["serve", str(toml), "--number", "0"]) == 0, "the run is complete"
    assert not (tmp_path / "run" / "servers").exists()


def test_a_client_without_the_token_gets_nothing_but_health(start, tmp_path: Path) -> None:
    start()
    there = wire.read_announcement(tmp_path / "servers", 0)
    assert there is not None
    url = f"http://{there.host}:{there.port}"
    assert requests.get(f"{url}/health", timeout=PATIENCE).status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert requests.get(f"{url}/status", headers=headers, timeout=PATIENCE).status_code == 401
        answer = requests.post(f"{url}/batches", headers=headers, data=b"x", timeout=PATIENCE)
        assert answer.status_code == 401 and "token" in answer.json()["detail"]
    assert requests.get(f"{url}/openapi.json", timeout=PATIENCE).status_code == 404
    assert wire.announcement_path(tmp_path / "servers", 0).stat().st_mode & 0o077 == 0


def test_what_is_no_unit_or_too_large_is_refused_with_a_reason(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    monkeypatch.setattr(wire, "MAX_BODY_BYTES", 1000)
    there = wire.read_announcement(tmp_path / "servers", 0)
    assert there is not None
    url = f"http://{there.host}:{there.port}/batches"
    headers = {"Authorization": f"Bearer {there.token}"}
    answer = requests.post(url, headers=headers, data=b"\x80\x03junk", timeout=PATIENCE)
    assert answer.status_code == 400 and "msgpack RequestBatch" in answer.json()["detail"]
    answer = requests.post(url, headers=headers, data=b"x" * 2000, timeout=PATIENCE)
    assert answer.status_code == 413 and "at most 1000 bytes" in answer.json()["detail"]
    assert requests.get(f"{url}/unknown", headers=headers, timeout=PATIENCE).status_code == 404


def test_units_are_spread_and_come_back_in_order(start, tmp_path: Path) -> None:
    servers = [start(number) for number in range(2)]
    clients = [client(tmp_path, number) for number in range(2)]
    assert seeds(asked(batches(6), clients, QUICK).wait()) == list(range(18))
    for running in servers:
        [engine] = running.engines
        assert engine.loaded in ([], [tmp_path / "weights" / "version_000003"]), "loaded once"


def test_an_engine_that_dies_is_started_again_and_loads_the_weights(start, tmp_path: Path) -> None:
    deaths = iter([True, True])

    def die_twice(_: CountingEngine) -> None:
        if next(deaths, False):
            raise TrainingError("killed")

    running = start(0, die_twice)
    assert seeds(asked(batches(2), [client(tmp_path)], QUICK).wait()) == list(range(6))
    assert len(running.engines) == 3 and running.engines[-1].loaded


def test_a_unit_that_kills_every_engine_is_given_up(start, tmp_path: Path) -> None:
    def die(_: CountingEngine) -> None:
        raise TrainingError("out of memory")

    start(0, die)
    with pytest.raises(TrainingError, match=r"Batch 0 of 1 failed 3 times.*out of memory"):
        asked(batches(1), [client(tmp_path)], QUICK).wait()


def test_weights_that_were_dropped_for_the_teachers_engine_are_loaded_again(tmp_path: Path) -> None:
    engines: dict[str, CountingEngine] = {}

    def make(model: wire.Model) -> CountingEngine:
        engines[model] = CountingEngine(lambda _: None)
        return engines[model]

    versions = WeightVersions(tmp_path / "weights")
    versions.write(WEIGHTS, iter([("a", torch.zeros(1))]))
    keeper = EngineKeeper(make, versions, wait=lambda _: None)  # type: ignore[arg-type]
    keeper.start()
    student = wire.RequestBatch("a", "student", WEIGHTS, (), Sampling(), PATIENCE)
    for batch in (student, student, dataclasses.replace(student, model="teacher", weights=None)):
        keeper.run(batch)
    assert len(engines["student"].loaded) == 1 and keeper.weights is None
    keeper.run(student)
    assert len(engines["student"].loaded) == 2 and keeper.weights == WEIGHTS


def test_a_server_whose_engine_keeps_dying_ends(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: CountingEngine) -> None:
        raise TrainingError("out of memory")

    monkeypatch.setattr(keeper_module, "MOST_FAILURES", 2)
    running = start(0, die)
    dispatch = asked(batches(1), [client(tmp_path)], QUICK)
    lose(dispatch, "has ended: .*keeps dying", match="server 0 has ended: .*dying.*tropd serve")
    running.thread.join(PATIENCE)
    assert "keeps dying: out of memory" in str(running.error)
    assert not wire.announcement_path(tmp_path / "servers", 0).exists()


def test_weights_that_cannot_be_read_for_a_moment_do_not_end_the_run(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the trainer's: no setting or file of the user is wrong, so it is tried again."""
    hiccups = iter(["is not a readable safetensors file: Stale file handle"])

    def load(_: CountingEngine, folder: Path) -> None:
        for hiccup in hiccups:
            raise InputError(f"{folder} {hiccup}")

    monkeypatch.setattr(CountingEngine, "load_weights", load)
    start(0)
    assert seeds(asked(batches(1), [client(tmp_path)], QUICK).wait()) == [0, 1, 2]


def test_an_engine_that_hangs_is_killed_after_the_units_time(start, tmp_path: Path) -> None:
    def hang(engine: CountingEngine) -> None:
        engine.killed.wait(PATIENCE)
        raise TrainingError("pipe closed")

    running = start(0, hang)
    with pytest.raises(TrainingError, match=r"generating a batch for more than 0.2 s"):
        asked(batches(1, seconds=0.2), [client(tmp_path)], QUICK).wait()
    assert all(engine.killed.is_set() for engine in running.engines[:3])


def test_a_slow_server_keeps_its_unit(start, tmp_path: Path) -> None:
    """Longer than the silence for which a server is taken for dead: it still answers."""
    start(0, lambda _: time.sleep(3.5))
    patience = dataclasses.replace(QUICK, lost_seconds=2.5)
    asking = client(tmp_path, answer_seconds=2.0)  # twice as often
    assert seeds(asked(batches(1), [asking], patience).wait()) == [0, 1, 2]


def test_requests_no_server_can_serve_are_not_tried_again(start, tmp_path: Path) -> None:
    def refuse(_: CountingEngine) -> None:
        raise InputError("Request 0 needs 500 tokens")

    running = start(0, refuse)
    with pytest.raises(InputError, match="Request 0 needs 500 tokens"):
        asked(batches(1), [client(tmp_path)], QUICK).wait()
    assert len(running.engines) == 1
    with pytest.raises(InputError, match="name its weights"):
        asked(batches(1, weights=None), [client(tmp_path)], QUICK).wait()


def test_weights_that_come_late_are_waited_for(start, tmp_path: Path) -> None:
    start()
    late = WeightsName(4, "trainer")
    dispatch = asked(batches(1, weights=late), [client(tmp_path)], QUICK)
    time.sleep(0.3)
    WeightVersions(tmp_path / "weights").write(late, iter([("a", torch.zeros(2))]))
    assert seeds(dispatch.wait()) == [0, 1, 2]


def test_weights_that_are_not_there_cost_no_engine(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "VISIBLE_SECONDS", 0.0)
    running = start()
    for name, message in (
        (WeightsName(4, "trainer"), "version_000004 are not there"),
        (WeightsName(3, "other"), "of the trainer trainer, expected other"),
    ):
        with pytest.raises(TrainingError, match=message):
            asked(batches(1, weights=name), [client(tmp_path)], QUICK).wait()
    assert len(running.engines) == 1


@pytest.mark.parametrize(
    ("number", "known", "message"),
    [
        (1, {}, "has not announced itself"),
        (0, {"settings": "others"}, "other settings of the models or the rollout"),
    ],
)
def test_servers_that_cannot_help_are_named(
    start, tmp_path: Path, number: int, known: dict[str, str], message: str
) -> None:
    start(0)
    dispatch = asked(batches(1), [client(tmp_path, number, **known)], QUICK)
    lose(dispatch, message, match=f"server {number} .*{message}")


def test_a_run_that_was_asked_to_stop_waits_less(tmp_path: Path) -> None:
    patience = dataclasses.replace(QUICK, stopping_seconds=0.5)
    before = time.monotonic()
    with pytest.raises(ServersLost, match="not announced itself"):
        asked(batches(1), [client(tmp_path)], patience, lambda: True).wait()
    assert time.monotonic() - before < PATIENCE / 2


def test_a_wrong_token_is_said(start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(0)
    there = wire.read_announcement(tmp_path / "servers", 0)
    assert there is not None
    wire.announce(tmp_path / "elsewhere", dataclasses.replace(there, token=None))
    monkeypatch.setenv(wire.TOKEN_VARIABLE, "another job's")
    dispatch = asked(batches(1), [client(tmp_path, folder=tmp_path / "elsewhere")], QUICK)
    lose(dispatch, "does not accept the token: TROPD_SERVER_TOKEN")


@pytest.mark.parametrize("code", [200, 400])
def test_whoever_else_listens_there_now_is_no_server(start, tmp_path: Path, code: int) -> None:
    """An address of an earlier start: neither its answers nor its refusals end the run."""

    class Alien(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Alien) as alien:
        threading.Thread(target=alien.serve_forever, daemon=True).start()
        there = wire.Announcement(0, "127.0.0.1", alien.server_port, 1, "same", "token")
        wire.announce(tmp_path / "servers", there)
        dispatch = asked(batches(1), [client(tmp_path)], QUICK)
        lose(dispatch, f"answered {code} like no rollout server: '<html>'")
        start(1)
        clients = [client(tmp_path, number) for number in range(2)]
        assert seeds(asked(batches(1), clients, QUICK).wait()) == [0, 1, 2]
        alien.shutdown()


def test_a_server_that_ends_starts_no_engine_any_more(start) -> None:
    running = start(0)
    keeper = running.server._keeper
    while keeper.state != "ready":
        time.sleep(0.01)
    [engine] = running.engines
    running.stop()
    assert engine.killed.is_set() and "student" not in keeper._engines
    with pytest.raises(TrainingError, match="server ends"):
        keeper.start()
    assert running.engines == [engine]


def test_a_second_server_of_the_same_number_takes_over(start, tmp_path: Path) -> None:
    first = start(0)
    start(0)
    first.thread.join(PATIENCE)
    assert "announces another server 0" in str(first.error)
    assert seeds(asked(batches(1), [client(tmp_path)], QUICK).wait()) == [0, 1, 2]


def test_a_server_that_is_told_to_stop_first_ends_what_is_asked_of_it(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_tropd.rollout.engines.server.IDLE_SECONDS", 0.5)
    generating = threading.Event()

    def generate(_: CountingEngine) -> None:
        generating.set()
        time.sleep(1.0)

    running = start(0, generate)
    dispatch = asked(batches(1), [client(tmp_path)], QUICK)
    assert generating.wait(PATIENCE)
    running.stops = 1
    assert seeds(dispatch.wait()) == [0, 1, 2]
    running.thread.join(PATIENCE)
    assert not running.thread.is_alive() and running.error is None
