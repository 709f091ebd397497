"""How many tokens a chunk has: what decides the shapes of collectives is the same on every rank."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from megatron_tropd.losses import LogitsSignal, TopKSignal, chunks, equal_bounds
from megatron_tropd.losses.dense import DenseSpec
from megatron_tropd.losses.vocab_parallel import Shard, shard_of

# GPT-2, Llama 2, Llama 3, Mistral, Phi, Qwen2.5, Qwen3, DeepSeek, Gemma, Gemma 3, odd ones.
VOCABULARIES = (50257, 32000, 128256, 32768, 100352, 151643, 151669, 129280, 256000, 262144)
VOCABULARIES += (100, 37, 1)
SIZES = (2, 3, 4, 6, 8, 12, 16)
PADDINGS = {
    "to the ranks": lambda vocab, size: -vocab % size,
    "to 64 a rank": lambda vocab, size: -vocab % (64 * size),
    "to 128 a rank": lambda vocab, size: -vocab % (128 * size),
    "to 152064": lambda vocab, size: max(0, 152064 - vocab) + -max(152064, vocab) % size,
    "a rank more": lambda vocab, size: -vocab % size + 1000 * size,
}
UNEQUAL = {
    "equal as can be": equal_bounds,
    "the first without columns": lambda vocab, size: [0, *equal_bounds(vocab, size - 1)],
    "the last with most": lambda vocab, size: [*range(size), vocab],
}
"""Bounds of shards without padding."""
SETTINGS = [(None, True, 1), (None, True, 2), (1, False, 1), (100, True, 2)]
"""MiB, whether the teacher's logits are at hand, chunks that share the budget."""


def _shards(vocab: int, size: int, bounds: list[int]) -> list[Shard]:
    """Of every rank."""
    return [
        shard_of(
            bounds[rank + 1] - bounds[rank],
            vocab_size=vocab,
            group=SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank),
            bounds=bounds,
        )
        for rank in range(size)
    ]


def _layouts(vocab: int, size: int):
    for pad in PADDINGS.values():
        width = (vocab + pad(vocab, size)) // size
        yield [rank * width for rank in range(size + 1)]
    if vocab >= size:
        for bounds_of in UNEQUAL.values():
            yield bounds_of(vocab, size)


def _pair(shard: Shard, device: str, memory_mib: int | None, full: bool) -> chunks.Pair:
    nothing = torch.empty(0, 0)
    signal = LogitsSignal(nothing, shard.bounds[-1])
    return chunks.Pair(
        student=signal,
        teacher=signal if full else TopKSignal(nothing, nothing, nothing),
        ids_T=torch.empty(0, dtype=torch.int64),
        k=0,
        spec=DenseSpec(),
        shard=shard,
        device=torch.device(device),
        memory_mib=memory_mib,
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("plain", [False, True])
def test_ranks_choose_the_same_chunks(device, plain, monkeypatch):
    """Real vocabularies on up to 16 ranks, however they are padded; a GPU is not asked."""
    monkeypatch.setattr(chunks, "needs_scratch", lambda device: plain or device.type == "cpu")
    for vocab, size in product(VOCABULARIES, SIZES):
        for bounds in _layouts(vocab, size):
            shards = {shard.real: shard for shard in _shards(vocab, size, bounds)}.values()
            for memory_mib, full, count in SETTINGS:
                pairs = [_pair(shard, device, memory_mib, full) for shard in shards]
                found = {chunks.rows_of_chunk(pair, count=count) for pair in pairs}
                slices = {chunks._scratch(pair).rows for pair in pairs}
                assert len(found) == len(slices) == 1, (vocab, bounds, memory_mib, full, count)


def test_the_widest_shard_fits_its_budget():
    for vocab, size, memory_mib in product((50257, 151936), (1, 4), (8, 72)):
        for shard in _shards(vocab, size, equal_bounds(vocab, size)):
            pair = _pair(shard, "cpu", memory_mib, full=True)
            rows = chunks.rows_of_chunk(pair, count=1)
            stride = chunks._row_stride(shard.real, pair.device)
            needs = 8 * rows * stride + chunks._scratch(pair).bytes
            assert rows == 1 or 0.6 * memory_mib * 2**20 < needs <= memory_mib * 2**20


def test_buffers_are_this_ranks_columns():
    """As many rows as the widest shard can hold, and no wider than what there is."""
    for shard in _shards(100, 2, [0, 64, 128]):
        pair = _pair(shard, "cpu", 1, full=True)
        buffers = chunks._Buffers(pair, count=1)
        assert buffers._logits.shape == (1, 2, 1, shard.real)
