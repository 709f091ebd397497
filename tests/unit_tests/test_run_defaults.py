"""Commands take a run's settings: prompts and samples are those that the run would make."""

import json
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.cli.main import parse
from megatron_tropd.config import config_to_dict, load_config


@pytest.fixture(params=["file", "folder"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run as its TOML file, and as the folder of the started run."""
    toml = tmp_path / "my.toml"
    toml.write_text(f"""
        [model]
        student = "student"
        teacher = "teacher"
        dtype = "bfloat16"
        [rollout]
        prompts = "prompts.jsonl"
        max_new_tokens = 33
        samples_per_prompt = 3
        temperature = 0.5
        top_p = 0.75
        stop_token_ids = [5, 9]
        apply_chat_template = true
        [train]
        steps = 2
        seed = 99
        [run]
        dir = "{tmp_path / "run"}"
    """)
    if request.param == "file":
        return toml
    (tmp_path / "run").mkdir()
    settings = config_to_dict(load_config(toml))
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    return tmp_path / "run"


def test_the_commands_take_the_settings_of_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {
        **{"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 33, "temperature": 0.5},
        **{"top_p": 0.75, "stop_token_ids": [5, 9], "apply_chat_template": True, "seed": 99},
        "dtype": "bfloat16",
    }
    for name, own in (
        ("responses", {"teacher": tmp_path / "teacher", "samples": 1}),
        ("rollouts", {"student": tmp_path / "student", "samples": 3, "round": 0}),
    ):
        options = vars(parse([name, "--run", str(run), "--out", "o"]))
        assert options.items() >= (shared | own).items(), name
        said = capsys.readouterr().err
        assert f"from {run}: " in said and "stop_token_ids [5, 9]" in said


def test_an_option_comes_before_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "rollouts",
        "--run",
        str(run),
        "--out",
        "o",
        "--temperature",
        "1",
        "--stop-token-ids",
        "4",
    ]
    options = parse(arguments)
    assert (options.temperature, options.stop_token_ids, options.top_p) == (1.0, [4], 0.75)
    assert "temperature" not in capsys.readouterr().err


def test_a_trained_student_is_sampled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "student_hf").mkdir(parents=True)
    options = parse(["rollouts", "--run", str(run), "--out", "o"])
    assert options.student == tmp_path / "run" / "student_hf"


def test_without_a_run_everything_must_be_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["rollouts", "--out", "o"])
    assert "--max-new-tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match="no run folder"):
        parse(["rollouts", "--run", str(tmp_path), "--out", "o"])
    with pytest.raises(ConfigError, match="does not exist"):
        parse(["rollouts", "--run", str(tmp_path / "x.toml"), "--out", "o"])
