"""``benchmarks/gpu_day.sh``: parts that fail, hang or lack a package leave the others alone."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
DEVICE = {"torch": "2.13.0", "built_for": "13.0", "names": ["NVIDIA Test GPU"]}


@pytest.fixture(scope="module")
def gpu_day():
    """``benchmarks/gpu_day.py`` as a module."""
    spec = importlib.util.spec_from_file_location("gpu_day", BENCHMARKS / "gpu_day.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_day"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_a_gpu(gpu_day, monkeypatch):
    monkeypatch.setattr(gpu_day, "find_device", lambda: DEVICE)
    monkeypatch.setattr(gpu_day, "GRACE_SECONDS", 2.0)


def _python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


HANG = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
print("hangs", flush=True)
time.sleep(100)
"""


def _short_parts(gpu_day, tmp_path: Path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    return [
        gpu_day.Part("good", _python(f"{count}; print('{{\"x\": 1}}')"), 60, (), gpu_day.last_json),
        gpu_day.Part("bad", _python("raise SystemExit('reason')"), 60, (), gpu_day.kernel_numbers),
        gpu_day.Part("hanging", (*_python(HANG), "{out}"), 3),
        gpu_day.Part("lacking", _python(""), 60, ("no_such_package",)),
        gpu_day.Part("no program", ("/no/such/program",), 60),
        gpu_day.Part("last", _python("print('done')"), 60),
    ]


def test_a_part_that_goes_wrong_leaves_the_others_alone(gpu_day, on_a_gpu, tmp_path):
    out = tmp_path / "out"
    parts = _short_parts(gpu_day, tmp_path)
    assert gpu_day.main(["--out", str(out)], parts) == 1
    (result,) = [json.loads(path.read_text()) for path in out.glob("gpu-day-*.json")]
    found = result["parts"]
    assert {name: record["status"] for name, record in found.items()} == {
        "good": "done",
        "bad": "failed",
        "hanging": "timed out",
        "lacking": "skipped: no_such_package not installed",
        "no program": "failed",
        "last": "done",
    }
    assert next(iter(out.glob("*.json"))).name == "gpu-day-1x-nvidia-test-gpu.json"
    assert found["good"]["numbers"] == {"x": 1} and found["good"]["rc"] == 0
    assert found["bad"]["rc"] == 1 and found["bad"]["last lines"] == ["reason"]
    assert "FileNotFoundError" in found["bad"]["numbers lacking"]
    assert found["hanging"]["rc"] is None and found["hanging"]["last lines"] == ["hangs"]
    assert "/no/such/program" in found["no program"]["error"]
    assert result["device"] == DEVICE and result["versions"]["torch"]
    child = int((out / "hanging" / "child").read_text())
    assert _has_ended(child), "what a part started goes on computing"


def _has_ended(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gpu_day
gpu_day.GRACE_SECONDS = 2.0
gpu_day.find_device = lambda: {"names": ["NVIDIA Test GPU"]}
out = Path(sys.argv[2])
part = gpu_day.Part("hanging", (sys.executable, "-c", sys.argv[3], "{out}"), 60)
sys.exit(gpu_day.main(["--out", str(out)], [part]))
"""


def test_a_signal_ends_the_part_under_way_and_it_is_recorded(tmp_path):
    command = [*_python(INTERRUPTED), str(BENCHMARKS), str(tmp_path), HANG]
    day = subprocess.Popen(command)
    place = tmp_path / "hanging" / "child"
    for _ in range(200):
        if place.exists() and place.read_text():
            break
        time.sleep(0.05)
    day.terminate()
    assert day.wait(30) == 128 + 15
    assert _has_ended(int(place.read_text())), "what a part started goes on computing"
    (path,) = tmp_path.glob("gpu-day-*.json")
    assert json.loads(path.read_text())["parts"]["hanging"]["status"] == "interrupted"


def test_parts_that_are_done_are_left_out_when_asked(gpu_day, on_a_gpu, tmp_path):
    parts = _short_parts(gpu_day, tmp_path)[:2]
    command = ["--out", str(tmp_path / "out")]
    assert gpu_day.main(command, parts) == 1
    mended = gpu_day.Part("bad", _python("print('{\"y\": 2}')"), 60, (), gpu_day.last_json)
    assert gpu_day.main([*command, "--resume"], [parts[0], mended]) == 0
    assert (tmp_path / "count").read_text() == "x"
    (path,) = (tmp_path / "out").glob("*.json")
    found = json.loads(path.read_text())["parts"]
    assert found["good"]["numbers"] == {"x": 1} and found["bad"]["numbers"] == {"y": 2}
    assert gpu_day.main(command, [parts[0], mended]) == 0
    assert (tmp_path / "count").read_text() == "xx", "without --resume everything runs"


def test_what_no_time_is_left_for_is_said(gpu_day, on_a_gpu, tmp_path):
    parts = _short_parts(gpu_day, tmp_path)[:1]
    assert gpu_day.main(["--out", str(tmp_path / "out"), "--minutes", "0.5"], parts) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text())["parts"]["good"]["status"] == "dropped: too little time"
    assert not (tmp_path / "count").exists()


def test_without_a_gpu_it_says_so(gpu_day, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_day, "find_device", lambda: DEVICE | {"names": []})
    assert gpu_day.main(["--out", str(tmp_path / "out")]) == 2
    assert "No GPU to run on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_torch_does_not_see_is_another_reason(gpu_day, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: x)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    reason = gpu_day.no_gpu(DEVICE | {"names": []})
    assert "nvidia-smi lists 1 GPU(s), and torch 2.13.0 (built for CUDA 13.0) sees none" in reason


def test_a_dry_run_shows_every_part():
    run = subprocess.run(
        [BENCHMARKS / "gpu_day.sh", "--dry-run"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for name in ("gpu suite", "kernels", "losses", "local layers", "Transformer Engine", "vLLM"):
        assert re.search(f"^(?! ).*{name}", run.stdout, re.MULTILINE), name


def _nvidia_smi(folder: Path, monkeypatch, lines: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_memory_of_the_part_before_is_waited_for(gpu_day, on_a_gpu, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    count = f"echo x >> {calls}; n=$(wc -l < {calls})"
    _nvidia_smi(tmp_path, monkeypatch, f"{count}; [ $n = 2 ] && echo 1000 || echo 80000")
    assert gpu_day.main(["--out", str(tmp_path / "out")], _short_parts(gpu_day, tmp_path)[:1]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    found = json.loads(path.read_text())["parts"]["good"]["memory before"]
    assert found["free_mib"] == [80000] and found["all is back"] and found["waited"] >= 0.5


def test_memory_that_does_not_come_back_is_said(gpu_day, on_a_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "MEMORY_SECONDS", 0.6)
    calls = tmp_path / "calls"
    _nvidia_smi(tmp_path, monkeypatch, f"[ -e {calls} ] && echo 9 || echo 80000; touch {calls}")
    assert gpu_day.main(["--out", str(tmp_path / "out")], _short_parts(gpu_day, tmp_path)[:1]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    found = json.loads(path.read_text())["parts"]["good"]["memory before"]
    assert found["free_mib"] == [9] and not found["all is back"]


SAVES = """
import pathlib, signal, subprocess, sys, time
code = "import time; time.sleep(100)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
def save(*_):
    time.sleep(3)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
time.sleep(100)
"""


def test_a_part_may_save_and_leaves_no_process(gpu_day, on_a_gpu, tmp_path):
    part = gpu_day.Part("saving", (*_python(SAVES), "{out}"), 2, grace=20.0)
    assert gpu_day.main(["--out", str(tmp_path)], [part]) == 1
    assert (tmp_path / "saving" / "saved").exists(), "killed while it saved"
    assert _has_ended(int((tmp_path / "saving" / "child").read_text()))


def test_parts_of_tropd_have_the_time_that_it_promises(gpu_day):
    from megatron_tropd.launch import launcher

    assert gpu_day.TROPD_GRACE_SECONDS >= launcher.GRACE_SECONDS
    for part in gpu_day.parts():
        if "distill" in part.command:
            assert part.grace == gpu_day.TROPD_GRACE_SECONDS


def test_everything_fits_into_half_an_hour(gpu_day):
    limits = sum(part.seconds for part in gpu_day.parts())
    assert limits + gpu_day.RESERVE_SECONDS <= 60 * gpu_day.MINUTES


def test_every_script_and_option_is_there(gpu_day):
    for part in gpu_day.parts():
        scripts = [word for word in part.command if word.startswith("benchmarks/")]
        for script in scripts:
            text = (REPOSITORY / script).read_text()
            for word in part.command:
                assert not word.startswith("--") or f'"{word}"' in text, (script, word)


def test_numbers_of_the_suite(gpu_day, tmp_path):
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/>'
        '<testcase name="b"><failure message="assert 1 == 2&#10;more">text</failure></testcase>'
        '<testcase name="c"><skipped message="needs two GPUs"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert gpu_day.suite_numbers(tmp_path, "") == {
        "tests": 3,
        "failed": 1,
        "skipped": 1,
        "failures": [["b", "assert 1 == 2"]],
        "reasons to skip": ["needs two GPUs"],
    }


def test_numbers_of_the_losses(gpu_day, tmp_path):
    """Of the result that a real GPU gave."""
    (measured,) = (BENCHMARKS / "results").glob("losses-gpu-*.json")
    (tmp_path / "losses.json").write_text(measured.read_text())
    found = gpu_day.loss_numbers(tmp_path, "")
    assert 1 < found["ratio"]["ours hidden exact tropd"] < 2
    assert found["gb_per_second"]["copy"] > 1000


def test_numbers_of_an_unfinished_run(gpu_day, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": step, "seconds/total": float(step)} for step in (1, 2, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gpu_day.run_numbers(tmp_path, "")
    assert found["steps"] == 3 and not found["finished"]
    assert found["median seconds"] == {"seconds/total": 2.0}


@pytest.mark.slow
def test_the_training_step_runs_on_a_cpu_too(gpu_day, tiny_model):
    teacher = tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)
    sizes = ("--samples", "4", "--tokens", "20", "--micro-batch", "128")
    command = (sys.executable, BENCHMARKS / "gpu_step.py", "--layers", "local", *sizes)
    models = ("--student", tiny_model("qwen3", tie_word_embeddings=True), "--teacher", teacher)
    run = subprocess.run(
        [*command, *models],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = gpu_day.last_json(BENCHMARKS, run.stdout)
    assert found["layers"] == "local" and len(found["losses"]) == 3
    assert all(0 < loss < 1 for loss in found["losses"]) and found["grad_norm"] > 0
    assert found["seconds"].keys() == {"teacher", "student", "optimizer", "export", "total"}


@pytest.mark.needs("shellcheck")
def test_the_script_is_clean():
    subprocess.run(["shellcheck", BENCHMARKS / "gpu_day.sh"], check=True)
