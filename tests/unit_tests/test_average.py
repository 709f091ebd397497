"""The average of the weights: what a checkpoint does with it leaves the student trainable."""

from typing import Any

import torch

from megatron_tropd.mcore.average import Average


class _Model:
    """Two layers, in the type of a GPU's student."""

    def __init__(self) -> None:
        self.chunks = [torch.nn.Linear(2, 2, dtype=torch.bfloat16) for _ in range(2)]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {f"{n}.{name}": p for n, c in enumerate(self.chunks) for name, p in _named(c)}

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return {name: p.detach() for name, p in self.trainable().items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for name, parameter in self.trainable().items():
            parameter.copy_(state[name])


def _named(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(module.named_parameters())


def test_a_checkpoint_of_an_average_leaves_the_hooks_of_gradients() -> None:
    """Megatron's are on the nodes that add gradients up, which a change of type throws away."""
    model = _Model()
    average, met = Average(model, decay=0.5), []
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.trainable().values()]
    for node in nodes:
        node.register_hook(lambda *_: met.append(1))
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    state = average.state({})
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    average.restore({name: tensor + 1 for name, tensor in state.items()})
    with average.in_place():
        for name, parameter in model.trainable().items():
            torch.testing.assert_close(parameter.detach(), (before[name].float() + 1).bfloat16())
    for name, parameter in model.trainable().items():
        assert torch.equal(parameter, before[name])
    sum(p.float().sum() for p in model.trainable().values()).backward()
    assert len(met) == len(nodes)
