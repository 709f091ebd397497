"""Golden answers: from a prompt's line to a mean of their own in the loss."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_choices import Models, step_sequences
from test_step import LR, _learn, _Pair

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import PromptConfig
from megatron_tropd.config.loss import preset
from megatron_tropd.data.golden import golden_answers, golden_sequence
from megatron_tropd.data.packing import count_loss_tokens
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.data.sequence_files import dump_sequences, read_sequences
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill.metrics import sequence_metrics
from megatron_tropd.integrations import global_batch

PAIR = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
LOSS = preset("stable_opd", reference_weight=0.0, golden_weight=0.7)


@pytest.fixture
def one_rank(tmp_path):
    """A world of one, so that there are groups."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _with_answers() -> list[TokenSequence]:
    """Those of a step; in the place of two of them stand golden answers."""
    sequences = step_sequences()
    for place, answer in ((3, (5, 9, 11)), (7, (6, 2))):
        key = sequences[place].key
        prompt = Prompt(key.prompt, "", tuple(sequences[place].prompt_ids), {})
        sequences[place] = golden_sequence(key, prompt, answer)
    return sequences


# ---- where they come from ----


def test_an_answer_has_the_ids_that_the_teacher_writes_and_ends_as_it_does():
    tokenizer = load_tokenizer(PAIR / "student")
    path = PAIR / "prompts.jsonl"
    prompts = load_prompts(path, tokenizer, PromptConfig())[:50]
    answers = golden_answers(path, prompts, "solution", tokenizer, max_new_tokens=64)
    same = 0
    with (PAIR / "responses.jsonl").open() as file:
        for line in islice(file, 1, 51):
            written = json.loads(line)
            if written["text"] == prompts[written["prompt_index"]].fields["solution"]:
                assert answers[written["prompt_index"]] == tuple(written["token_ids"])
                same += 1
    assert same > 30


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, 'a.jsonl, line 7: .* expects the golden answer under "solution", .* found None'),
        ("  ", "found '  '"),
        (41, "a text, found 41"),
        ("1+1=2\n" * 9, "the golden answer has 55 tokens, its EOS included"),
    ],
    ids=["none", "blank", "number", "long"],
)
def test_an_answer_that_is_missing_or_too_long_is_named(answer, message):
    prompt = Prompt(0, "start 5:", (1, 2), {"solution": answer}, line=7)
    with pytest.raises(InputError, match=message):
        tokenizer = load_tokenizer(PAIR / "student")
        golden_answers("a.jsonl", [prompt], "solution", tokenizer, max_new_tokens=8)


def test_a_file_of_sequences_keeps_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(dump_sequences(_with_answers()))
    found = read_sequences(tmp_path / "a.jsonl")
    assert [t.count(Writer.GOLDEN) for t in found] == [0, 0, 0, 3, 0, 0, 0, 2]


# ---- what the loss makes of them ----


@pytest.mark.parametrize("denominator", ["joint", "separate"])
def test_the_step_divides_their_loss_by_their_number(one_rank, denominator):
    """The gradient is a mean over student (and teacher) tokens, and one over golden tokens."""
    loss = replace(LOSS, denominator=denominator)
    sequences, models = _with_answers(), Models()
    weight = models.weight.double().requires_grad_()
    terms: dict[int, list[Any]] = {int(writer): [] for writer in Writer}
    for t in sequences:
        for read, x, writer in zip(t.ids_N[:-1], t.ids_N[1:], t.writer_N[1:], strict=True):
            log_q = (weight @ models.student[read].double()).log_softmax(-1)[x]
            log_p = models.teacher_weight.double() @ models.teacher[read].double()
            ratio = log_p.log_softmax(-1)[x] - log_q
            beta = {Writer.TEACHER: 0.5, Writer.GOLDEN: 0.7}.get(Writer(writer))
            terms[writer].append(-ratio.detach() * log_q if beta is None else -beta * log_q)
    teacher, student, golden = terms[Writer.TEACHER], terms[Writer.STUDENT], terms[Writer.GOLDEN]
    expected = sum(golden) / len(golden)
    if denominator == "joint":
        expected = expected + sum(teacher + student) / len(teacher + student)
    else:
        expected = expected + sum(teacher) / len(teacher) + sum(student) / len(student)
    expected.backward()
    for size in (24, 10_000):
        pair = _Pair()
        result = _learn(pair, sequences, loss=loss, beta=0.5, tokens_per_micro_batch=size)
        # Megatron's schedule divides by all loss tokens; the tables' does not.
        found = (models.weight - pair.weight) / LR / result.counts.total
        torch.testing.assert_close(found.double(), weight.grad, rtol=1e-3, atol=1e-5)
        assert result.counts.golden == len(golden) == result.metrics["tokens_golden"] == 5
        assert result.metrics["tokens_teacher"] == len(teacher)
        assert result.metrics["tokens_student"] == len(student)
        nll = float(sum(golden).detach()) / 0.7 / len(golden)
        assert result.metrics["golden_nll"] == pytest.approx(nll, rel=1e-4)


def test_without_them_a_step_says_nothing_of_them(one_rank):
    metrics = _learn(_Pair(), step_sequences()).metrics
    assert not {"tokens_golden", "golden_nll"} & metrics.keys()


def test_lengths_and_repetition_are_those_of_what_was_sampled():
    sequences = _with_answers()
    sampled = [t for t in sequences if not t.count(Writer.GOLDEN)]
    assert sequence_metrics(sequences, step=0) == sequence_metrics(sampled, step=0)


def test_a_loss_that_has_nothing_for_them_refuses_them():
    assert count_loss_tokens(_with_answers(), LOSS).golden == 5
    with pytest.raises(ConfigError, match=r"'tropd' has no loss for golden answers, found 5"):
        count_loss_tokens(_with_answers(), preset("tropd"))


def test_the_plug_in_refuses_a_dataset_that_holds_them():
    shape = (1, 4)
    item = {name: torch.zeros(shape, dtype=torch.int64) for name in global_batch.TRAJECTORY}
    item |= {"sample_key": torch.tensor([SampleKey(0, 0, 0)])}
    item["writers"][0, 2] = Writer.GOLDEN
    share: Any = SimpleNamespace(shape=shape, masked=False, must_be_sampled=False, step=0)
    with pytest.raises(InputError, match="found golden answers, for which no method of the plug"):
        global_batch._columns(item, share, range(1))
