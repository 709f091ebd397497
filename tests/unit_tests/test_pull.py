"""What pulls on a token that is nearly right: the table of docs/study.md."""

import math

import pytest
import torch

from megatron_tropd.losses import LogitsSignal, LossTargets, preset, tropd_loss

TAU = -2.5


def _pull(wrong: float, teachers: float, name: str, **settings: object) -> float:
    """Mean pull on the right one of two tokens, over both that may be sampled and the draw."""
    probability = torch.tensor([1 - wrong, wrong], dtype=torch.float64)
    teacher = torch.tensor([1 - teachers, teachers], dtype=torch.float64).log()
    logits = probability.log().repeat(2, 1).requires_grad_()
    targets = LossTargets(
        ids_T=torch.tensor([0, 1]),
        is_teacher_T=torch.zeros(2, dtype=torch.bool),
        uniforms_T=torch.full((2,), 0.5, dtype=torch.float64),
    )
    output = tropd_loss(
        logits,
        targets,
        LogitsSignal(teacher.repeat(2, 1), 2),
        config=preset(name, **settings),
        vocab_size=2,
        group=None,
    )
    (output.loss_T * probability).sum().backward()
    assert logits.grad is not None
    return -float(logits.grad[:, 0].sum())


@pytest.mark.parametrize(
    ("name", "settings", "leading"),
    [
        ("opd", {}, lambda e, d: e * math.log(e / d)),
        ("tropd_expected", {"outlier": "clip", "tau": TAU}, lambda e, d: e * -TAU),
        ("tropd_expected", {"top_k": 2}, lambda e, d: 2 * e**2 + d * math.log(e / d)),
        ("tropd_exact", {"top_k": 0}, lambda e, d: 2 * e**2 + d * math.log(e / d)),
        ("tropd_expected", {"outlier": "mask"}, lambda e, d: e**2 + d * math.log(e / d)),
    ],
)
@pytest.mark.parametrize(("e", "d"), [(1e-2, 1e-5), (1e-3, 1e-8)])
def test_the_pull_on_a_nearly_right_token_is_what_the_study_says(
    name: str, settings: dict, leading, e: float, d: float
) -> None:
    assert _pull(e, d, name, **settings) == pytest.approx(leading(e, d), rel=0.05)
