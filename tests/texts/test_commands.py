"""Every command that a text shows is run by a test, or says why not; and it can be parsed.

A comment stands before each block of commands: ``<!-- commands: tests/... -->`` names the tests
that run them on models of their own, ``<!-- commands: not run: REASON -->`` says why none does.
"""

import re
import shlex
from pathlib import Path

import pytest

from megatron_tropd.cli.main import parse

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = sorted(
    [
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *REPOSITORY.glob("docs/*.md"),
        *REPOSITORY.glob("examples/*/README.md"),
        *REPOSITORY.glob("slurm/*.md"),
    ]
)
BLOCK = re.compile(r"^(?:<!-- commands: (.*?) -->\n)?```(\w*)\n(.*?)^```", re.M | re.S)
PROGRAM = re.compile(
    r"^\$? ?(\w+=\S+ +)*(tropd|make|python|pip|torchrun|srun|sbatch|vllm|docker|apptainer"
    r"|\.venv/bin/\S+) ",
    re.M,
)


def _blocks(path: Path) -> list[tuple[str, str]]:
    """(mark, text) of every block that shows commands."""
    found = [(m[1] or "", m[2], m[3]) for m in BLOCK.finditer(path.read_text())]
    return [
        (mark, text)
        for mark, language, text in found
        if mark or language == "bash" or (language in ("", "text") and PROGRAM.match(text))
    ]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_are_run_or_say_why_not(path: Path):
    for mark, text in _blocks(path):
        assert mark, f"{path.name} shows commands that nothing runs:\n{text}"
        if mark.startswith("not run: "):
            assert len(mark) > len("not run: ") + 5
            continue
        for name in mark.split(", "):
            file, _, test = name.partition("::")
            assert (REPOSITORY / file).is_file(), f"{path.name} names {name}"
            assert f"def {test}" in (REPOSITORY / file).read_text(), f"{path.name} names {name}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_of_tropd_can_be_parsed(path: Path, capsys):
    """Their options are those that the command has, and what must be given is given."""
    for _, text in _blocks(path):
        for words in _commands(text):
            try:
                parse(words)
            except SystemExit:
                pytest.fail(f"{path.name}: tropd {' '.join(words)}\n{capsys.readouterr().err}")


def _commands(text: str) -> list[list[str]]:
    """The words after each ``tropd`` of a block."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        plain = line.strip().removeprefix("$ ")
        plain = re.sub(r'"?\$\(\(.*?\)\)"?', "1", plain)  # arithmetic of the shell
        plain = re.sub(r"\[(\S+)\]", r"\1", plain)  # what may be left out
        if command := re.match(r"(\w+=\S+ +)*tropd (.*)", plain):
            words = shlex.split(command[2].removesuffix("&"), comments=True)
            found += [] if "--run" in words else [words]  # what a run answers is not asked for
    return found


def test_these_tests_can_fail(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("```\ntropd report runs/x --typo\n```\n")
    assert _blocks(page) == [("", "tropd report runs/x --typo\n")]
    with pytest.raises(SystemExit):
        parse(_commands(_blocks(page)[0][1])[0])
