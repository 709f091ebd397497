"""What a teacher reads in the place of the prompt: templates, lines, lengths, settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import PromptConfig, load_config
from megatron_tropd.data.contexts import contexts_of
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.distill.inputs import load_inputs
from megatron_tropd.mcore.options_check import check_teacher_is_built

TEMPLATE = "{prompt} It is {solution}. Again: {prompt}"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
PLAIN = PromptConfig()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    loaded = load_tokenizer(tiny_llama)
    loaded.chat_template = CHAT
    return loaded


def _texts(
    lines: list[dict[str, Any]],
    tokenizer: Any,
    path: Path,
    settings: PromptConfig = PLAIN,
    **more: Any,
) -> list[str]:
    (path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = load_prompts(path / "p.jsonl", tokenizer, settings)
    given: dict[str, Any] = {"template": TEMPLATE, "max_tokens": 99} | more
    found = contexts_of("p.jsonl", prompts, tokenizer=tokenizer, settings=settings, **given)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found.values()]


def test_a_text_stays_one_and_messages_keep_their_form(tokenizer: Any, tmp_path: Path) -> None:
    assert _texts([{"prompt": "1+1=", "solution": 2}], tokenizer, tmp_path) == [
        "1+1= It is 2. Again: 1+1="
    ]
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": [{"type": "text", "text": "1+1"}]},
    ]
    expected = "<system>Add.<user>1+1 It is 2. Again: 1+1<assistant>"
    for key in ("messages", "prompt"):
        assert _texts([{key: messages, "solution": "2"}], tokenizer, tmp_path) == [expected]
    wrapped = PromptConfig(apply_chat_template=True)
    assert _texts([{"prompt": "1+1", "solution": "2"}], tokenizer, tmp_path, wrapped) == [
        "<user>1+1 It is 2. Again: 1+1<assistant>"
    ]
    assert _texts([{"prompt": "x"}], tokenizer, tmp_path, template="{{{prompt}}}") == ["{x}"]


@pytest.mark.parametrize(
    ("line", "changed", "expected"),
    [
        ({"prompt": "1"}, {}, r"p\.jsonl, line 1: teacher.context reads solution"),
        ({"prompt": "1", "solution": ["2"]}, {}, "reads solution, a text or a number"),
        ({"prompt": "1", "solution": "2"}, {"max_tokens": 9}, r"line 1: .* at most 9 fit"),
        ({"messages": [{"role": "system", "content": "s"}]}, {}, "last message, found none"),
    ],
)
def test_a_line_that_gives_no_context_is_refused(
    line: Any, changed: Any, expected: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        _texts([line], tokenizer, tmp_path, **changed)


@pytest.mark.parametrize("template", ["no field", "{", "{0}", "{prompt!r}", "{prompt:>9}", "{a.b}"])
def test_a_template_that_is_none_is_refused(template: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.context"):
        _texts([{"prompt": "1"}], tokenizer, tmp_path, template=template)


SETTINGS = """
[model]
student = "{student}"
[teacher]
placement = "self"
context = "{{prompt}} {{solution}}"
[rollout]
prompts = "prompts.jsonl"
max_new_tokens = 8
prompts_per_step = 2
[train]
steps = 2
[evaluation]
problems = "prompts.jsonl"
[run]
dir = "run"
"""


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path) -> Callable[..., Any]:
    lines = [{"prompt": f"{i}+1=", "answer": str(i), "solution": f"is {i}"} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.toml").write_text(SETTINGS.format(student=tiny_llama))
    return lambda *overrides: load_config(tmp_path / "run.toml", overrides)


def test_the_teacher_is_the_student_and_reads_and_answers_in_its_context(run: Any) -> None:
    inputs = load_inputs(run())
    assert list(inputs.folders) == ["student", "teacher"]
    assert inputs.folders["teacher"].path == inputs.folders["student"].path
    assert inputs.routes is not None and inputs.routes.names == ("teacher",)
    answered = inputs.problem_sets[0].of_teachers["teacher"]
    for prompt, problem in zip(inputs.prompts, answered, strict=True):
        read = inputs.routes.contexts[prompt.index]
        assert inputs.tokenizer.decode(read, skip_special_tokens=True).endswith(
            f"is {prompt.index}"
        )
        assert problem.token_ids == read != prompt.token_ids
    assert inputs.max_model_len == max(map(len, inputs.routes.contexts.values())) + 8


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["model.teacher=other"], 'placement = "self" is the student itself'),
        (["teacher.placement=resident", "model.teacher=t", "teacher.ema_decay=0.5"], "Remove it"),
        (["teacher.ema_decay=1.0"], "must be in"),
        (["evaluation.task=reverse_kl"], "teacher.context would not be read"),
        (["rollout.behaviour=blended"], "teacher.context would not be read"),
        (["teacher.ema_decay=0.5", "teacher.offload=host"], "for a model that the job loads"),
        (["teacher.reference=student", "loss.method=exopd"], "takes no reference"),
        (["teacher.requests=8"], "asks no server and does not read teacher.requests"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changed: list[str], expected: str, run: Any
) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_inputs(run(*changed))


def test_options_of_a_teacher_need_a_model_of_its_own(run: Any) -> None:
    option = "megatron.teacher.bias_activation_fusion=false"
    check_teacher_is_built(run(option))
    served = ["teacher.placement=served", "model.teacher=t", 'teacher.address=["http://a:1"]']
    for changed in (["teacher.ema_decay=0.5"], ["model.lora.rank=2"], served):
        config = run(*changed, "evaluation.teacher=false")
        check_teacher_is_built(config)
        with pytest.raises(ConfigError, match="this run builds none"):
            check_teacher_is_built(run(option, *changed, "evaluation.teacher=false"))


def test_the_longest_context_must_fit_a_micro_batch(run: Any) -> None:
    inputs = load_inputs(run())
    assert inputs.routes is not None
    longest = max(map(len, inputs.routes.contexts.values())) + 8 - 1
    assert longest > max(len(prompt.token_ids) for prompt in inputs.prompts) + 8 - 1
    assert inputs.longest_read(run().rollout) == longest + 1, "what a server must take"
    load_inputs(run(f"train.tokens_per_micro_batch={longest}"))
    with pytest.raises(ConfigError, match=f"make {longest} positions"):
        load_inputs(run(f"train.tokens_per_micro_batch={longest - 1}"))
