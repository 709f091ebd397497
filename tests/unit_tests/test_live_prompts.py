"""Live rollouts read prompts as the trainer does, and ask for a date that they cannot keep."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import RolloutConfig
from megatron_tropd.integrations.on_policy_data import LoopSettings, OnPolicyData, OnPolicySettings

TEMPLATE = "{{ strftime_now('%d %b') }}{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def read(tmp_path: Path, tiny_llama: Path) -> Callable[..., list[str]]:
    """``read(teacher's template, **rollout)``: the texts of the prompts."""
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "a" * 40}]
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    with prompts.open("a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")

    def make(template: str, **settings: object) -> list[str]:
        for name, text in (("student", TEMPLATE), ("teacher", template)):
            folder = tmp_path / name
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tiny_llama, folder)
            path = folder / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": text}))
        rollout = RolloutConfig(
            prompts=str(prompts), max_new_tokens=8, prompts_per_step=1, **settings
        )
        live = OnPolicyData(OnPolicySettings(tmp_path / "student", rollout, tmp_path))
        live._loop = LoopSettings(32, seed=1, steps=1, teachers=(tmp_path / "teacher",))
        live._read_texts()
        return [prompt.text for prompt in live._prompts]

    return make


def test_prompts_of_live_rollouts(read: Callable[..., list[str]]) -> None:
    dated = {"chat_template_date": "2026-01-31", "filter_overlong_prompts": True}
    assert read(TEMPLATE, **dated) == ["31 Jan[a]"]
    with pytest.raises(InputError, match=r"line 2 \(48 tokens\)"):
        read(TEMPLATE, chat_template_date="2026-01-31")
    with pytest.raises(ConfigError, match="Give the rollouts a date: chat_template_date"):
        read(TEMPLATE, filter_overlong_prompts=True)
    with pytest.raises(InputError, match="line 1: the chat templates of student and teacher"):
        read(TEMPLATE.replace("[", "<"), **dated)
    with pytest.raises(InputError, match="line 1: the chat template does not read effort"):
        read(TEMPLATE, **dated, chat_template_kwargs={"effort": "low"})
