"""Several tasks: which prompts a step takes, what each task says of its own, what is refused."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import Config, config_from_dict, config_to_dict, config_to_toml
from megatron_tropd.config.run import load_config
from megatron_tropd.config.run_folder import open_run
from megatron_tropd.data.mixing import Mixing, Tasks, most_of_a_step
from megatron_tropd.data.samples import Sample
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.distill.inputs import load_inputs
from megatron_tropd.distill.metrics import StepSums, StepTotals, groups_of, sequence_metrics
from megatron_tropd.distill.session import rollout_source

SIZES, WEIGHTS = (7, 5, 40), (1.0, 0.3, 2.0)


def tasks() -> Tasks:
    ends = np.cumsum(SIZES)
    firsts = (0, *ends[:-1].tolist())
    places = tuple(np.arange(a, b) for a, b in zip(firsts, ends, strict=True))
    return Tasks(("a", "b", "c"), firsts, places, WEIGHTS)


def mixing(seed: int = 3) -> Mixing:
    return Mixing(tasks(), per_step=10, seed=seed)


def test_each_task_has_its_share_of_every_step_and_no_prompt_is_there_twice() -> None:
    choose, found = mixing(), Counter[int]()
    for step in range(600):
        chosen = choose(step)
        assert len(set(chosen)) == 10
        counts = Counter(tasks().of_index(place) for place in chosen)
        for task, weight in enumerate(WEIGHTS):
            assert abs(counts[task] - 10 * weight / sum(WEIGHTS)) < 1
            assert counts[task] <= most_of_a_step(weight, sum(WEIGHTS), 10)
        found.update(counts)
    for task, weight in enumerate(WEIGHTS):
        assert found[task] / 6000 == pytest.approx(weight / sum(WEIGHTS), abs=0.004)


def test_a_resumed_run_chooses_what_an_uninterrupted_one_does() -> None:
    whole = mixing()
    steps = [whole(step) for step in range(40)]
    for start in (0, 1, 17, 39):
        later = mixing()
        assert [later(step) for step in range(start, 40)] == steps[start:]
    assert whole(5) == steps[5], "asked for again, out of order"
    assert mixing(4)(0) != steps[0]


def test_a_task_goes_through_its_prompts_before_it_begins_again() -> None:
    choose, seen = mixing(), []
    for step in range(6):
        seen += [place for place in choose(step) if tasks().of_index(place) == 2]
    assert len(seen) > 34 and len(set(seen[:34])) == 34


def test_a_task_with_too_few_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"may take 10 of .* the task c, which has 4"):
        few = replace(
            tasks(), weights=(0.01, 0.01, 5.0), places=(*tasks().places[:2], np.arange(4))
        )
        Mixing(few, per_step=10, seed=1)


# ---- a run of two tasks ----

SETTINGS = """
[model]
student = "{student}"
teacher = "{teacher}"
[[tasks]]
name = "sums"
prompts = "sums.jsonl"
weight = 2.0
[[tasks]]
name = "words"
prompts = "words.jsonl"
max_new_tokens = 5
prompt_template = "Say {{{{ prompt }}}}"
grader = {{name = "exact"}}
[rollout]
max_new_tokens = 8
prompts_per_step = 6
samples_per_prompt = 2
[train]
steps = 4
[guidance]
prefixed_per_prompt = 0
[evaluation]
[[evaluation.sets]]
name = "words"
of_task = "words"
problems = "words.jsonl"
[run]
dir = "{run}"
"""


@pytest.fixture
def load(tmp_path: Path, tiny_llama: Path, tiny_qwen3: Path) -> Callable[..., Config]:
    """Read the settings, changed."""
    for name, count in (("sums", 9), ("words", 4)):
        lines = [
            json.dumps({"prompt": f"{i}+{len(name)}=", "answer": str(i)}) for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    names = {"student": tiny_llama, "teacher": tiny_qwen3, "run": tmp_path / "run"}

    def read(*overrides: str, text: str = SETTINGS) -> Config:
        (tmp_path / "run.toml").write_text(text.format(**names))
        return load_config(tmp_path / "run.toml", overrides)

    return read


class Engines:
    """Answers one token to each request."""

    channel = SimpleNamespace(version=0)

    def start(self, requests: Any, sampling: Any) -> None:
        self.requests = list(requests)

    def finish(self) -> list[Sample]:
        return [Sample((5, 2), (-1.0, -1.0), "stop") for _ in self.requests]

    def awake(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def test_prompts_of_all_tasks_have_indices_lengths_and_forms_of_their_own(load: Any) -> None:
    config = load()
    inputs = load_inputs(config)
    assert [p.index for p in inputs.prompts] == list(range(13))
    assert [p.task for p in inputs.prompts] == [0] * 9 + [1] * 4
    assert inputs.prompts[9].text == "Say 0+5=" and inputs.prompts[0].text == "0+4="
    assert inputs.tasks is not None and inputs.tasks.firsts == (0, 9)
    (words,) = inputs.problem_sets
    assert words.max_new_tokens == 5 and words.problems[0].text == "Say 0+5="
    assert words.settings.grader is not None and words.settings.grader.name == "exact"
    assert [grader.name for grader in config.graders] == ["marked", "exact"]


def test_an_episode_is_sampled_as_its_task_says(load: Any) -> None:
    config = load()
    inputs, engines = load_inputs(config), Engines()
    source = rollout_source(config, inputs, engines, is_main=True)  # type: ignore[arg-type]
    source.begin(0)
    sequences = source.collect()
    assert inputs.tasks is not None and len(sequences) == 12
    numbers = inputs.tasks.of(sequences)
    assert sorted(Counter(numbers).values()) == [4, 8]
    for number, request in zip(numbers, engines.requests, strict=True):
        assert request.max_new_tokens == (8, 5)[number]
    metrics = sequence_metrics(sequences, step=0, tasks=inputs.tasks)
    assert (metrics["task/sums/sequences"], metrics["task/words/sequences"]) == (8, 4)
    assert metrics["task/words/response_length"] == 2.0
    assert "task/sums/sequences" not in sequence_metrics(sequences, step=0)


def test_a_task_without_tokens_shows() -> None:
    sequence = TokenSequence.of_runs(
        SampleKey(0, 8, 0), (Writer.CONTEXT, (1,)), (Writer.STUDENT, (2,)), logprobs=(-1.0,)
    )
    groups = groups_of(None, tasks(), [sequence])
    assert [(each.kind, each.names, each.of_row) for each in groups] == [
        ("task", ("a", "b", "c"), (1,))
    ]
    names = tuple(f"task/{name}" for name in "abc")
    sums = StepSums.zeros(torch.device("cpu"), groups)
    metrics = StepTotals(sums.sums.tolist(), 0.0, 2**62, names).metrics()
    assert metrics["task/b/tokens"] == 0 and metrics["task/b/k1"] is None


def test_settings_survive_every_form_and_a_change_of_a_task_is_named(load: Any) -> None:
    config = load()
    assert config_from_dict(config_to_dict(config)) == config
    again = load(text=config_to_toml(config).replace("{", "{{").replace("}", "}}"))
    assert again == config
    open_run(config)
    with pytest.raises(ConfigError, match=r"tasks.words.weight: was 1.0, now 3.0"):
        words = replace(config.tasks[1], weight=3.0)
        open_run(replace(config, tasks=(config.tasks[0], words)))
    with pytest.raises(ConfigError, match=r"tasks.words.\w+: was .*, now None"):
        open_run(replace(config, tasks=config.tasks[:1], evaluation=load().evaluation.__class__()))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[rollout]", '[rollout]\nprompts = "sums.jsonl"', r"is beside rollout.prompts"),
        ('name = "words"\nprompts', 'name = "sums"\nprompts', "sums is there twice"),
        ("max_new_tokens = 5", "max_new_tokens = 9", "must be at most rollout.max_new_tokens = 8"),
        ("weight = 2.0", 'teacher = "x"', r"expected one of the \[\[teachers\]\]"),
        ('of_task = "words"', 'of_task = "wards"', "expected one of the tasks"),
        ("weight = 2.0", 'mode = "no_such"', "tasks.mode"),
        ("weight = 2.0", 'mode = "multi_turn"', "needs rollout.mode"),
        ("[rollout]", '[rollout]\nrecorded = "sums.jsonl"', "beside rollout.recorded"),
    ],
)
def test_what_does_not_go_with_tasks_is_refused(
    load: Any, old: str, new: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(text=SETTINGS.replace(old, new, 1))


def test_a_run_needs_prompts_or_tasks(load: Any) -> None:
    with pytest.raises(ConfigError, match=r"rollout.prompts is missing .* \[\[tasks\]\]"):
        load(
            "evaluation.sets=[]",
            text=SETTINGS.split("[[tasks]]")[0] + "[rollout]" + SETTINGS.split("[rollout]")[1],
        )


def test_a_task_goes_to_the_teacher_it_names(load: Any, tiny_qwen3: Path) -> None:
    teachers = "".join(
        f'[[teachers]]\nname = "{name}"\nmodel = "{tiny_qwen3}"\n' for name in ("one", "two")
    )
    text = SETTINGS.replace('teacher = "{teacher}"\n', teachers, 1)
    text = text.replace("weight = 2.0", 'teacher = "two"').replace(
        "max_new_tokens = 5", 'max_new_tokens = 5\nteacher = "one"'
    )
    inputs = load_inputs(load(text=text))
    assert inputs.routes is not None
    assert inputs.routes.of_prompt == {i: int(i < 9) for i in range(13)}
    (words,) = inputs.problem_sets
    assert {who: len(mine) for who, mine in words.of_teachers.items()} == {
        **{"teacher one": 4, "teacher two": 0}
    }
