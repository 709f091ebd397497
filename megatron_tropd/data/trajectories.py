"""Trajectories, written and read as JSON lines (record and replay)."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tropd.base.errors import InputError
from megatron_tropd.base.text_files import read_json_lines
from megatron_tropd.data.types import Trajectory


def dump_trajectories(trajectories: Sequence[Trajectory]) -> bytes:
    """One JSON object per trajectory and line; floats are written exactly."""
    # Not asdict: it copies tuples token by token.
    lines = (json.dumps(vars(trajectory)) + "\n" for trajectory in trajectories)
    return "".join(lines).encode()


def write_trajectories(path: str | Path, trajectories: Sequence[Trajectory]) -> None:
    """Write one JSON object per trajectory; the file appears whole or not at all.

    Args:
        path: file to write; an older one is replaced.
        trajectories: floats are written exactly.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(dump_trajectories(trajectories))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """Inverse of :func:`write_trajectories`.

    Args:
        path: the file.

    Returns:
        Trajectories in the order of the file.

    Raises:
        InputError: the file is missing, or a line is not a trajectory (with the line number).
    """
    return [
        _trajectory(record, f"{path}, line {number}")
        for number, record in read_json_lines(path, "trajectories file")
    ]


def _trajectory(record: dict[str, Any], where: str) -> Trajectory:
    names = {f.name for f in dataclasses.fields(Trajectory)}
    if record.keys() != names:
        raise InputError(
            f"{where}: expected a trajectory with the keys {sorted(names)}, found "
            f"{sorted(record)}. Use a file this program recorded."
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    trajectory = Trajectory(**values)
    if len(trajectory.response_ids) != len(trajectory.rollout_logprobs):
        raise InputError(
            f"{where}: expected one rollout log-prob per response token, found "
            f"{len(trajectory.rollout_logprobs)} for {len(trajectory.response_ids)} tokens."
        )
    return trajectory
