"""Recorded trajectories: items token by token, every broken line, Megatron's own samplers."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from megatron_tropd.base.errors import InputError
from megatron_tropd.data.packing import pack
from megatron_tropd.data.recorded import (
    RecordedTrajectories,
    training_item,
)
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer

HEADER = {"format": "tropd-rollouts-1", "tokenizer": "0" * 16, "settings": {}}
LINE = {
    "prompt_index": 4,
    "sample_index": 1,
    "prompt_ids": [10, 11, 12],
    "response_ids": [20, 21, 22, 2],
    "segments": [["teacher", 1], ["student", 3]],
    "rollout_logprobs": [None, -0.5, -0.25, -0.125],
    "finish_reason": "stop",
    "weights": "abc",
    "seed": 7,
}


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def many(count: int) -> list[dict]:
    """A header and trajectories whose first response token is their place."""
    lines = [LINE | {"prompt_index": i, "response_ids": [20 + i, 21, 22, 2]} for i in range(count)]
    return [HEADER, *lines]


def open_file(path: Path, **changed) -> RecordedTrajectories:
    return RecordedTrajectories(path, **({"seq_length": 8, "vocab_size": 100} | changed))


def test_an_item_is_the_trajectory_shifted_by_one(tmp_path: Path) -> None:
    item = open_file(write(tmp_path / "r.jsonl", [HEADER, LINE]))[0]
    expected = {
        "tokens": [10, 11, 12, 20, 21, 22, 0, 0],
        "labels": [11, 12, 20, 21, 22, 2, 0, 0],
        "position_ids": list(range(8)),
        "weights": [0, 0, 1, 1, 1, 1, 0, 0],
        "writers": [0, 0, 1, 2, 2, 2, 0, 0],
        "behaviour_logprobs": [0, 0, 0, -0.5, -0.25, -0.125, 0, 0],
        "engine_logprobs": [0, 0, 0, -0.5, -0.25, -0.125, 0, 0],
        "response_positions": [0, 0, 0, 1, 2, 3, 0, 0],
        "sample_key": [0, 4, 1],
    }
    assert {name: item[name].tolist() for name in expected} == expected
    dtypes = {name: tensor.dtype for name, tensor in item.items()}
    assert dtypes == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "weights": torch.float32,
        "writers": torch.int64,
        "behaviour_logprobs": torch.float32,
        "engine_logprobs": torch.float32,
        "response_positions": torch.int64,
        "sample_key": torch.int64,
    }


def test_weights_and_several_segments_are_kept(tmp_path: Path) -> None:
    line = LINE | {
        "segments": [["student", 1], ["teacher", 2], ["student", 1]],
        "rollout_logprobs": [-1, None, -9.0, -2],
        "loss_weights": [0.5, 1, 0, 2],
    }
    item = open_file(write(tmp_path / "r.jsonl", [HEADER, line]))[0]
    assert item["weights"].tolist() == [0, 0, 0.5, 1, 0, 2, 0, 0]
    assert item["writers"].tolist() == [0, 0, 2, 1, 1, 2, 0, 0]
    assert item["behaviour_logprobs"].tolist() == [0, 0, -1, 0, 0, -2, 0, 0]


def test_items_agree_with_the_trainers_packing() -> None:
    trajectory = TokenSequence.of_runs(
        SampleKey(0, 4, 1),
        (Writer.CONTEXT, (10, 11, 12)),
        (Writer.TEACHER, (20, 21)),
        (Writer.STUDENT, (22, 2)),
        logprobs=(-0.25, -0.125),
        version=0,
    )
    (batch,) = pack(
        [trajectory], dp_rank=0, dp_size=1, tokens_per_micro_batch=8, pad_multiple=8, seed=0, step=0
    )
    item = training_item(trajectory, 8)
    assert tuple(item.pop("sample_key")) == batch.keys[0]
    for name, row in item.items():
        assert torch.equal(row, getattr(batch, name)[0]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.clear(), "holds no trajectory"),
        (lambda r: r.pop(), "holds no trajectory"),
        (lambda r: r.pop(0), "line 1: expected a header with format 'tropd-rollouts-2'"),
        (lambda r: r[1].update(response_ids=[20, 21, 100, 2]), r"line 2: ids must be in"),
        (lambda r: r[1].update(prompt_ids=[-1]), r"line 2: ids must be in 0\.\.99"),
        (lambda r: r[1].update(prompt_ids=[]), "line 2: prompt_ids must be a list of ids"),
        (lambda r: r[1].update(response_ids=[]), "line 2: response_ids must be a list of ids"),
        (lambda r: r[1].update(response_ids=[1.5]), "line 2: response_ids must be a list of ids"),
        (lambda r: r[1].pop("rollout_logprobs"), "line 2: rollout_logprobs must be a list"),
        (lambda r: r[1].update(rollout_logprobs=[None, -1]), "found 2 for 4 tokens"),
        (
            lambda r: r[1].update(rollout_logprobs=[None, -1, None, -1]),
            "missing for 1 of 3, the first at token 5",
        ),
        (lambda r: r[1].update(rollout_logprobs=[None, -1, 0.5, -1]), "at most 0; found 0.5"),
        (lambda r: r[1].update(rollout_logprobs=[None, -1, "x", -1]), "must be a list of numbers"),
        (lambda r: r[1].pop("segments"), "line 2: segments must be a list like"),
        (lambda r: r[1].update(segments=[["nobody", 4]]), "line 2: segments must be a list like"),
        (lambda r: r[1].update(segments=[["student", 3]]), "segments cover 3 tokens, expected 4"),
        (lambda r: r[1].update(loss_weights=[1]), "one of loss_weights per token"),
        (lambda r: r[1].update(loss_weights=[1, -1, 1, 1]), "weight_N must be finite"),
        (lambda r: r[1].pop("sample_index"), "sample_index must be an integer"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, change: Callable, message: str) -> None:
    records = json.loads(json.dumps([HEADER, LINE]))
    change(records)
    with pytest.raises(InputError, match=message):
        open_file(write(tmp_path / "r.jsonl", records))


def assert_same_items(first: RecordedTrajectories, second: RecordedTrajectories) -> None:
    assert len(first) == len(second)
    for index in range(len(first)):
        for name, value in first[index].items():
            assert torch.equal(value, second[index][name])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl cannot be read: No such file"):
        open_file(tmp_path / "absent.jsonl")
    path = write(tmp_path / "r.jsonl", many(3))
    marked = tmp_path / "marked.jsonl"
    marked.write_text(path.read_text(), encoding="utf-8-sig", newline="\r\n")
    assert_same_items(open_file(marked), open_file(path))
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is a Parquet file, expected UTF-8 text"):
        open_file(tmp_path / "r.parquet")
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match="line 4: expected a JSON object"):
        open_file(path)


def test_a_file_of_another_tokenizer_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    from megatron_tropd.data.tokenizers import fingerprint, load_tokenizer

    tokenizer = load_tokenizer(tiny_llama)
    path = write(tmp_path / "r.jsonl", [HEADER, LINE])
    with pytest.raises(InputError, match="expected the tokenizer"):
        open_file(path, tokenizer=tokenizer)
    write(path, [HEADER | {"tokenizer": fingerprint(tokenizer)}, LINE])
    assert len(open_file(path, tokenizer=tokenizer)) == 1


def test_longer_trajectories_are_refused_or_cut_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [HEADER, LINE, LINE | {"prompt_ids": [10]}])
    assert open_file(path, seq_length=6).num_truncated == 0
    with pytest.raises(InputError, match=r"line 2: 3 prompt and 4 response tokens need .* of 6"):
        open_file(path, seq_length=5)
    data = open_file(path, seq_length=4, longer="truncate")
    assert (len(data), data.num_truncated) == (2, 1)
    assert data[0]["labels"].tolist() == [11, 12, 20, 21]
    assert data[0]["weights"].tolist() == [0, 0, 1, 1]
    assert data[1]["labels"].tolist() == [20, 21, 22, 2]
    with pytest.raises(InputError, match="within 2 positions nothing of the response"):
        open_file(path, seq_length=2, longer="truncate")


def test_lines_are_found_again_past_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(r) + "\n" for r in many(5)) + "\n \n")
    data = open_file(path)
    assert [int(data[i]["tokens"][3]) for i in (4, 0, 2)] == [24, 20, 22]
    with pytest.raises(IndexError):
        data[5]
    path.write_text(path.read_text().replace("prompt_ids", "prompt_xxx"))
    with pytest.raises(InputError, match="line 5: prompt_ids must be a list"):
        data[1]


def test_sample_ids_tell_trajectories_apart(tmp_path: Path) -> None:
    lines = [LINE | {"prompt_index": p, "sample_index": s} for p in range(20) for s in range(20)]
    data = open_file(write(tmp_path / "r.jsonl", [HEADER, *lines]))
    assert len({tuple(item["sample_key"].tolist()) for item in data}) == 400


def first_ids(batches) -> list[list[int]]:
    """The place of each trajectory, by its first response token."""
    return [(batch["tokens"][:, 3] - 20).tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_megatrons_samplers_choose_the_order(tmp_path: Path, workers: int) -> None:
    from megatron.training.datasets.data_samplers import (
        MegatronPretrainingRandomSampler,
        MegatronPretrainingSampler,
    )

    data = open_file(write(tmp_path / "r.jsonl", many(12)))
    place = {"micro_batch_size": 2, "data_parallel_size": 2, "data_parallel_rank": 1}
    single = MegatronPretrainingSampler(total_samples=12, consumed_samples=4, **place)
    loader = DataLoader(data, batch_sampler=single, num_workers=workers)
    assert first_ids(loader) == [[6, 7], [10, 11]]
    random = MegatronPretrainingRandomSampler(
        data, total_samples=12, consumed_samples=0, data_sharding=False, **place
    )
    loader = DataLoader(data, batch_sampler=random, num_workers=workers)
    once = first_ids(loader)
    assert len(once) == 3 and len({i for batch in once for i in batch}) == 6
    assert pickle.loads(pickle.dumps(data))[3]["tokens"].tolist() == data[3]["tokens"].tolist()


def write_round(path: Path, number: int) -> Path:
    header = HEADER | {"settings": {"round": number}}
    return write(path, [header, *many(4)[1:]])


def test_a_folder_is_its_rounds_one_after_another(tmp_path: Path) -> None:
    """What Megatron consumed in earlier rounds leads to the beginning of the newest file."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    for number in (9, 10):
        write_round(tmp_path / f"round-{number:02d}.jsonl", number)
    data = open_file(tmp_path)
    assert len(data) == 8
    sampler = MegatronPretrainingSampler(
        total_samples=len(data),
        consumed_samples=4,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    assert list(sampler) == [[4, 5], [6, 7]]
    assert first_ids(DataLoader(data, batch_sampler=sampler)) == [[0, 1], [2, 3]]
    (tmp_path / "round-10.jsonl").rename(tmp_path / "round-010.jsonl")
    with pytest.raises(InputError, match=r"of the rounds \[10, 9\]; expected each round once"):
        open_file(tmp_path)
    with (tmp_path / "round-09.jsonl").open("a") as file:
        file.write(json.dumps(LINE | {"prompt_ids": [200]}) + "\n")
    with pytest.raises(InputError, match=r"round-09\.jsonl, line 6: ids must be in"):
        open_file(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \*\.jsonl"):
        open_file(tmp_path / "empty")
