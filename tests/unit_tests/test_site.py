"""The site is built strictly: no page left out, no dead link, every public name has its text."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_tropd
from megatron_tropd.config.described import describe_settings

REPOSITORY = Path(__file__).resolve().parents[2]
pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, f"make site:\n{run.stderr[-3000:]}"
    return out


def test_every_text_is_a_page(site: Path):
    pages = {path.stem for path in site.rglob("*.html")}
    assert {path.stem for path in (REPOSITORY / "docs").glob("*.md")} <= pages
    assert {"index", "commands", "settings", "glossary", "changelog", "security"} <= pages


def test_every_public_name_has_its_signature(site: Path):
    text = (site / "api.html").read_text()
    shown = set(re.findall(r'id="megatron_tropd\.[\w.]*?\.?(\w+)"', text))
    assert set(megatron_tropd.__all__) <= shown


def test_every_setting_has_its_row(site: Path):
    text = (site / "settings.html").read_text()
    for setting in describe_settings():
        assert setting.text, f"{setting.key} has no string under it"
        assert f"<code>{setting.name}</code>" in text


def test_pages_say_what_runs_their_commands(site: Path):
    text = (site / "conversion.html").read_text()
    assert "Run by <code>tests/unit_tests/test_conversion.py</code>" in text
    assert "<!-- commands:" not in text


def test_nothing_is_fetched_from_elsewhere(site: Path):
    for path in site.rglob("*.html"):
        found = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', path.read_text()
        )
        assert [address for address in found if "canonical" not in address] == [], path.name
