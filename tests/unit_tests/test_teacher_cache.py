"""A cached teacher: its files, who is refused, and that a killed writer goes on where it was."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.files import write_json
from megatron_tropd.cli.score import job_config
from megatron_tropd.config import (
    Config,
    config_from_dict,
    config_to_dict,
    load_config,
    read_settings,
)
from megatron_tropd.config.loss import preset
from megatron_tropd.config.teacher_cache import bytes_per_token
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.packing import pack
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.data.sequence_files import FORMAT, record_of
from megatron_tropd.data.tokenizers import fingerprint, load_tokenizer
from megatron_tropd.distill.score import load_to_score
from megatron_tropd.losses import (
    LogitsSignal,
    ReferencedTopKSignal,
    TopKSignal,
    check_signal,
    reduction,
)
from megatron_tropd.teacher import signal_of
from megatron_tropd.teacher.cached import CachedTeacher, check_cache, top_k
from megatron_tropd.teacher.cached.digest import (
    model_digest,
    num_scored,
    rollouts_digest,
    scored_tokens,
)
from megatron_tropd.teacher.cached.files import (
    CacheHeader,
    TeacherCache,
    check_header,
    shard_path,
    shards_of,
    write_header,
    write_shard,
)
from tests.ranks import run_in_process

PAIR = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
K, VOCAB = 4, 320
C, T, S = Writer.CONTEXT, Writer.TEACHER, Writer.STUDENT


def _sequences() -> list[TokenSequence]:
    """Six of several lengths, one in two turns, one with a prefix."""
    runs: list[list[tuple[Writer, Any]]] = [
        [(C, range(3, 6)), (S, range(10, 10 + length))] for length in (5, 1, 9, 4)
    ]
    runs.append([(C, [3]), (S, [8, 9]), (C, [4, 4, 4]), (S, [7, 7, 2])])
    runs.append([(C, [3, 4]), (T, [5, 6, 7]), (S, [8, 2])])
    return [
        TokenSequence.of_runs(
            SampleKey(0, number, 0),
            *each,
            logprobs=[-1.0] * sum(len(ids) for who, ids in each if who == S),
        )
        for number, each in enumerate(runs)
    ]


def _told(sequences: list[TokenSequence], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Columns that tell which token of which sequence each row is of."""
    places = [
        (number, token)
        for number, sequence in enumerate(sequences)
        for token in np.flatnonzero(scored_tokens(sequence))
    ]
    value_M = torch.tensor([-float(100 * number + token) / 64 for number, token in places])
    ids_MK = torch.arange(K).repeat(len(places), 1) + torch.tensor([t for _, t in places])[:, None]
    return {
        "sampled_logprobs": value_M,
        "logsumexp": value_M + 9,
        "topk_ids": ids_MK,
        "topk_logprobs": (value_M[:, None] - torch.arange(K)).to(dtype),
    }


def _header(sequences: list[TokenSequence], shards: int, **changes: Any) -> CacheHeader:
    header = CacheHeader(
        teacher=model_digest(HFFolder(PAIR / "teacher")),
        reference=None,
        tokenizer=fingerprint(load_tokenizer(PAIR / "student")),
        vocab_size=VOCAB,
        model_dtype="float32",
        top_k=K,
        dtype="float32",
        rollouts=rollouts_digest(sequences),
        sequences=len(sequences),
        tokens=num_scored(sequences),
        shards=shards,
    )
    return dataclasses.replace(header, **changes)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Six sequences in two shards."""
    sequences, folder = _sequences(), tmp_path / "cache"
    folder.mkdir()
    write_header(folder, _header(sequences, 2))
    for number, rows in enumerate((slice(0, 3), slice(3, 6))):
        taken = sequences[rows]
        write_shard(shard_path(folder, number), taken, _told_of(sequences, rows))
    return folder


def _told_of(sequences: list[TokenSequence], rows: slice) -> dict[str, torch.Tensor]:
    before, count = num_scored(sequences[: rows.start]), num_scored(sequences[rows])
    return {
        name: column[before : before + count]
        for name, column in _told(sequences, torch.float32).items()
    }


def test_every_loss_token_gets_the_row_of_its_token(cache: Path):
    """Two turns, prefixes and masked ids: rows are counted by tokens, labels one early."""
    sequences = _sequences()
    sequences = [s.replace(key=s.key._replace(step=7)) for s in sequences]  # as a run asks for them
    loss = preset("opd", mask_first_ids=(11, 8, 7))
    batches = pack(
        sequences, dp_rank=0, dp_size=1, tokens_per_micro_batch=24, seed=1, step=7, loss=loss
    )
    teacher = CachedTeacher(TeacherCache(cache))
    teacher.begin(7, sequences)
    seen = 0
    for batch, found in zip(batches, teacher.signals(batches), strict=True):
        length = batch.tokens.shape[1]
        at = batch.loss_at.tolist()
        told = [-(100 * batch.rows[n // length] + n % length + 1) / 64 for n in at]
        assert found.sampled_logprobs_T.tolist() == told
        assert found.topk_ids_TK.dtype == torch.int64
        assert found.topk_ids_TK[:, 0].tolist() == [n % length + 1 for n in at]
        assert torch.equal(found.topk_logprobs_TK[:, 1], found.sampled_logprobs_T - 1)
        seen += len(at)
    assert seen == num_scored(sequences) - sum(
        any(i in s.ids_N[scored_tokens(s)] for s in [s]) for s in sequences for i in (11, 8, 7)
    )
    assert CachedTeacher(None).signals(batches) == [], "a rank without the loss reads nothing"


def test_what_stands_behind_the_last_scored_token_changes_no_score(cache: Path):
    """A loader's row does not tell a tool's last words from padding."""
    sequence = _sequences()[4]
    runs = [(C, [3]), (S, [8, 9]), (C, [4, 4, 4]), (S, [7, 7, 2]), (C, [6, 6])]
    longer = TokenSequence.of_runs(sequence.key, *runs, logprobs=[-1.0] * 5)
    opened = TeacherCache(cache)
    found, expected = opened.read(longer), opened.read(sequence)
    assert all(torch.equal(found[name], column) for name, column in expected.items())
    other = sequence.replace(ids_N=np.append(sequence.ids_N[:-1], 3))
    with pytest.raises(InputError, match="has no scores"):
        opened.find(other)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_rows_get_the_rows_of_their_tokens(cache: Path, parts: int):
    """As ranks that share rows ask; a part without loss tokens gets none."""
    from megatron_tropd.mcore.layout import zigzag

    sequences, seen = _sequences(), 0
    (whole,) = pack(
        sequences, dp_rank=0, dp_size=1, tokens_per_micro_batch=72, pad_multiple=12, seed=1, step=0
    )
    teacher = CachedTeacher(TeacherCache(cache))
    teacher.begin(0, sequences)
    for part in range(parts):
        batch = whole.at(zigzag(whole.tokens.shape[1], part, parts))
        (found,) = teacher.signals([batch])
        places = batch.of_loss_tokens(batch.position_ids) + 1
        rows = batch.loss_rows
        assert torch.equal(found.sampled_logprobs_T, -(100 * rows + places) / 64)
        seen += len(batch.loss_at)
    assert seen == num_scored(sequences)
    (padding,) = teacher.signals([whole.at(torch.tensor([11]))])
    assert padding.topk_ids_TK.shape == (0, K)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_states_the_bytes_that_are_written(tmp_path: Path, dtype: str):
    sequences, path = _sequences(), tmp_path / "shard"
    write_shard(path, sequences, _told(sequences, getattr(torch, dtype)))
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    expected = bytes_per_token(K, dtype) * num_scored(sequences) + 64 * len(sequences)
    assert path.stat().st_size - header == expected


def test_a_teacher_that_gives_no_number_is_refused_before_anything_is_written(tmp_path: Path):
    sequences, columns = _sequences(), _told(_sequences(), torch.float32)
    columns["topk_logprobs"][7, 2] = torch.nan  # the second token of the third
    with pytest.raises(InputError, match="topk_logprobs of prompt 2, sample 0 are not all numbers"):
        write_shard(tmp_path / "shard", sequences, columns)
    assert not list(tmp_path.iterdir())


def test_shards_are_of_whole_sequences():
    sequences = _sequences()  # 5, 1, 9, 4, 5 and 5 scored tokens
    assert shards_of(sequences, 10) == [range(2), range(2, 3), range(3, 5), range(5, 6)]
    assert shards_of(sequences, 1) == [range(n, n + 1) for n in range(6)]
    assert shards_of(sequences, 99) == [range(6)]
    assert shards_of([], 99) == []


def test_the_most_likely_ids_are_those_of_the_whole_distribution(monkeypatch: pytest.MonkeyPatch):
    logits = torch.randn(17, 40, generator=torch.Generator().manual_seed(1))
    logits[:, 33:] = 50  # padding
    ids = torch.arange(17)
    monkeypatch.setitem(reduction._BUDGET, "cpu", 4 * 33 * 5)  # five rows at a time
    found = top_k.top_k_of(LogitsSignal(logits, 33), ids, 6, group=None)
    expected = logits[:, :33].double().log_softmax(-1)
    values, places = expected.topk(6)
    torch.testing.assert_close(found["topk_logprobs"].double(), values, rtol=0, atol=1e-6)
    assert torch.equal(found["topk_ids"], places)
    sampled = expected.gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(found["sampled_logprobs"].double(), sampled, rtol=0, atol=1e-6)
    total = logits[:, :33].double().logsumexp(-1)
    torch.testing.assert_close(found["logsumexp"].double(), total, rtol=0, atol=1e-6)


# ---- refusals ----


def _config(cache: Path, **loss: Any) -> Config:
    config = load_config(
        PAIR / "opd.toml",
        [
            *("teacher.placement=cached", f"teacher.cache={cache}", "evaluation.teacher=false"),
            f"rollout.recorded={cache}/rollouts.jsonl",
        ],
    )
    return dataclasses.replace(config, loss=preset(**loss)) if loss else config


def _check(
    cache: Path, sequences: list[TokenSequence] | None = None, teacher: Path | None = None
) -> None:
    check_cache(
        str(cache),
        preset("opd"),
        HFFolder(teacher or PAIR / "teacher"),
        load_tokenizer(PAIR / "student"),
        VOCAB,
        recorded=[_sequences() if sequences is None else sequences],
    )


def test_the_run_s_own_cache_is_taken(cache: Path):
    _check(cache)


def test_another_teacher_tokenizer_vocabulary_or_sequence_is_refused_by_name(cache: Path):
    with pytest.raises(InputError, match="scores of another teacher: expected"):
        _check(cache, teacher=PAIR / "student")
    changed = _sequences()
    changed[4] = changed[4].replace(ids_N=changed[4].ids_N + 1)
    with pytest.raises(InputError, match=r"no scores of prompt 4, sample 0 \(9 tokens\)"):
        _check(cache, changed)
    # The same ids, of which the first turn is now a prompt: other tokens are scored.
    again = [(C, [3, 8, 9, 4, 4, 4]), (S, [7, 7, 2])]
    turned = TokenSequence.of_runs(SampleKey(0, 9, 1), *again, logprobs=[-1.0] * 3)
    with pytest.raises(InputError, match="no scores of prompt 9, sample 1"):
        _check(cache, [turned])
    for name, value in (("tokenizer", "other"), ("vocab_size", 319), ("reference", "x")):
        write_header(cache, _header(_sequences(), 2, **{name: value}))
        if name == "reference":
            _check(cache)  # a reference that the loss does not read does no harm
            continue
        with pytest.raises(InputError, match=f"scores of another {name.replace('_', ' ')}"):
            _check(cache)


def test_a_loss_that_needs_more_ids_is_refused(cache: Path):
    opened = TeacherCache(cache)
    opened.check_top_k(K, "tropd")
    with pytest.raises(ConfigError, match=r"needs the teacher's 64 most likely ids, found 4"):
        opened.check_top_k(64, "tropd")


def test_the_command_takes_the_offload_of_the_settings(tmp_path: Path):
    config = _config(tmp_path)
    teacher = dataclasses.replace(config.teacher, offload="host_by_layer")
    scored = job_config(dataclasses.replace(config, teacher=teacher)).teacher
    assert (scored.placement, scored.offload) == ("resident", "host_by_layer")


@pytest.mark.parametrize("method", ["gkd_jsd", "tropd_exact", "trb", "eopd"])
def test_a_method_that_needs_more_is_told_which_work(tmp_path: Path, method: str):
    config = _config(tmp_path, name=method)
    with pytest.raises(ConfigError, match=r"whole dist.* ids and .*tropd, tropd_exp.*opd") as told:
        check_signal(config.loss, signal_of(config), vocab_size=VOCAB)
    assert "Signal" not in str(told.value), "no name of ours"
    check_signal(_config(tmp_path, name="tropd").loss, signal_of(config), vocab_size=VOCAB)


def test_a_reference_is_in_the_files_too(tmp_path: Path):
    asked = ["teacher.placement=cached", f"teacher.cache={tmp_path}", "evaluation.teacher=false"]
    asked += [f"rollout.recorded={tmp_path}", "loss.method=delta", "teacher.reference=student"]
    config = load_config(PAIR / "opd.toml", asked)
    assert signal_of(config) is ReferencedTopKSignal
    check_signal(config.loss, signal_of(config), vocab_size=VOCAB)
    assert signal_of(_config(tmp_path)) is TopKSignal


def test_what_is_missing_or_damaged_is_named(cache: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no cache\.json.*tropd score"):
        TeacherCache(tmp_path / "nothing")
    second = shard_path(cache, 1)
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(InputError, match=r"1 of 2 shards are missing, first signals-00001\.safe"):
        TeacherCache(cache)
    second.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=r"signals-00001\.safetensors cannot be read"):
        TeacherCache(cache)
    second.write_bytes(whole)
    tensors = safetensors.torch.load_file(second)
    tensors["topk_logprobs"][-1, 0] -= 1
    safetensors.torch.save_file(tensors, second)
    opened = TeacherCache(cache)
    opened.read(_sequences()[4])
    with pytest.raises(InputError, match=r"signals-00001.*prompt 5, sample 0 do not have their"):
        opened.read(_sequences()[5])
    (cache / "cache.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(InputError, match="expected the format 'tropd-teacher-1'"):
        TeacherCache(cache)


def test_a_folder_of_other_scores_is_not_continued(cache: Path):
    sequences = _sequences()
    check_header(cache, _header(sequences, 2))
    with pytest.raises(InputError, match=r"top_k: 4 there, 8 asked for; dtype: 'float32' there"):
        check_header(cache, _header(sequences, 2, top_k=8, dtype="bfloat16"))
    with pytest.raises(InputError, match="rollouts: "):
        check_header(cache, _header(sequences[:5], 2))


def test_settings_that_do_not_go_with_a_cache_are_refused(tmp_path: Path):
    cached = ["teacher.placement=cached", "evaluation.teacher=false"]
    with pytest.raises(ConfigError, match=r"needs teacher\.cache, found none.*tropd score"):
        load_config(PAIR / "opd.toml", cached)
    with pytest.raises(ConfigError, match=r"needs rollout\.recorded, found none"):
        load_config(PAIR / "opd.toml", [*cached, f"teacher.cache={tmp_path}"])
    with pytest.raises(ConfigError, match=r"Set evaluation\.teacher = false"):
        load_config(
            PAIR / "opd.toml",
            [cached[0], f"teacher.cache={tmp_path}", f"rollout.recorded={tmp_path}"],
        )
    with pytest.raises(ConfigError, match=r"cache_top_k must be at least 32, .* found 8"):
        load_config(
            PAIR / "opd.toml",
            [
                *(*cached, f"teacher.cache={tmp_path}", f"rollout.recorded={tmp_path}/a.jsonl"),
                *("loss.method=local_support", "loss.support=teacher", "teacher.cache_top_k=8"),
            ],
        )
    with pytest.raises(ConfigError, match=r'Set teacher\.placement = "cached"'):
        job_config(load_config(PAIR / "opd.toml"))


def test_the_setting_s_former_name_is_read_in_run_folders_alone(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is now teacher\.placement"):
        load_config(PAIR / "opd.toml", ["teacher.source=resident"])
    settings = config_to_dict(load_config(PAIR / "opd.toml"))
    settings["teacher"] = {"source": "own_teacher:Indifferent", "reference": None}
    write_json(tmp_path / "config.json", settings)
    read = config_from_dict(read_settings(tmp_path / "config.json"))
    assert read.teacher.placement == "own_teacher:Indifferent"


# ---- tropd score ----


def write_rollouts(folder: Path, count: int = 12) -> Config:
    """Answers of several lengths to the first prompts, and the settings that score them."""
    tokenizer = load_tokenizer(PAIR / "student")
    config = load_config(
        PAIR / "opd.toml",
        [
            *("teacher.placement=cached", f"teacher.cache={folder}/cache"),
            *("evaluation.teacher=false", f"rollout.recorded={folder}/rollouts.jsonl"),
            *("parallel.tensor=1", "rollout.num_engines=1", "teacher.cache_top_k=16"),
            *("rollout.samples_per_prompt=1", "rollout.prompts_per_step=4"),
        ],
    )
    prompts = load_prompts(config.rollout.prompts, tokenizer, config.rollout, max_prompt_tokens=99)
    lines: list[Any] = [{"format": FORMAT, "tokenizer": fingerprint(tokenizer)}]
    for prompt in prompts[:count]:
        ids = [5 + (prompt.index * n) % 200 for n in range(3 + prompt.index % 7)]
        runs = (C, prompt.token_ids), (S, ids)
        key = SampleKey(0, prompt.index, 0)
        lines.append(record_of(TokenSequence.of_runs(key, *runs, logprobs=[-1.0] * len(ids))))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "rollouts.jsonl").write_text(text)
    return job_config(config)


def score_in_shards(config: dict[str, Any], killed_at: str | None) -> None:
    """Be the one rank of ``tropd score``, with small shards; die while one is written."""
    from megatron_tropd.base.progress import Progress, StopFlag
    from megatron_tropd.config.run_folder import RunFolder
    from megatron_tropd.distill import score

    folder = RunFolder(Path(config["run"]["dir"]))
    folder.root.mkdir(parents=True, exist_ok=True)
    write_json(folder.config, config)
    written = score.write_shard

    def write(path: Path, *rest: Any) -> None:
        if path.name == killed_at:
            setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
        written(path, *rest)

    score.SHARD_TOKENS, score.write_shard = 20, write  # type: ignore[misc]
    score.score(folder, console=sys.stderr, stop=StopFlag(), progress=Progress())


def test_more_ids_than_there_are_cannot_be_kept(tmp_path: Path):
    config = write_rollouts(tmp_path)
    config = dataclasses.replace(
        config, teacher=dataclasses.replace(config.teacher, cache_top_k=VOCAB + 1)
    )
    with pytest.raises(ConfigError, match=r"teacher\.cache_top_k = 321 exceeds .* 320 tokens"):
        load_to_score(config)


def test_a_killed_writer_goes_on_and_writes_the_same_bytes(tmp_path: Path):
    config = config_to_dict(write_rollouts(tmp_path))
    cache = tmp_path / "cache"
    assert run_in_process(score_in_shards, config, "signals-00002.safetensors") == -signal.SIGKILL
    left = sorted(path.name for path in cache.glob("*signals-*"))
    assert left == [
        ".signals-00002.safetensors.tmp",
        *(f"signals-0000{number}.safetensors" for number in range(2)),
    ]
    with pytest.raises(InputError, match=r"is not complete: \d of \d shards are missing"):
        TeacherCache(cache)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("signals-*")}
    assert run_in_process(score_in_shards, config, None) == 0
    for name, time in before.items():
        assert (cache / name).stat().st_mtime_ns == time, "complete shards are not made again"
    assert not list(cache.glob(".signals-*"))
    opened, summary = TeacherCache(cache), json.loads((cache / "job" / "summary.json").read_text())
    assert summary["shards"] == opened.header.shards > 3
    resumed = {path.name: path.read_bytes() for path in cache.glob("signals-*")}

    for path in cache.glob("signals-*"):
        path.unlink()
    assert run_in_process(score_in_shards, config, None) == 0
    assert {path.name: path.read_bytes() for path in cache.glob("signals-*")} == resumed


@pytest.mark.parametrize(("data", "context"), [(1, 2), (2, 2), (4, 1)])
def test_scores_of_parts_of_rows_are_put_in_order(data: int, context: int):
    """As replicas of rows and ranks that share them give them; six rows are no multiple of four."""
    from megatron_tropd.distill.score import Scorer, _in_order
    from megatron_tropd.losses import LogitsSignal
    from megatron_tropd.mcore.layout import Layout

    sequences, parts = _sequences(), []
    sizes: dict[str, Any] = dict(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
    groups = SimpleNamespace(tp=None)
    for replica in range(data * context):
        where = {"dp_rank": replica // context, "cp_rank": replica % context}
        layout = Layout(
            rank=replica, world_size=data * context, dp_size=data, cp_size=context,
            groups=groups, pad_multiple=2 * context, **where, **sizes,
        )  # fmt: skip
        scorer = Scorer(CachedTeacher(None), layout, 1, torch.float32, 24)
        for batch in map(layout.local, scorer._packed(scorer._weighed(sequences))):
            # The most likely id is the place of the token in its row.
            places = batch.of_loss_tokens(batch.position_ids) + 1
            logits = torch.nn.functional.one_hot(places, VOCAB).float()
            parts.append(scorer._columns(batch, LogitsSignal(logits, VOCAB)))
    found = _in_order(parts, len(sequences))
    expected = np.concatenate([np.flatnonzero(scored_tokens(s)) for s in sequences])
    assert found["topk_ids"].flatten().tolist() == expected.tolist()
