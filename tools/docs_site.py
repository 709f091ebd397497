"""What MkDocs needs beyond docs/: pages made of other files, their links, and marks of commands.

README and the other texts of the repository are pages as they are. A link that leaves the site
becomes the name of the file. Where a comment before a block of commands says which test runs
them, or why none does, the page says so below.
"""

import io
import os
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    **{
        f"examples/{name}/README.md": f"examples/{name}.md"
        for name in ("arithmetic", "stories", "two_teachers", "dialect", "tool_use", "megatron_lm")
    },
}
"""Texts of the repository that are pages of the site."""
MARK = re.compile(r"^<!-- commands: (.*?) -->\n(```.*?\n```)$", re.M | re.S)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of other files."""
    for source, target in PAGES.items():
        text = (REPOSITORY / source).read_text()
        files.append(File.generated(config, target, content=text))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links, and say of commands what runs them."""
    uri = page.file.src_uri
    source = next((path for path, target in PAGES.items() if target == uri), f"docs/{uri}")
    return _outside_of_code(_show_marks(markdown), lambda text: _links(text, source, uri))


def commands_page() -> str:
    """Write what ``tropd COMMAND --help`` prints, for all commands."""
    from megatron_tropd.cli.main import COMMANDS, main

    os.environ["COLUMNS"] = "100"
    parts = ["# Commands\n\nWhat `tropd COMMAND --help` prints.\n"]
    for name, what in COMMANDS.items():
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            main([name, "--help"])
        parts.append(
            f"## {name}\n\n{what[0].upper()}{what[1:]}.\n\n```text\n{printed.getvalue()}```\n"
        )
    return "\n".join(parts)


def settings_page() -> str:
    """Write a table for each table of a config: keys, defaults, meanings."""
    from megatron_tropd.config.described import Described, describe_settings

    parts = [
        "# Settings\n\nEvery table of a TOML file, from the code. On the command line a setting is "
        "`table.key=value`; an unknown key is an error. `[loss]` names a method and gives it its "
        "settings: [losses](losses.md). `[megatron.model]` and its siblings take any option of "
        "Megatron's: [Megatron's options](megatron_options.md).\n"
    ]
    tables: dict[str, list[Described]] = {}
    for each in describe_settings():
        tables.setdefault(each.table, []).append(each)
    for table, settings in tables.items():
        head = f"[[{table}]]" if table == "teachers" else f"[{table}]"
        parts.append(f"\n## `{head}`\n\n| key | default | meaning |\n|---|---|---|\n")
        for each in settings:
            default = f"`{each.default}`" if each.default else "must be given"
            text = _cell(each.text)
            parts.append(f"| `{each.name}` | {_cell(default)} | {text} |\n")
    return "".join(parts)


def _cell(text: str) -> str:
    """Keep the bars and angle brackets of a text in its cell."""
    plain = text.replace("``", "`").replace("|", "\\|")
    return plain if "`<" in plain else plain.replace("<", "&lt;")


def _show_marks(markdown: str) -> str:
    def show(match: re.Match[str]) -> str:
        mark, block = match.groups()
        return f'{block}\n\n<p class="ran">{_sentence(mark)}</p>\n'

    return MARK.sub(show, markdown)


def _sentence(mark: str) -> str:
    if mark.startswith("not run: "):
        return f"Not run by a test: {mark.removeprefix('not run: ')}."
    tests = ", ".join(f"<code>{test}</code>" for test in mark.split(", "))
    return f"Run by {tests}."


def _outside_of_code(markdown: str, change: Any) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def _links(text: str, source: str, uri: str) -> str:
    """Lead links of a file of the repository to pages of the site."""

    def lead(match: re.Match[str]) -> str:
        image, label, target, anchor = match.groups()
        if re.match(r"\w+:", target):
            return match[0]
        path = os.path.normpath(PurePosixPath(source).parent / target)
        found = PAGES.get(path) or PAGES.get(f"{path}/README.md")
        if path.startswith("docs/") and (REPOSITORY / path).is_file():
            found = path.removeprefix("docs/")
        if found is None:
            return (
                f"`{path}`" if label.strip("`").endswith(Path(path).name) else f"{label} (`{path}`)"
            )
        relative = os.path.relpath(found, PurePosixPath(uri).parent)
        return f"{image}[{label}]({relative}{anchor or ''})"

    return LINK.sub(lead, text)
