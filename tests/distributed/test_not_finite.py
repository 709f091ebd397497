"""A gradient that is not finite changes nothing: no weight, no moment of Adam, no learning rate.

One that is too large skips the update, and says so.
"""

import math

import pytest
import torch
from test_checkpoint import TRAIN, _some_steps, _student
from test_training import LAYOUTS, recorded_trajectories

from megatron_tropd.data.packing import pack
from tests.ranks import leave_layout, run_with_env

GATHERED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
BROKEN = "decoder.layers.0.mlp.linear_fc2.weight"


def _state(learner) -> list[torch.Tensor]:
    """Weights and what the optimizer keeps of them."""
    kept = [p.detach() for p in learner.module.parameters()]
    for optimizer in learner.optimizer.chained_optimizers:
        states = optimizer.optimizer.state.items()
        kept += [v for p, state in states for v in (p, *state.values()) if torch.is_tensor(v)]
    return [tensor.detach().clone() for tensor in kept]


def _how(ranks, step: int) -> dict[str, int]:
    how = {"tokens_per_micro_batch": 128, "pad_multiple": 2, "seed": 0, "step": step}
    return how | {"dp_rank": ranks.dp_rank, "dp_size": ranks.dp_size}


def _check(folder: str) -> None:
    import torch.distributed as dist

    from megatron_tropd.mcore.schedule import cross_entropy
    from megatron_tropd.mcore.student import NotFinite

    dist.init_process_group("gloo")
    runs = zip(
        ("tp2", "pp2", "dp2", "dp2_distributed_optimizer"), 2 * ("float32", "bfloat16"), strict=True
    )
    for name, dtype in runs:
        learner, ranks = _student(folder, LAYOUTS[name], dtype)
        _some_steps(learner, ranks, 0, 2)
        batches = pack(recorded_trajectories(2), **_how(ranks, 2))
        for value in (math.nan, math.inf):
            learner.forward_backward(batches, cross_entropy)
            mine = [p for n, p in learner.module.named_parameters() if n == BROKEN]
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


def _skip(folder: str) -> None:
    import torch.distributed as dist

    from megatron_tropd.mcore.schedule import cross_entropy

    dist.init_process_group("gloo")
    for name in ("pp2", "dp2_distributed_optimizer"):
        spread = name.startswith("dp2")
        learner, ranks = _student(
            folder,
            LAYOUTS[name],
            "bfloat16",
            ddp=GATHERED if spread else None,
            optimizer={"decoupled_lr": 0.5},
        )
        if spread and dist.get_rank():
            # Megatron looks at the threshold only on ranks that have a part of the states.
            for optimizer in learner.optimizer.chained_optimizers:
                optimizer.get_parameters = list
        (norm,) = _some_steps(learner, ranks, 0, 1)
        before, lr = _state(learner), learner.scheduler.get_lr({})
        assert lr <= TRAIN.lr < 0.1
        learner.optimizer.config.grad_norm_skip_threshold = norm / 100
        batches = pack(recorded_trajectories(1), **_how(ranks, 1))
        learner.forward_backward(batches, cross_entropy)
        update = learner.update()
        assert update.skipped and update.grad_norm > norm / 100 and update.lr == lr
        assert all(map(torch.equal, before, _state(learner))), name
        learner.optimizer.config.grad_norm_skip_threshold = math.inf
        learner.forward_backward(batches, cross_entropy)
        again = learner.update()
        assert not again.skipped and math.isclose(again.grad_norm, update.grad_norm, rel_tol=1e-6)
        assert again.lr < lr  # the schedule counts steps
        assert not all(map(torch.equal, before, _state(learner)))
        leave_layout()


def test_a_skipped_update_is_told(tiny_model):
    run_with_env(2, _skip, str(tiny_model("qwen3")))


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_model):
    run_with_env(2, _check, str(tiny_model("qwen3")))
