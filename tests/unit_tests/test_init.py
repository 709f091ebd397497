"""``tropd init``: the file it writes is a config whose plan is the one it names."""

from pathlib import Path

import pytest

from megatron_tropd.cli.main import main
from megatron_tropd.config import load_config
from megatron_tropd.planning.estimate import estimate, layout_name
from megatron_tropd.planning.hardware import load_hardware
from megatron_tropd.planning.planned_run import plan_run

MODELS = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "models"
PAIR = [str(MODELS / "Qwen3-1.7B"), str(MODELS / "Qwen3-4B")]


def test_the_file_is_laid_out_by_the_planner(tmp_path: Path, capsys):
    out = tmp_path / "new" / "my.toml"
    words = ["init", *PAIR, "--gpus", "2", "--max-new-tokens", "1500", "--out", str(out)]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"tropd distill {out} --dry-run" in said and "the fastest that fits" in said
    config = load_config(out)
    assert config.rollout.max_new_tokens == 1500
    assert config.train.tokens_per_micro_batch == 2048  # 512 + 1500, rounded up
    assert config.parallel.world_size == 2
    run = plan_run(config, load_hardware("h100"))
    assert estimate(run).fits
    text = out.read_text()
    head = " ".join(text.partition("\n\n")[0].replace("#", "").split())
    assert layout_name(run) in head and layout_name(run) in said and "not calibrated" in head
    # Each setting of ours says what it means.
    assert "# Longest response in tokens, a teacher prefix included.\nmax_new_tokens" in text

    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((str(MODELS / "Qwen3-8B"), str(MODELS / "Qwen3-235B-A22B"), "--gpus", "1"), "Nothing was"),
        (("nowhere", PAIR[1]), "nowhere does not exist"),
        ((*PAIR, "--gpus", "0"), "--gpus must be at least 1"),
        ((*PAIR, "--hardware", "tpu"), "neither one of"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys
):
    out = tmp_path / "my.toml"
    assert main(["init", *words, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
