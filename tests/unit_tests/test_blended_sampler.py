"""The sampler of two models in a stand-in for vLLM's runner: models are tables of bigrams.

Without round-off between passes the tokens must be the same whatever the block, bit for bit.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_tropd.data.samples import Blend
from megatron_tropd.rollout.engines import blended
from megatron_tropd.rollout.engines.behaviour import trust_region
from megatron_tropd.rollout.engines.blended import _INDEX, BlendedSampler, Written

SIZE = 7


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blended, "_output", lambda ids: SimpleNamespace(sampled_token_ids=ids))


def table(seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(SIZE, SIZE, generator=made)


STUDENT, TEACHER = table(1), table(2)


@dataclass
class Runner:
    """What the sampler reads and replaces of vLLM's runner; hidden states are the last tokens."""

    sampler: SimpleNamespace = field(default_factory=SimpleNamespace)
    rejection_sampler: SimpleNamespace = field(default_factory=SimpleNamespace)
    requests: dict[str, SimpleNamespace] = field(default_factory=dict)
    input_batch: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(req_ids=[]))
    drafter: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            model=SimpleNamespace(compute_logits=lambda hidden: STUDENT[hidden])
        )
    )


def generate(
    rule: Blend, seeds: list[int], length: int, drafts: int, *, together: int = 10**9
) -> list[list[int]]:
    """Continue the token 3 as vLLM would, ``together`` requests at a time; checks what it kept."""
    runner = Runner()
    sampler = BlendedSampler(runner)
    sampler.start(rule, [(seed, 3) for seed in seeds])
    ids: dict[str, list[int]] = {}
    for index in range(len(seeds)):
        params = SimpleNamespace(extra_args={_INDEX: index})
        runner.requests[str(index)] = SimpleNamespace(sampling_params=params)
    waiting, live = list(runner.requests), list[str]()
    drafted: dict[str, tuple[list[int], Tensor]] = {}
    while waiting or live:
        while waiting and len(live) < together:
            live.append(waiting.pop(0))
        runner.input_batch.req_ids = live
        if drafted:
            rows = [drafted.get(name, ([], torch.empty(0, SIZE))) for name in live]
            context = [
                token
                for name, (tokens, _) in zip(live, rows, strict=True)
                for token in [ids[name][-1] if name in ids else 0, *tokens]
            ]
            counts = [len(tokens) for tokens, _ in rows]
            starts = torch.tensor([0, *counts[:-1]]).cumsum(0) + torch.arange(len(live))
            metadata = SimpleNamespace(
                num_draft_tokens=counts,
                max_spec_len=max(counts),
                draft_token_ids=torch.tensor([t for tokens, _ in rows for t in tokens]),
                target_logits_indices=torch.cat(
                    [s + torch.arange(c) for s, c in zip(starts, counts, strict=True)]
                ),
            )
            log_q = torch.cat([logprobs for _, logprobs in rows])
            found = runner.rejection_sampler.forward(metadata, log_q, TEACHER[context], None)
        else:
            found = runner.sampler.forward(logits=torch.zeros(len(live), SIZE))
        for name, line in zip(live, found.sampled_token_ids.tolist(), strict=True):
            ids.setdefault(name, []).extend(token for token in line if token >= 0)
        last = torch.tensor([ids[name][-1] for name in live])
        steps = []
        for _ in range(drafts):
            last, log_q = runner.drafter._sample_draft_tokens(last, None)
            steps.append((last, log_q))
        drafted = {
            name: ([int(t[row]) for t, _ in steps], torch.stack([q[row] for _, q in steps]))
            for row, name in enumerate(live)
        }
        live = [name for name in live if len(ids[name]) <= length]
        drafted = {name: drafted[name] for name in live}
    results = [ids[str(index)] for index in range(len(seeds))]
    for tokens, written in zip(results, sampler.finish(), strict=True):
        check(rule, tokens, written, drafts)
    return [tokens[1 : length + 1] for tokens in results]


def check(rule: Blend, tokens: list[int], written: list[Written], drafts: int) -> None:
    """What is kept of each token is what the tables say."""
    assert tokens[0] == 3 and len(written) == len(tokens) - 1
    log_q = STUDENT[tokens[:-1]].double().log_softmax(-1)
    found = trust_region(TEACHER[tokens[:-1]].double().log_softmax(-1), log_q, rule.strength)
    for row, (token, kept) in enumerate(zip(tokens[1:], written, strict=True)):
        assert kept.log_mu == pytest.approx(found.log_mu_NV[row, token].item(), abs=1e-9)
        assert kept.log_q == pytest.approx(log_q[row, token].item(), abs=1e-9)
        assert kept.kl <= rule.strength and kept.b == pytest.approx(found.b_N[row].item())
    numbers = [kept.number for kept in written]
    assert numbers == sorted(numbers) and set(numbers) == set(range(1, numbers[-1] + 1))
    assert max(map(numbers.count, numbers)) <= drafts


RULE = Blend("blended", 0.1)
SEEDS = [31 * i + 5 for i in range(60)]


def test_blocks_and_batches_leave_no_trace() -> None:
    wanted = generate(RULE, SEEDS, 13, 6)
    for drafts in (1, 2, 5):
        assert generate(RULE, SEEDS, 13, drafts) == wanted
    assert generate(RULE, SEEDS, 13, 6, together=7) == wanted
    assert generate(RULE, SEEDS[20:21], 13, 4) == [wanted[20]]


def test_frequencies_are_those_of_mu() -> None:
    """Behind every token, wherever in a block: 20,000 draws."""
    sequences = generate(RULE, list(range(1000)), 20, 4)
    pairs = torch.tensor([pair for ids in sequences for pair in zip([3, *ids], ids, strict=False)])
    counts = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    counts.index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(len(pairs)).double(), accumulate=True)
    log_p, log_q = (one.double().log_softmax(-1) for one in (TEACHER, STUDENT))
    mu = trust_region(log_p, log_q, 0.1).log_mu_NV.exp()

    def chi_square(probabilities: Tensor) -> float:
        expected = counts.sum(-1, keepdim=True) * probabilities
        return ((counts - expected) ** 2 / expected).sum().item()

    freedom = SIZE * (SIZE - 1)
    assert len(pairs) == 20_000 and chi_square(mu) < freedom + 4 * (2 * freedom) ** 0.5
    assert min(chi_square(log_p.exp()), chi_square(log_q.exp())) > 10 * freedom


def test_the_student_alone_keeps_all_drafts() -> None:
    generate(Blend("blended", 0.0), SEEDS, 12, 6)


def test_a_token_without_drafts_in_the_midst_is_an_error() -> None:
    runner = Runner()
    sampler = BlendedSampler(runner)
    sampler.start(RULE, [(1, 3)])
    runner.requests["a"] = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={_INDEX: 0}))
    runner.input_batch.req_ids = ["a"]
    assert runner.sampler.forward(torch.zeros(1, SIZE)).sampled_token_ids.tolist() == [[3]]
    with pytest.raises(RuntimeError, match="without drafts"):
        runner.sampler.forward(torch.zeros(1, SIZE))
