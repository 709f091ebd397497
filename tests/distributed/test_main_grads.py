"""bfloat16 training gets float32 gradients of the output layer, through Megatron's own DDP.

The loss adds them to ``main_grad`` instead of handing a bfloat16 tensor to autograd. Checked on the
gradients Megatron's optimizer would see, with several micro-batches: against the same model
computed in float32, against the exact sum of what the loss made of the hidden states it was given,
with and without tied embeddings (whose own gradient goes the usual way to the same buffer), and
with a reduction that overlaps the backward pass, which insists on seeing a gradient.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import LAYOUTS, TRAIN, recorded_trajectories

from megatron_tropd.config import MegatronConfig, ParallelConfig
from megatron_tropd.config.loss import preset
from megatron_tropd.data.packing import count_loss_tokens
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import build_parts

Gradients = dict[str, torch.Tensor]


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class _Recorded:
    """A student; and the exact sum of the output layer's gradients that its loss makes."""

    def __init__(self, student: Any, *, hide_main_grad: bool) -> None:
        self.student, self.module = student, student.module
        self.hide_main_grad = hide_main_grad
        self.exact: torch.Tensor | None = None

    def forward_backward(self, batches, loss_fn):
        def recorded(hidden, weight, batch, index):
            copy = weight.detach().clone().requires_grad_()
            if self.exact is None:
                self.exact = torch.zeros_like(weight, dtype=torch.float32)
            copy.main_grad = self.exact
            loss, _ = loss_fn(hidden.detach(), copy, batch, index)
            loss.backward()
            if copy.grad is not None:  # a float32 weight has no buffer of another type
                self.exact += copy.grad
            if self.hide_main_grad:
                weight = weight.view_as(weight)
            return loss_fn(hidden, weight, batch, index)

        return self.student.forward_backward(batches, recorded)


def _gradients(
    folders: tuple[str, str],
    layout: ParallelConfig,
    dtype: str,
    *,
    hide_main_grad: bool = False,
    overlap: bool = False,
) -> tuple[Gradients, torch.Tensor | None, torch.Tensor]:
    """(main gradients of this rank, exact ones of its output layer, rows of it no token reads)."""
    from megatron_tropd.distill.step import forward_backward, micro_batches
    from megatron_tropd.mcore.hidden import output_weight

    parts = build_parts(
        *folders,
        layout,
        replace(TRAIN, tokens_per_micro_batch=64),
        preset("minillm_single_step"),
        dtype=dtype,
        megatron=MegatronConfig(ddp={"overlap_grad_reduce": True} if overlap else {}),
        pad_multiple=2,
    )
    ranks, model = parts.layout, parts.student.module
    trajectories = recorded_trajectories(0)
    batches, counts = micro_batches(parts, trajectories, 0), count_loss_tokens(trajectories)
    recorded = _Recorded(parts.student, hide_main_grad=hide_main_grad)
    assert len(batches) > 1
    parts = replace(parts, student=recorded)
    forward_backward(parts, batches, counts, 0, record=lambda *_: {})
    found = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    unread = torch.ones(model.vocab_size, dtype=torch.bool)
    for batch in batches:
        unread[batch.tokens.flatten()] = False
    exact = recorded.exact
    if exact is not None:
        exact = exact / (counts.teacher + counts.student)
        found["output"] = output_weight(model).main_grad.clone()
        unread = unread.view(ranks.tp_size, -1)[ranks.tp_rank]
    leave_layout()
    return found, exact, unread


def _check_layout(folders: tuple[str, str], name: str) -> None:
    tied = "tied_student" in folders[0]
    expected, _, _ = _gradients(folders, LAYOUTS[name], "float32")
    found, exact, unread = _gradients(folders, LAYOUTS[name], "bfloat16")
    rounded, _, _ = _gradients(folders, LAYOUTS[name], "bfloat16", hide_main_grad=True)
    assert found.keys() == expected.keys() == rounded.keys()
    for parameter, gradient in found.items():
        error = _relative_error(gradient, expected[parameter])
        assert error < 0.03, (name, tied, parameter, error)
    if exact is None:
        return
    # The embedding's part is in the same buffer where the two are tied: rows without it are exact.
    rows = unread if tied else slice(None)
    assert exact[rows].abs().sum() > 0
    ours, theirs = (_relative_error(g["output"][rows], exact[rows]) for g in (found, rounded))
    assert ours < 1e-6 and theirs > 1e-3, (name, tied, ours, theirs)


def _check_overlap(folders: tuple[str, str]) -> None:
    for dtype in ("float32", "bfloat16"):
        expected, _, _ = _gradients(folders, LAYOUTS["dp2"], dtype)
        found, _, _ = _gradients(folders, LAYOUTS["dp2"], dtype, overlap=True)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-7)


def _check_everything(tied: str, untied: str, teacher: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for student in (tied, untied):
        for name in ("tp2", "pp2", "tp2_sequence_parallel"):
            _check_layout((student, teacher), name)
        _check_overlap((student, teacher))


def _in_bfloat16(folder: Path, out: Path) -> str:
    """A copy whose weights bfloat16 holds exactly."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    weights = load_file(out / "model.safetensors")
    weights = {name: value.bfloat16().float() for name, value in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


@pytest.mark.slow
def test_bfloat16_weights_get_float32_gradients_from_the_loss(tmp_path, tiny_model):
    models = {
        "tied_student": tiny_model("llama", tie_word_embeddings=True),
        "untied_student": tiny_model("llama"),
        "teacher": tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5),
    }
    run_with_env(2, _check_everything, *(_in_bfloat16(m, tmp_path / n) for n, m in models.items()))
