"""The page of eight GPUs shows the plan of its example, and its commands' file is a config."""

import re
from pathlib import Path

import pytest

from megatron_tropd.cli.main import main
from megatron_tropd.config import Config, load_config

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "gsm8k"
MODELS = REPOSITORY / "configs" / "recipes" / "models"
PAIR = [
    f"model.student={MODELS / 'Qwen3-1.7B'}",
    f"model.teacher={MODELS / 'Qwen3-8B'}",
]


@pytest.fixture(scope="module")
def config() -> Config:
    """The example, with its models' config.json from the recipes in the place of the hub."""
    return load_config(EXAMPLE / "tropd.toml", PAIR)


def test_the_example_asks_the_hub_for_public_models():
    model = load_config(EXAMPLE / "tropd.toml").model
    assert (model.student, model.teacher) == ("hf://Qwen/Qwen3-1.7B", "hf://Qwen/Qwen3-8B")


def test_every_gpu_trains_and_samples(config: Config):
    assert config.parallel.world_size == 8
    assert config.rollout.num_engines * config.rollout.engine_tensor_parallel == 8


def test_the_plan_is_the_committed_one_and_the_page_shows_it(capsys):
    words = ["plan", str(EXAMPLE / "tropd.toml"), *PAIR, "--prompt-tokens", "256"]
    assert main(words) == 0
    written = (EXAMPLE / "plan.txt").read_text()
    assert capsys.readouterr().out == written, "tropd plan ... > examples/gsm8k/plan.txt"
    page = (REPOSITORY / "docs" / "eight_gpus.md").read_text()
    seconds = dict(re.findall(r"^  (rollout|teacher|student|total) +([\d.]+)$", written, re.M))
    assert len(seconds) == 4
    for name, value in seconds.items():
        assert f"| {name} | {float(value):.1f} |" in page
    peaks = re.findall(r"^peak of (rollout|teacher|student) +([\d.]+)$", written, re.M)
    assert len(peaks) == 3 and all(f"{float(peak):.1f}" in page for _, peak in peaks)


def test_the_rehearsal_has_the_plan_s_layout_and_no_finding():
    text = (EXAMPLE / "rehearsal.txt").read_text()
    assert "FINDING" not in text
    layout = re.compile(r"^layout +(.+\n +.+)$", re.M)
    found = [layout.search(each) for each in (text, (EXAMPLE / "plan.txt").read_text())]
    assert found[0] and found[1] and found[0][1].split() == found[1][1].split()
    page = (REPOSITORY / "docs" / "eight_gpus.md").read_text()
    for phase in ("teacher", "student"):
        row = re.search(rf"^  {phase} +([\d.]+) +([\d.]+) ", text, re.M)
        assert row and all(f"{float(number):.1f}" in page for number in row.groups())
