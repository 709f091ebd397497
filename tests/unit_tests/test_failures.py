"""The one reason why a run ended: what counts as what, who may write it, what a full disk does."""

import errno
import json
import os

import pytest

from megatron_tropd.base import exits
from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.base.failures import KINDS, Failure, exit_code, kind_of, read, report


class DistBackendError(RuntimeError):
    """Stands for torch's, which is known by its name."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TrainingError("The loss is not finite"), "training"),
        (TrainingError("The engine died", kind="engine"), "engine"),
        (ConfigError("unknown key"), "config"),
        (InputError("no such folder"), "input"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (OSError(errno.EROFS, "Read-only file system"), "disk"),
        (OSError(errno.ENOENT, "No such file"), "bug"),
        (ConnectionResetError("reset"), "lost_peer"),
        (RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.1]"), "lost_peer"),
        (RuntimeError("[unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"), "hung"),
        (RuntimeError("[pair.cc:559] Application timeout caused pair closure"), "hung"),
        (RuntimeError("[pair.cc:560] Socket closed [10.0.0.1]:4321"), "lost_peer"),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:1] who knows"), "lost_peer"),
        (DistBackendError("whatever"), "lost_peer"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "device"),
        (RuntimeError("CUDA error: out of memory"), "bug"),
        (RuntimeError("CUDA error: device-side assert triggered"), "bug"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "bug"),
        (RuntimeError("CUDA error: invalid device ordinal"), "bug"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "bug"),
        (KeyError("x"), "bug"),
    ],
)
def test_errors_are_told_apart(error, kind):
    assert kind_of(error) == kind


def test_what_a_restart_may_cure():
    assert {kind for kind, code in KINDS.items() if code == exits.RESTART} == {
        *("engine", "disk", "device", "hung", "killed", "lost_peer")
    }


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_first_cause_stays(tmp_path, monkeypatch, hard_links):
    """Also on file systems that have no hard links."""
    if not hard_links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "failure.json"
    assert read(path) is None
    symptom = Failure(kind="lost_peer", message="connection closed", rank=0)
    assert report(path, symptom)
    found = json.loads(path.read_text())
    assert found["exit_code"] == 75 and found["node"] and found["time"]

    assert report(path, Failure(kind="killed", message="signal 9", rank=1, step=3, phase="rollout"))
    cause = read(path)
    assert cause is not None and (cause.kind, cause.rank, cause.phase) == ("killed", 1, "rollout")
    for later in (symptom, Failure(kind="engine", message="died")):
        assert report(path, later)
        assert read(path) == cause
    assert [p.name for p in tmp_path.iterdir()] == ["failure.json"]


def test_a_command_that_cannot_write_says_so_and_may_be_repeated(capsys):
    def fail(number: int) -> int:
        raise OSError(number, os.strerror(number), "run/config.json")

    assert exit_code(lambda: fail(errno.EROFS)) == 75
    assert "Read-only file system: 'run/config.json'" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        exit_code(lambda: fail(errno.ENOENT))


def test_a_job_script_can_read_the_exit_code_with_sed(tmp_path):
    path = tmp_path / "failure.json"
    report(path, Failure(kind="training", message='"exit_code": 7 says nobody'))
    lines = [line for line in path.read_text().splitlines() if line.startswith('  "exit_code"')]
    assert lines == ['  "exit_code": 1']


def test_a_folder_that_takes_no_file_is_no_second_failure(tmp_path):
    assert not report(tmp_path / "gone" / "failure.json", Failure(kind="disk", message="full"))
    assert read(tmp_path / "gone" / "failure.json") is None
    assert os.listdir(tmp_path) == []
