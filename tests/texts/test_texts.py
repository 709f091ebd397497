"""What the texts show and name is there: links, files, metrics, keys, listings."""

import difflib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from megatron_tropd.base.failures import KINDS
from megatron_tropd.config import load_config
from megatron_tropd.planning.estimate import layout_name
from megatron_tropd.planning.hardware import load_hardware
from megatron_tropd.planning.planned_run import plan_run
from tests.unit_tests.test_planning import ESTIMATE_KEYS, PLAN_KEYS

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = [
    path
    for path in sorted(REPOSITORY.glob("*.md")) + sorted(REPOSITORY.glob("*/**/*.md"))
    if not {".venv", "runs"} & set(path.relative_to(REPOSITORY).parts)
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_within_the_repository_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/support.md"])
def test_files_that_support_what_is_said_exist(page: str):
    text = (REPOSITORY / page).read_text()
    named = set(re.findall(r"`((?:tests|tools|docs|examples|benchmarks)/[\w./]+)`", text))
    assert named, "the tables name their tests"
    for name in named:
        assert (REPOSITORY / name).exists(), f"{page} names {name}"


def test_every_metric_of_the_report_is_described():
    page = (REPOSITORY / "megatron_tropd" / "report" / "page.js").read_text()
    described = (REPOSITORY / "docs" / "metrics.md").read_text()
    for name in set(re.findall(r'curve\("(\w+)"', page)):
        assert f"`{name}`" in described, f"docs/metrics.md does not describe {name}"


def test_the_family_file_shown_is_the_real_one():
    (shown,) = _python_of("docs/model_families.md")
    assert shown == (REPOSITORY / "megatron_tropd/convert/families/qwen3.py").read_text()


def test_the_parts_shown_are_those_of_the_example():
    names = ("own_method", "own_teacher", "own_rollout")
    files = [REPOSITORY / "examples" / "own_parts" / f"{name}.py" for name in names]
    assert _python_of("docs/extending.md") == [file.read_text() for file in files]


def test_the_diff_shown_is_that_of_the_examples_and_short():
    example = REPOSITORY / "examples" / "megatron_lm"
    names = ("pretrain_gpt.py", "pretrain_gpt_tropd.py")
    scripts = [(example / name).read_text().splitlines() for name in names]
    diff = [line.rstrip() for line in difflib.unified_diff(*scripts, *names, "", "", n=1)]
    assert 5 < len([line for line in diff[2:] if line[:1] in "+-"]) < 30
    readme = [line.rstrip() for line in (example / "README.md").read_text().splitlines()]
    shown = "\n".join(readme).split("```diff\n")[1].split("\n```")[0]
    assert shown.splitlines() == diff, "the README shows another diff"


def _python_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)


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


def test_the_tables_of_plans_are_those_of_the_command():
    spec = importlib.util.spec_from_file_location("plans", REPOSITORY / "benchmarks" / "plans.py")
    plans = importlib.util.module_from_spec(spec)
    sys.modules["plans"] = plans
    spec.loader.exec_module(plans)
    for page, table in (("planning", plans.recipe_table), ("parallelism", plans.layout_table)):
        text = (REPOSITORY / "docs" / f"{page}.md").read_text()
        what = "recipes" if page == "planning" else "layouts"
        assert "\n".join(table()) in text, f"python benchmarks/plans.py {what}"


def test_kept_rehearsals_are_those_of_the_recipes():
    """Of their layout, and without a finding; python benchmarks/plans.py write NAME."""
    recipes = REPOSITORY / "configs" / "recipes"
    kept = sorted(recipes.glob("*.rehearsal.txt"))
    assert len(kept) >= 5
    for path in kept:
        text, name = path.read_text(), path.name.removesuffix(".rehearsal.txt")
        run = plan_run(load_config(recipes / f"{name}.toml"), load_hardware("h100"))
        layout = " ".join(text[text.index("layout ") : text.index("\nstep ")].split())
        assert layout == f"layout {layout_name(run)}" and "FINDING" not in text, name


def test_the_documented_keys_are_those_of_the_json_object():
    text = (REPOSITORY / "docs" / "planning.md").read_text()
    assert all(f"`{key}`" in text for key in PLAN_KEYS | ESTIMATE_KEYS)
