"""Several teachers: whose a prompt is, what is refused, and what is told of each."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.cli import main as cli
from megatron_tropd.config import (
    Config,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    load_config,
)
from megatron_tropd.config.loss import preset
from megatron_tropd.config.run_folder import open_run
from megatron_tropd.data.routes import Routes, routes_of
from megatron_tropd.data.sequence import NO_VERSION, SampleKey, TokenSequence, Writer
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill.inputs import load_inputs
from megatron_tropd.losses import (
    HiddenStatesSignal,
    LogitsSignal,
    ReferencedSignal,
    RoutedSignal,
    TopKSignal,
)
from megatron_tropd.teacher import signal_of

SETTINGS = """
[model]
student = "student"
[[teachers]]
name = "math"
model = "one"
sources = ["gsm", "aime"]
[[teachers]]
name = "code"
model = "two"
[rollout]
prompts = "prompts.jsonl"
max_new_tokens = 32
[train]
steps = 10
[run]
dir = "runs/x"
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "two.toml").write_text(SETTINGS)
    config = load_config(tmp_path / "two.toml")
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, dir=str(tmp_path / "run"))
    )


def test_settings_are_the_same_in_every_form(config: Config, tmp_path: Path) -> None:
    assert [t.name for t in config.teachers] == ["math", "code"]
    assert config.teachers[0].model == str(tmp_path / "one"), "relative to the file"
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    (tmp_path / "again.toml").write_text(config_to_toml(config))
    assert load_config(tmp_path / "again.toml") == config


def test_each_teacher_has_a_run_of_its_own(config: Config) -> None:
    alone = config.by_teacher
    assert list(alone) == ["teacher math", "teacher code"]
    assert alone["teacher code"].model.teacher.endswith("two")
    assert {c.teacher.offload for c in alone.values()} == {"host"}, "one at a time on the device"
    (single,) = alone["teacher math"].by_teacher.values()
    assert single == alone["teacher math"]
    cached = dataclasses.replace(config.teachers[1], placement="cached", cache="scores")
    recorded = dataclasses.replace(config.rollout, recorded="rollouts.jsonl")
    mixed = dataclasses.replace(config, teachers=(config.teachers[0], cached), rollout=recorded)
    assert [c.teacher.offload for c in mixed.by_teacher.values()] == ["none", "none"]
    assert mixed.loads_teacher and signal_of(mixed) is TopKSignal
    assert signal_of(config) is RoutedSignal
    teachers = tuple(dataclasses.replace(t, reference="student") for t in config.teachers)
    exopd = dataclasses.replace(config, teachers=teachers, loss=preset("exopd"))
    assert signal_of(exopd) is ReferencedSignal


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ('model.teacher="t"', r"\[\[teachers\]\] is beside model.teacher"),
        ("teacher.offload=host", r"\[\[teachers\]\] is beside \[teacher\]"),
        ("guidance.responses=r", "beside guidance.responses"),
        ("rollout.behaviour=blended", '"blended" takes one teacher'),
        ("loss.method=exopd", r"\[\[teachers\]\] math: .* needs teacher.reference"),
    ],
)
def test_what_knows_of_one_teacher_is_refused(tmp_path: Path, changed: str, expected: str) -> None:
    (tmp_path / "two.toml").write_text(SETTINGS)
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path / "two.toml", [changed])


def test_a_run_keeps_one_average(config: Config) -> None:
    """Each would be kept in the place of the one before."""
    averaged = [
        dataclasses.replace(t, model=config.model.student, placement="self", ema_decay=0.5)
        for t in config.teachers
    ]
    dataclasses.replace(config, teachers=(averaged[0], config.teachers[1]))
    with pytest.raises(ConfigError, match=r"one average of its student, found 2 \(math, code\)"):
        dataclasses.replace(config, teachers=tuple(averaged))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "code"', 'name = "math"', "teachers.name: math is there twice"),
        ('name = "code"', 'name = "a/b"', "letters, digits, - and _ alone, found 'a/b'"),
        ('model = "two"', 'model = "two"\nsources = ["gsm"]', "teachers.sources: gsm is there"),
        ('model = "two"', 'model = "two"\nresponses = "r"', "none for math"),
        ('model = "two"', "", "teachers.model is missing"),
        ('model = "two"', 'model = "two"\nplacement = "cached"', "code: .* needs teacher.cache"),
        ("[train]", '[evaluation]\nproblems = "h"\ntask = "reverse_kl"\n[train]', "takes one"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, old: str, new: str, expected: str) -> None:
    (tmp_path / "two.toml").write_text(SETTINGS.replace(old, new))
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path / "two.toml")


def test_a_run_goes_on_with_the_same_teachers_alone(config: Config) -> None:
    open_run(config)

    def changed(**settings: Any) -> Config:
        first = dataclasses.replace(config.teachers[0], **settings)
        return dataclasses.replace(config, teachers=(first, config.teachers[1]))

    open_run(changed(offload="host_by_layer"))
    with pytest.raises(ConfigError, match=r"teachers.math.model: was '.*one', now 'other'"):
        open_run(changed(model="other"))
    with pytest.raises(ConfigError, match=r"teachers.code.name: was 'code', now None"):
        open_run(dataclasses.replace(config, teachers=config.teachers[:1]))


# ---- whose a prompt is ----


def _prompts(*lines: dict[str, Any]) -> list[Prompt]:
    return [Prompt(2 * n, "p", (1, 2), line, n + 1) for n, line in enumerate(lines)]


def test_the_line_names_the_teacher_or_its_source_does(config: Config) -> None:
    lines = ({"teacher": "code", "source": "gsm"}, {"source": "aime"}, {"teacher": "math"})
    routes = routes_of("p.jsonl", _prompts(*lines), config.teachers)
    assert routes.names == ("math", "code")
    assert routes.of_prompt == {0: 1, 2: 0, 4: 0}
    assert [p.index for p in routes.prompts_of(0, _prompts(*lines))] == [2, 4]


@pytest.mark.parametrize(
    "line", [{}, {"teacher": "maths"}, {"source": "web"}, {"teacher": 3}, {"source": ["gsm"]}]
)
def test_a_prompt_of_no_teacher_is_refused_by_its_line(config: Config, line: Any) -> None:
    prompts = _prompts({"teacher": "math"}, line)
    with pytest.raises(InputError, match=r"p\.jsonl, line 2: .*one of math, code.*gsm, aime"):
        routes_of("p.jsonl", prompts, config.teachers)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A folder with a config of two tiny teachers, prompts of both and held-out problems."""
    folder = tmp_path_factory.mktemp("pair")
    lines = [
        {"prompt": f"{i} + {i} =", "answer": str(2 * i), "teacher": ("math", "code")[i % 2]}
        for i in range(8)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "prompts.jsonl").write_text(text)
    (folder / "heldout.jsonl").write_text(text)
    models = {
        '"student"': tiny_model("llama", tie_word_embeddings=True),
        '"one"': tiny_model("qwen3", num_hidden_layers=4, seed=5),
        '"two"': tiny_model("llama", num_hidden_layers=4, seed=9),
    }
    text = SETTINGS + '[evaluation]\nproblems = "heldout.jsonl"\n'
    for name, path in models.items():
        text = text.replace(name, f'"{path}"')
    text = text.replace("max_new_tokens = 32", "max_new_tokens = 8\nprompts_per_step = 4")
    (folder / "two.toml").write_text(text)
    return folder


def test_inputs_know_the_models_prompts_and_problems_of_each(pair: Path) -> None:
    inputs = load_inputs(load_config(pair / "two.toml"))
    assert list(inputs.folders) == ["student", "teacher math", "teacher code"]
    assert inputs.routes is not None
    assert inputs.routes.of_prompt == {i: i % 2 for i in range(8)}
    (only,) = inputs.problem_sets
    answered = {who: [p.index for p in mine] for who, mine in only.of_teachers.items()}
    assert answered == {"teacher math": [0, 2, 4, 6], "teacher code": [1, 3, 5, 7]}
    (only,) = load_inputs(load_config(pair / "two.toml", ["evaluation.teacher=false"])).problem_sets
    assert only.problems and not only.of_teachers


def test_the_tokenizer_of_each_teacher_is_checked(
    pair: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    import shutil

    config = load_config(pair / "two.toml")
    shutil.copytree(config.teachers[1].model, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    other = dataclasses.replace(config.teachers[1], model=str(tmp_path / "other"))
    changed = dataclasses.replace(config, teachers=(config.teachers[0], other))
    with pytest.raises(InputError, match=r"Student and teacher code must share one tokenizer"):
        load_inputs(changed)


def test_a_command_refuses_a_prompt_of_nobody_and_tells_who_there_is(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", str(pair / "two.toml"), f"run.dir={tmp_path / 'run'}", "--dry-run"]
    assert cli.main(words) == 0
    assert "teacher code: " in capsys.readouterr().out
    lines = (pair / "prompts.jsonl").read_text().replace('"code"', '"cod"', 1)
    (tmp_path / "wrong.jsonl").write_text(lines)
    assert cli.main([*words, f"rollout.prompts={tmp_path / 'wrong.jsonl'}"]) == 2
    assert "wrong.jsonl, line 2: expected" in capsys.readouterr().err


def test_prefixes_are_those_of_the_prompts_own_teacher(pair: Path, tmp_path: Path) -> None:
    from megatron_tropd.data.prompts import load_prompts
    from megatron_tropd.data.responses import TeacherResponse, header_record, response_record
    from megatron_tropd.data.tokenizers import load_tokenizer

    config = load_config(pair / "two.toml")
    tokenizer = load_tokenizer(config.model.student)
    teachers = []
    for number, teacher in enumerate(config.teachers):
        records = [header_record(tokenizer, {})]
        for prompt in load_prompts(config.rollout.prompts, tokenizer):
            if prompt.index % 2 == number or number == 0:  # the first answers all of them
                response = TeacherResponse(prompt.index, 0, (10 + number, 2), "stop")
                records.append(response_record(prompt, response, text="", seed=1))
        path = tmp_path / f"{teacher.name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        teachers.append(dataclasses.replace(teacher, responses=str(path)))
    responses = load_inputs(dataclasses.replace(config, teachers=tuple(teachers))).responses
    assert responses is not None
    assert {i: r.token_ids[0] for i, (r,) in responses.items()} == {i: 10 + i % 2 for i in range(8)}


# ---- what is scored ----


@pytest.mark.parametrize("mine", [0, 1, 3])
@pytest.mark.parametrize("multiple", [1, 2])
def test_ranks_that_share_experts_run_a_teacher_equally_often(
    mine: int, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those without a row of its own, and with virtual stages: else the others wait."""
    from types import SimpleNamespace

    from megatron_tropd.teacher._routed import _Reader

    layout: Any = SimpleNamespace(
        ep_size=2, batch_multiple=multiple, pad_multiple=1, row_multiple=1, local=lambda b: b
    )
    source: Any = SimpleNamespace(begin=lambda *_: None)
    reader = _Reader(source, layout, tokens_per_micro_batch=8)
    rows = [
        TokenSequence.of_runs(SampleKey(0, n, 0), (Writer.CONTEXT, [1]), (Writer.TEACHER, [2] * 5))
        for n in range(4)
    ]
    reader.begin(0, dict(enumerate(rows)))
    monkeypatch.setattr(reader, "_most", lambda count: 4)
    assert len(reader._batches(list(range(mine)))) == 4


def test_a_response_goes_on_after_another_prompt() -> None:
    sequence = TokenSequence.of_runs(
        SampleKey(0, 1, 2),
        (Writer.CONTEXT, [1, 2, 3]),
        (Writer.TEACHER, [4]),
        (Writer.STUDENT, [5, 6]),
        (Writer.CONTEXT, [7]),
        (Writer.STUDENT, [8]),
        logprobs=[-0.1, -0.2, -0.3],
        version=4,
        finish="length",
        fields={"a": 1},
    )
    other = sequence.after([9, 9, 9, 9, 9])
    assert other.prompt_ids == [9] * 5 and other.response_ids == sequence.response_ids
    assert other.writers == sequence.writers
    assert (other.key, other.finish, other.fields) == (sequence.key, "length", {"a": 1})
    assert other.weight_N.tolist() == [0] * 5 + [1, 1, 1, 0, 1]
    assert other.version_N.tolist()[:6] == [NO_VERSION] * 6
    np.testing.assert_array_equal(
        other.engine_logprobs_N[5:], sequence.engine_logprobs_N[3:], strict=True
    )


def test_every_token_has_the_logits_of_its_own_teacher() -> None:
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(6, 3, generator=draw), torch.randn(6, 4, generator=draw)]
    hidden = [torch.randn(4, 3, generator=draw), torch.randn(3, 4, generator=draw)]
    parts = [HiddenStatesSignal(h, w, 5) for h, w in zip(hidden, weights, strict=True)]
    logits = [h @ w[:5].t() for h, w in zip(hidden, weights, strict=True)]
    signal = RoutedSignal(tuple(parts), ((0, 0, 2), (1, 0, 1), (1, 1, 0), (0, 2, 2), (1, 1, 2)))
    expected = torch.cat([logits[0][:2], logits[1][:1], logits[0][2:], logits[1][1:]])
    assert (signal.num_tokens, signal.width, signal.vocab_size) == (7, 6, 5)
    for start in range(7):
        for stop in range(start, 8):
            out = torch.full((stop - start, 5), torch.nan)
            signal.write_logits(slice(start, stop), out)
            torch.testing.assert_close(out, expected[start:stop])
    with pytest.raises(ValueError, match="same columns"):
        RoutedSignal((parts[0], LogitsSignal(torch.zeros(2, 7), 5)), ())


def test_a_teacher_without_tokens_shows() -> None:
    from megatron_tropd.distill.metrics import RowGroups, StepSums, StepTotals, groups_of

    routes = Routes(("math", "code"), {0: 0, 1: 1})
    assert groups_of(routes, None, []) == [RowGroups("teacher", ("math", "code"), ())]
    assert groups_of(Routes(("teacher",), {}), None, []) == []
    sums = StepSums.zeros(torch.device("cpu"), groups_of(routes, None, []))
    names = tuple(f"teacher/{name}" for name in routes.names)
    metrics = StepTotals(sums.sums.tolist(), 0.0, 2**62, names).metrics()
    assert metrics["teacher/code/tokens"] == 0
    assert metrics["teacher/code/token_share"] is None is metrics["teacher/code/k1"]


# ---- tropd score ----


def _cached(config: Config, path: Path, **changed: Any) -> Config:
    """The second teacher is cached, and reads the answer too; the first is resident."""
    second = dataclasses.replace(
        config.teachers[1],
        placement="cached",
        cache=str(path / "scores"),
        context="{prompt} {answer}",
    )
    rollout = dataclasses.replace(
        config.rollout, recorded=str(path / "rollouts.jsonl"), samples_per_prompt=1
    )
    evaluation = dataclasses.replace(config.evaluation, teacher=False)
    teachers = (config.teachers[0], second)
    settings: dict[str, Any] = dict(rollout=rollout, evaluation=evaluation, teachers=teachers)
    return dataclasses.replace(config, **settings | changed)


def test_scores_are_of_one_teacher_its_own_prompts_and_its_context(
    pair: Path, tmp_path: Path
) -> None:
    from megatron_tropd.cli.score import job_config
    from megatron_tropd.data.prompts import load_prompts
    from megatron_tropd.data.sequence_files import FORMAT, record_of
    from megatron_tropd.data.tokenizers import fingerprint, load_tokenizer
    from megatron_tropd.distill.score import load_to_score

    config = _cached(load_config(pair / "two.toml"), tmp_path)
    tokenizer = load_tokenizer(config.model.student)
    lines = [{"format": FORMAT, "tokenizer": fingerprint(tokenizer)}]
    for prompt in load_prompts(config.rollout.prompts, tokenizer):
        sequence = TokenSequence.of_runs(
            SampleKey(0, prompt.index, 0),
            (Writer.CONTEXT, prompt.token_ids),
            (Writer.STUDENT, [10 + prompt.index, 2]),
            logprobs=[-1.0, -1.0],
        )
        lines.append(record_of(sequence))
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    job = job_config(config)
    assert [(t.name, t.placement) for t in job.teachers] == [("code", "resident")]
    assert job.run.dir == str(tmp_path / "scores" / "job")
    found = load_to_score(job)
    assert list(found.folders) == ["teacher"]
    assert [s.response_ids for s in found.sequences] == [[10 + i, 2] for i in (1, 3, 5, 7)]
    read = [tokenizer.decode(s.prompt_ids, skip_special_tokens=True) for s in found.sequences]
    assert read == [f"{i} + {i} = {2 * i}" for i in (1, 3, 5, 7)]
    with pytest.raises(InputError, match=r"scores.* holds no cache\.json"):
        load_inputs(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("math", "expected --teacher with one of code, found math"), ("x", "one of code, found x")],
)
def test_a_teacher_that_is_not_cached_is_not_scored(
    name: str, expected: str, pair: Path, tmp_path: Path
) -> None:
    from megatron_tropd.cli.score import job_config

    config = load_config(pair / "two.toml")
    with pytest.raises(ConfigError, match=expected):
        job_config(_cached(config, tmp_path), name)
    with pytest.raises(ConfigError, match="no teacher is cached"):
        job_config(config)
    (alone,) = [c for who, c in config.by_teacher.items() if who.endswith("math")]
    with pytest.raises(ConfigError, match=r"--teacher math: the config has no \[\[teachers\]\]"):
        job_config(alone, "math")


def test_a_row_counts_for_one_of_several_teachers(config: Config) -> None:
    from megatron_tropd.convert.families import model_shape
    from megatron_tropd.convert.sizes import row_flops
    from megatron_tropd.distill.pair import _row_work

    folder = Path(__file__).parents[2] / "examples" / "arithmetic" / "teacher"
    shape = model_shape(json.loads((folder / "config.json").read_text()))
    shapes = dict.fromkeys(["student", *config.by_teacher], shape)
    alone = next(iter(config.by_teacher.values()))
    one = _row_work(alone, {"student": shape, "teacher": shape}, 64)
    loaded = sum(each.loads_teacher for each in config.by_teacher.values())
    missing = row_flops(shape, 64) * (1 - loaded / len(config.by_teacher))
    assert _row_work(config, shapes, 64) == pytest.approx(one - missing)
