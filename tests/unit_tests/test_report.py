"""The page a run ends with, from run folders finished, unfinished and broken."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import chromium
from synthetic_run import write_synthetic_run

from megatron_tropd.base.errors import InputError
from megatron_tropd.report.html import (
    MAX_ANSWERS,
    MAX_DUMPS,
    MAX_POINTS,
    MAX_TOKENS,
    bucket_labels,
    held_out_answers,
    method_name,
    page_data,
    thin,
    write_report,
)
from megatron_tropd.report.records import read_run
from megatron_tropd.report.summary import summary_table
from megatron_tropd.report.timeline import Span, timeline_file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished synthetic run; tests may read it only."""
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "run", steps=40)


def _embedded(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_page_holds_what_the_run_holds(run: Path):
    page = write_report(run)
    data = _embedded(page.read_text())
    assert page == run / "report.html"
    assert data["columns"]["step"] == list(range(1, 41))
    assert data["summary"]["student_after"] == 0.899
    assert [dump["step"] for dump in data["dumps"]] == list(range(0, 41, 5))
    tokens = json.loads((run / "trajectories/step_000000.jsonl").read_text().splitlines()[0])
    assert data["dumps"][0]["items"][0]["tokens"] == tokens["tokens"]
    assert not list(run.glob("*.partial"))


def test_page_asks_for_nothing_over_the_network(run: Path):
    page = write_report(run).read_text()
    assert "default-src 'none'" in page
    # The SVG namespace is a name, not an address that is fetched.
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<(?:link|img|iframe)\b|\bsrc=|@import|url\(", page)


def _two_kinds(run: Path) -> None:
    """Phases of student and teacher, side by side."""
    spans = {"student": [("teacher", 0, 2), ("student", 2, 6)], "teacher": [("scoring", 0, 2)]}
    for kind, found in spans.items():
        file = timeline_file(run, kind)
        file.parent.mkdir(exist_ok=True)
        lines = [Span(1, phase, start, end)._asdict() for phase, start, end in found]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _browse(page: Path, profile: Path) -> subprocess.CompletedProcess[str]:
    """A page as a browser draws it, with what it says on stderr."""
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"
    return subprocess.run(
        [
            chromium(),
            *options.split(),
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=30000",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("steps", [1, 40])
def test_a_browser_draws_it(tmp_path: Path, steps: int):
    """Without a message on the console, and with every section."""
    run = write_synthetic_run(tmp_path / "run", steps=steps)
    if steps > 1:
        _two_kinds(run)
    page = write_report(run)
    browser = _browse(page, tmp_path / "profile")
    assert "CONSOLE" not in browser.stderr, browser.stderr
    titles = re.findall(r"<h2>(.*?)</h2>", browser.stdout)
    assert titles == [
        "Learning",
        "The trust region",
        "Where the time goes",
        *(["Student and teacher side by side"] if steps > 1 else []),
        "Held-out answers, before and after",
        "Training trajectories",
    ]
    assert browser.stdout.count("<svg") >= 13


@pytest.mark.needs("chromium")
def test_what_an_environment_wrote_is_told_apart(tmp_path: Path):
    run = write_synthetic_run(tmp_path / "run", steps=4, trajectories=1)
    for path in (run / "trajectories").glob("*.jsonl"):
        record = json.loads(path.read_text().splitlines()[0])
        record["segment"] = ["student", *["context"] * 3, *record["segment"][4:]]
        path.write_text(json.dumps(record) + "\n")
    browser = _browse(write_report(run), tmp_path / "profile")
    assert "CONSOLE" not in browser.stderr, browser.stderr
    shown = browser.stdout.count("environment 3")
    assert shown > 0 and browser.stdout.count('class="tok context') == 3 * shown + 1, "and a key"


@pytest.mark.needs("chromium")
def test_outliers_in_closed_form_are_counted_by_their_probability(tmp_path: Path):
    run = write_synthetic_run(tmp_path / "run", steps=4, trajectories=1)
    for path in (run / "trajectories").glob("*.jsonl"):
        record = json.loads(path.read_text().splitlines()[0])
        record["segment"] = ["student"] * len(record["tokens"])
        small = [0.001] * (len(record["tokens"]) - 1)
        record["outlier"] = [0.9, *small]
        path.write_text(json.dumps(record) + "\n")
    drawn = _browse(write_report(run), tmp_path / "profile").stdout
    assert f"0.9 of {len(small) + 1} tokens outliers" in drawn
    assert drawn.count('class="tok outlier') == drawn.count("tokens outliers")


@pytest.mark.needs("chromium")
def test_long_responses_are_paged(tmp_path: Path):
    """Eight of 8,000 tokens a dump: all of them are in the page, 500 of each are drawn."""
    run = write_synthetic_run(tmp_path / "run", steps=8, trajectories=8)
    for path in (run / "trajectories").glob("*.jsonl"):
        path.write_text("".join(_lengthened(line, 8000) for line in path.read_text().splitlines()))
    page = write_report(run)
    dumps = _embedded(page.read_text())["dumps"]
    assert [dump["step"] for dump in dumps] == [0, 3, 5, 8]
    assert all(len(item["tokens"]) == 8000 for dump in dumps for item in dump["items"])
    began = time.monotonic()
    drawn = _browse(page, tmp_path / "profile").stdout
    assert time.monotonic() - began < 60
    assert drawn.count('class="tok ') < 16 * 500 + 10
    assert drawn.count("tokens 1 to 500 of 8000") == 16


@pytest.mark.needs("chromium")
def test_tasks_and_sets_have_curves_of_their_own(tmp_path: Path):
    run = write_synthetic_run(tmp_path / "run", steps=12)
    for name in ("metrics", "evaluations"):
        path = run / f"{name}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if name == "metrics":
            of_task = {
                "token_share": 0.5,
                "k1": 0.1,
                "response_length": 9.0,
                "truncated_share": 0.1,
            }
            both = {f"task/{t}/{k}": v for t in ("sums", "words") for k, v in of_task.items()}
            records = [record | both for record in records]
        else:
            records = [record | {"set": t} for record in records for t in ("sums", "words")]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    browser = _browse(write_report(run), tmp_path / "profile")
    assert "CONSOLE" not in browser.stderr, browser.stderr
    drawn = browser.stdout
    for title in ("Tokens of each task", "Response length of each task", "Divergence on each task"):
        assert title in drawn
    for name in ("sums", "words"):
        assert f"Held-out accuracy of {name}" in drawn
        assert f"held-out problems of {name}, greedy" in drawn


def _lengthened(line: str, tokens: int) -> str:
    record = json.loads(line)
    for name, values in record.items():
        if isinstance(values, list):
            record[name] = (values * (tokens // len(values) + 1))[:tokens]
    return json.dumps(record) + "\n"


def test_text_of_the_run_cannot_become_markup(tmp_path: Path):
    run = write_synthetic_run(tmp_path / "run", steps=4, trajectories=1)
    path = run / "trajectories" / "step_000000.jsonl"
    hostile = "</script><script>alert(1)</script><!--"
    record = json.loads(path.read_text()) | {"prompt": hostile}
    path.write_text(json.dumps(record) + "\n")
    page = write_report(run).read_text()
    assert hostile not in page
    assert page.count("<script") == 2
    assert _embedded(page)["dumps"][0]["items"][0]["prompt"] == hostile


@pytest.mark.parametrize(
    "missing", [["summary.json"], ["evaluations.jsonl", "summary.json"], ["metrics.jsonl"]]
)
def test_unfinished_runs_have_a_page_too(tmp_path: Path, missing: list[str]):
    run = write_synthetic_run(tmp_path / "run", steps=4)
    for name in missing:
        (run / name).unlink()
    assert _embedded(write_report(run).read_text())["name"] == "run"


def test_torn_last_line_is_left_out(tmp_path: Path):
    run = write_synthetic_run(tmp_path / "run", steps=4)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [record["step"] for record in read_run(run).metrics] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]"])
def test_broken_line_is_named(tmp_path: Path, line: str):
    run = write_synthetic_run(tmp_path / "run", steps=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 3"):
        read_run(run)


def test_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path)


def test_long_runs_are_thinned(tmp_path: Path):
    run = write_synthetic_run(tmp_path / "run", steps=3 * MAX_POINTS, trajectories=1)
    for step in range(1, 9):
        (run / "trajectories" / f"step_{step:06d}.jsonl").write_text('{"tokens": ["a"]}\n')
    data = page_data(read_run(run))
    assert len(data["columns"]["step"]) == MAX_POINTS
    steps = [dump["step"] for dump in data["dumps"]]
    assert len(steps) == MAX_DUMPS and steps[0] == 0 and steps[-1] == 3 * MAX_POINTS


def test_long_trajectories_are_cut(run: Path):
    long = {"tokens": ["a"] * (MAX_TOKENS + 5), "tv": [0.1] * (MAX_TOKENS + 5)}
    records = dataclasses.replace(read_run(run), trajectories={7: [long]})
    item = page_data(records)["dumps"][0]["items"][0]
    assert (len(item["tokens"]), len(item["tv"]), item["cut"]) == (MAX_TOKENS, MAX_TOKENS, 5)


def test_thin_averages_and_keeps_the_last_step():
    rows = [
        {"step": 1, "a": 1.0, "b": None, "c": [1.0, None]},
        {"step": 2, "a": 3.0, "b": 4.0, "c": [3.0, 5.0]},
        {"step": 3, "a": None, "b": 6.0, "c": [7.0, 9.0]},
    ]
    assert thin(rows, 2) == [
        {"step": 2, "a": 2.0, "b": 4.0, "c": [2.0, 5.0]},
        {"step": 3, "a": None, "b": 6.0, "c": [7.0, 9.0]},
    ]
    assert thin(rows, 3) == rows
    assert thin([], 3) == []


def test_bucket_labels_follow_the_metric():
    assert bucket_labels(0) == []
    assert bucket_labels(4) == ["0-7", "8-15", "16-31", "32-63"]


def test_buckets_nobody_reached_are_not_shown(run: Path):
    records = read_run(run)
    for record in records.metrics:
        record["acceptance_by_position"] = [0.9, 0.8, None, 0.7, None, None]
    assert len(page_data(records)["buckets"]) == 4


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (
            {"method": "tropd", "outlier": "forward_kl", "top_k": 64},
            "TrOPD, outliers: top-64 forward KL",
        ),
        ({"method": "opd"}, "OPD (no trust region)"),
        ({"method": "tropd", "outlier": "mask"}, "TrOPD, outliers: mask"),
        ({"method": "my.toy:Toy"}, "my.toy:Toy"),
        (
            {"method": "static", "outlier": "clip", "tau": -2.5},
            "Static region, tau -2.5, outliers: clip",
        ),
    ],
)
def test_method_name(loss: dict, name: str):
    assert method_name(loss) == name


def test_answers_stand_beside_each_other(run: Path):
    answers = page_data(read_run(run))["answers"]
    assert len(answers) == MAX_ANSWERS
    assert {"prompt", "answer", "before", "after", "teacher"} == set(answers[0])
    gained = [a for a in answers if not a["before"]["correct"] and a["after"]["correct"]]
    assert gained and all(a["answer"] in a["after"]["response"] for a in gained)


def test_answers_of_a_run_that_has_just_begun():
    example = {
        "prompt_index": 3,
        "prompt": "2+2=",
        "answer": "4",
        "response": "5",
        "correct": False,
    }
    record = {"step": 0, "model": "student", "accuracy": 0.0, "examples": [example]}
    assert held_out_answers([record]) == [
        {"prompt": "2+2=", "answer": "4", "before": {"response": "5", "correct": False}}
    ]
    assert held_out_answers([{"step": 0, "model": "student", "reverse_kl": 1.0}]) == []


def test_summary_table_shows_the_result():
    table = summary_table(
        {
            "student_before": 0.25,
            "student_after": 0.75,
            "teacher": 1.0,
            "seconds": 125.4,
            "steps": 7,
            "world_size": 4,
            "tensor_parallel": 2,
            "pipeline_parallel": 2,
        }
    )
    for text in ("25.0 %", "75.0 %", "100.0 %", "67 %", "2 min 05 s", "4 (TP 2, PP 2)"):
        assert text in table
    assert len({len(line) for line in table.splitlines()}) == 1


def test_summary_table_of_what_there_is():
    assert summary_table({}) == "(nothing measured)"
    assert "0.350 nats/token" in summary_table({"student_after_reverse_kl": 0.35})
    assert "gap" not in summary_table({"student_before": 0.5, "student_after": 0.5, "teacher": 0.5})


def test_report_needs_no_heavy_import():
    code = (
        "import sys, megatron_tropd.report.html, megatron_tropd.report.metrics\n"
        "assert not {'torch', 'numpy', 'megatron.core', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
