"""Evaluations and the teacher-responses file, with an engine made of a dictionary."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.responses import load_responses
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks.exact_match import Asking, grade_answers
from megatron_tropd.tasks.reverse_kl import measure_reverse_kl
from megatron_tropd.tasks.sample_files import model_identity
from megatron_tropd.tasks.teacher_responses import write_responses


class FakeEngine:
    """Answers every request by a function of its ids and seed; counts its calls."""

    def __init__(self, answer: Callable[[SampleRequest], Sequence[int]], fail_after: int = 99):
        self.answer, self.fail_after = answer, fail_after
        self.requests: list[SampleRequest] = []
        self.samplings: list[Sampling] = []

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """The fixed answers."""
        if len(self.samplings) == self.fail_after:
            raise RuntimeError("killed")
        self.requests += requests
        self.samplings.append(sampling)
        answers = [tuple(self.answer(request)) for request in requests]
        return [Sample(ids, (0.0,) * len(ids), "stop") for ids in answers]


def write_prompts(path: Path, count: int) -> Path:
    """Problems "0+1=", "1+1=", ... with answers."""
    lines = [json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def problems(tiny_llama: Path, tmp_path: Path) -> list[Prompt]:
    """Ten problems in ids of the tiny tokenizer."""
    return load_prompts(write_prompts(tmp_path / "p.jsonl", 10), load_tokenizer(tiny_llama))


def test_exact_match_grades_greedy_answers(tiny_llama: Path, problems: list[Prompt]) -> None:
    tokenizer = load_tokenizer(tiny_llama)

    def answer(request: SampleRequest) -> list[int]:
        number = int(tokenizer.decode(list(request.token_ids)).split("+")[0])
        return [*tokenizer.encode(f"answer {number + (number < 7)}"), 2]

    engine = FakeEngine(answer)
    asking = Asking(stop_token_ids=(2,), max_new_tokens=9)
    samples = engine.generate(asking.requests(problems), asking.sampling)
    result = grade_answers(problems, samples, tokenizer)
    assert (result.correct, result.total, result.accuracy) == (7, 10, 0.7)
    assert 0.39 < result.ci_low < 0.4 < 0.89 < result.ci_high < 0.9
    assert [response.correct for response in result.responses] == [True] * 7 + [False] * 3
    assert result.responses[8].response == "answer 8"
    assert engine.samplings == [Sampling(temperature=0.0, stop_token_ids=(2,))]
    assert {request.max_new_tokens for request in engine.requests} == {9}


def test_exact_match_needs_problems_with_answers() -> None:
    with pytest.raises(InputError, match="no answer to grade"):
        grade_answers([], [], None)  # type: ignore[arg-type]


def dumb_reverse_kl(folders: Sequence[Path], prompt: Sequence[int], response: Sequence[int]):
    """Per response token, in float64, token after token without a batch."""
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in folders]
    values = []
    for end in range(len(response)):
        ids = torch.tensor([[*prompt, *response[:end]]])
        with torch.no_grad():
            q, p = (model(ids).logits[0, -1, :259].softmax(-1) for model in models)
        values.append(sum(float(a) * math.log(a / b) for a, b in zip(q, p, strict=True)))
    return values


def test_reverse_kl_is_that_of_the_definition(
    tiny_llama: Path, tiny_model: Callable[..., Path], problems: list[Prompt]
) -> None:
    teacher = tiny_model("qwen3", vocab_size=264)
    lengths = (3, 1, 6)
    texts = [(p.token_ids, tuple(range(9, 9 + n))) for p, n in zip(problems, lengths, strict=False)]
    values = [dumb_reverse_kl((tiny_llama, teacher), *text) for text in texts]
    for tokens_per_batch in (1, 24, 4096):
        result = measure_reverse_kl(
            tiny_llama, teacher, texts, vocab_size=259, tokens_per_batch=tokens_per_batch
        )
        assert (result.tokens, result.sequences) == (10, 3)
        assert math.isclose(result.reverse_kl, sum(map(sum, values)) / 10, rel_tol=1e-5)
        assert result.ci_low < result.reverse_kl < result.ci_high
    same = measure_reverse_kl(teacher, teacher, texts, vocab_size=259)
    assert (same.reverse_kl, same.ci_low, same.ci_high) == (0.0, 0.0, 0.0)
    with pytest.raises(InputError, match="no response token"):
        measure_reverse_kl(tiny_llama, teacher, [], vocab_size=259)


def write(engine: FakeEngine, prompts: list[Prompt], folder: Path, path: Path, **changed) -> int:
    """Two samples per prompt with the usual settings."""
    settings = {
        "sampling": Sampling(temperature=0.8, stop_token_ids=(2,)),
        "max_new_tokens": 6,
        "samples": 2,
        "seed": 5,
        "teacher": model_identity(folder),
    }
    tokenizer = load_tokenizer(folder)
    return write_responses(lambda: engine, prompts, tokenizer, path, **(settings | changed))


def test_responses_survive_a_kill_and_are_the_same_as_without(
    tiny_llama: Path, problems: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_tropd.tasks.sample_files._REQUESTS_PER_BATCH", 3)

    def answer(request: SampleRequest) -> list[int]:
        return [3 + request.seed % 200, 2]

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert write(FakeEngine(answer), problems, tiny_llama, whole) == 20
    with pytest.raises(RuntimeError, match="killed"):
        write(FakeEngine(answer, fail_after=2), problems, tiny_llama, cut)
    assert len(cut.read_bytes().splitlines()) == 7
    for torn in (b'{"prompt_index": 3, "sam', b'{"prompt_index": 0}'):
        with cut.open("ab") as file:
            file.write(torn)
        engine = FakeEngine(answer, fail_after=1)
        with pytest.raises(RuntimeError, match="killed"):
            write(engine, problems, tiny_llama, cut)
    assert write(FakeEngine(answer), problems, tiny_llama, cut) == 20 - 6 - 3 - 3
    assert cut.read_bytes() == whole.read_bytes()

    def never() -> FakeEngine:
        raise AssertionError("nothing is missing")

    settings = {"sampling": Sampling(temperature=0.8, stop_token_ids=(2,)), "max_new_tokens": 6}
    identity = model_identity(tiny_llama)
    tokenizer = load_tokenizer(tiny_llama)
    more = {"samples": 2, "seed": 5, "teacher": identity}
    assert write_responses(never, problems, tokenizer, cut, **settings, **more) == 0
    responses = load_responses(cut, problems, tokenizer)
    assert {i: len(found) for i, found in responses.items()} == dict.fromkeys(range(10), 2)
    assert len({r.token_ids for found in responses.values() for r in found}) > 15


def test_responses_are_never_mixed(
    tiny_llama: Path, tiny_qwen3: Path, problems: list[Prompt], tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    engine = FakeEngine(lambda request: [7, 2])
    write(engine, problems, tiny_llama, path)
    before = path.read_bytes()
    other = Sampling(temperature=0.9, stop_token_ids=(2,))
    cases = (
        ({"seed": 6}, "seed: 5 in the file, 6 asked for"),
        ({"samples": 3}, "samples: 2 in the file, 3 asked for"),
        ({"sampling": other}, r"temperature: 0\.8 in the file, 0\.9 asked for"),
        ({"teacher": model_identity(tiny_qwen3)}, "teacher: "),
        ({"resume": False}, "exists"),
    )
    for changed, message in cases:
        with pytest.raises(InputError, match=message):
            write(engine, problems, tiny_llama, path, **changed)
    with path.open("ab") as file:
        file.write(b"nonsense\n")
    with pytest.raises(InputError, match=r"line 22: expected a JSON object"):
        write(engine, problems, tiny_llama, path)
    assert path.read_bytes() == before + b"nonsense\n"
