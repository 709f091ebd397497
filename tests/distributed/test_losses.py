"""Every loss against the float64 reference, value and gradient, at TP 1, 2 and 4 on gloo.

One spawn of four ranks serves TP 4 (all of them) and TP 2 (two pairs); TP 1 needs none. The
references are made once, in the parent, and handed over in a file. Not exercised here: NCCL, and
the sum over micro-batches, which belongs to the training step.
"""

import itertools

import pytest
import reference
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from megatron_tropd.config import LossConfig
from megatron_tropd.losses import (
    HiddenStatesSignal,
    LogitsSignal,
    LossTargets,
    keyed_uniform,
    top_k_signal,
    tropd_loss,
)
from megatron_tropd.losses import vocab_parallel as vp

BETA = 0.3
LOSSES = [
    dict(region="bernoulli", outlier="forward_kl"),
    dict(region="bernoulli", outlier="mask"),
    dict(region="bernoulli", outlier="clip", tau=-0.4),
    dict(region="threshold", outlier="forward_kl", tau=-0.4),
    dict(region="threshold", outlier="mask", tau=-0.4),
    dict(region="threshold", outlier="clip", tau=-0.4),
    dict(region="none", outlier="forward_kl"),
    dict(region="none", outlier="clip", tau=-0.4),
]
TROPD = LOSSES[0]


def _data(tokens, vocab_size, width, *, dtype=torch.float32, ties=False, seed=0):
    """Logits of both models, padded with values that would be seen if they took part."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, 6, generator=draw), torch.randn(width, 6, generator=draw)
    student = 1.5 * torch.randn(tokens, width, generator=draw)
    teacher = 0.5 * student + hidden @ weight.t() * 0.7
    if ties:
        teacher, student = teacher.round() + 0.0, student.round()
        teacher[:, 0:vocab_size:3] *= -1.0  # zeros of both signs, equal as numbers
    student[:, vocab_size:], teacher[:, vocab_size:] = torch.nan, 60.0
    return dict(
        student=student.to(dtype),
        teacher=teacher.to(dtype),
        ids=torch.randint(vocab_size, (tokens,), generator=draw),
        is_teacher=torch.rand(tokens, generator=draw) < 0.3,
        uniforms=torch.from_numpy(keyed_uniform(seed, 0, 0, range(tokens))),
        vocab_size=vocab_size,
        weights=(1.0, 1.0),
        chunk=None,
        signal="logits",
    )


def _cases():
    base = _data(24, 37, 40)
    cases = {f"{c['region']}-{c['outlier']}": base | {"config": c} for c in LOSSES}
    cases["bf16"] = _data(24, 37, 40, dtype=torch.bfloat16) | {"config": TROPD}
    cases["ties"] = _data(40, 37, 40, ties=True) | {"config": TROPD}
    cases["all of the vocabulary"] = _data(9, 5, 8) | {"config": TROPD | {"top_k": 5}}
    cases["a rank of padding only"] = _data(9, 5, 8) | {"config": TROPD | {"top_k": 2}}
    cases["no padding"] = _data(9, 8, 8) | {"config": TROPD}
    cases["chunks of 5"] = base | {"config": TROPD, "chunk": 5}
    cases["segment weights"] = base | {"config": TROPD, "weights": (0.25, 3.0)}
    cases["one token"] = _data(1, 37, 40, seed=3) | {"config": TROPD}
    cases["no tokens"] = _data(0, 37, 40) | {"config": TROPD}
    cases["all teacher"] = base | {"config": TROPD, "is_teacher": torch.ones(24, dtype=torch.bool)}
    cases["all student"] = base | {"config": TROPD, "is_teacher": torch.zeros(24, dtype=torch.bool)}
    cases["top-k signal"] = base | {"config": TROPD, "signal": "top_k"}
    cases["hidden states"] = _data(24, 37, 40, seed=5) | {"config": TROPD, "signal": "hidden"}
    excluded = base["teacher"].clone()
    excluded[::2, 1:30:2] = -torch.inf
    cases["teacher never writes some"] = base | {"config": TROPD, "teacher": excluded}
    cases["top-k wider than the teacher's support"] = base | {
        "config": TROPD | {"top_k": 37},
        "teacher": excluded,
    }
    whole = base["teacher"].clone()
    whole[::2, 20:30] = -torch.inf  # all columns of the third of four ranks
    cases["teacher never writes a whole shard"] = base | {"config": TROPD, "teacher": whole}
    mutual = base["student"].clone()
    mutual[::2, 1:30:4] = -torch.inf
    ids = base["ids"].clone()
    ids[::2] = 0
    cases["neither writes some"] = base | {
        "config": TROPD,
        "teacher": excluded,
        "student": mutual,
        "ids": ids,
    }
    far = base["student"].clone()
    far[:, ::2] += 1.0e4
    cases["far from zero"] = base | {"config": TROPD, "student": far, "ids": ids}
    for case in cases.values():
        case["config"] = {"top_k": 4, "tau": None} | case["config"]
        case["expected"] = reference.losses(
            case["student"],
            case["teacher"],
            case["ids"],
            case["is_teacher"],
            case["uniforms"],
            case["weights"],
            beta=BETA,
            vocab_size=case["vocab_size"],
            **case["config"],
        )
    return cases


@pytest.fixture(scope="module")
def cases():
    return _cases()


def _shard(tensor, group):
    if group is None:
        return tensor.clone()
    return tensor.chunk(group.size(), dim=-1)[group.rank()].contiguous()


def _signal(case, config, group):
    teacher, vocab_size = _shard(case["teacher"], group), case["vocab_size"]
    if case["signal"] == "top_k":
        k = config.top_k + 2  # a signal may bring more than the loss uses
        return top_k_signal(teacher, case["ids"], k, vocab_size=vocab_size, group=group)
    if case["signal"] == "hidden":
        # With hidden states = logits and the identity as weight, the product is exact.
        eye = torch.eye(case["teacher"].shape[-1])
        rows = eye if group is None else eye.chunk(group.size())[group.rank()]
        return HiddenStatesSignal(case["teacher"], rows, vocab_size)
    return LogitsSignal(teacher, vocab_size)


def _run(case, group):
    """(loss, values, gradient) of the code; the caller's tensors are compared with copies."""
    config = LossConfig(**case["config"])
    signal = _signal(case, config, group)
    logits = _shard(case["student"], group).requires_grad_()
    targets = LossTargets(case["ids"], case["is_teacher"], case["uniforms"])
    owned = [logits, *vars(targets).values(), *(v for v in vars(signal).values() if v is not None)]
    owned = [tensor for tensor in owned if isinstance(tensor, torch.Tensor)]
    copies = [tensor.detach().clone() for tensor in owned]
    output = tropd_loss(
        logits,
        targets,
        signal,
        config=config,
        beta=BETA,
        vocab_size=case["vocab_size"],
        group=group,
        segment_weights=case["weights"],
        chunk=case["chunk"],
    )
    factor = torch.arange(1.0, len(output.loss_T) + 1)
    (output.loss_T * factor).sum().backward()
    for tensor, copy in zip(owned, copies, strict=True):
        assert torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num())
    assert logits.grad is not None
    return output, logits.grad


def _check(name, case, group):
    output, grad = _run(case, group)
    loss, expected_grad, expected_values = case["expected"]
    where = f"{name}, TP {1 if group is None else group.size()}"
    bf16 = case["student"].dtype == torch.bfloat16

    def close(what, actual, expected, rtol=2e-5, atol=2e-5):
        torch.testing.assert_close(
            actual.double(), expected, rtol=rtol, atol=atol, msg=lambda m: f"{where}: {what}\n{m}"
        )

    assert output.loss_T.dtype == torch.float32 and output.loss_T.requires_grad
    close("loss", output.loss_T.detach(), loss)
    full = case["signal"] != "top_k"
    divergences = {"tv", "reverse_kl", "forward_kl", "student_entropy", "teacher_entropy"}
    for key, column in expected_values.items():
        if full or key not in divergences:
            close(key, output.values[key], column)
    assert all(not v.requires_grad and v.dtype == torch.float32 for v in output.values.values())
    assert grad.dtype == case["student"].dtype
    # Gradients grow with the row number; bf16 rounds them to 8 bits when they are stored.
    rtol, atol = (2**-8, 1e-6) if bf16 else (2e-5, 1e-4)
    expected_shard = _shard(expected_grad, group)
    close("gradient", grad, expected_shard.nan_to_num(), rtol, atol)
    _start, real = vp.local_columns(grad.shape[-1], vocab_size=case["vocab_size"], group=group)
    assert torch.all(grad[:, real:] == 0), f"{where}: padded columns got a gradient"
    return output


def test_cases_reach_every_branch(cases):
    """Both sides of each region, tokens of both writers, ties across the edge of the top-k."""
    for config in LOSSES[:6]:
        case = cases[f"{config['region']}-{config['outlier']}"]
        outlier = case["expected"][2]["outlier"]
        student = ~case["is_teacher"]
        assert 2 < outlier.sum() < student.sum() - 2
        assert case["is_teacher"].sum() > 2
        clear = (case["expected"][2]["trust"] - case["uniforms"]).abs().min()
        assert clear > 1e-5, "a draw so close to its threshold says nothing about the code"
    teacher = cases["ties"]["teacher"][:, :37]
    fourth, fifth = teacher.sort(descending=True).values[:, 3:5].unbind(-1)
    assert (fourth == fifth).sum() > 10
    assert (torch.signbit(teacher) & (teacher == 0)).any()


def test_losses_tp1(cases):
    for name, case in cases.items():
        _check(name, case, None)


def test_losses_tp2_and_tp4(cases, tmp_path):
    torch.save(cases, tmp_path / "cases.pt")
    run_on_ranks(4, _check_on_ranks, str(tmp_path / "cases.pt"))


def _check_on_ranks(world, path):
    cases = torch.load(path, weights_only=False)
    alone = [dist.new_group([rank]) for rank in range(4)][world.rank()]
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][world.rank() // 2]
    for (name, case), group in itertools.product(cases.items(), [alone, pair, world]):
        output = _check(name, case, group)
        _check_same_on_ranks(output, group)
    _check_top_k(cases["ties"], [alone, pair, world])
    _check_collectives(cases["chunks of 5"], world)
    _check_wrong_shards(cases["chunks of 5"], world)


def _check_same_on_ranks(output, group):
    """Bit for bit: ranks that disagree on a mask would train different models."""
    for column in (output.loss_T.detach(), *output.values.values()):
        if column.numel():
            others = vp.all_gather(column, group=group)
            assert all(torch.equal(column, other) for other in others)


def _check_top_k(case, groups):
    teacher, vocab_size = case["teacher"], case["vocab_size"]
    for k in (1, 4, vocab_size):
        expected = [reference.top_k_ids(row, k, vocab_size) for row in teacher]
        for group in groups:
            logits, ids = vp.top_k(_shard(teacher, group), k, vocab_size=vocab_size, group=group)
            assert ids.tolist() == expected
            assert torch.equal(logits, teacher.gather(-1, ids) + 0.0)


def _check_collectives(case, group):
    """One all-gather and one all-reduce per chunk of rows forward, none backward."""
    calls = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
    for name, original in originals.items():

        def counted(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    try:
        _run(case, group)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    assert calls == ["all_gather", "all_reduce"] * 5  # 24 rows in chunks of 5


def _check_wrong_shards(case, group):
    """Shards of another padding would silently compare different tokens."""
    student = _shard(case["student"], group)
    targets = LossTargets(case["ids"], case["is_teacher"], case["uniforms"])
    wider = torch.zeros(student.shape[0], student.shape[1] + 1)
    with pytest.raises(ValueError, match="Pad both vocabularies"):
        tropd_loss(
            student,
            targets,
            LogitsSignal(wider, 37),
            config=LossConfig(top_k=4),
            beta=BETA,
            vocab_size=37,
            group=group,
        )
