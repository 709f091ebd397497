"""Which loss a step has, and that selection and rewards of the whole batch reach its gradient.

The reference is dense, in float64, in loops, and knows nothing of micro-batches.
"""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.config import LossSettings
from megatron_tropd.config.loss import PRESETS, TEACHER, loss_name, preset
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import count_loss_tokens, pack
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.distill.step import forward_backward
from megatron_tropd.distill.step_parts import LossParts
from megatron_tropd.losses import HiddenStatesSignal

VOCAB, HIDDEN, BETA = 41, 8, 0.5


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    """A world of one, so that there are groups."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", PRESETS)
def test_a_loss_that_is_a_preset_has_its_name(name):
    assert loss_name(preset(name)) == name


def test_any_other_loss_is_named_by_its_method():
    assert loss_name(preset("tropd_expected", top_k=5)) == "tropd"
    assert loss_name(preset("gkd_jsd", jsd_beta=0.2)) == "gkd"


def test_the_phases_of_a_loss_that_switches():
    loss = preset("reopold", switch_step=5)
    first, second = loss.at_step(4), loss.at_step(5)
    assert first == preset("static", outlier="mask", floor=0.2) and not first.needs_student_pass
    assert second == preset("static", outlier="clip", floor=0.2, entropy_share=0.2)
    assert second.reward_floor == loss.reward_floor and second.needs_student_pass
    for name in PRESETS:
        if name != "reopold" and not name.startswith("veto"):
            assert preset(name).at_step(7) == preset(name)


def test_the_target_of_veto_becomes_the_teacher():
    loss = preset("veto_reverse_kl", student_power=0.8, decay_steps=4)
    targets = [loss.at_step(step).needs.target for step in range(6)]
    assert [t.student for t in targets] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    assert targets[5] == TEACHER
    assert loss.at_step(1).at_step(3) == loss.at_step(1)


def step_sequences() -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(2)

    def ids(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, VOCAB, (size,), generator=generator).tolist())

    made = []
    for i in range(8):
        response = ids(2, 9)
        made.append(
            TokenSequence.of_runs(
                SampleKey(0, 30 + i // 4, i % 4),
                (Writer.CONTEXT, ids(1, 4)),
                (Writer.TEACHER, ids(2, 4) if i % 4 == 0 else ()),
                (Writer.STUDENT, response),
                logprobs=(-3.0,) * len(response),
                version=0,
                finish="length" if i == 5 else "stop",
            )
        )
    return made


class Models:
    """Hidden states as a function of the input token, and two output layers: both models."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        student, teacher, self.weight, self.teacher_weight = (
            torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(4)
        )
        self.student, self.teacher = student, teacher
        layer = SimpleNamespace(weight=self.weight)
        self.module = SimpleNamespace(share_embeddings_and_output_weights=False, output_layer=layer)

    def score(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return [self.student[batch.tokens[batch.loss_mask]] for batch in batches]

    def signals(self, batches: Sequence[MicroBatch]) -> list[HiddenStatesSignal]:
        hidden = [self.teacher[batch.tokens[batch.loss_mask]] for batch in batches]
        return [HiddenStatesSignal(states, self.teacher_weight, VOCAB) for states in hidden]

    def forward_backward(self, batches: Sequence[MicroBatch], loss_fn: Any) -> list[Any]:
        self.weight.requires_grad_()
        losses = []
        for index, (hidden, batch) in enumerate(zip(self.score(batches), batches, strict=True)):
            summed, report = loss_fn(hidden, self.weight, batch, index)
            summed.backward()
            losses.append(report)
        return losses


def _weight_gradient(loss: LossSettings, tokens: int) -> tuple[torch.Tensor, int]:
    """Gradient of the output layer as training gets it, and how many tokens were trained."""
    models, trajectories = Models(), step_sequences()
    world: Any = dist.group.WORLD
    place = dict(tp_group=world, loss_group=world, row_group=None, cp_size=1)
    layout: Any = SimpleNamespace(**place, is_last_stage=True)
    parts: Any = LossParts(
        student=models,
        teacher=models,  # type: ignore[arg-type]
        loss=loss,  # type: ignore[arg-type]
        beta=BETA,
        vocab_size=VOCAB,
        layout=layout,
        tokens_per_micro_batch=tokens,
    )
    counts = count_loss_tokens(trajectories, loss)
    reports = forward_backward(
        parts,
        _packed(loss, tokens),
        counts,
        0,
        record=lambda values, weights_T, batch: {"trained": (weights_T != 0).sum()},
        prompts=[t.key.prompt for t in trajectories],
    )
    assert models.weight.grad is not None
    gradient = models.weight.grad / (counts.teacher + counts.student)
    return gradient, sum(int(report["trained"]) for report in reports)


def _packed(loss: LossSettings, tokens: int) -> list[MicroBatch]:
    place = {"dp_rank": 0, "dp_size": 1, "seed": 1, "step": 0}
    return pack(step_sequences(), tokens_per_micro_batch=tokens, loss=loss, **place)


@dataclasses.dataclass
class _Token:
    """One token that carries loss: log-probs, who wrote it, where."""

    log_q: torch.Tensor
    log_p: torch.Tensor
    label: int
    prompt: int
    row: int
    is_teacher: bool


def _reference_tokens(weight: torch.Tensor, loss: LossSettings) -> list[_Token]:
    models, tokens = Models(), []
    (batch,) = _packed(loss, 10_000)
    for b, s in batch.loss_mask.nonzero().tolist():
        x = batch.tokens[b, s]
        tokens.append(
            _Token(
                (weight @ models.student[x].double()).log_softmax(-1),
                (models.teacher_weight.double() @ models.teacher[x].double()).log_softmax(-1),
                int(batch.labels[b, s]),
                step_sequences()[batch.rows[b]].key.prompt,
                batch.rows[b],
                int(batch.writers[b, s]) == Writer.TEACHER,
            )
        )
    return tokens


@pytest.mark.parametrize("denominator", ["joint", "separate"])
def test_the_gradient_of_entropy_opd(denominator):
    loss = preset("entropy_opd", entropy_share=0.3, denominator=denominator, mask_truncated=True)
    weight = Models().weight.double().requires_grad_()
    tokens = _reference_tokens(weight, loss)
    student = [t for t in tokens if not t.is_teacher]
    teacher = [t for t in tokens if t.is_teacher]
    by_entropy = sorted(student, key=lambda t: float((t.log_q.exp() * t.log_q).sum().detach()))
    kept = by_entropy[: -(-3 * len(student) // 10)]
    terms = sum(-(t.log_p - t.log_q)[t.label].detach() * t.log_q[t.label] for t in kept)
    prefix = sum(-BETA * t.log_q[t.label] for t in teacher)
    if denominator == "joint":
        expected = (terms + prefix) / (len(kept) + len(teacher))
    else:
        expected = terms / len(kept) + prefix / len(teacher)
    expected.backward()
    for size in (24, 10_000):
        gradient, trained = _weight_gradient(loss, size)
        assert trained == len(kept) + len(teacher)
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_top_d():
    # rho lies far from 1 (rollout log-probs are invented), so PPO's clip is left out here.
    loss = preset("top_d", importance="none", mask_first_ids=(7, 8, 9))
    weight = Models().weight.double().requires_grad_()
    tokens = _reference_tokens(weight, loss)
    share = loss.proximal_alpha
    rewards = {}
    for i, t in enumerate(tokens):
        if not t.is_teacher:
            ratio = (t.log_p - t.log_q)[t.label].detach().exp()
            rewards[i] = torch.log(share * ratio + 1 - share)
    far = {}
    for i, reward in rewards.items():
        later = [r for j, r in rewards.items() if j > i and tokens[j].row == tokens[i].row]
        far[i] = reward + (sum(later) / len(later) if later else 0)
    expected = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(tokens):
        if t.is_teacher:
            expected = expected - BETA * t.log_q[t.label]
            continue
        group = torch.stack([far[j] for j in far if tokens[j].prompt == t.prompt])
        standard = (far[i] - group.mean()) / (group.std(correction=0) + 1e-6)
        expected = expected - standard * t.log_q[t.label]
    (expected / len(tokens)).backward()
    for size in (24, 10_000):
        gradient, trained = _weight_gradient(loss, size)
        assert trained == len(tokens)
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_iw_opd():
    loss = preset("iw_opd", gain=0.7, mask_first_ids=(7, 8))
    weight = Models().weight.double().requires_grad_()
    tokens = _reference_tokens(weight, loss)
    rewards = {
        i: (t.log_p - t.log_q)[t.label].detach() for i, t in enumerate(tokens) if not t.is_teacher
    }
    expected = torch.zeros((), dtype=torch.float64)
    for i, t in enumerate(tokens):
        if t.is_teacher:
            expected = expected - BETA * t.log_q[t.label]
            continue
        same = [j for j in rewards if tokens[j].row == t.row]
        before = sum(abs(rewards[j]) for j in same if j < i)
        factor = 1 + 0.7 * (1 - before / sum(abs(rewards[j]) for j in same))
        expected = expected - factor * rewards[i] * t.log_q[t.label]
    (expected / len(tokens)).backward()
    for size in (24, 10_000):
        gradient, trained = _weight_gradient(loss, size)
        assert trained == len(tokens)
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_opsa():
    loss = preset("opsa", lowest_share=0.3, advantage=-0.5)
    weight = Models().weight.double().requires_grad_()
    tokens = _reference_tokens(weight, loss)
    student = [t for t in tokens if not t.is_teacher]
    teacher = [t for t in tokens if t.is_teacher]
    rare = sorted(student, key=lambda t: float(t.log_q[t.label].detach()))[
        : -(-3 * len(student) // 10)
    ]
    expected = sum(0.5 * t.log_q[t.label] for t in rare)
    expected = expected - sum(BETA * t.log_q[t.label] for t in teacher)
    (expected / (len(rare) + len(teacher))).backward()
    for size in (24, 10_000):
        gradient, _ = _weight_gradient(loss, size)
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-4, atol=1e-6)
