"""Files of answers: a killed evaluation continues, nothing is graded twice; two are compared."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.base.errors import InputError
from megatron_tropd.cli.main import main
from megatron_tropd.config import GraderConfig
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks.answer_files import dump_answers, header_of, read_answers, write_answers
from megatron_tropd.tasks.comparison import compare_answers, compare_files
from megatron_tropd.tasks.exact_match import Asking, result_of
from megatron_tropd.tasks.grading import Grade, Grader

TOKENIZER: Any = SimpleNamespace(decode=lambda ids, **_: f"answer {ids[0]}")
ASKING = Asking(max_new_tokens=4, stop_token_ids=(0,), samples=4, temperature=0.7, seed=3)


def problems(count: int, first: int = 0) -> list[Prompt]:
    lines = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(first, first + count)]
    return [Prompt(i, line["prompt"], (9, i), line) for i, line in enumerate(lines)]


class Engine:
    """Answers i + 1 or, by the seed, something near it; fails after some calls."""

    def __init__(self, calls: int = 100, skill: int = 2) -> None:
        self.calls, self.skill, self.asked = calls, skill, 0

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        if not self.calls:
            raise RuntimeError("killed")
        self.calls -= 1
        self.asked += len(requests)
        assert sampling == Sampling(0.7, 1.0, (0,))
        return [
            Sample((r.token_ids[1] + (1 if r.seed % 3 < self.skill else 2), 0), (0.0, 0.0), "stop")
            for r in requests
        ]


class Counting(Grader):
    """Counts what it grades."""

    def __init__(self) -> None:
        super().__init__(GraderConfig())
        self.graded = 0

    def grade_all(self, pairs: Sequence[tuple[str, Any]]) -> list[Grade]:
        self.graded += len(pairs)
        return super().grade_all(pairs)


def write(path: Path, engine: Engine, grader: Grader, asking: Asking = ASKING) -> None:
    settings = {"samples": asking.samples, "temperature": asking.temperature}
    write_answers(
        lambda: engine,
        problems(5),
        asking,
        TOKENIZER,
        grader,
        path,
        header=header_of("sums", problems(5), settings, "a model"),
        engines=1,
    )


def test_a_killed_evaluation_continues_and_grades_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_tropd.tasks.sample_files._REQUESTS_PER_BATCH", 6)
    whole, cut, grader = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl", Counting()
    write(whole, Engine(), Counting())
    with pytest.raises(RuntimeError, match="killed"):
        write(cut, Engine(calls=2), grader)
    with cut.open("ab") as file:
        file.write(b'{"prompt_index": 3, "sam')
    assert grader.graded == 12 and len(read_answers(cut).responses) == 12
    write(cut, Engine(), grader)
    assert grader.graded == 20 and cut.read_bytes() == whole.read_bytes()
    again = Engine()
    write(cut, again, grader)
    assert again.asked == 0 and grader.graded == 20
    with pytest.raises(InputError, match=r"other settings \(temperature: 0.7 in the file, 0.9"):
        write(cut, again, grader, replace(ASKING, temperature=0.9))


def test_a_line_is_an_answer_with_its_text_and_verdict(tmp_path: Path) -> None:
    write(tmp_path / "sums.jsonl", Engine(), Counting())
    header, *lines = map(json.loads, (tmp_path / "sums.jsonl").read_text().splitlines())
    assert header["set"] == "sums" and header["settings"]["model"] == "a model"
    assert [(line["prompt_index"], line["sample"]) for line in lines] == [
        (i, number) for i in range(5) for number in range(4)
    ]
    right = [line["response"] == f"answer {line['answer']}" for line in lines]
    assert [line["correct"] for line in lines] == right
    assert 0 < sum(right) < 20, "samples of a problem differ by their seeds"
    read = read_answers(tmp_path / "sums.jsonl")
    assert result_of(read.responses, read.samples).accuracy == sum(right) / 20


def by_hand(path: Path) -> list[float]:
    lines = [json.loads(text) for text in path.read_text().splitlines()[1:]]
    return [
        sum(line["correct"] for line in lines if line["prompt_index"] == i) / 4 for i in range(5)
    ]


def test_differences_are_paired_by_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a" / "sums.jsonl", tmp_path / "b" / "sums.jsonl"
    write(a, Engine(skill=1), Counting())
    write(b, Engine(skill=2), Counting())
    (found,) = compare_files(a.parent, b.parent)
    gaps = [y - x for x, y in zip(by_hand(a), by_hand(b), strict=True)]
    accuracy = found.measures["accuracy"]
    assert accuracy.difference == pytest.approx(sum(gaps) / 5)
    assert accuracy.b_better == sum(gap > 0 for gap in gaps)
    assert accuracy.a_better == 0 and accuracy.ci_low >= 0
    assert set(found.measures) == {
        *("accuracy", "pass@2", "pass@4", "majority@4", "response_length", "truncated_share")
    }
    assert (found.common, found.only_a, found.only_b, found.settings) == (5, 0, 0, {})
    assert main(["compare", str(a.parent), str(b)]) == 2, "a folder and a file"
    assert main(["compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "sums: 5 problems in both" in shown and "B - A +" in shown
    assert main(["compare", str(a), str(b), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["sets"]["sums"]["measures"]["accuracy"]["problems"] == 5


def dumped(path: Path, name: str, first: int, count: int, **settings: Any) -> Path:
    mine = problems(count, first)
    write(path.with_suffix(".full"), Engine(), Counting())
    responses = read_answers(path.with_suffix(".full")).responses[: 4 * count]
    items = {p.index: p for p in mine}
    from megatron_tropd.tasks.exact_match import item_digest

    changed = [replace(r, item=item_digest(items[r.prompt_index])) for r in responses]
    header = header_of(name, mine, {"samples": 4} | settings, "m")
    dump_answers(path, header, changed)
    return path


def test_what_both_have_is_compared_and_the_rest_is_counted(tmp_path: Path) -> None:
    a = dumped(tmp_path / "a.jsonl", "sums", 0, 4, temperature=0.5)
    b = dumped(tmp_path / "b.jsonl", "sums", 2, 5, temperature=1.0)
    found = compare_answers(read_answers(a), read_answers(b))
    assert (found.common, found.only_a, found.only_b) == (2, 2, 3)
    assert found.settings["temperature"] == (0.5, 1.0)
    assert "problems_digest" in found.settings


def test_different_sets_are_refused_by_name(tmp_path: Path) -> None:
    a = dumped(tmp_path / "a" / "sums.jsonl", "sums", 0, 3)
    other = dumped(tmp_path / "b" / "products.jsonl", "products", 0, 3)
    far = dumped(tmp_path / "c" / "sums.jsonl", "sums", 50, 3)
    with pytest.raises(InputError, match=r"to the set sums, .* to products"):
        compare_files(a, other)
    with pytest.raises(InputError, match=r"the sets sums and .* the sets products: none"):
        compare_files(a.parent, other.parent)
    with pytest.raises(InputError, match="both call their set sums, but have no problem in common"):
        compare_files(a, far)
    text = tmp_path / "d" / "sums.jsonl"
    text.parent.mkdir()
    text.write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="is no file of answers"):
        compare_files(a, text)
    assert main(["compare", str(tmp_path / "gone"), str(a)]) == 2
