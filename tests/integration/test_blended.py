"""Sampling from between two models: one real engine against transformers, token by token.

The student is the arithmetic pair's; the teacher is the pair's with more columns than the student,
so the engine has the first ones of both. Prompts are random ids: both models are unsure there, and
far from each other.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.data.samples import Blend, Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines.engine import RolloutEngine

pytestmark = pytest.mark.timeout(600)
PAIR = Path(__file__).resolve().parents[2] / "examples" / "arithmetic"
VOCABULARY, PROMPT, LENGTH, DRAFTS = 320, 4, 14, 6
STOP = 2
EPSILONS = (0.005, 0.05, 0.5)
Log = Callable[[Tensor], Tensor]


def request(index: int, length: int = LENGTH) -> SampleRequest:
    """A prompt of random ids; eight in turn, so that many draws have the same prefix."""
    made = torch.Generator().manual_seed(index % 8)
    ids = torch.randint(3, VOCABULARY, (PROMPT,), generator=made).tolist()
    return SampleRequest(tuple(ids), length, 7919 * index + 3)


@dataclass(frozen=True)
class Models:
    """The pair in transformers, over the columns that both have."""

    student: torch.nn.Module
    teacher: torch.nn.Module

    def logprobs(self, samples: list[tuple[SampleRequest, Sample]]) -> tuple[Tensor, Tensor]:
        """[N, R, V] log p and log q before each token of equally long samples."""
        ids = torch.tensor([request.token_ids + sample.token_ids for request, sample in samples])
        both = []
        for model in (self.teacher, self.student):
            with torch.no_grad():
                parts = [model(part).logits[:, PROMPT - 1 : -1] for part in ids.split(256)]
            both.append(torch.cat(parts)[..., :VOCABULARY].double().log_softmax(-1))
        return both[0], both[1]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair's teacher with 32 more columns, which must never be seen."""
    folder = tmp_path_factory.mktemp("teacher")
    text = (PAIR / "teacher" / "config.json").read_text()
    folder.joinpath("config.json").write_text(
        text.replace(f'"vocab_size": {VOCABULARY}', f'"vocab_size": {VOCABULARY + 32}')
    )
    tensors = load_file(PAIR / "teacher" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], 3 * torch.ones(32, tensors[name].shape[1])])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(teacher_folder: Path) -> Models:
    return Models(
        *(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for folder in (PAIR / "student", teacher_folder)
        )
    )


@pytest.fixture(scope="module")
def engine(
    teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory, warm_engines: None
) -> Iterator[RolloutEngine]:
    with RolloutEngine(
        PAIR / "student",
        teacher_folder=teacher_folder,
        draft_tokens=DRAFTS,
        max_model_len=64,
        log_file=tmp_path_factory.mktemp("engine") / "engine.log",
        cpu_kv_gib=0.25,
        threads=1,
    ) as engine:
        yield engine


def sampling(kind: str, strength: float = 0.0, **others: object) -> Sampling:
    stops = others.pop("stop_token_ids", ())
    return Sampling(stop_token_ids=stops, blend=Blend(kind, strength, **others))


def target(epsilon: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Log mu by halving alone, over any leading shape."""

    def tilted(b: Tensor) -> Tensor:
        return ((1 - b) * log_q + b * log_p).log_softmax(-1)

    def distance(log_mu: Tensor) -> Tensor:
        return (log_mu.exp() * (log_mu - log_q)).sum(-1, keepdim=True)

    low, high = torch.zeros_like(log_p[..., :1]), torch.ones_like(log_p[..., :1])
    whole = distance(log_p) <= epsilon
    for _ in range(30):
        middle = (low + high) / 2
        near = distance(tilted(middle)) <= epsilon
        low, high = torch.where(near, middle, low), torch.where(near, high, middle)
    return torch.where(whole, log_p, tilted(low))


def surprise(log_mu: Tensor, tokens: Tensor) -> float:
    """How many standard deviations the counts of tokens are off: chi-square, made normal.

    Args:
        log_mu: [N, V] of N draws, which may depend on earlier draws.
        tokens: [N] drawn.
    """
    mu = log_mu.exp()
    # The ids that are expected 10 times, up to 24; all others share the last of the bins.
    expected, order = mu.sum(0).sort(descending=True)
    own = min(24, int((expected >= 10).sum()))
    own -= int(expected[own:].sum() < 10)
    bins = torch.full_like(order, own)
    bins[order[:own]] = torch.arange(own)
    mass = torch.zeros(len(mu), own + 1, dtype=torch.float64).index_add_(1, bins, mu)
    seen = torch.nn.functional.one_hot(bins[tokens], own + 1).double()
    off = (seen - mass).sum(0)[:-1]
    covariance = torch.diag(mass.sum(0)) - mass.T @ mass
    share = (off @ torch.linalg.solve(covariance[:-1, :-1], off)).item() / own
    spread = 2 / (9 * own)  # Wilson and Hilferty: the cube root is nearly normal
    return (share ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def assert_drawn_from(log_mu: Tensor, tokens: Tensor, where: str) -> None:
    assert len(tokens) >= 100, f"{where}: only {len(tokens)} draws"
    assert surprise(log_mu, tokens) < 4, where


def places_in_blocks(samples: list[Sample]) -> dict[str, Tensor]:
    """[N, R] bool of each kind of place; known before the token there is drawn."""
    shape = (len(samples), LENGTH)
    found = {
        name: torch.zeros(shape, dtype=torch.bool)
        for name in (
            "behind the prompt",
            "behind a rejection",
            "behind a full block",
            "last of a block",
        )
    }
    for row, sample in enumerate(samples):
        assert sample.blend is not None
        passes = sample.blend.passes
        begins = [i for i in range(LENGTH) if not i or passes[i] != passes[i - 1]]
        found["behind the prompt"][row, 0] = True
        for before, start in pairwise(begins):
            kind = "full block" if start - before == DRAFTS else "rejection"
            found[f"behind a {kind}"][row, start] = True
        for start in begins:
            if start + DRAFTS <= LENGTH and passes[start] == passes[start + DRAFTS - 1]:
                found["last of a block"][row, start + DRAFTS - 1] = True
    return found


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_tokens_are_drawn_from_mu(engine: RolloutEngine, models: Models, epsilon: float):
    requests = [request(index) for index in range(1440)]
    samples = engine.generate(requests, sampling("blended", epsilon))
    log_p, log_q = models.logprobs(list(zip(requests, samples, strict=True)))
    log_mu = target(epsilon, log_p, log_q)
    tokens = torch.tensor([sample.token_ids for sample in samples])
    assert tokens.numel() >= 20_000 and log_p.shape[-1] == VOCABULARY
    assert_drawn_from(log_mu.flatten(0, 1), tokens.flatten(), "all")
    for where, chosen in places_in_blocks(samples).items():
        assert_drawn_from(log_mu[chosen], tokens[chosen], where)
    for other in (log_q, log_p):  # the test can tell
        assert surprise(other.flatten(0, 1), tokens.flatten()) > 10

    of_tokens = log_mu.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    traces = [sample.blend for sample in samples if sample.blend is not None]
    behaviour = torch.tensor([trace.logprobs for trace in traces], dtype=torch.float64)
    torch.testing.assert_close(behaviour, of_tokens, atol=2e-3, rtol=0)
    of_student = log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    engine_q = torch.tensor([sample.logprobs for sample in samples], dtype=torch.float64)
    torch.testing.assert_close(engine_q, of_student, atol=2e-4, rtol=0)
    kl = torch.tensor([trace.kl for trace in traces], dtype=torch.float64)
    assert (kl <= epsilon).all() and (kl >= -1e-9).all()
    distance = (log_mu.exp() * (log_mu - log_q)).sum(-1)
    torch.testing.assert_close(kl, distance, atol=1e-4, rtol=0)
    b = torch.tensor([trace.b for trace in traces])
    assert b.min() >= 0 and (b < 1).any()


def test_a_sample_depends_on_its_own_seed_only(engine: RolloutEngine):
    requests = [request(index) for index in range(300)]
    samples = engine.generate(requests, sampling("blended", 0.05))
    assert engine.generate(requests, sampling("blended", 0.05)) == samples
    alone = engine.generate(requests[17:18], sampling("blended", 0.05))[0]
    assert alone.token_ids == samples[17].token_ids
    assert engine.generate([], sampling("blended", 0.05)) == []


def test_an_unbounded_radius_is_the_teacher(engine: RolloutEngine, models: Models):
    requests = [request(index) for index in range(400)]
    samples = engine.generate(requests, sampling("blended", 1e6))
    log_p, _ = models.logprobs(list(zip(requests, samples, strict=True)))
    tokens = torch.tensor([sample.token_ids for sample in samples])
    assert_drawn_from(log_p.flatten(0, 1), tokens.flatten(), "teacher")
    behaviour = torch.tensor([sample.blend.logprobs for sample in samples], dtype=torch.float64)
    of_tokens = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(behaviour, of_tokens, atol=2e-4, rtol=0)
    assert {b for sample in samples for b in sample.blend.b} == {1.0}


def test_no_radius_keeps_every_draft(engine: RolloutEngine):
    samples = engine.generate([request(i, 12) for i in range(40)], sampling("blended", 0.0))
    for sample in samples:
        assert sample.blend.logprobs == sample.logprobs and not any(sample.blend.kl)
        assert sample.blend.passes == (1,) * DRAFTS + (2,) * DRAFTS


@pytest.mark.parametrize("kind", ["mixture", "skd"])
def test_other_rules(engine: RolloutEngine, models: Models, kind: str):
    requests = [request(index) for index in range(500)]
    samples = engine.generate(requests, sampling(kind, 0.3, top_k=5))
    log_p, log_q = models.logprobs(list(zip(requests, samples, strict=True)))
    p, q = log_p.exp(), log_q.exp()
    if kind == "mixture":
        mu = 0.3 * p + 0.7 * q
    else:
        kept = torch.zeros_like(q).scatter(-1, p.topk(5).indices, 1.0) * q
        mu = kept + (1 - kept.sum(-1, keepdim=True)) * p
    tokens = torch.tensor([sample.token_ids for sample in samples])
    assert_drawn_from(mu.log().flatten(0, 1), tokens.flatten(), kind)
    assert surprise(log_q.flatten(0, 1), tokens.flatten()) > 10


def test_different_stops_are_one_event(engine: RolloutEngine, models: Models):
    """Student and teacher may stop by other ids: the student's is written for both."""
    stops = (STOP, 298, 299, 303, 311)  # some likely ones
    requests = [request(index, 1) for index in range(1000)]
    how = sampling("blended", 0.2, stops=stops, stop_token_ids=stops)
    samples = engine.generate(requests, how)
    log_p, log_q = models.logprobs(list(zip(requests, samples, strict=True)))
    tokens = torch.tensor([sample.token_ids[0] for sample in samples])
    assert not set(tokens.tolist()) & set(stops[1:])
    assert 10 <= (tokens == STOP).sum() <= 990
    merged = []
    for logprobs in (log_p[:, 0], log_q[:, 0]):
        alone = logprobs.clone()
        alone[:, list(stops)] = -60.0
        alone[:, STOP] = logprobs[:, list(stops)].logsumexp(-1)
        merged.append(alone)
    assert_drawn_from(target(0.2, *merged), tokens, "stops")
    for sample in samples:
        assert sample.finish_reason == ("stop" if sample.token_ids[0] == STOP else "length")


def test_lengths_up_to_the_last_place(engine: RolloutEngine):
    """Requests of all lengths side by side, the longest up to the end of the engine."""
    requests = [request(i, length) for i, length in enumerate([60, 1, 2, 6, 7, 60, 59] * 40)]
    samples = engine.generate(requests, sampling("blended", 0.05, stop_token_ids=(STOP, 5, 6)))
    for asked, sample in zip(requests, samples, strict=True):
        stopped = sample.token_ids[-1] in (STOP, 5, 6)
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(sample.token_ids) == asked.max_new_tokens
        assert len(sample.logprobs) == len(sample.blend.logprobs) == len(sample.token_ids)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


def test_prompts_that_end_with_a_stop_and_too_short_ones(engine: RolloutEngine):
    ends = [SampleRequest((7, 8, STOP), 9, seed) for seed in range(40)]
    whole = engine.generate(ends, sampling("blended", 0.05))
    some = set[int]().union(*(sample.token_ids for sample in whole)) - {STOP}
    other = next(t for t in sorted(some) if any(t not in sample.token_ids for sample in whole))
    stops = (STOP, other)
    found = engine.generate(ends, sampling("blended", 0.05, stop_token_ids=stops))
    assert {sample.finish_reason for sample in found} == {"stop", "length"}
    for sample, longer in zip(found, whole, strict=True):
        assert sample.token_ids == longer.token_ids[: len(sample.token_ids)]
        assert (sample.token_ids[-1] in stops) == (sample.finish_reason == "stop")
        assert not set(sample.token_ids[:-1]) & set(stops)
    with pytest.raises(InputError, match="needs 2"):
        engine.generate([SampleRequest((7,), 9, 1)], sampling("blended", 0.05))


def test_new_weights_are_the_students(engine: RolloutEngine, models: Models, tmp_path: Path):
    """Twice, each time from a folder that is gone when the next one comes."""
    tensors = load_file(PAIR / "student" / "model.safetensors")
    for factor in (1.05, 1.1):
        changed = {name: tensor * factor for name, tensor in tensors.items()}
        changed["lm_head.weight"] = changed["model.embed_tokens.weight"].clone()
        folder = tmp_path / str(factor)
        folder.mkdir()
        save_file(changed, folder / "model.safetensors")
        engine.load_weights(folder)
        shutil.rmtree(folder)
    student = AutoModelForCausalLM.from_pretrained(PAIR / "student", dtype=torch.float32)
    student.load_state_dict({**student.state_dict(), **changed})
    new = Models(student, models.teacher)
    requests = [request(index) for index in range(60)]
    samples = engine.generate(requests, sampling("blended", 0.05))
    log_p, log_q = new.logprobs(list(zip(requests, samples, strict=True)))
    tokens = torch.tensor([sample.token_ids for sample in samples]).unsqueeze(-1)
    found = torch.tensor([sample.logprobs for sample in samples], dtype=torch.float64)
    torch.testing.assert_close(found, log_q.gather(-1, tokens).squeeze(-1), atol=2e-4, rtol=0)
    behaviour = torch.tensor([sample.blend.logprobs for sample in samples], dtype=torch.float64)
    wanted = target(0.05, log_p, log_q).gather(-1, tokens).squeeze(-1)
    torch.testing.assert_close(behaviour, wanted, atol=2e-3, rtol=0)


def test_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="without CUDA"):
        RolloutEngine(
            PAIR / "student",
            teacher_folder=PAIR / "teacher",
            max_model_len=64,
            log_file=tmp_path / "engine.log",
        )
