"""``tropd monitor``: what a run's files say, in the terminal and on loopback."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from megatron_tropd.cli import monitor
from megatron_tropd.cli.main import main
from megatron_tropd.report.monitor import WIDTH, sparkline
from tests.synthetic_run import write_synthetic_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 40 steps that is at its 30th."""
    folder = write_synthetic_run(tmp_path / "run", steps=40)
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:30]) + lines[30][:20])
    beats = folder / "logs" / "heartbeats"
    beats.mkdir(parents=True)
    for rank, phase in enumerate(("teacher", "teacher", "rollout")):
        beat = {"beat": 1, "rank": rank, "node": "n", "pid": 1, "step": 31, "phase": phase}
        (beats / f"rank_{rank:05d}.json").write_text(json.dumps(beat | {"at": "x"}))
    (folder / "logs" / "engine_student_000.log").touch()
    return folder


def _shown(run: Path, capsys) -> str:
    assert main(["monitor", str(run), "--once"]) == 0
    return capsys.readouterr().out


def test_a_run_that_trains(run: Path, capsys):
    text = _shown(run, capsys)
    assert "running" in text and "step 30 of 40" in text and "left" in text
    assert "2 in teacher of step 31" in text and "1 in rollout of step 31" in text
    for name in ("rollout", "optimizer", "tokens per second", "reverse_kl", "engine_student_000"):
        assert name in text
    assert "held out: accuracy" in text and "last failure" not in text


def test_curves_of_tasks_are_shown(run: Path, capsys):
    with (run / "metrics.jsonl").open() as file:
        rows = [json.loads(line) for line in file.readlines()[:30]]
    text = "".join(json.dumps(row | {"teacher/maths/reverse_kl": 0.25}) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text)
    evaluation = {"step": 30, "model": "student", "accuracy": 0.5, "accuracy/maths": 0.625}
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(evaluation) + "\n")
    shown = _shown(run, capsys)
    assert "teacher/maths/reverse_kl" in shown and "0.625" in shown


def test_a_run_that_is_silent_and_failed(run: Path, capsys):
    for path in (run / "logs" / "heartbeats").iterdir():
        os.utime(path, (time.time() - 600, time.time() - 600))
    failure = {"kind": "engine", "message": "Engine 0 died. Start again.", "rank": 0, "step": 31}
    (run / "failure.json").write_text(json.dumps(failure | {"phase": "rollout"}))
    text = _shown(run, capsys)
    assert "not running: no heartbeat for 10 min" in text
    assert "last failure" in text and "Engine 0 died. Start again." in text


def test_a_complete_run_and_one_that_has_just_begun(tmp_path: Path, capsys):
    folder = write_synthetic_run(tmp_path / "run", steps=10)
    assert "complete" in _shown(folder, capsys)
    for name in ("summary.json", "metrics.jsonl", "evaluations.jsonl"):
        (folder / name).unlink()
    text = _shown(folder, capsys)
    assert "no heartbeat yet" in text and "step 0 of 10" in text


def test_a_folder_of_no_run_is_a_user_s_mistake(tmp_path: Path, capsys):
    for option in ("--once", "--serve"):
        assert main(["monitor", str(tmp_path), option]) == 2
        assert "not a run folder" in capsys.readouterr().err


def test_the_live_report_is_on_loopback_and_follows_the_run(run: Path, capsys):
    server = monitor.make_server(run, 0, every=2)
    host, port = server.server_address[:2]
    assert host == "127.0.0.1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{port}/"
        with urllib.request.urlopen(address) as answer:
            first = answer.read().decode()
            assert answer.headers["Refresh"] == "10"
        (run / "metrics.jsonl").unlink()
        with urllib.request.urlopen(address) as answer:
            assert answer.read().decode() != first
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}config.json")
        assert main(["monitor", str(run), "--serve", "--port", str(port)]) == 2
        assert f"Port {port} cannot be listened on" in capsys.readouterr().err
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_curve_is_averaged_to_its_width():
    assert sparkline([1.0, 1.0]) == "▁▁"
    line = sparkline([float(i) for i in range(1000)])
    assert len(line) == WIDTH and line[0] == "▁" and line[-1] == "█"
