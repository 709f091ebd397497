"""bfloat16 training gets float32 gradients of the output layer, through Megatron's own DDP.

The loss adds them to ``main_grad`` instead of handing a bfloat16 tensor to autograd. Checked on the
gradients Megatron's optimizer would see, with several micro-batches: against the same model
computed in float32, against the exact sum of what the loss made of the hidden states it was given,
with and without tied embeddings (whose own gradient goes the usual way to the same buffer), and
with a reduction that overlaps the backward pass, which insists on seeing a gradient.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import LAYOUTS, TRAIN, recorded_trajectories

from megatron_tropd.config import MegatronConfig, ParallelConfig
from megatron_tropd.config.loss import preset
from megatron_tropd.data.packing import count_loss_tokens, pack
from tests.ranks import leave_layout, run_with_env

Gradients = dict[str, torch.Tensor]


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class _Recorded:
    """An objective, and the exact sum of the output layer's gradients it makes."""

    def __init__(self, objective, shadow, *, hide_main_grad: bool) -> None:
        self.objective, self.shadow = objective, shadow
        self.hide_main_grad = hide_main_grad
        self.exact: torch.Tensor | None = None

    def __call__(self, hidden, weight, batch, index):
        copy = weight.detach().clone().requires_grad_()
        if self.exact is None:
            self.exact = torch.zeros_like(weight, dtype=torch.float32)
        copy.main_grad = self.exact
        loss, _ = self.shadow(hidden.detach(), copy, batch, index)
        loss.backward()
        if copy.grad is not None:  # a float32 weight has no buffer of another type
            self.exact += copy.grad
        if self.hide_main_grad:
            weight = weight.view_as(weight)
        return self.objective(hidden, weight, batch, index)


def _gradients(
    folders: tuple[str, str],
    layout: ParallelConfig,
    dtype: torch.dtype,
    *,
    hide_main_grad: bool = False,
    overlap: bool = False,
) -> tuple[Gradients, torch.Tensor | None, torch.Tensor]:
    """(main gradients of this rank, exact ones of its output layer, rows of it no token reads)."""
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.distill.step_loss import StepObjective
    from megatron_tropd.mcore import models, parallel
    from megatron_tropd.mcore.frozen import FrozenModel
    from megatron_tropd.mcore.hidden import output_weight
    from megatron_tropd.mcore.student import Student

    ranks = parallel.initialize(layout, seed=1)
    built = [
        models.build_model(
            HFFolder(Path(folder)),
            ranks=ranks,
            parallel=layout,
            dtype=dtype,
            padded_vocab_size=320,
        )
        for folder in folders
    ]
    options = MegatronConfig(ddp={"overlap_grad_reduce": True} if overlap else {})
    wrapping = {"train": TRAIN, "parallel": layout, "dtype": dtype}
    student = Student(built[0], megatron=options, **wrapping)
    teacher = FrozenModel(built[1], vocab_size=259)
    trajectories = recorded_trajectories(0)
    batches = pack(
        trajectories,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        tokens_per_micro_batch=64,
        pad_multiple=2,
        seed=7,
        step=0,
    )
    counts, signals = count_loss_tokens(trajectories), teacher.score(batches)
    objective, shadow = (
        StepObjective(
            signals,
            config=preset("minillm_single_step"),
            beta=0.5,
            vocab_size=259,
            group=ranks.tp_group,
            counts=counts,
            counted=False,
            device=torch.device("cpu"),
        )
        for _ in range(2)
    )
    recorded = _Recorded(objective, shadow, hide_main_grad=hide_main_grad)
    assert len(batches) > 2
    student.forward_backward(batches, recorded)
    found = {name: p.main_grad.clone() for name, p in built[0].trainable().items()}
    unread = torch.ones(320, dtype=torch.bool)
    for batch in batches:
        unread[batch.tokens.flatten()] = False
    exact = recorded.exact
    if exact is not None:
        exact = exact / (counts.teacher + counts.student)
        found["output"] = output_weight(built[0].module).main_grad.clone()
        unread = unread.view(ranks.tp_size, -1)[ranks.tp_rank]
    leave_layout()
    return found, exact, unread


def _check_layout(folders: tuple[str, str], name: str) -> None:
    tied = "tied_student" in folders[0]
    expected, _, _ = _gradients(folders, LAYOUTS[name], torch.float32)
    found, exact, unread = _gradients(folders, LAYOUTS[name], torch.bfloat16)
    rounded, _, _ = _gradients(folders, LAYOUTS[name], torch.bfloat16, hide_main_grad=True)
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
    for dtype in (torch.float32, torch.bfloat16):
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
