"""What the texts show works: snippets run, settings load, links lead somewhere."""

import re
from pathlib import Path

import torch

from megatron_tropd.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]


def _blocks(page: str, language: str) -> list[str]:
    text = (REPOSITORY / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_snippet_of_the_loss_runs():
    (snippet,) = _blocks("loss_only.md", "python")
    tokens, vocab = 6, 101
    names = {
        "ids": torch.arange(tokens),
        "is_prefix": torch.arange(tokens) < 2,
        "uniforms": torch.full((tokens,), 0.5),
        "teacher_logits": torch.randn(tokens, vocab),
        "student_logits": torch.randn(tokens, vocab, requires_grad=True),
        "vocab_size": vocab,
        "tensor_parallel_group": None,
        "num_loss_tokens_of_the_whole_step": tokens,
    }
    exec(snippet, names)
    names["loss"].backward()
    assert names["student_logits"].grad.abs().sum() > 0
    assert {"trust", "outlier", "tv", "reverse_kl"} <= names["output"].values.keys()


def test_the_settings_shown_load(tmp_path: Path):
    first, parallel = _blocks("running.md", "toml")
    path = tmp_path / "my.toml"
    path.write_text(first)
    overrides, section = [], ""
    for line in parallel.splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("["):
            section = text.strip("[]")
        elif text:
            key, _, value = text.partition("=")
            overrides.append(f"{section}.{key.strip()}={value.strip()}")
    assert load_config(path).parallel.world_size == 1
    config = load_config(path, overrides)
    assert config.parallel.world_size == 8 and config.rollout.num_engines == 8


def test_the_readme_is_short():
    """Long tables are pages of docs/."""
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
