"""Distributions between student and teacher: against plain Python, at the edges, by frequencies."""

import math

import pytest
import torch

from megatron_tropd.data.samples import Blend
from megatron_tropd.losses.draws import Purpose, keyed_noise, keyed_seed
from megatron_tropd.rollout.engines.behaviour import (
    TOLERANCE,
    accepted,
    blend,
    residual,
    share_stops,
    trust_region,
)

INF = math.inf


def rows(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def random_pair(count: int, size: int, sharpness: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(count * 1000 + size)
    noise = torch.randn(2, count, size, generator=made, dtype=torch.float64)
    p, q = (sharpness * noise).log_softmax(dim=-1)
    return p, q


def plain_kl(first: list[float], second: list[float]) -> float:
    return sum(a * math.log(a / b) if a else 0.0 for a, b in zip(first, second, strict=True) if a)


def plain_blend(p: list[float], q: list[float], b: float) -> list[float]:
    weights = [y ** (1 - b) * x**b for x, y in zip(p, q, strict=True)]
    return [weight / sum(weights) for weight in weights]


def plain_b(p: list[float], q: list[float], epsilon: float) -> float:
    """By halving alone."""
    if plain_kl(p, q) <= epsilon:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        near = plain_kl(plain_blend(p, q, middle), q) <= epsilon
        low, high = (middle, high) if near else (low, middle)
    return low


@pytest.mark.parametrize("epsilon", [1e-4, 0.001, 0.02, 0.05, 1.0, 4.0])
def test_b_is_the_root(epsilon: float):
    p, q = random_pair(40, 30)
    p[:3] = q[:3] + 1e-3 * p[:3]  # near: b = 1
    p = p.log_softmax(dim=-1)
    found = trust_region(p, q, epsilon)
    assert found.log_mu_NV.dtype == torch.float64
    for row in range(len(p)):
        p_row, q_row = p[row].exp().tolist(), q[row].exp().tolist()
        b = plain_b(p_row, q_row, epsilon)
        mu = plain_blend(p_row, q_row, found.b_N[row].item())
        torch.testing.assert_close(found.log_mu_NV[row].exp().tolist(), mu)
        distance = plain_kl(mu, q_row)
        assert distance <= epsilon * (1 + 1e-9)
        assert found.kl_N[row].item() == pytest.approx(distance, abs=1e-12)
        if b == 1:
            assert found.b_N[row] == 1
        else:
            assert epsilon - distance <= TOLERANCE * 1.001
    assert ((found.b_N == 1).sum() >= 3) and (epsilon > 1 or (found.b_N < 1).any())


def test_no_radius_is_the_student_and_an_infinite_one_the_teacher():
    p, q = random_pair(5, 12)
    p[0], q[0] = rows([0.5, 0.5] + [0.0] * 10)[0], rows([0.0, 0.5, 0.5] + [0.0] * 9)[0]
    student, teacher = trust_region(p, q, 0.0), trust_region(p, q, INF)
    assert torch.equal(student.log_mu_NV, q) and not student.b_N.any() and not student.kl_N.any()
    assert torch.equal(teacher.log_mu_NV, p) and (teacher.b_N == 1).all()
    assert teacher.kl_N[0] == INF and teacher.kl_N[1:].isfinite().all()
    assert torch.equal(trust_region(q, q, 0.0).b_N, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(trust_region(q, q, 0.01).log_mu_NV, q.log_softmax(-1))


def test_tokens_that_one_model_never_writes():
    p = rows([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.01, 0.0, 0.99], [1.0, 0.0, 0.0], [0.3, 0.4, 0.3])
    q = rows(
        [0.0, 0.4, 0.6], [0.4, 0.599, 0.001], [0.9, 0.1, 0.0], [0.0, 0.5, 0.5], [0.3, 0.4, 0.3]
    )
    found = trust_region(p, q, 0.2)
    # KL(p || q) is infinite, and the teacher on the common token is too far: -log 0.4.
    assert found.b_N[0] == 0 and torch.equal(found.log_mu_NV[0], q[0])
    # A student's token that the teacher lacks is gone.
    assert found.b_N[1] == 1 and found.log_mu_NV[1, 2] == -INF
    # The teacher's favourite is unknown to the student: the teacher on the common one, -log 0.9.
    assert found.b_N[2] == 1
    torch.testing.assert_close(found.log_mu_NV[2].exp().tolist(), [1.0, 0.0, 0.0])
    assert found.kl_N[2].item() == pytest.approx(-math.log(0.9))
    assert found.b_N[3] == 0  # nothing in common
    assert found.b_N[4] == 1 and found.kl_N[4].abs() < 1e-12
    assert not found.log_mu_NV.isnan().any() and (found.kl_N <= 0.2).all()


def test_stopping_is_one_event():
    logprobs = rows([0.1, 0.2, 0.3, 0.4])
    shared = share_stops(logprobs, (3, 1))
    torch.testing.assert_close(shared.exp().tolist(), [[0.1, 0.0, 0.3, 0.6]])
    assert share_stops(logprobs, (2,)) is logprobs and share_stops(logprobs, ()) is logprobs
    # Models that stop alike, by other ids: nothing lies between them.
    p, q = rows([0.2, 0.8, 0.0]), rows([0.2, 0.0, 0.8])
    assert trust_region(p, q, 0.1).b_N == 0
    found = trust_region(share_stops(p, (2, 1)), share_stops(q, (2, 1)), 0.1)
    assert found.b_N == 1 and found.kl_N.abs() < 1e-12


@pytest.mark.parametrize("kind", ["blended", "mixture", "skd", "teacher"])
def test_drafts_kept_or_replaced_follow_mu(kind: str):
    """The probability of each token, computed: kept drafts and replacements together."""
    p, q = random_pair(30, 20)
    rule = Blend("mixture" if kind == "teacher" else kind, 1.0 if kind == "teacher" else 0.3, 4)
    found = blend(rule, p, q)
    mu, ratio = found.log_mu_NV.exp(), (found.log_mu_NV - q).clamp(max=0).exp()
    kept = q.exp() * ratio
    replaced = (1 - kept.sum(-1, keepdim=True)) * residual(found.log_mu_NV, q).softmax(-1)
    torch.testing.assert_close(kept + replaced, mu)
    torch.testing.assert_close(mu.sum(-1), torch.ones(30, dtype=torch.float64))
    if kind == "teacher":
        torch.testing.assert_close(mu, p.exp())


def test_rules():
    p, q = rows([0.6, 0.3, 0.1]), rows([0.2, 0.2, 0.6])
    mixture = blend(Blend("mixture", 0.25), p, q)
    torch.testing.assert_close(mixture.log_mu_NV.exp().tolist(), [[0.3, 0.225, 0.475]])
    skd = blend(Blend("skd", top_k=2), p, q)
    torch.testing.assert_close(skd.log_mu_NV.exp().tolist(), [[0.56, 0.38, 0.06]])
    assert skd.b_N.item() == pytest.approx(0.6)
    assert torch.equal(blend(Blend("mixture", 0.0), p, q).log_mu_NV, q)


def test_replacements_of_equal_distributions():
    q = rows([0.2, 0.8])
    assert torch.equal(residual(q, q), q)
    tiny = rows([1e-300, 1 - 1e-300])
    assert residual(tiny, rows([1e-310, 1.0]))[0].isfinite().tolist() == [True, False]
    assert residual(rows([0.5, 0.5]), rows([0.0, 1.0]))[0].exp().tolist() == [0.5, 0.0]


def test_a_draft_is_kept_below_the_ratio():
    mu, q = rows([0.1, 0.9]).repeat(3, 1), rows([0.5, 0.5]).repeat(3, 1)
    uniforms = torch.tensor([0.19, 0.21, 0.999], dtype=torch.float64)
    found = accepted(mu, q, torch.tensor([0, 0, 1]), uniforms)
    assert found.tolist() == [True, False, True]


def test_noise_is_keyed_and_uniform():
    keys = [(Purpose.DRAFT, keyed_seed(3, 2), position) for position in range(50)]
    noise = keyed_noise(keys, 2000, torch.device("cpu"))
    assert torch.equal(noise[7:8], keyed_noise(keys[7:8], 2000, torch.device("cpu")))
    assert torch.equal(noise[:, :9], keyed_noise(keys, 9, torch.device("cpu")))
    assert (noise > 0).all() and (noise < 1).all() and len(noise.unique()) == noise.numel()
    assert noise.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 1e5))
    assert torch.corrcoef(noise)[0, 1:].abs().max() < 0.12
    frozen = keyed_noise([(Purpose.ACCEPTANCE, 5, 0)], 2, torch.device("cpu"))[0]
    assert frozen.tolist() == FROZEN_NOISE


FROZEN_NOISE = [0.5351024722967488, 0.32749581062177285]
