"""Rows of docs/reliability.md, written down by the tests that produce the faults.

``TROPD_RELIABILITY=FILE pytest ...`` adds one JSON line per fault to FILE; tools/reliability.py
makes the table of them. Without the variable nothing is written.
"""

import json
import os
from pathlib import Path

_FILE = "TROPD_RELIABILITY"


def are_recorded() -> bool:
    """Whether rows are added to a file."""
    return bool(os.environ.get(_FILE))


def record(fault: str, *, how: str, seen: str, stops: float | None, back: float | None, lost: str):
    """Add a row.

    Args:
        fault: what broke, in the words of the table.
        how: how the test produced it.
        seen: what the user saw: exit code, reason.
        stops: seconds from the fault to the end of the command; None: it went on.
        back: seconds from the next start to the first new step; None: no restart was needed.
        lost: work that had to be done again, and data lost.
    """
    target = os.environ.get(_FILE)
    if target:
        row = {"fault": fault, "how": how, "seen": seen, "stops": stops, "back": back, "lost": lost}
        with Path(target).open("a") as file:
            file.write(json.dumps(row) + "\n")
