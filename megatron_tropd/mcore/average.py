"""An exponential moving average of the weights that are trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch import Tensor
from torch.nn import Module, Parameter

_PREFIX = "average."
"""Of its tensors' names in a checkpoint."""


class Averaged(Protocol):
    """What an average asks of a ``StudentModel``."""

    @property
    def chunks(self) -> Sequence[Module]:
        """The modules that have them."""

    def trainable(self) -> Mapping[str, Parameter]:
        """Find the parameters that are averaged."""

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Describe what a checkpoint holds of what they hold now."""

    def restore(self, state: dict[str, Any]) -> None:
        """Copy into them what was described, loaded."""


class Average:
    """This rank's part of the average, in float32: small steps would be lost in bfloat16."""

    def __init__(self, model: Averaged, *, decay: float) -> None:
        """Begin with the weights as they are.

        Args:
            model: whose trained weights are averaged.
            decay: share of the average that an update keeps.
        """
        self._model, self._decay = model, decay
        self._of = {n: p.detach().float().clone() for n, p in model.trainable().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights as they are; not at all if they are the average already."""
        for name, parameter in self._model.trainable().items():
            self._of[name].lerp_(parameter.float(), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the model with the average, in the model's type, while the block lasts."""
        types = {name: p.dtype for name, p in self._model.trainable().items()}
        with self._instead({name: own.to(types[name]) for name, own in self._of.items()}):
            yield

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Describe what a checkpoint holds of it, sharded as the model is."""
        with self._parameters_instead():
            state = self._model.state(metadata)
            dict_list_map_inplace(_kept, state)  # what the parameters hold now, not later
        add_prefix_for_sharding(state, _PREFIX)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` described, loaded."""
        with self._parameters_instead():
            self._model.restore(state)

    @contextmanager
    def _instead(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the parameters hold other tensors of their types while the block lasts."""
        trained = self._model.trainable()
        held = {name: parameter.data for name, parameter in trained.items()}
        try:
            for name, parameter in trained.items():
                parameter.data = tensors[name]
            yield
        finally:
            for name, parameter in trained.items():
                parameter.data = held[name]

    @contextmanager
    def _parameters_instead(self) -> Iterator[None]:
        """Let the modules have the average itself as their parameters while the block lasts.

        A parameter that held a tensor of another type, however shortly, would lose the hook by
        which Megatron takes up its gradients.
        """
        other = {}
        for name, parameter in self._model.trainable().items():
            other[id(parameter)] = own = Parameter(self._of[name], parameter.requires_grad)
            vars(own).update(vars(parameter))
        places: list[tuple[dict[str, Parameter | None], str, Parameter]] = [
            (module._parameters, key, held)
            for chunk in self._model.chunks
            for module in chunk.modules()
            for key, held in module._parameters.items()
            if held is not None and id(held) in other
        ]
        try:
            for parameters, key, held in places:
                parameters[key] = other[id(held)]
            yield
        finally:
            for parameters, key, held in places:
                parameters[key] = held


def _kept(part: Any) -> Any:
    if isinstance(part, ShardedBase) and isinstance(getattr(part, "data", None), Tensor):
        part.data = part.data.detach()
    return part
