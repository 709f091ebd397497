"""Merged ids: every loss as if they were one id of a smaller vocabulary, on 1, 2 and 4 ranks.

The reference adds the probabilities up with autograd, in float64, and knows no shards.
"""

from dataclasses import replace

import pytest
import reference
import torch
import torch.distributed as dist
from loss_settings import config_of
from reference import Tokens

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.losses import (
    HiddenStatesSignal,
    LogitsSignal,
    LossTargets,
    TopKSignal,
    check_signal,
    preset,
    tropd_loss,
    tropd_loss_from_hidden,
)
from tests.ranks import run_on_ranks

VOCAB, WIDTH, HIDDEN, NUM, BETA = 37, 40, 8, 24, 0.3
MERGED = (30, 2, 17, 18)
"""On four ranks of ten columns: of the fourth, the first, and two of the second."""
SETTINGS = {
    "opd": dict(region="none"),
    "stale opd": dict(region="none", importance="ppo", importance_low=0.75, importance_high=1.25),
    "tropd": dict(top_k=4),
    "exact": dict(region="exact", top_k=0),
    "exact clip": dict(region="exact", outlier="clip", tau=-0.4),
    "eopd": dict(region="none", entropy_forward_kl=1.0, top_k=4),
    "jsd": dict(objective="jsd", teacher_tokens="same"),
    "local": dict(objective="local_support", top_k=4),
    "reverse": dict(objective="reverse_kl", teacher_tokens="same"),
    "power": dict(method="power_opd_exact", power=2.0),
    "veto": dict(method="veto", divergence="forward_kl", student_power=0.4),
}


def _problem():
    draw = torch.Generator().manual_seed(5)
    hidden, near = torch.randn(2, NUM, HIDDEN, generator=draw)
    weight, close = torch.randn(2, WIDTH, HIDDEN, generator=draw) * 0.7
    ids = torch.randint(VOCAB, (NUM,), generator=draw)
    ids[:8] = torch.tensor(MERGED * 2)
    is_teacher = torch.rand(NUM, generator=draw) < 0.2
    uniforms = torch.rand(NUM, generator=draw)
    weights = torch.rand(NUM, generator=draw) + 0.5
    log_q = (hidden @ weight[:VOCAB].t()).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    rho = torch.tensor([0.4, 0.9, 1.1, 1.8])[torch.arange(NUM) % 4]
    return (
        hidden,
        near,
        weight,
        close,
        Tokens(ids, is_teacher, uniforms, weights, log_q - rho.log()),
    )


def _one_event(logits):
    """[T, V - m + 1]: the event in the place of the first id, which comes last."""
    others = [n for n in range(VOCAB) if n not in MERGED]
    event = logits[:, list(MERGED)].logsumexp(-1, keepdim=True)
    return torch.cat([logits[:, others], event], -1)


def _answer(student, teacher, tokens, settings):
    """(values, gradient of the logits) of the smaller vocabulary."""
    leaf = student.double().requires_grad_()
    number = {n: at for at, n in enumerate(n for n in range(VOCAB) if n not in MERGED)}
    ids = torch.tensor([number.get(n, len(number)) for n in tokens.ids.tolist()])
    own = leaf.detach().log_softmax(-1).gather(-1, tokens.ids[:, None])[:, 0]
    event = _one_event(leaf.detach()).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    # What is known of the sampler is its probability of the id, not of the event.
    rollout = tokens.rollout_logprobs.double() + event - own
    fewer = Tokens(ids, tokens.is_teacher, tokens.uniforms, tokens.weights, rollout)
    surrogate, values = reference.losses(
        _one_event(leaf), _one_event(teacher.double()), fewer, settings, beta=BETA
    )
    surrogate.sum().backward()
    return values | {"student_logprob": own}, leaf.grad


def _check(group, name):
    settings = SETTINGS[name]
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    mine = slice(WIDTH // size * rank, WIDTH // size * (rank + 1))
    hidden, near, weight, close, tokens = _problem()
    student, teacher = hidden @ weight.t(), near @ close.t()
    values, gradient = _answer(student[:, :VOCAB], teacher[:, :VOCAB], tokens, settings)
    padded = torch.zeros(NUM, WIDTH, dtype=torch.float64)
    padded[:, :VOCAB] = gradient
    options = dict(
        config=replace(config_of(**settings), merge_ids=MERGED),
        vocab_size=VOCAB,
        group=group,
        beta=BETA,
    )
    targets = LossTargets(*vars(tokens).values())
    near_enough = dict(rtol=1e-4, atol=2e-5)

    leaf = student[:, mine].clone().requires_grad_()
    output = tropd_loss(leaf, targets, LogitsSignal(teacher[:, mine], VOCAB), **options)
    output.loss_T.sum().backward()
    for key in output.values.keys() & values.keys():
        found = output.values[key].double()
        torch.testing.assert_close(found, values[key].double(), **near_enough, msg=f"{name} {key}")
    torch.testing.assert_close(leaf.grad.double(), padded[:, mine], **near_enough)

    leaves = hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()
    signal = HiddenStatesSignal(near, close[mine], VOCAB)
    summed = tropd_loss_from_hidden(*leaves, targets, signal, memory_mib=1, **options)
    summed.loss.backward()
    wide = padded @ weight.double(), (padded.t() @ hidden.double())[mine]
    for leaf, expected in zip(leaves, wide, strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_merged_ids_are_one_id_on_one_rank(name, plain, monkeypatch):
    if plain:
        monkeypatch.setenv("TROPD_PLAIN", "1")
    _check(None, name)


def test_merged_ids_are_one_id_on_two_and_four_ranks():
    run_on_ranks(4, _on_ranks)


def _on_ranks(world):
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][world.rank() // 2]
    for name in SETTINGS:
        _check(pair, name)
        _check(world, name)


def test_what_merged_ids_need():
    merged = preset("opd", merge_ids=(3, 5))
    with pytest.raises(ConfigError, match="whole distribution"):
        check_signal(merged, TopKSignal, vocab_size=9)
    with pytest.raises(ConfigError, match="vocabulary of 5 tokens"):
        check_signal(merged, LogitsSignal, vocab_size=5)
    for wrong in ((3,), (3, 3)):
        with pytest.raises(ConfigError, match="two or more ids, each once"):
            preset("opd", merge_ids=wrong)
