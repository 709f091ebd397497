"""A gradient that is not finite changes nothing: no weight, no moment of Adam, no learning rate."""

import math

import pytest
import torch
from test_checkpoint import _some_steps, _student
from test_training import LAYOUTS, recorded_trajectories

from megatron_tropd.data.packing import pack
from tests.ranks import leave_layout, run_with_env

BROKEN = "decoder.layers.0.mlp.linear_fc2.weight"


def _state(learner) -> list[torch.Tensor]:
    """Weights and what the optimizer keeps of them."""
    kept = [p.detach() for p in learner.model.parameters()]
    for optimizer in learner.optimizer.chained_optimizers:
        states = optimizer.optimizer.state.items()
        kept += [v for p, state in states for v in (p, *state.values()) if torch.is_tensor(v)]
    return [tensor.detach().clone() for tensor in kept]


def _check(folder: str) -> None:
    import torch.distributed as dist

    from megatron_tropd.mcore.step import NotFinite, cross_entropy

    dist.init_process_group("gloo")
    runs = zip(
        ("tp2", "pp2", "dp2", "dp2_distributed_optimizer"), 2 * ("float32", "bfloat16"), strict=True
    )
    for name, dtype in runs:
        learner, ranks = _student(folder, LAYOUTS[name], dtype)
        _some_steps(learner, ranks, 0, 2)
        how = dict(tokens_per_micro_batch=128, pad_multiple=2, seed=0, step=2)
        batches = pack(
            recorded_trajectories(2), dp_rank=ranks.dp_rank, dp_size=ranks.dp_size, **how
        )
        for value in (math.nan, math.inf):
            learner.forward_backward(batches, cross_entropy)
            mine = [p for n, p in learner.model.named_parameters() if n == BROKEN]
            for weight in mine if dist.get_rank() == 0 or name.startswith("dp2") else []:
                weight.main_grad.view(-1)[0] = value
            before, lr = _state(learner), learner.optimizer.param_groups[0]["lr"]
            with pytest.raises(NotFinite, match=r"The gradient norm is (nan|inf)") as caught:
                learner.update()
            if mine and dist.get_rank() == 0:
                assert BROKEN in str(caught.value)
            after = _state(learner)
            assert all(map(torch.equal, before, after)), (name, dtype)
            assert learner.optimizer.param_groups[0]["lr"] == lr
        # The same step again, with gradients that are numbers.
        (norm,) = _some_steps(learner, ranks, 2, 3)
        assert 0 < norm < math.inf
        assert not all(map(torch.equal, before, _state(learner)))
        leave_layout()


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_model):
    run_with_env(2, _check, str(tiny_model("qwen3")))
