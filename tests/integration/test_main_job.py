"""`tropd distill` as a user runs it: real models, real engine, two ranks; and what can go wrong.

One run that nobody disturbs (tests/calm_run.py) is the yardstick. Others are killed, stopped or
lose their engine, and are resumed by the same command: their metrics must be those of the
yardstick, bit for bit. More faults are in test_faults.py.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_commands
from calm_run import STEPS, TROPD, CalmRun, assert_same, records
from hold import Hold
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_engines import environment_of_commands

from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron

pytestmark = pytest.mark.slow
OF_LAYOUT = {"engine_gap_mean", "engine_gap_max", "padding_share", "waiting_share"}
"""Metrics that differ between layouts, or between runs."""


@pytest.fixture(scope="module")
def pair(calm) -> tuple[Path, Path]:
    """Student and teacher of the calm run."""
    return calm.student, calm.teacher


@pytest.fixture(scope="module")
def config(calm) -> Path:
    """Of the calm run."""
    return calm.config


@pytest.fixture(scope="module")
def unevaluated(calm) -> Path:
    """The same without evaluations."""
    return calm.unevaluated


class Run:
    """A run in the background, from the same command each time.

    Command, ranks and engines have done their imports before, unless they are ``fresh``.
    """

    def __init__(
        self,
        config: Path,
        folder: Path,
        *overrides: str,
        hold: Hold | None = None,
        fresh: str = "",
    ):
        """Start it.

        Args:
            fresh: "all", or "engines" alone.
        """
        self.folder, self.hold = folder, hold
        self._before = self.steps_logged()
        held = hold.environment if hold else {}
        words = ["distill", str(config), f"run.dir={folder}", *overrides]
        if fresh:
            environment = os.environ | held
        else:
            path = held.get("PYTHONPATH", "")
            environment = held | environment_of_commands(config.parent / "warm", path)
        self.process = (
            warm_commands.Command(words, environment=environment)
            if fresh != "all"
            else subprocess.Popen(
                [*TROPD, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=environment,
            )
        )

    def finish(self) -> tuple[int, str]:
        """(exit code, everything printed)."""
        out, err = self.process.communicate(timeout=500)
        return self.process.returncode, out + err

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + 500
        while True:
            over = self.process.poll() is not None  # first: it may end between the two
            if found := condition():
                return found
            assert not over, f"ended before {what}: {self.finish()}"
            assert time.monotonic() < deadline, f"no {what} in time"
            time.sleep(0.01)

    def steps_logged(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_for_new_step(self) -> None:
        """Until this start has logged a step; those after the checkpoint are cut off first."""

        def is_new() -> bool:
            now = self.steps_logged()
            self._before = min(self._before, now)
            return now > self._before

        self.wait_for(is_new, "a step")

    def processes(self) -> list[int]:
        """Every process of this run: it is named so, or has a file of the run folder open."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().decode(errors="replace")
                    environment = (entry / "environ").read_bytes().decode(errors="replace")
                    state = (entry / "stat").read_text().rpartition(") ")[2][0]
                    mine = warm_commands.has_open(entry, self.folder)
                except OSError:
                    continue
                mine |= str(self.folder) in command or f"TROPD_TEST={self.folder}" in environment
                if mine and state != "Z":
                    found.append(int(entry.name))
        return found

    def named(self, module: str) -> list[int]:
        """Its processes that run a module, in the order they were started."""

        def born(pid: int) -> int:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19])

        mine = self.processes()
        found = [pid for pid in mine if module in Path(f"/proc/{pid}/cmdline").read_text()]
        return sorted(found, key=born)

    def engine(self) -> int:
        return self.named("engines.child")[0]


@pytest.fixture
def start(config, tmp_path, monkeypatch) -> Callable[..., Run]:
    """``start(*overrides)``: a run in this test's folder; nothing of it may be left at the end.

    With ``step=`` or ``save=`` it stands still there until ``run.hold.release()``.
    """
    folder = tmp_path / "run"
    monkeypatch.setenv("TROPD_TEST", str(folder))
    started: list[Run] = []

    def make(*overrides: str, config: Path = config, fresh: str = "", **where: int) -> Run:
        hold = Hold(tmp_path / "hold", **where) if where else None
        run = Run(config, folder, *overrides, hold=hold, fresh=fresh)
        started.append(run)
        return started[-1]

    yield make
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
    deadline = time.monotonic() + 60
    while any(run.processes() for run in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for run in started for pid in run.processes()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes were left behind"


def test_a_mixture_is_sampled_as_it_is_trained(start, unevaluated, tiny_model):
    """Experts shared by two replicas, each with an engine: the engines follow every update."""
    run = start(
        f"model.student={tiny_model('qwen3_moe', norm_topk_prob=False)}",
        f"model.teacher={tiny_model('mixtral', seed=5)}",
        *("parallel.tensor=1", "parallel.data=2", "parallel.expert=2", "rollout.num_engines=2"),
        *("train.steps=3", "train.lr=1e-2"),
        config=unevaluated,
    )
    code, text = run.finish()
    assert code == 0, text
    metrics = records(run.folder / "metrics.jsonl")
    assert len(metrics) == 3
    assert all(record["engine_gap_max"] < 1e-4 for record in metrics)
    AutoModelForCausalLM.from_pretrained(run.folder / "student_hf")


def test_ranks_that_share_rows_train_alike_and_resume_under_another_layout(
    start, unevaluated, calm
):
    """Samples, losses and gradients are those of TP 2, round-off apart."""
    run = start("parallel.tensor=1", "parallel.context=2", step=3, config=unevaluated)
    run.wait_for(lambda: run.steps_logged() >= 3, "step 3")
    _stop(run, signal.SIGTERM, 143)
    halfway = run.steps_logged()
    code, text = start(config=unevaluated).finish()
    assert code == 0, text
    found, expected = (records(folder / "metrics.jsonl") for folder in (run.folder, calm.folder))
    # The gaps are round-off themselves; more steps add it up.
    for mine, theirs in zip(found[: halfway + 2], expected, strict=False):
        for name in theirs.keys() - OF_LAYOUT:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert len(found) == STEPS


def test_virtual_stages_train_alike_and_resume_under_another_layout(
    start, unevaluated, tiny_model, tmp_path
):
    """Samples, losses and gradients are those of TP 2, round-off apart."""
    student = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=4)
    of_both = (f"model.student={student}", "train.steps=5")
    chunks = ("parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2")
    run = start(*of_both, *chunks, step=3, config=unevaluated)
    run.wait_for(lambda: run.steps_logged() >= 3, "step 3")
    _stop(run, signal.SIGTERM, 143)
    code, text = start(*of_both, config=unevaluated).finish()
    assert code == 0, text
    whole = Run(unevaluated, tmp_path / "whole", *of_both)
    code, text = whole.finish()
    assert code == 0, text
    found, expected = (records(r.folder / "metrics.jsonl") for r in (run, whole))
    assert len(found) == len(expected) == 5
    for mine, theirs in zip(found, expected, strict=True):
        for name in theirs.keys() - OF_LAYOUT:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    one, other = (load_file(r.folder / "student_hf" / "model.safetensors") for r in (run, whole))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


RECOMPUTED = (
    "megatron.model.recompute_granularity=full",
    "megatron.model.recompute_method=uniform",
    "megatron.model.recompute_num_layers=1",
)


def test_megatrons_options_are_in_force_and_change_no_number(start, calm):
    run = start(*RECOMPUTED, "megatron.ddp.overlap_grad_reduce=true")
    code, text = run.finish()
    assert code == 0, text
    _assert_same_run(run.folder, calm)
    (log,) = (run.folder / "logs").glob("rank_*0.log")
    assert "Megatron's options: megatron.model.recompute_granularity='full'" in log.read_text()


def test_megatron_refuses_an_option_before_anything_is_written(start):
    run = start(RECOMPUTED[0])
    code, text = run.finish()
    assert code == 2 and "[megatron.model]: Megatron refuses" in text
    assert not (run.folder / "config.json").exists()


def _assert_same_run(folder: Path, calm: CalmRun) -> None:
    assert_same(folder, calm, "metrics.jsonl", "evaluations.jsonl")


def test_a_run_leaves_a_complete_folder(calm):
    yardstick = calm.folder
    assert "student after" in calm.printed and str(yardstick / "report.html") in calm.printed
    summary = json.loads((yardstick / "summary.json").read_text())
    assert {"student_before", "student_after", "teacher", "seconds"} <= summary.keys()
    assert (summary["steps"], summary["world_size"], summary["tensor_parallel"]) == (STEPS, 2, 2)
    metrics = records(yardstick / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert max(record["engine_gap_mean"] for record in metrics) < 1e-3
    assert metrics[0]["prefix_share"] > 0 == metrics[-1]["staleness"]
    kept = sorted(p.name for p in (yardstick / "checkpoints").iterdir())
    assert kept == ["step_000010", "step_000012"]
    evaluated = [(r["step"], r["model"]) for r in records(yardstick / "evaluations.jsonl")]
    assert evaluated == [
        (0, "teacher"),
        *((step, "student") for step in (0, 3, 6, 9, 12)),
    ]
    assert {p.name for p in (yardstick / "trajectories").iterdir()} == {
        f"step_{step:06d}.jsonl" for step in (0, 3, 6, 9, 11)
    }


def test_a_run_from_megatron_checkpoints(start, pair, calm, tmp_path):
    """The same numbers as from the HF folders; the run's own checkpoint converts to its export."""
    folders = dict(zip(("student", "teacher"), pair, strict=True))
    for who, source in folders.items():
        hf_to_megatron(ToMegatron(source, tmp_path / who))
    run = start(*(f"model.{who}={tmp_path / who}" for who in folders))
    code, text = run.finish()
    assert code == 0, text
    _assert_same_run(run.folder, calm)
    megatron_to_hf(ToHF(run.folder / "checkpoints" / f"step_{STEPS:06d}", tmp_path / "again"))
    one, other = (
        load_file(f / "model.safetensors") for f in (tmp_path / "again", run.folder / "student_hf")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (run.folder / "student_hf" / "tensors.json").exists()


def test_the_exported_student_loads_in_transformers(calm, pair):
    folder = calm.folder / "student_hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("1 + 1 =")
    before = load_file(pair[0] / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(model.model.embed_tokens.weight, before), "it has been trained"


def test_evaluate_and_report_take_the_run_folder(calm):
    problems = str(calm.config.parent / "heldout.jsonl")
    evaluate = ["evaluate", calm.folder, problems, "--json"]
    warm = environment_of_commands(calm.config.parent / "warm")
    done = warm_commands.run(evaluate, environment=warm)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["total"] == 12 and 0 <= result["ci_low"] <= result["accuracy"]
    summary = json.loads((calm.folder / "summary.json").read_text())
    assert result["accuracy"] == summary["student_after"]
    subprocess.run([*TROPD, "report", str(calm.folder)], check=True, capture_output=True)
    page = (calm.folder / "report.html").read_text()
    assert "createElementNS" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_the_same_command_on_a_complete_run_changes_nothing(calm):
    before = (calm.folder / "metrics.jsonl").read_bytes()
    code, text = Run(calm.config, calm.folder).finish()
    assert code == 0 and "student after" in text
    assert (calm.folder / "metrics.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(calm):
    code, text = Run(calm.config, calm.folder, "train.lr=0.5").finish()
    assert code == 2 and "train.lr: was 0.001, now 0.5" in text


@pytest.mark.timeout(1200)
def test_whatever_interrupts_it_the_run_continues_bit_for_bit(start, calm):
    """One interruption after the other, each in a new start of the same command."""
    run = start(step=3, fresh="all")
    run.wait_for(lambda: run.steps_logged() >= 3, "step 3")
    # The process that was prepared served the teacher; the student's engine came after it.
    *ranks, engine = run.named("megatron_tropd.")[1:]
    assert len(ranks) == 2 and run.named("launch.rank") == ranks and run.engine() == engine
    run.process.kill()
    run.process.wait()
    _kill_during_save(start(save=4), step=4)
    _stop(start(step=1), signal.SIGTERM, 143)
    _stop(start(step=1), signal.SIGINT, 130)
    _kill_engine(start(step=1, fresh="engines"))
    code, text = start().finish()
    assert code == 0, text
    _assert_same_run(run.folder, calm)


def _kill_during_save(run: Run, step: int) -> None:
    checkpoint = run.folder / "checkpoints" / f"step_{step:06d}"
    saving = checkpoint.with_name(f".{checkpoint.name}.tmp")
    run.wait_for(saving.exists, f"the save of step {step}")
    run.process.kill()
    run.process.wait()
    assert not checkpoint.exists()


def _stop(run: Run, number: int, expected: int) -> None:
    run.wait_for_new_step()
    run.process.send_signal(number)
    run.hold.release()
    code, text = run.finish()
    assert code == expected and "the same command resumes" in text
    saved = sorted(p.name for p in (run.folder / "checkpoints").iterdir())
    assert saved[-1] == f"step_{run.steps_logged():06d}"
    assert not any(name.startswith(".") for name in saved)


def _kill_engine(run: Run) -> None:
    run.wait_for_new_step()
    os.kill(run.engine(), signal.SIGKILL)
    run.hold.release()
    code, text = run.finish()
    assert code == 75
    assert "rollout engine" in text and "signal 9" in text and "resume" in text


def test_a_loss_that_is_not_finite_names_step_trajectory_and_checkpoint(
    start, unevaluated, pair, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(pair[1], broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = start(f"model.teacher={broken}", config=unevaluated)
    code, text = run.finish()
    assert code == 1
    assert "not finite in step 1" in text and "prompt" in text and "No checkpoint" in text
    assert "first at its token 0 (id" in text and "the teacher's log-prob of it is nan" in text
    assert not (run.folder / "checkpoints").exists() and not run.steps_logged()
