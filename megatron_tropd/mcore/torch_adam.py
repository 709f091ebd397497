"""torch's Adam in Megatron's distributed optimizer, where no other brings a fused one."""

import functools
from typing import Any

import torch


def accept_torch_adam() -> None:
    """Let the distributed optimizer load its checkpoints into torch's Adam.

    torch keeps a step count per parameter, from its first step on. Megatron asks a new optimizer
    for it, saves it per group, looks for it per parameter when loading, and gives all parameters
    one tensor, which each then advances.
    """
    from megatron.core.optimizer import distrib_optimizer

    optimizer = distrib_optimizer.DistributedOptimizer
    set_states, load = optimizer._set_main_param_and_optimizer_states, optimizer.load_state_dict
    state_dict = optimizer.state_dict
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(load, "__wrapped__"):
        return

    @functools.wraps(set_states)
    def set_states_without_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # The loader skips what is no tensor. Slices of buffers bring a count of this process.
        set_states(self, model_param, {**tensors, "step": None})

    @functools.wraps(load)
    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(state_dict)
    def state_dict_even_if_new(self: Any) -> dict[str, Any]:
        _fill_adam_states(self.optimizer)
        return state_dict(self)

    optimizer._set_main_param_and_optimizer_states = set_states_without_step
    optimizer.load_state_dict = load_with_own_steps
    optimizer.state_dict = state_dict_even_if_new


def _fill_adam_states(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }
