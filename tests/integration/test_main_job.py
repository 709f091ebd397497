"""`tropd distill` as a user runs it: real models, real engine, two ranks; and what can go wrong.

One uninterrupted run is the yardstick. Other runs are killed, stopped or lose their engine, and
are resumed by the same command: their metrics must be those of the yardstick, bit for bit. More
faults are in test_faults.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hold import Hold
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron

pytestmark = pytest.mark.slow

STEPS = 8
TIMINGS = ("seconds_", "tokens_per_second", "peak_memory")
TROPD = [sys.executable, "-m", "megatron_tropd.cli"]


@pytest.fixture(scope="module")
def pair(tiny_model) -> tuple[Path, Path]:
    """A tied Llama student with columns that its teacher lacks; an untied, wider Qwen3 teacher."""
    student = tiny_model("llama", tie_word_embeddings=True, vocab_size=300)
    return student, tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)


@pytest.fixture(scope="module")
def config(tmp_path_factory, pair) -> Path:
    """TOML of a short run with guidance, evaluation, checkpoints and dumps."""
    folder = tmp_path_factory.mktemp("job")
    lines = [json.dumps({"prompt": f"{i} + {i} =", "answer": str(2 * i)}) for i in range(12)]
    for name in ("prompts.jsonl", "heldout.jsonl"):
        (folder / name).write_text("\n".join(lines) + "\n")
    subprocess.run(
        [
            *(sys.executable, "tools/teacher_responses.py", "--teacher", str(pair[1])),
            *("--prompts", str(folder / "prompts.jsonl")),
            *("--out", str(folder / "responses.jsonl"), "--max-new-tokens", "16"),
        ],
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    toml = folder / "tropd.toml"
    toml.write_text(f"""
        [model]
        student = "{pair[0]}"
        teacher = "{pair[1]}"
        [parallel]
        tensor = 2
        [rollout]
        prompts = "prompts.jsonl"
        max_new_tokens = 16
        prompts_per_step = 4
        samples_per_prompt = 2
        engine_memory = 0.25
        [guidance]
        responses = "responses.jsonl"
        beta = 0.1
        [loss]
        top_k = 16
        [train]
        steps = {STEPS}
        lr = 1e-3
        [evaluation]
        problems = "heldout.jsonl"
        every = 3
        [run]
        dir = "unset"
        deterministic = true
        checkpoint_every = 2
        trajectories_every = 3
    """)
    return toml


@pytest.fixture(scope="module")
def unevaluated(config) -> Path:
    """The same without evaluations, hence without the teacher's engines."""
    toml = config.with_name("unevaluated.toml")
    toml.write_text(config.read_text().replace('problems = "heldout.jsonl"', ""))
    return toml


class Run:
    """A run in the background, from the same command each time."""

    def __init__(self, config: Path, folder: Path, *overrides: str, hold: Hold | None = None):
        self.folder, self.hold = folder, hold
        self._before = self.steps_logged()
        self.process = subprocess.Popen(
            [*TROPD, "distill", str(config), f"run.dir={folder}", *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | (hold.environment if hold else {}),
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
        """Every process of this run, found by the run folder or engine it serves."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().decode(errors="replace")
                    environment = (entry / "environ").read_bytes().decode(errors="replace")
                    state = (entry / "stat").read_text().rpartition(") ")[2][0]
                except OSError:
                    continue
                mine = str(self.folder) in command or f"TROPD_TEST={self.folder}" in environment
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
        return self.named("engines.worker")[0]


@pytest.fixture
def start(config, tmp_path, monkeypatch) -> Callable[..., Run]:
    """``start(*overrides)``: a run in this test's folder; nothing of it may be left at the end.

    With ``step=`` or ``save=`` it stands still there until ``run.hold.release()``.
    """
    folder = tmp_path / "run"
    monkeypatch.setenv("TROPD_TEST", str(folder))
    started: list[Run] = []

    def make(*overrides: str, config: Path = config, **where: int) -> Run:
        hold = Hold(tmp_path / "hold", **where) if where else None
        started.append(Run(config, folder, *overrides, hold=hold))
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


def _records(path: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)}
        for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def yardstick(config, tmp_path_factory) -> Path:
    """Folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("yardstick") / "run"
    run = Run(config, folder)
    code, text = run.finish()
    assert code == 0, text
    assert "student after" in text and str(folder / "report.html") in text
    return folder


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
    metrics = _records(run.folder / "metrics.jsonl")
    assert len(metrics) == 3
    assert all(record["engine_gap_max"] < 1e-4 for record in metrics)
    AutoModelForCausalLM.from_pretrained(run.folder / "student_hf")


RECOMPUTED = (
    "megatron.model.recompute_granularity=full",
    "megatron.model.recompute_method=uniform",
    "megatron.model.recompute_num_layers=1",
)


def test_megatrons_options_are_in_force_and_change_no_number(start, yardstick):
    run = start(*RECOMPUTED, "megatron.ddp.overlap_grad_reduce=true")
    code, text = run.finish()
    assert code == 0, text
    _assert_same_run(run.folder, yardstick)
    (log,) = (run.folder / "logs").glob("rank_*0.log")
    assert "Megatron's options: megatron.model.recompute_granularity='full'" in log.read_text()


def test_megatron_refuses_an_option_before_anything_is_written(start):
    run = start(RECOMPUTED[0])
    code, text = run.finish()
    assert code == 2 and "[megatron.model]: Megatron refuses" in text
    assert not (run.folder / "config.json").exists()


def _assert_same_run(folder: Path, yardstick: Path) -> None:
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert _records(folder / name) == _records(yardstick / name), name
    ours, theirs = (load_file(f / "student_hf" / "model.safetensors") for f in (folder, yardstick))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_a_complete_folder(yardstick):
    summary = json.loads((yardstick / "summary.json").read_text())
    assert {"student_before", "student_after", "teacher", "seconds"} <= summary.keys()
    assert (summary["steps"], summary["world_size"], summary["tensor_parallel"]) == (STEPS, 2, 2)
    metrics = _records(yardstick / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert max(record["engine_gap_mean"] for record in metrics) < 1e-3
    assert metrics[0]["prefix_share"] > 0 == metrics[-1]["staleness"]
    kept = sorted(p.name for p in (yardstick / "checkpoints").iterdir())
    assert kept == ["step_000006", "step_000008"]
    evaluated = [(r["step"], r["model"]) for r in _records(yardstick / "evaluations.jsonl")]
    assert evaluated == [
        *((0, "teacher"), (0, "student"), (3, "student"), (6, "student"), (8, "student"))
    ]
    assert {p.name for p in (yardstick / "trajectories").iterdir()} == {
        f"step_{step:06d}.jsonl" for step in (0, 3, 6, 7)
    }


def test_a_run_from_megatron_checkpoints(start, pair, yardstick, tmp_path):
    """The same numbers as from the HF folders; the run's own checkpoint converts to its export."""
    folders = dict(zip(("student", "teacher"), pair, strict=True))
    for who, source in folders.items():
        hf_to_megatron(ToMegatron(source, tmp_path / who))
    run = start(*(f"model.{who}={tmp_path / who}" for who in folders))
    code, text = run.finish()
    assert code == 0, text
    _assert_same_run(run.folder, yardstick)
    megatron_to_hf(ToHF(run.folder / "checkpoints" / "step_000008", tmp_path / "again"))
    one, other = (
        load_file(f / "model.safetensors") for f in (tmp_path / "again", run.folder / "student_hf")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (run.folder / "student_hf" / "tensors.json").exists()


def test_the_exported_student_loads_in_transformers(yardstick, pair):
    folder = yardstick / "student_hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("1 + 1 =")
    before = load_file(pair[0] / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(model.model.embed_tokens.weight, before), "it has been trained"


def test_evaluate_and_report_take_the_run_folder(config, yardstick):
    problems = str(config.parent / "heldout.jsonl")
    evaluate = [*TROPD, "evaluate", str(yardstick), problems, "--json"]
    done = subprocess.run(evaluate, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["total"] == 12 and 0 <= result["ci_low"] <= result["accuracy"]
    summary = json.loads((yardstick / "summary.json").read_text())
    assert result["accuracy"] == summary["student_after"]
    subprocess.run([*TROPD, "report", str(yardstick)], check=True, capture_output=True)
    page = (yardstick / "report.html").read_text()
    assert "createElementNS" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_the_same_command_on_a_complete_run_changes_nothing(config, yardstick):
    before = (yardstick / "metrics.jsonl").read_bytes()
    code, text = Run(config, yardstick).finish()
    assert code == 0 and "student after" in text
    assert (yardstick / "metrics.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(config, yardstick):
    code, text = Run(config, yardstick, "train.lr=0.5").finish()
    assert code == 2 and "train.lr: was 0.001, now 0.5" in text


@pytest.mark.timeout(1200)
def test_whatever_interrupts_it_the_run_continues_bit_for_bit(start, yardstick):
    """One interruption after the other, each in a new start of the same command."""
    run = start(step=3)
    run.wait_for(lambda: run.steps_logged() >= 3, "step 3")
    # The process that was prepared served the teacher; the student's engine came after it.
    first, forked, engine = run.named("megatron_tropd.")[1:]
    assert run.named("first_rank") == [first, forked] and run.engine() == engine
    run.process.kill()
    run.process.wait()
    _kill_during_save(start(save=4), step=4)
    _stop(start(step=1), signal.SIGTERM, 143)
    _stop(start(step=1), signal.SIGINT, 130)
    _kill_engine(start(step=1))
    code, text = start().finish()
    assert code == 0, text
    _assert_same_run(run.folder, yardstick)


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
