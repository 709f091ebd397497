"""Small files: whole or not at all, patient with hiccups, never torn; logs lose lines instead."""

import io
import subprocess

import pytest

from megatron_tropd.base import files
from megatron_tropd.base.errors import TrainingError
from megatron_tropd.base.files import LossyFile, append_line, replace_text
from megatron_tropd.report.metrics import MetricsLog
from slurm.testcluster.runs import small_file_system


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", (0.0, 0.0, 0.0))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    with small_file_system(tmp_path / "disk", "64k") as folder:
        yield folder


def _fill(folder):
    with pytest.raises(OSError), (folder / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


@pytest.mark.needs("mount")
def test_a_full_disk_tears_no_line_and_no_file(small_disk):
    log, table = small_disk / "metrics.jsonl", small_disk / "summary.json"
    append_line(log, "first\n")
    replace_text(table, "old")
    _fill(small_disk)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written: No space") as met:
        append_line(log, "x" * 8192 + "\n")
    assert met.value.kind == "disk"
    with pytest.raises(TrainingError, match=r"summary\.json cannot be written"):
        replace_text(table, "y" * 8192)
    assert table.read_text() == "old"
    assert sorted(p.name for p in small_disk.iterdir()) == [
        *("ballast", "metrics.jsonl", "summary.json")
    ]

    (small_disk / "ballast").unlink()
    append_line(log, "second\n")
    assert log.read_text() == "first\nsecond\n", "the torn attempt was taken back"


@pytest.mark.needs("mount")
def test_a_read_only_disk_is_named(small_disk):
    log = small_disk / "metrics.jsonl"
    append_line(log, "first\n")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(TrainingError, match="Read-only file system") as caught:
        append_line(log, "second\n")
    assert caught.value.kind == "disk" and log.read_text() == "first\n"


def test_a_hiccup_passes(tmp_path):
    attempts = []

    def third_time_lucky() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError(5, "Input/output error")

    files.patiently(third_time_lucky, tmp_path)
    assert len(attempts) == 3


@pytest.mark.needs("mount")
def test_a_log_on_a_full_disk_loses_lines_and_nothing_else(small_disk):
    _fill(small_disk)
    with (small_disk / "log").open("wb") as file:
        log = io.TextIOWrapper(
            io.BufferedWriter(LossyFile(file.fileno(), "w", closefd=False)), line_buffering=True
        )
        print("x" * 10_000, file=log)
        (small_disk / "ballast").unlink()
        print("after", file=log)
        log.flush()
    assert (small_disk / "log").read_text().endswith("after\n")


@pytest.mark.needs("mount")
def test_tensorboard_on_a_full_disk_costs_its_curves_only(small_disk, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").symlink_to(small_disk)
    log = MetricsLog(run)
    log.write({"step": 1, "loss": 0.5})
    _fill(small_disk)
    for step in range(2, 60):
        log.write({"step": step, **{f"value_{i}": 0.5 for i in range(50)}})
    log.close()
    assert (run / "metrics.jsonl").read_text().count("\n") == 59
    assert "TensorBoard is off until the next start" in capsys.readouterr().out
