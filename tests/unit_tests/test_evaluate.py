"""``tropd evaluate`` measures a run as the run measures itself, and says with which settings."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.cli import measure as command
from megatron_tropd.cli.main import main
from megatron_tropd.cli.measure import How, Overrides, What, evaluate
from megatron_tropd.config import Config, DataConfig, config_from_dict, config_to_dict
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.distill.evaluation import Evaluator
from megatron_tropd.distill.inputs import load_inputs
from megatron_tropd.losses.draws import Purpose, keyed_seed
from megatron_tropd.report.metrics import MetricsLog
from megatron_tropd.report.summary import summary_table

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}ok "


class Engine:
    """Answers "answer 4" to everything; remembers what it was asked and made with."""

    def __init__(self, config: Config, inputs: Any, folder: Path, **_: Any) -> None:
        self.made = (config.model.dtype, inputs.max_model_len, inputs.vocab_size, folder)
        self.text = inputs.tokenizer.encode("answer 4", add_special_tokens=False)
        self.asked: list[tuple[list[SampleRequest], Sampling]] = []

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """The same to every request."""
        self.asked.append((list(requests), sampling))
        ids = tuple(self.text)
        return [Sample(ids, (0.0,) * len(ids), "stop")] * len(requests)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Those that the command makes."""
    made: list[Engine] = []

    def make(*arguments: Any, **settings: Any) -> Engine:
        made.append(Engine(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(command, "make_engine", make)
    return made


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Six problems, of which "4" solves two; one cannot be judged."""
    answers = ["4", "4", "5", "6", "four", "8"]
    lines = [json.dumps({"prompt": f"{i}+1=", "answer": a}) for i, a in enumerate(answers)]
    path = tmp_path / "heldout.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def make_run(tiny_llama: Path, tiny_qwen3: Path, tmp_path: Path, problems: Path):
    """``make_run(**sections)``: a finished run with settings that all differ from the defaults."""

    def make(**sections: dict[str, Any]) -> tuple[Path, Config]:
        root = tmp_path / "run"
        student, teacher = root / "student_hf", tmp_path / "teacher"
        for source, copy in ((tiny_llama, student), (tiny_qwen3, teacher)):
            shutil.copytree(source, copy)
            (copy / "chat_template.jinja").write_text(TEMPLATE)
        config = config_from_dict(
            {
                "model": {"student": str(student), "teacher": str(teacher)},
                "rollout": {
                    **{"prompts": str(problems), "max_new_tokens": 9, "prompts_per_step": 2},
                    **{"apply_chat_template": True, "stop_token_ids": [11, 7]},
                },
                "train": {"steps": 1, "seed": 77},
                "run": {"dir": str(root)},
                "evaluation": {"problems": str(problems), "num_problems": 5, "max_new_tokens": 6},
            }
            | sections
        )
        (root / "config.json").write_text(json.dumps(config_to_dict(config)))
        (root / "summary.json").write_text('{"dtype": "bfloat16"}')
        return root, config

    return make


def own_evaluation(config: Config) -> tuple[Engine, list[dict[str, Any]]]:
    """The engine of the run's own evaluation, and what it wrote down."""
    inputs = load_inputs(config)
    engine = Engine(config, inputs, Path(config.model.student))
    written: list[dict[str, Any]] = []
    evaluator = Evaluator(
        config,
        inputs,
        RunFolder(Path(config.run.dir)),
        is_main=True,
        log=SimpleNamespace(write_evaluation=written.append),
    )
    evaluator.measure_student(
        engine, step=1, export=lambda _: None, teacher=Path(config.model.teacher)
    )
    return engine, written


@pytest.mark.parametrize(
    "sections",
    [
        {"teacher": {"parallel": {"tensor": 2}}, "parallel": {"data": 2}},
        {"megatron": {"model": {"cp_comm_type": "a2a"}}, "parallel": {"context": 2}},
        {
            "parallel": {"data": 2, "distributed_optimizer": True},
            "run": {"dir": "run", "checkpoint_sharding": "dp_reshardable"},
        },
        {
            "loss": {"method": "stable_opd"},
            "teacher": {"reference": "student"},
            "guidance": {"golden_field": "solution"},
        },
    ],
)
def test_what_speaks_of_training_alone_does_not_stop_it(
    make_run: Any, sections: dict[str, Any]
) -> None:
    _, config = make_run(**sections)
    run: Any = SimpleNamespace(read_config=lambda: config, read_summary=lambda: None)
    measured = command._as_in_run(run, Path(config.model.student), What(), [])
    assert measured.parallel.world_size == 1 and measured.rollout.temperature == 1


@pytest.mark.parametrize("given", ["run", "export", "other problems"])
def test_a_run_is_asked_what_it_asks_itself(
    make_run: Callable, engines: list[Engine], problems: Path, given: str
) -> None:
    run, config = make_run()
    if given == "export":
        result = evaluate(run / "student_hf", What(problems))
    else:
        result = evaluate(run, What(problems) if given == "other problems" else None)
    own, (record,) = own_evaluation(config)
    assert engines[0].asked == own.asked
    requests, sampling = own.asked[0]
    assert len(requests) == 5 and {r.max_new_tokens for r in requests} == {6}
    assert {7, 11} < set(sampling.stop_token_ids)
    for name in ("accuracy", "correct", "unjudged", "total", "ci_low"):
        assert result[name] == record[name], name
    assert (result["correct"], result["unjudged"], result["total"]) == (2, 1, 5)
    # The type that "auto" was on the machine of the run.
    assert result["settings"] == record["settings"] | {"dtype": "bfloat16"}
    assert result["settings"]["apply_chat_template"] is True
    assert result["settings_from"] == str(run / "config.json") and result["overridden"] == []
    assert engines[0].made[2:] == (own.made[2], run / "student_hf")


def test_only_what_the_command_asks_for_is_another(
    make_run: Callable, engines: list[Engine]
) -> None:
    run, _ = make_run()
    overrides = Overrides(
        **{"max_new_tokens": 3, "num_problems": 2, "apply_chat_template": False},
        **{"samples": 1, "temperature": 0.5, "top_p": 0.9, "seed": 5},
        **{"dtype": "float32", "data": DataConfig()},
    )
    result = evaluate(run, overrides=overrides)
    requests, sampling = engines[0].asked[0]
    assert [r.max_new_tokens for r in requests] == [3, 3]
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)
    assert [r.seed for r in requests] == [keyed_seed(5, Purpose.EVALUATION, i, 0) for i in (0, 1)]
    assert {7, 11} < set(sampling.stop_token_ids)
    assert result["settings"]["apply_chat_template"] is False
    assert engines[0].made[0] == result["settings"]["dtype"] == "float32"
    assert result["overridden"] == list(vars(overrides))


def test_a_run_that_measures_its_divergence_is_measured_so(
    make_run: Callable, engines: list[Engine], problems: Path, tmp_path: Path
) -> None:
    evaluation = {"problems": str(problems), "num_problems": 3, "task": "reverse_kl"}
    run, _ = make_run(evaluation=evaluation)
    result = evaluate(run)
    assert result["reverse_kl"] > 0 and result["sequences"] == 3 and "accuracy" not in result
    requests, sampling = engines[0].asked[0]
    assert sampling.temperature == 1 and len({r.seed for r in requests}) == 3
    assert result["settings"]["seed"] == 77 and {r.max_new_tokens for r in requests} == {9}
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(InputError, match=r"teacher .* is gone"):
        evaluate(run)


def test_a_folder_of_no_run_says_what_is_assumed(
    tiny_llama: Path, make_run: Callable, engines: list[Engine], problems: Path, tmp_path: Path
) -> None:
    run, _ = make_run()
    folder = shutil.copytree(run / "student_hf", tmp_path / "elsewhere")
    result = evaluate(folder, What(problems))
    assert result["settings_from"].startswith("defaults")
    assert result["settings"]["problems"] == 6
    assert result["settings"]["apply_chat_template"] is False
    assert "--chat-template" in result["notes"][0]
    longest = max(len(r.token_ids) for r in engines[0].asked[0][0])
    assert result["settings"]["max_new_tokens"] == 256 - longest
    alike = evaluate(folder, What(problems), like=run)
    assert alike["settings"] == evaluate(run)["settings"]
    assert engines[-1].asked == engines[-2].asked
    assert alike["notes"] == [] and evaluate(tiny_llama, What(problems))["notes"] == []


def test_a_run_without_its_teacher_can_be_measured(
    make_run: Callable, engines: list[Engine], tmp_path: Path
) -> None:
    run, _ = make_run()
    shutil.rmtree(tmp_path / "teacher")
    result = evaluate(run)
    assert result["correct"] == 2 and "is gone" in result["notes"][0]


def test_what_cannot_be_measured_is_named(
    make_run: Callable, tiny_llama: Path, problems: Path, tmp_path: Path
) -> None:
    run, _ = make_run(evaluation={})
    with pytest.raises(ConfigError, match=r"no held-out problems .* give a file"):
        evaluate(run)
    with pytest.raises(InputError, match="is no run folder"):
        evaluate(tiny_llama, What(problems), like=tmp_path)
    with pytest.raises(ConfigError, match="is no run folder, so it has no problems"):
        evaluate(tiny_llama)
    shutil.rmtree(run / "student_hf")
    with pytest.raises(InputError, match="no trained student yet"):
        evaluate(run, What(problems))
    for answer in ("", ', "answer": null', ', "answer": NaN', ', "answer": [1]'):
        problems.write_text(f'\n{{"prompt": "1"{answer}}}\n')
        with pytest.raises(InputError, match=f'^{problems}: .*line 2.* needs an "answer"'):
            evaluate(tiny_llama, What(problems))


def test_the_command_says_settings_and_their_source(
    make_run: Callable, engines: list[Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run()
    assert main(["evaluate", str(run), "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy 40.0 %" in shown and "2 of 5; 1 cannot be judged" in shown
    assert "max_new_tokens 4" in shown and "apply_chat_template True" in shown
    assert f"from {run / 'config.json'}; of this command: max_new_tokens" in shown
    assert main(["evaluate", str(run), "--no-chat-template", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["apply_chat_template"] is False


SETS = """
[evaluation]
max_new_tokens = 5
temperature = 0.5

[[evaluation.sets]]
name = "sums"
problems = "heldout.jsonl"
samples = 3

[[evaluation.sets]]
name = "first"
problems = "heldout.jsonl"
num_problems = 2
samples = 1
temperature = 0.0
max_new_tokens = 4
prompt_template = "What is {{ prompt }}"
grader = {name = "last_number"}
"""


@pytest.fixture
def sets_file(problems: Path, tmp_path: Path) -> Path:
    lines = problems.read_text().replace("four", "44")
    problems.write_text(lines)
    path = tmp_path / "sets.toml"
    path.write_text(SETS)
    return path


def test_several_sets_are_measured_each_in_its_own_way(
    make_run: Callable, engines: list[Engine], sets_file: Path, tmp_path: Path
) -> None:
    run, _ = make_run()
    out = How(out=tmp_path / "answers")
    result = evaluate(run, What(sets_file=sets_file), how=out)
    (sums, drawn), (first, greedy) = engines[0].asked
    assert len(engines) == 1 and len(sums) == 3 * 6 and len(first) == 2
    assert (drawn.temperature, greedy.temperature) == (0.5, 0.0)
    assert len({r.seed for r in sums}) == 18 and {r.seed for r in first} == {0}
    assert {r.max_new_tokens for r in sums} == {5} and {r.max_new_tokens for r in first} == {4}
    assert {len(r.token_ids) for r in first} != {len(r.token_ids) for r in sums[:6]}
    found = result["sets"]
    assert found["sums"]["accuracy"] == pytest.approx(2 / 6) and found["sums"]["total"] == 18
    assert found["sums"]["pass@3"] == found["sums"]["majority@3"] == pytest.approx(2 / 6)
    assert found["first"]["accuracy"] == 1.0 and "pass@2" not in found["first"]
    assert found["first"]["settings"]["grader"]["name"] == "last_number"
    assert sorted(path.name for path in out.out.iterdir()) == ["first.jsonl", "sums.jsonl"]
    again = evaluate(run, What(sets_file=sets_file), how=out)
    assert again == result and len(engines) == 1, "nothing was missing, so no engine was started"
    only = evaluate(run, What(sets_file=sets_file, names=("first",)))
    assert list(only["sets"]) == ["first"]
    with pytest.raises(ConfigError, match="--set second: expected one of sums, first"):
        evaluate(run, What(sets_file=sets_file, names=("second",)))
    with pytest.raises(ConfigError, match=r"sets.toml: .* alone, found rollout"):
        sets_file.write_text("[rollout]\n" + SETS)
        evaluate(run, What(sets_file=sets_file))


def test_a_folder_of_no_run_is_measured_on_sets(
    tiny_llama: Path, engines: list[Engine], sets_file: Path
) -> None:
    result = evaluate(tiny_llama, What(sets_file=sets_file), overrides=Overrides(samples=1))
    assert {name: record["total"] for name, record in result["sets"].items()} == {
        **{"sums": 6, "first": 2}
    }
    assert "What is" not in str(result["sets"]["sums"]["settings"])


def test_a_run_keeps_the_answers_of_its_evaluations(make_run: Callable, problems: Path) -> None:
    lines = problems.read_text().replace("four", "44")
    problems.write_text(lines)
    one = {"name": "sums", "problems": str(problems), "samples": 2, "temperature": 0.5}
    other = {"name": "more", "problems": str(problems), "num_problems": 3}
    run, config = make_run(evaluation={"sets": [one, other], "max_new_tokens": 6})
    _, records = own_evaluation(config)
    assert [(r["set"], r["total"]) for r in records] == [("sums", 12), ("more", 3)]
    kept = run / "evaluations" / "student_step_000001"
    assert len((kept / "sums.jsonl").read_text().splitlines()) == 13
    assert main(["compare", str(run), str(kept)]) == 0
    log = MetricsLog(run, tensorboard=False)
    for record in records:
        log.write_evaluation(record)
    inputs = load_inputs(config)
    summary = Evaluator(config, inputs, RunFolder(run), is_main=True, log=None).summary()
    assert summary["sets"]["more"]["student_after"] == records[1]["accuracy"]
    assert "student after, exact match, sums" in summary_table(summary)
    log.truncate_after(0)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"samples": 4}, "greedy answers are all the same"),
        ({"top_p": 0.9}, "greedy answers are all the same"),
        ({"task": "reverse_kl", "temperature": 0.5}, "reads one sample at temperature 1"),
        ({"sets": [{"name": "a b", "problems": "x"}]}, "letters, digits"),
        ({"sets": [{"name": "a", "problems": "x"}] * 2}, "a is there twice"),
        ({"problems": "x", "sets": [{"name": "a", "problems": "x"}]}, "is for a single set"),
        ({"sets": [{"name": "a", "problems": "x", "samples": 2}]}, "of a beside temperature = 0"),
    ],
)
def test_settings_that_do_not_go_together(
    make_run: Callable, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run(evaluation=evaluation)


def test_a_run_of_several_tasks_is_measured_as_it_measures_itself(
    make_run: Callable, engines: list[Engine], problems: Path, sets_file: Path
) -> None:
    shared = {"max_new_tokens": 9, "prompts_per_step": 2, "stop_token_ids": [11, 7]}
    task = {"name": "short", "prompts": str(problems), "max_new_tokens": 3}
    task |= {"grader": {"name": "last_number"}, "prompt_template": "Say {{ prompt }}"}
    one = {"name": "short", "of_task": "short", "problems": str(problems)}
    run, config = make_run(
        rollout=shared,
        tasks=[task, {"name": "other", "prompts": str(problems)}],
        evaluation={"sets": [{"name": "any", "problems": str(problems)}, one]},
    )
    own, records = own_evaluation(config)
    result = evaluate(run)
    assert [r for requests, _ in engines[0].asked for r in requests] == own.asked[0][0]
    for record in records:
        found = result["sets"][record["set"]]
        assert found["settings"] == record["settings"] | {"dtype": "bfloat16"}
        assert found["accuracy"] == record["accuracy"]
    assert result["sets"]["short"]["settings"]["max_new_tokens"] == 3
    assert result["sets"]["any"]["settings"]["max_new_tokens"] == 9


class Half(Engine):
    """One of several engines: asked and read apart."""

    def start_generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        self.samples = self.generate(requests, sampling)

    def finish_generate(self) -> list[Sample]:
        return self.samples


def test_engines_share_the_problems_in_order(
    make_run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, config = make_run()
    made: list[Half] = []

    def make(*arguments: Any, threads: int, **settings: Any) -> Half:
        assert threads >= 1
        made.append(Half(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(command, "make_engine", make)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    result = evaluate(run, how=How(out=tmp_path / "out", engines=2))
    asked = [[r.token_ids for r in half.asked[0][0]] for half in made]
    (only,) = load_inputs(config).problem_sets
    ids = [problem.token_ids for problem in only.problems]
    assert asked == [ids[0::2], ids[1::2]] and result["total"] == 5
    lines = [json.loads(t) for t in (tmp_path / "out" / "heldout.jsonl").read_text().splitlines()]
    assert [line["prompt_index"] for line in lines[1:]] == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"--engines must be in 1..3 here \(3 cores\), found 9"):
        evaluate(run, how=How(engines=9))


READY = sorted((Path(__file__).resolve().parents[2] / "configs" / "evaluation").glob("*.toml"))
ROWS = {
    "aime24": {"id": 60, "problem": "What is 2+2?", "solution": "It is 4.", "answer": "4"},
    "amc23": {"id": 1, "question": "What is 2+2?", "answer": 4.0, "url": "-"},
    "math500": {"problem": "What is 2+2?", "solution": "4", "answer": "4", "level": 1},
    "gsm8k": {"question": "What is 2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
}
"""One row of our own with the columns of each set."""


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_sets_are_read_wrapped_and_graded(
    make_run: Callable, engines: list[Engine], path: Path, tmp_path: Path
) -> None:
    pytest.importorskip("math_verify")
    run, _ = make_run()
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[path.stem]) + "\n")
    text = path.read_text()
    name = re.search(r"hf://[^\"]+", text)
    assert name is not None and path.stem in text
    for old, new in (
        (name[0], "rows.jsonl"),
        (r'(subset|split) = "\w+", ', ""),
        (r"(max_new\w+) = \d+", r"\1 = 8"),
    ):
        text = re.sub(old, new, text)
    (tmp_path / "set.toml").write_text(text)
    result = evaluate(run, What(sets_file=tmp_path / "set.toml"))
    record = result["sets"][path.stem]
    assert record["accuracy"] == 1.0 and record["settings"]["grader"]["name"] == "math"
    ((requests, sampling),) = engines[0].asked
    assert len(requests) == record["settings"].get("samples", 1)
    assert sampling.temperature == record["settings"]["temperature"]
    assert record["settings"]["apply_chat_template"] is True
    assert "boxed{}" in record["settings"]["prompt_template"]


def test_there_is_a_row_for_each_ready_set() -> None:
    assert {path.stem for path in READY} == ROWS.keys()
