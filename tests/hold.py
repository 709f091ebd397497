"""A run that stands still at a known place until the test lets it go on.

A small run takes a tenth of a second for a step, and on a busy machine a test may get no turn for
seconds: the run would be over before the test breaks anything. So it waits for the test.
"""

import os
from pathlib import Path

SITE = """
import os as _os, sys as _sys, time as _time

def _hold(path):
    while _os.path.exists(path):
        _time.sleep(0.01)

def _hold_after_step(number, path):
    from megatron_tropd.base import files
    append, logged = files.append_line, [0]
    def append_and_hold(file, line):
        append(file, line)
        logged[0] += file.name == "metrics.jsonl"
        if logged[0] == number:
            _hold(path)
    for module in list(_sys.modules.values()):  # who was forked has imported it already
        if getattr(module, "append_line", None) is append:
            module.append_line = append_and_hold

def _hold_in_save(number, path):
    from pathlib import Path
    rename = Path.rename
    def hold_and_rename(self, target):
        if self.name == f".step_{number:06d}.tmp":
            _hold(path)
        return rename(self, target)
    Path.rename = hold_and_rename

if _os.environ.get("TROPD_TEST_HOLD"):
    _where, _number, _path = _os.environ["TROPD_TEST_HOLD"].split(" ", 2)
    {"step": _hold_after_step, "save": _hold_in_save}[_where](int(_number), _path)
"""
"""For a ``sitecustomize.py``: every Python that is started reads it first."""


class Hold:
    """Stops a run once it has logged its n-th step, or before a checkpoint counts as complete."""

    def __init__(self, folder: Path, *, step: int | None = None, save: int | None = None) -> None:
        """Nothing is held yet: start the run with :attr:`environment`.

        Args:
            folder: for two small files; made if absent.
            step: which of the steps that this start logs, from 1.
            save: the step whose checkpoint it is.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(SITE)
        self._file = folder / "hold"
        self._file.touch()
        where = f"step {step}" if save is None else f"save {save}"
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.environment = {"PYTHONPATH": path, "TROPD_TEST_HOLD": f"{where} {self._file}"}

    def release(self) -> None:
        """Let it go on."""
        self._file.unlink()
