"""The quickstart's example: its task, its files, and the pair of models that is committed."""

import json
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.tokenizers import check_same_tokenizer, load_tokenizer, stop_token_ids

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
sys.path.insert(0, str(EXAMPLE))

import problems as task  # noqa: E402 (the example is no package)


def read_prompts(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text().splitlines()]


def solve(prompt: str) -> int:
    """Follow a prompt word by word, unlike the generator, which writes both sides at once."""
    words = prompt.removesuffix(":").split()
    value = int(words[1])
    for verb, number in zip(words[2::2], words[3::2], strict=True):
        operand = int(number)
        value = {"add": value + operand, "take": value - operand, "times": value * operand}[verb]
    return value


def test_training_and_held_out_prompts_are_disjoint() -> None:
    train = [line["prompt"] for line in read_prompts("prompts.jsonl")]
    held_out = [line["prompt"] for line in read_prompts("heldout.jsonl")]
    assert len(set(train)) == len(train) >= 2000
    assert len(set(held_out)) == len(held_out) >= 500
    assert not set(train) & set(held_out)


def test_every_prompt_lies_in_the_split_of_its_file_whatever_the_seed() -> None:
    for name, split in (("prompts.jsonl", "train"), ("heldout.jsonl", "heldout")):
        assert {task.split_of(line["prompt"]) for line in read_prompts(name)} == {split}
    for seed in range(3):
        assert {task.split_of(p.prompt) for p in islice(task.problems("train", seed), 200)} == {
            "train"
        }


@pytest.mark.parametrize("name", ["prompts.jsonl", "heldout.jsonl"])
def test_answers_are_right(name: str) -> None:
    for line in read_prompts(name):
        assert solve(line["prompt"]) == int(line["answer"]), line
        assert line["solution"].endswith(f"\nanswer {line['answer']}"), line


def test_working_is_a_chain_of_true_lines() -> None:
    for problem in islice(task.problems("train", 5), 300):
        *lines, last = problem.working.split("\n")
        assert task.MIN_OPERATIONS <= len(lines) <= task.MAX_OPERATIONS
        value = re.match(r"start (\d+) ", problem.prompt).group(1)
        for line in lines:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups()
            assert left == value
            assert eval(f"{left}{sign}{right}") == int(result)
            assert task.SMALLEST <= int(result) <= task.LARGEST
            value = result
        assert last == f"answer {problem.answer}" == f"answer {value}"


def test_slips_are_marked_and_the_rest_follows_from_what_stands_there() -> None:
    rng, slips = random.Random(1), 0
    for problem in islice(task.problems("train", 9), 300):
        assert "".join(text for text, _ in task.with_slips(problem, rng, 0.0)) == problem.working
        pieces = task.with_slips(problem, rng, 0.3)
        *lines, last = "".join(text for text, _ in pieces).split("\n")
        good = [is_right for _, is_right in pieces]
        before = problem.working.split("-")[0].split("+")[0].split("*")[0]
        for i, line in enumerate(lines):
            left, sign, second, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups()
            left_is_good, _, _, result_is_good = good[4 * i : 4 * i + 4]
            assert (left == before) == left_is_good
            assert (eval(f"{left}{sign}{second}") == int(result)) or not result_is_good
            slips += not all(good[4 * i : 4 * i + 4])
            before = result
        assert last == f"answer {before}"
    assert slips > 300


def test_the_answer_depends_on_every_number() -> None:
    rng = random.Random(0)
    for problem in islice(task.problems("train", 6), 200):
        numbers = list(re.finditer(r"\d+", problem.prompt))
        number = rng.choice(numbers)
        changed = (
            problem.prompt[: number.start()]
            + str(int(number.group()) + 1)
            + problem.prompt[number.end() :]
        )
        assert solve(changed) != problem.answer


def test_streams_repeat_and_differ_between_seeds() -> None:
    first, again = (list(islice(task.problems("heldout", 3), 20)) for _ in range(2))
    assert first == again
    assert first != list(islice(task.problems("heldout", 4), 20))


def test_pair_shares_a_tokenizer_with_one_token_a_digit() -> None:
    tokenizer = check_same_tokenizer(EXAMPLE / "student", EXAMPLE / "teacher")
    assert stop_token_ids(EXAMPLE / "student") == stop_token_ids(EXAMPLE / "teacher")
    ids = tokenizer.encode("12+34=46\nanswer 46", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids)[:5] == ["1", "2", "+", "3", "4"]
    assert tokenizer.decode(ids) == "12+34=46\nanswer 46"
    for problem in islice(task.problems("train", 7), 100):
        text = problem.prompt + problem.working
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_prompts_load_and_fit_the_context() -> None:
    tokenizer = load_tokenizer(EXAMPLE / "student")
    prompts = load_prompts(EXAMPLE / "prompts.jsonl", tokenizer, max_prompt_tokens=64)
    assert all(tokenizer.decode(prompt.token_ids) == prompt.text for prompt in prompts)
    context = json.loads((EXAMPLE / "student" / "config.json").read_text())[
        "max_position_embeddings"
    ]
    longest = max(
        len(tokenizer.encode(p.prompt)) + len(tokenizer.encode(p.working))
        for p in islice(task.problems("train", 8), 500)
    )
    assert longest < context


def test_committed_pair_is_small_and_does_what_its_record_says() -> None:
    pair = json.loads((EXAMPLE / "pair.json").read_text())
    size = sum(
        file.stat().st_size
        for name in ("student", "teacher")
        for file in (EXAMPLE / name).iterdir()
    )
    assert size <= 10e6
    for name in ("student", "teacher"):
        with safe_open(EXAMPLE / name / "model.safetensors", framework="pt") as weights:
            names = weights.keys()
            total = sum(weights.get_tensor(n).numel() for n in names)
        assert total == pair[name]["parameters"]
    assert pair["teacher"]["problems"] >= 500 and pair["student"]["problems"] >= 500
    assert pair["teacher"]["accuracy"] >= 0.95
    assert 0.10 <= pair["student"]["accuracy"] <= 0.60
    families = {
        json.loads((EXAMPLE / name / "config.json").read_text())["model_type"]
        for name in ("student", "teacher")
    }
    assert len(families) == 2
