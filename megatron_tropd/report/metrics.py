"""Where the numbers of a run go: JSON lines always, TensorBoard and Weights & Biases if asked.

``metrics.jsonl`` and ``evaluations.jsonl`` are the truth; the other two are copies of it. Every
line is on disk when the call that wrote it returns.
"""

import contextlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.files import append_line, replace_text
from megatron_tropd.report.records import finite, read_lines

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


class MetricsLog:
    """The open logs of one run folder. One process writes; ``step`` is in every record."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the logs of ``run_dir`` for appending; nothing is written yet.

        Args:
            tensorboard: also write event files to ``run_dir/tensorboard``.
            wandb_project: also log to this Weights & Biases project.

        Raises:
            ConfigError: a project is named but the wandb package is not installed.
        """
        self._folder = Path(run_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._wandb = _start_wandb(wandb_project, self._folder, config) if wandb_project else None

    def truncate_after(self, step: int, *, evaluations: int | None = None) -> None:
        """Forget everything later than ``step``: records, torn last lines, trajectory dumps.

        But not the teacher's evaluation, which knows no steps. Call it when resuming from a
        checkpoint of ``step``, before the first write.

        Args:
            evaluations: last step whose evaluation is kept; None: ``step``.
        """
        limits = {METRICS: step, EVALUATIONS: step if evaluations is None else evaluations}
        for name, last in limits.items():
            path = self._folder / name
            if path.is_file():
                kept = [
                    record
                    for record in read_lines(path)
                    if record["step"] <= last or record.get("model") == "teacher"
                ]
                replace_text(path, "".join(_line(record) for record in kept))
        for path in (self._folder / "trajectories").glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        for path in (self._folder / "evaluations").glob("student_step_*"):
            if int(path.name.removeprefix("student_step_")) > limits[EVALUATIONS]:
                shutil.rmtree(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the metrics of one step.

        Args:
            record: ``step`` and numbers by name; lists and None go to the JSON lines only.
        """
        self._append(METRICS, record)
        self._copy(record)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Log one evaluation: ``step``, ``model`` ("student" or "teacher") and its numbers."""
        self._append(EVALUATIONS, record)
        prefix = "_".join(["eval", record["model"], *filter(None, [record.get("set")]), ""])
        numbers = {prefix + name: value for name, value in record.items() if name != "step"}
        self._copy({"step": record["step"], **numbers})

    def close(self) -> None:
        """Flush and close TensorBoard and Weights & Biases."""
        if self._writer is not None and self._tensorboard:
            with contextlib.suppress(OSError):
                self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        append_line(self._folder / name, _line(record))

    def _copy(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        numbers = {
            name: value
            for name, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        if self._tensorboard:
            try:
                self._copy_to_tensorboard(numbers, step)
            except OSError as error:  # a copy is not worth the run
                self._tensorboard = False
                print(f"TensorBoard is off until the next start: {error}", flush=True)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def _copy_to_tensorboard(self, numbers: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            # Imported late: it takes seconds, and a login node may not have it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(finite(dict(record)), allow_nan=False) + "\n"


def _start_wandb(project: str, folder: Path, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"run.wandb_project = {project!r} needs the wandb package, which is not installed. "
            "Install it (.venv/bin/uv pip install '.[wandb]') or leave run.wandb_project out."
        ) from None
    # The id is kept in the folder, so that a resumed run goes on in the same W&B run.
    id_file = folder / "wandb_id"
    if not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:8])
    return wandb.init(
        project=project,
        id=id_file.read_text().strip(),
        resume="allow",
        name=folder.resolve().name,
        dir=str(folder),
        config=dict(config or {}),
    )
