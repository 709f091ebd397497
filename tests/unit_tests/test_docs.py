"""What the texts show works: snippets run, settings load, links lead somewhere."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from megatron_tropd.base.failures import KINDS
from megatron_tropd.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = [
    path
    for path in sorted(REPOSITORY.glob("*.md")) + sorted(REPOSITORY.glob("*/**/*.md"))
    if not {".venv", "runs"} & set(path.relative_to(REPOSITORY).parts)
]


def _blocks(language: str) -> list[str]:
    text = (REPOSITORY / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_readme_loss_snippet_runs():
    (snippet,) = _blocks("python")
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


def test_readme_settings_load(tmp_path: Path):
    first, parallel = _blocks("toml")
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


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_within_the_repository_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_files_the_readme_names_exist():
    text = (REPOSITORY / "README.md").read_text()
    named = set(re.findall(r"`((?:tests|tools|docs|examples)/[\w./]+)`", text))
    assert named, "the support table names its tests"
    for name in named:
        assert (REPOSITORY / name).exists(), f"README.md names {name}"


def test_every_metric_of_the_report_is_described():
    page = (REPOSITORY / "megatron_tropd" / "report" / "page.js").read_text()
    described = (REPOSITORY / "docs" / "metrics.md").read_text()
    for name in set(re.findall(r'curve\("(\w+)"', page)):
        assert f"`{name}`" in described, f"docs/metrics.md does not describe {name}"


def test_the_family_file_shown_is_the_real_one():
    (shown,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs/extending.md").read_text(), re.DOTALL
    )
    assert shown == (REPOSITORY / "megatron_tropd/convert/families/qwen3.py").read_text()


def test_the_table_of_faults_is_made_of_its_rows():
    spec = importlib.util.spec_from_file_location("tool", REPOSITORY / "tools" / "reliability.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rows = json.loads((REPOSITORY / "docs" / "reliability.json").read_text())
    text = (REPOSITORY / "docs" / "reliability.md").read_text()
    assert tool.put(text, rows) == text, "run tools/reliability.py"
    assert tool.merge([{"fault": "a", "x": 1}], [{"fault": "a", "x": 2}, {"fault": "b"}]) == [
        *({"fault": "a", "x": 2}, {"fault": "b"})
    ]
    kinds = set(re.findall(r"`(\w+)`", text[text.index("| exit code") : text.index("## Checkpoi")]))
    assert set(KINDS) <= kinds
