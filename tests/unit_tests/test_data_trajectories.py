"""Recorded trajectories come back exactly, or with an error that names the line."""

import json
from pathlib import Path

import pytest

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.trajectories import read_trajectories, write_trajectories
from megatron_tropd.data.types import Trajectory

ONE = Trajectory(
    step=3,
    prompt_index=1,
    sample_index=2,
    prompt_ids=(1, 2),
    prefix_ids=(),
    response_ids=(3, 4),
    rollout_logprobs=(-0.1, -1e-30),
    finish_reason="length",
    weights_version=3,
)


def test_round_trip(tmp_path: Path):
    path = tmp_path / "new" / "t.jsonl"
    for trajectories in ([ONE, ONE], [ONE], []):
        write_trajectories(path, trajectories)
        assert read_trajectories(path) == trajectories
    assert [p.name for p in path.parent.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout_logprobs": [-0.1]}, "line 2: expected one rollout log-prob per response token"),
        ({"extra": 1}, "line 2: expected a trajectory with the keys"),
    ],
)
def test_bad_lines(tmp_path: Path, change: dict, message: str):
    path = tmp_path / "t.jsonl"
    write_trajectories(path, [ONE, ONE])
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + json.dumps(json.loads(second) | change))
    with pytest.raises(InputError, match=message):
        read_trajectories(path)


def test_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"trajectories file .* cannot be read"):
        read_trajectories(tmp_path / "absent.jsonl")
