"""Every method of configs/methods trains for real: Megatron-Core, vLLM, the shipped pair of models.

One process and one engine serve all of them: each method gets a fresh student and its own settings,
takes two steps as a run does (rollout, teacher, student, weights to the engine), then a few more on
one batch, on which what it is meant to lower must fall.
"""

import contextlib
import io
import json
import math
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm_engines

from megatron_tropd.config import load_config
from tests.ranks import run_with_env

REPOSITORY = Path(__file__).resolve().parents[2]
METHODS = sorted((REPOSITORY / "configs" / "methods").glob("*.toml"))
PAIR = REPOSITORY / "examples" / "arithmetic"
STEPS, REPEATS = 2, 5
NOTHING_LEFT = "nothing_left"
"""A run beside the methods: responses are cut off, and such responses are masked."""

pytestmark = pytest.mark.slow


def _overrides(path: Path, texts: Path, run: Path) -> list[str]:
    """The method's own file, but for sizes: one rank, a small batch, no evaluation."""
    settings = {
        "parallel.tensor": 1,
        "rollout.num_engines": 1,
        "rollout.prompts": texts / "prompts.jsonl",
        "rollout.max_new_tokens": 24,
        "rollout.prompts_per_step": 4,
        "train.steps": STEPS + REPEATS,
        "train.lr": 2e-4,
        "train.lr_schedule": "constant",
        "train.warmup_steps": 0,
        "run.dir": run,
        "run.trajectories_every": 0,
        "run.tensorboard": "false",
    }
    text = path.read_text()
    if "behaviour" in text:
        settings["rollout.behaviour"] = "student"  # the engine has no teacher (test_warmup_run.py)
    if "responses" in text:
        settings["guidance.responses"] = texts / "responses.jsonl"
    if "golden_field" in text:
        settings["guidance.golden_field"] = "answer"  # the solutions are longer
    if "switch_step" in text:
        settings["loss.switch_step"] = 1  # one step of each phase
    return [f"{name}={value}" for name, value in settings.items()]


def _config(path: Path, texts: Path, run: Path):
    config = load_config(path, _overrides(path, texts, run))
    return replace(config, evaluation=replace(config.evaluation, problems=None))


def _train_all(texts: str, out: str, engines: dict[str, str]) -> None:
    os.environ.update(engines)
    with warm_engines.use():
        _train_each(texts, out)


def _train_each(texts: str, out: str) -> None:
    from megatron_tropd.base.progress import Progress
    from megatron_tropd.config.run_folder import open_run
    from megatron_tropd.distill.loop import resume
    from megatron_tropd.distill.session import open_session

    stop: Any = SimpleNamespace(requested=False)
    folder = Path(out, "run")
    configs = {path.stem: _config(path, Path(texts), folder) for path in METHODS}
    opd = configs["opd"]
    configs[NOTHING_LEFT] = replace(opd, loss=replace(opd.loss, mask_truncated=True))
    opened, results = open_run(next(iter(configs.values()))), {}
    with (
        open(os.devnull, "w") as nowhere,
        open_session(opened, console=nowhere, stop=stop, progress=Progress()) as run,
    ):
        resume(run)
        for name, config in configs.items():
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                results[name], last = _train(run, config)
            results[name]["log"] = printed.getvalue()
        results["complete before the step ends"] = _save_and_train(last)
    Path(out, "results.json").write_text(json.dumps(results))


def _save_and_train(run: Any) -> list[int]:
    """The checkpoints that are complete when the step after a save ends."""
    from megatron_tropd.distill.loop import save, train_step

    run.progress.step = 1
    save(run)
    run.checkpoints._save.writer.close()
    train_step(run)
    return run.checkpoints.steps()


def _train(run: Any, config: Any) -> tuple[dict[str, Any], Any]:
    """Train with other settings in the same run: new models, the engine gets their weights."""
    from megatron_tropd.distill.inputs import load_inputs
    from megatron_tropd.distill.loop import learn_from, rollout, sync_weights, train_step
    from megatron_tropd.distill.pair import step_parts
    from megatron_tropd.distill.session import rollout_source

    inputs = load_inputs(config)
    parts = step_parts(config, inputs.folders, run.layout)
    run = replace(
        run,
        config=config,
        inputs=inputs,
        rollouts=rollout_source(config, inputs, run.engines, is_main=True),
        parts=replace(parts, clock=run.reporter.clock),
    )
    run.progress.step = 0
    sync_weights(run, 0)
    before = [p.detach().clone() for p in parts.student.module.parameters()]
    for _ in range(STEPS):
        train_step(run)
    lines = run.folder.metrics.read_text().splitlines()[-STEPS:]
    after = list(parts.student.module.parameters())
    sequences = rollout(run)
    return {
        "steps": [json.loads(line) for line in lines],
        "changed": [not torch.equal(old, new) for old, new in zip(before, after, strict=True)],
        "repeated": [learn_from(run, sequences).metrics for _ in range(REPEATS)],
    }, run


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    """Method -> what it logged in its steps and on the repeated batch."""
    texts, out = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("methods")
    for name, lines in (("prompts.jsonl", 16), ("responses.jsonl", 17)):
        with (PAIR / name).open() as file:
            (texts / name).write_text("".join(islice(file, lines)))
    run_with_env(1, _train_all, str(texts), str(out), warm_engines.address())
    return json.loads((out / "results.json").read_text())


def test_a_checkpoint_is_complete_before_the_next_step_ends(results):
    """What a crash in the training phases of that step would otherwise cost is the checkpoint."""
    assert results["complete before the step ends"] == [1]


@pytest.mark.parametrize("method", [path.stem for path in METHODS])
def test_a_method_trains(method, results):
    found = results[method]
    assert all(found["changed"]), "every parameter"
    for record in found["steps"] + found["repeated"]:
        assert math.isfinite(record["loss"]) and 0 < record["grad_norm"] < math.inf
    for record in found["steps"]:
        # The engine samples from the weights of the step before.
        assert record["engine_gap_mean"] < 1e-5 and record["staleness"] == 0
        assert (record["tokens_teacher"] > 0) == method.startswith(("tropd", "gkd"))
        # A number and EOS of each of 4 prompts.
        golden = record.get("tokens_golden", 0)
        assert 4 * 2 <= golden <= 4 * 3 if method.startswith("stable") else golden == 0
    first, last = found["repeated"][0], found["repeated"][-1]
    if method.startswith("veto"):  # its target moves with the student, and is sharper
        assert last["student_entropy"] < 0.95 * first["student_entropy"]
    elif method != "opsa":  # which asks no teacher
        assert last["k1"] < 0.95 * first["k1"], "they pull the student's tokens to the teacher"


@pytest.mark.parametrize(
    ("method", "metric"),
    [
        ("gkd_forward_kl", "forward_kl"),
        ("gkd_reverse_kl", "reverse_kl"),
        ("gkd_jsd", "loss"),
        ("minillm_single_step", "reverse_kl"),
        ("local_support", "loss"),
        ("tropd_exact", "forward_kl"),
        ("tropd_exact_full", "reverse_kl"),
    ],
)
def test_on_a_repeated_batch_a_divergence_falls(method, metric, results):
    values = [record[metric] for record in results[method]["repeated"]]
    assert values[-1] < 0.7 * values[0]
    if not method.startswith("tropd"):  # which lowers no divergence of its own at every step
        assert values == sorted(values, reverse=True)


def test_selection_and_phases_come_when_they_should(results):
    methods = [path.stem for path in METHODS]
    shares = {m: [r["selected_share"] for r in results[m]["steps"]] for m in methods}
    assert shares["opd"] == shares["top_d"] == shares["iw_opd"] == [1.0, 1.0]
    assert shares["opsa"] == pytest.approx([0.2, 0.2], abs=0.01)
    assert shares["entropy_opd"] == pytest.approx([0.2, 0.2], abs=0.01)
    assert shares["reopold"] == pytest.approx([1.0, 0.2], abs=0.01)
    assert results["eopd"]["steps"][0]["importance_mean"] == pytest.approx(1.0, abs=1e-4)


def test_a_run_whose_tokens_are_all_masked_goes_on_and_changes_nothing(results):
    found = results[NOTHING_LEFT]
    assert not any(found["changed"])
    for record in found["steps"]:
        assert record["loss"] is None and record["grad_norm"] == 0
        assert record["tokens_student"] == record["tokens_teacher"] == 0
        assert record["masked_tokens"] == 16 * 24
    assert f"step {STEPS}: every token is masked" in found["log"]
