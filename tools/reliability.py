"""Put what tests measured about faults into docs/reliability.json and the table of reliability.md.

    TROPD_RELIABILITY=rows.jsonl python -m pytest ...
    python tools/reliability.py [rows.jsonl ...]

A row replaces the one of the same fault; the others stay.
"""

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- table: tools/reliability.py -->\n", "<!-- end -->"
HEADER = (
    "| fault | how produced | what was seen | ends after | back after | lost |\n"
    "|---|---|---|---|---|---|\n"
)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        f"| {row['fault']} | {row['how']} | {row['seen']} | {_seconds(row['stops'])} | "
        f"{_seconds(row['back'])} | {row['lost']} |\n"
        for row in rows
    ]
    return HEADER + "".join(lines)


def merge(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` with ``new`` ones in the place of those of the same fault, or after all."""
    merged = {row["fault"]: row for row in rows}
    return list((merged | {row["fault"]: row for row in new}).values())


def put(text: str, rows: list[dict[str, Any]]) -> str:
    """A document with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(rows) + END + after


def main() -> None:
    """Merge the given files and write both documents."""
    source, document = DOCS / "reliability.json", DOCS / "reliability.md"
    rows = json.loads(source.read_text()) if source.exists() else []
    for name in sys.argv[1:]:
        rows = merge(rows, [json.loads(line) for line in Path(name).read_text().splitlines()])
    source.write_text(json.dumps(rows, indent=1) + "\n")
    document.write_text(put(document.read_text(), rows))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} s"


if __name__ == "__main__":
    main()
