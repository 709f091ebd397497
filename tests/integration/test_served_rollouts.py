"""Rollouts from real servers: two `tropd serve` processes, real vLLM, and what may happen to them.

Whatever dies, hangs or is slow, the samples must be those of an undisturbed engine, bit for bit.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import requests
import torch
import torch.distributed as dist
from calm_run import TIMINGS
from hold import Hold
from reliability import record
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from warm_commands import Command
from warm_engines import environment_of_commands

from megatron_tropd.base.errors import ServersLost
from megatron_tropd.config import load_config
from megatron_tropd.data.dispatch import Patience
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines import wire
from megatron_tropd.rollout.engines.client import ClientSettings
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.pool import cut_batches, merge_batches
from megatron_tropd.rollout.engines.served import ServerPool
from megatron_tropd.rollout.weights.mailbox import write_buckets
from megatron_tropd.rollout.weights.versions import WeightVersions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

TROPD = [sys.executable, "-m", "megatron_tropd.cli"]
SAMPLING = Sampling(stop_token_ids=(2, 50))
REQUESTS = [
    SampleRequest(tuple(3 + (5 * i + j) % 90 for j in range(1 + i % 7)), 110, 10**17 * i + 7)
    for i in range(120)
]
"""Half a second of work for each of two servers: long enough to be disturbed."""
SECONDS = 300.0


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Config of a short run on two ranks with two engines."""
    folder = tmp_path_factory.mktemp("served")
    lines = [json.dumps({"prompt": f"{i} + {i} =", "answer": str(2 * i)}) for i in range(12)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "tropd.toml"
    path.write_text(f"""
        [model]
        student = "{tiny_model("llama", tie_word_embeddings=True)}"
        teacher = "{tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)}"
        [parallel]
        tensor = 2
        [rollout]
        prompts = "prompts.jsonl"
        max_new_tokens = 112
        prompts_per_step = 4
        samples_per_prompt = 2
        num_engines = 2
        engine_cpu_kv_gib = 0.25
        [loss]
        method = "tropd"
        importance = "truncated"
        [train]
        steps = 5
        lr = 1e-3
        [run]
        dir = "unset"
        checkpoint_every = 2
        trajectories_every = 0
        tensorboard = false
    """)
    return path


class Server:
    """`tropd serve` in the background.

    Command and engine have done their imports before, unless it is ``fresh``.
    """

    def __init__(
        self, toml: Path, run: Path, number: int, *overrides: str, fresh: bool = False
    ) -> None:
        self.folder, self.number = run / "servers", number
        self.log = run.parent / f"{run.name}.server_{number}.log"
        words = ["serve", str(toml), f"run.dir={run}", *overrides]
        words += ["rollout.placement=separate", "--number", str(number)]
        with self.log.open("a") as log:
            if fresh:
                self.process: subprocess.Popen | Command = subprocess.Popen(
                    [*TROPD, *words],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            else:
                warm = environment_of_commands(run.parent / "warm")
                self.process = Command(words, environment=warm | {"OMP_NUM_THREADS": "1"}, log=log)

    def status(self) -> dict[str, Any]:
        """What /status says; state "gone" when nobody answers."""
        there = wire.read_announcement(self.folder, self.number)
        if there is None or there.pid != self.process.pid:
            return {"state": "gone"}
        try:
            answer = requests.get(
                f"http://{there.host}:{there.port}/status",
                headers={"Authorization": f"Bearer {there.token}"},
                timeout=5,
            )
        except requests.RequestException:
            return {"state": "gone"}
        return answer.json()

    def wait_for(self, state: str) -> dict[str, Any]:
        """Poll until it says ``state``."""
        deadline = time.monotonic() + SECONDS
        while (status := self.status())["state"] != state:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"not {state} in time: {status}"
            time.sleep(0.005)
        return status

    def end(self) -> int:
        """Ask it to leave; its exit code."""
        self.process.terminate()
        return self.process.wait(SECONDS)


def largest_gap(folder: Path, requests: list[SampleRequest], samples: list[Sample]) -> float:
    """Largest difference between the samples' log-probs and transformers'."""
    model, gaps = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for request, sample in zip(requests, samples, strict=True):
        ids = torch.tensor([request.token_ids + sample.token_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        wanted = logprobs.gather(1, ids[0, 1:, None])[len(request.token_ids) - 1 :, 0]
        gaps.append((torch.tensor(sample.logprobs) - wanted).abs().max().item())
    return max(gaps)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def _wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _alive(pid)], "processes were left behind"


@pytest.fixture(scope="module")
def servers(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers of one run folder. A test may kill one; the list holds those that live.

    The second is started as by a shell: it is the one that is seen to start, and killed.
    """
    run = tmp_path_factory.mktemp("cluster") / "run"
    running = [Server(toml, run, number, fresh=number == 1) for number in range(2)]
    yield running
    pids = [server.process.pid for server in running]
    pids += [server.status().get("engine_pid") or 0 for server in running]
    codes = [server.end() for server in running]
    assert codes == [143, 143]
    assert not list((run / "servers").glob("*.json"))
    _wait_gone([pid for pid in pids if pid])


@pytest.fixture(scope="module")
def weights(toml: Path) -> dict[str, torch.Tensor]:
    """The student's weights after "a step": its own, a little changed."""
    student = Path(load_config(toml).model.student)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(student / "model.safetensors").items()
    }
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """The pool's methods are collective: a world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def make_pool(
    toml: Path, servers: list[Server], world: None, weights: dict[str, torch.Tensor]
) -> Callable[..., ServerPool]:
    """``make_pool(answer_seconds, patience)``: a pool on the servers, weights handed over."""

    def make(
        answer_seconds: float = 30.0,
        model: wire.Model = "student",
        **patience: float,
    ) -> ServerPool:
        run = servers[0].folder.parent
        config = load_config(toml, [f"run.dir={run}", "rollout.placement=separate"])
        known = ClientSettings(
            servers[0].folder, wire.served_settings(config), answer_seconds=answer_seconds
        )
        pool = ServerPool(
            known,
            WeightVersions(run / "weights"),
            rank=0,
            num_servers=2,
            model=model,
            patience=Patience(**patience),  # type: ignore[arg-type]
        )
        pool.channel.send(iter(weights.items()), version=1)
        return pool

    return make


@pytest.fixture(scope="module")
def expected(toml: Path, weights: dict[str, torch.Tensor], tmp_path_factory) -> list[Sample]:
    """The samples of an engine in this test, batch by batch; checks another cut against them."""
    folder = tmp_path_factory.mktemp("expected")
    student = Path(load_config(toml).model.student)
    with RolloutEngine(
        student, max_model_len=122, log_file=folder / "log", cpu_kv_gib=0.25, threads=1
    ) as engine:
        (folder / "weights").mkdir()
        write_buckets(folder / "weights", iter(weights.items()))
        engine.load_weights(folder / "weights")
        samples = merge_batches([engine.generate(u, SAMPLING) for u in cut_batches(REQUESTS, 2)])
        whole = engine.generate(REQUESTS, SAMPLING)
    for one, other in zip(samples, whole, strict=True):
        assert one.token_ids == other.token_ids
        assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) < 1e-5
    return samples


def test_a_server_answers_while_its_engine_starts(servers: list[Server]) -> None:
    deadline = time.monotonic() + SECONDS
    while (state := servers[1].status()["state"]) == "gone":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert state == "starting"
    for server in servers:
        assert server.wait_for("ready")["weights"] is None


def test_served_samples_are_those_of_a_local_engine(make_pool, expected) -> None:
    pool = make_pool()
    assert pool.generate(REQUESTS, SAMPLING) == expected
    pool.start(REQUESTS, SAMPLING)
    assert pool.generate(REQUESTS[:2], SAMPLING)[1].token_ids == expected[1].token_ids
    assert pool.finish() == expected


def _record(fault: str, how: str) -> None:
    record(
        fault,
        how=how,
        seen="the run goes on with the other server, samples equal bit for bit",
        stops=None,
        back=None,
        lost="nothing; the batch is made again",
    )


def _disturbed(pool: ServerPool, victim: Server, disturb: Callable[[dict], None]) -> list[Sample]:
    """Generate while ``disturb`` gets the victim's status in the middle of its batch."""
    samples: list[list[Sample]] = []
    thread = threading.Thread(target=lambda: samples.append(pool.generate(REQUESTS, SAMPLING)))
    thread.start()
    disturb(victim.wait_for("generating"))
    thread.join(SECONDS)
    assert samples, "no samples in time"
    return samples[0]


def test_an_engine_killed_in_the_middle_is_replaced(make_pool, servers, expected) -> None:
    def kill(status: dict[str, Any]) -> None:
        os.kill(status["engine_pid"], signal.SIGKILL)

    assert _disturbed(make_pool(), servers[0], kill) == expected
    status = servers[0].wait_for("ready")
    assert status["engine_restarts"] == 1 and "signal 9" in status["last_error"]
    _record("the engine of a rollout server dies", "kill -9 in the middle of a batch")


def test_a_server_killed_in_the_middle_is_not_missed_and_used_again(
    make_pool, servers, toml, expected
) -> None:
    pool, old = make_pool(), servers[1]
    engine = old.wait_for("ready")["engine_pid"]
    assert _disturbed(pool, old, lambda _: old.process.kill()) == expected
    old.process.wait()
    _wait_gone([engine])
    servers[1] = Server(toml, old.folder.parent, 1)
    servers[1].wait_for("ready")
    assert pool.generate(REQUESTS, SAMPLING) == expected
    assert servers[1].status()["weights"]["version"] == 1
    _record("a rollout server dies", "kill -9 in the middle of a batch, started again by hand")


def test_a_server_that_hangs_is_done_without(make_pool, servers, expected) -> None:
    victim = servers[1]

    def stop(_: dict[str, Any]) -> None:
        victim.process.send_signal(signal.SIGSTOP)

    try:
        assert _disturbed(make_pool(answer_seconds=1.0), victim, stop) == expected
        with pytest.raises(ServersLost, match=r"server 1 .*did not answer for 0\.5 s"):
            for server in servers:
                server.process.send_signal(signal.SIGSTOP)
            make_pool(answer_seconds=0.5, lost_seconds=2.0).generate(REQUESTS[:2], SAMPLING)
    finally:
        for server in servers:
            server.process.send_signal(signal.SIGCONT)
    victim.wait_for("ready")
    _record("a rollout server hangs", "SIGSTOP in the middle of a batch, time-out of 1 s")


def test_the_teacher_is_served_on_demand(make_pool, servers, toml, expected) -> None:
    """For evaluations: its engine starts when it is asked for and ends when the student is."""
    samples = make_pool(model="teacher").generate(REQUESTS[:4], SAMPLING)
    assert samples != expected[:4]
    teacher = Path(load_config(toml).model.teacher)
    assert largest_gap(teacher, REQUESTS[:4], samples) < 1e-4
    assert make_pool().generate(REQUESTS, SAMPLING) == expected


def test_a_slow_engine_is_waited_for(make_pool, servers, expected) -> None:
    def delay(status: dict[str, Any]) -> None:
        os.kill(status["engine_pid"], signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(status["engine_pid"], signal.SIGCONT)

    restarts = servers[0].status()["engine_restarts"]
    assert _disturbed(make_pool(answer_seconds=1.0), servers[0], delay) == expected
    assert servers[0].status()["engine_restarts"] == restarts


class Run:
    """A run of `tropd distill` in a folder of its own; leaving it kills what is left of it."""

    def __init__(self, toml: Path, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self.command = ["distill", str(toml), f"run.dir={folder}", *overrides]
        self.process: Command | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()

    def start(self, hold: Hold | None = None) -> Command:
        """The trainer, in the background."""
        held = hold.environment if hold else {}
        warm = environment_of_commands(self.folder.parent / "warm", held.get("PYTHONPATH", ""))
        self.process = Command(self.command, environment=held | warm)
        return self.process

    def finish(self) -> tuple[int, str]:
        """(exit code, output) of the trainer that runs, or of a new one."""
        process, self.process = self.process or self.start(), None
        output = "".join(process.communicate(timeout=SECONDS))
        return process.wait(), output

    def interrupted_at(self, step: int) -> None:
        """Run until ``step`` is logged, then SIGTERM."""
        hold = Hold(self.folder.with_name(f"{self.folder.name}_hold"), step=step)
        process, metrics = self.start(hold), self.folder / "metrics.jsonl"
        deadline = time.monotonic() + SECONDS
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
            assert process.poll() is None, self.finish()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        hold.release()
        code, text = self.finish()
        assert code == 143, text

    def records(self) -> list[dict[str, Any]]:
        """Metrics and evaluations without timings."""
        files = [self.folder / "metrics.jsonl", self.folder / "evaluations.jsonl"]
        return [
            {k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)}
            for file in files
            if file.exists()
            for line in file.read_text().splitlines()
        ]


@contextmanager
def two_servers(toml: Path, run: Path, *overrides: str) -> Iterator[None]:
    """Servers for a run that completes in the block: they must then end by themselves."""
    both = [Server(toml, run, number, *overrides) for number in range(2)]
    try:
        yield
        assert [server.process.wait(SECONDS) for server in both] == [0, 0]
    finally:
        for server in both:
            server.process.kill()


def test_a_served_run_equals_a_colocated_one(toml: Path, tmp_path: Path) -> None:
    with (
        Run(toml, tmp_path / "colocated") as colocated,
        Run(toml, tmp_path / "served", "rollout.placement=separate") as served,
        two_servers(toml, served.folder),
    ):
        for run in (colocated, served):
            code, text = run.finish()
            assert code == 0, text
    assert served.records() == colocated.records()
    assert {record["staleness"] for record in served.records()} == {0}
    assert not (served.folder / "weights").exists()


def test_one_step_ahead_repeats_elsewhere_and_after_an_interruption(
    toml: Path, tmp_path: Path
) -> None:
    """Engines beside the ranks without a break; servers with one. An evaluation comes between a
    request for samples and their use.
    """
    problems = toml.parent / "prompts.jsonl"
    ahead = [
        *("rollout.steps_ahead=1", f"evaluation.problems={problems}"),
        *("evaluation.task=reverse_kl", "evaluation.num_problems=3", "evaluation.every=3"),
    ]
    with (
        Run(toml, tmp_path / "colocated", *ahead) as colocated,
        Run(toml, tmp_path / "served", *ahead, "rollout.placement=separate") as served,
        two_servers(toml, served.folder, *ahead),
    ):
        code, text = colocated.finish()
        assert code == 0, text
        served.interrupted_at(2)
        kept = sorted((served.folder / "checkpoints").glob("step_*"))
        assert kept and all((folder / "pending_rollouts.jsonl").exists() for folder in kept)
        code, text = served.finish()
        assert code == 0, text
    assert served.records() == colocated.records()
    metrics = [record for record in served.records() if "staleness" in record]
    assert [record["staleness"] for record in metrics] == [0, 1, 1, 1, 1]
    corrections = [abs(record["importance_mean"] - 1) for record in metrics]
    assert corrections[0] < 1e-4 and min(corrections[1:]) > 1e-3
