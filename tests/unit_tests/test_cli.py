"""The ``tropd`` command: a file for each subcommand; only the one asked for is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_tropd.cli
from megatron_tropd.cli.main import COMMANDS, main


def test_every_command_has_its_file():
    files = {path.stem: path for path in Path(megatron_tropd.cli.__file__).parent.glob("*.py")}
    assert files.keys() - {"__init__", "__main__", "main", "measure", "serving", "bars"} == {
        name.replace("-", "_") for name in COMMANDS
    }
    for name in COMMANDS:
        text = files[name.replace("-", "_")].read_text()
        assert "\ndef add_arguments(" in text and "\ndef run(" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_library(name: str):
    """Nor the files of the other commands; a launcher lives on without torch as well."""
    code = f"""
import json, sys
from megatron_tropd.cli.main import COMMANDS, main
try:
    main([{name!r}, "-h"])
except SystemExit as end:
    others = [other.replace("-", "_") for other in COMMANDS if other != {name!r}]
    names = [f"megatron_tropd.cli.{{other}}" for other in others]
    loaded = [n for n in ["torch", "numpy", "transformers", *names] if n in sys.modules]
    print(json.dumps([end.code, loaded]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *text, last = run.stdout.splitlines()
    assert json.loads(last) == [0, []], run.stderr
    assert text[0].startswith(f"usage: tropd {name}")


def test_overrides_may_stand_after_an_option(tmp_path: Path, capsys):
    assert main(["distill", "nowhere.toml", "--dry-run", "train.steps=3"]) == 2
    assert "nowhere.toml does not exist" in capsys.readouterr().err
    for words in (["distill", "a.toml", "--typo"], ["report", "run", "train.steps=3"], ["typo"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2


@pytest.mark.parametrize(
    "name", ["hf_to_megatron", "megatron_to_hf", "rollouts", "teacher_responses", "drop_layers"]
)
def test_a_script_is_a_door_to_its_command(name: str):
    path = Path(__file__).resolve().parents[2] / "tools" / f"{name}.py"
    said = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.startswith("usage: tropd ")
