"""Parts of a run are found by name, ours and the user's own."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.parts import load_part, part_names


def test_our_own_parts_are_the_modules_of_a_package() -> None:
    assert "exits" in part_names("megatron_tropd.base")
    assert load_part("megatron_tropd.base", "exits", attribute="COMPLETE", setting="s") == 0


def test_a_part_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts.py").write_text("PART = 17\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert load_part("megatron_tropd.base", "my_parts:PART", attribute="X", setting="s") == 17
    finally:
        sys.modules.pop("my_parts", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exit", "expected one of .*exits, failures"),
        ("no_such_module:X", "cannot be imported"),
        ("json:no_such_name", "cannot be imported"),
        (":X", "cannot be imported"),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"some.setting.*{message}"):
        load_part("megatron_tropd.base", name, attribute="X", setting="some.setting")


def test_names_of_parts_are_known_without_their_package() -> None:
    """On a login node that lacks what the package imports."""
    code = (
        "import sys; from megatron_tropd.base.parts import part_names; "
        "print(part_names('megatron_tropd.teacher')); "
        "assert 'megatron_tropd.teacher' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "resident" in run.stdout
