"""Weights of a frozen model that lie in the host's memory and visit the device while it scores.

They are never changed, so a visit is a copy that is thrown away: nothing travels back, and a pass
that fails leaves the model as it was. The output layer, which the loss reads later, stays on the
device, and so does what is small: the last norm and all buffers.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.mcore import platform

Offload = Literal["none", "host", "host_by_layer"]
"""``teacher.offload``."""
_PAGE = 4096
_ALIGNED = 512
"""Bytes at whose multiples a parameter begins."""
_AHEAD = 2
"""Parts on the device if they come one by one: one is run while the next arrives."""


class HostWeights:
    """The weights of a model's embedding and layers, in the host's memory."""

    def __init__(self, chunks: Sequence[GPTModel], *, by_layer: bool) -> None:
        """Move them there.

        Args:
            chunks: of a pipeline stage on the device; they can run only inside :meth:`visiting`
                then.
            by_layer: layer after layer visits in every pass, two on the device at a time; else
                all visit together, once for all passes.
        """
        visitors = [_visitors(chunk) for chunk in chunks]
        modules = list(chain.from_iterable(visitors))
        sizes = [_size(module) for module in modules]
        memory = _host_memory(sum(sizes), self)
        self._parts = [
            _Part(module, part) for module, part in zip(modules, memory.split(sizes), strict=True)
        ]
        rest = iter(self._parts)
        self._of_chunk = [list(islice(rest, len(some))) for some in visitors]
        self._by_layer = by_layer
        self._beside = torch.cuda.Stream() if platform.has_cuda() else None
        self._coming: Iterator[_Part] = iter(())
        self._called: deque[_Part] = deque()
        for part in self._parts:
            part.module.register_forward_pre_hook(lambda *_, part=part: part.arrive())
            part.module.register_forward_hook(lambda *_, part=part: self._has_run(part))

    @contextmanager
    def visiting(self, passes: Iterable[int]) -> Iterator[None]:
        """Have the weights on the device when the model's modules want them.

        Args:
            passes: number of the chunk of each pass of the block, in their order.
        """
        if self._by_layer:
            self._coming = chain.from_iterable(self._of_chunk[chunk] for chunk in passes)
            at_once = _AHEAD
        else:
            self._coming, at_once = iter(self._parts), len(self._parts)
        try:
            for _ in range(at_once):
                self._call_next()
            yield
        finally:
            self._coming = iter(())
            self._called.clear()
            for part in self._parts:
                part.leave()

    def _has_run(self, part: "_Part") -> None:
        if self._by_layer:
            self._called.popleft()
            # The only layer of a chunk is also the next one.
            if part not in self._called:
                part.leave()
            self._call_next()

    def _call_next(self) -> None:
        if (part := next(self._coming, None)) is not None:
            if part not in self._called:
                part.come(self._beside)
            self._called.append(part)


class _Place(NamedTuple):
    """Where a module has a parameter, and what it looks like."""

    owner: Module
    name: str
    start: int
    parameter: Parameter
    """On the host."""


class _Part:
    """The weights of one module: a stretch of the host's memory, at times with a copy."""

    def __init__(self, module: Module, memory: Tensor) -> None:
        """Move them to ``memory``, bytes of the host."""
        self.module, self._memory = module, memory
        self._places, start = [], 0
        for owner, name, parameter in _parameters(module):
            mine = _as(parameter, memory[start:])
            mine.data.copy_(parameter.data)
            self._places.append(_Place(owner, name, start, mine))
            start += _room(parameter)
        self._copied: torch.cuda.Event | None = None
        self.leave()

    def come(self, beside: "torch.cuda.Stream | None") -> None:
        """Begin to copy the weights to the device, behind what it was asked for so far."""
        copy = torch.empty(self._memory.shape, dtype=torch.uint8, device=platform.device())
        if beside is None:
            copy.copy_(self._memory)
        else:
            # The allocator may have given us memory that is read until then.
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                copy.copy_(self._memory, non_blocking=True)
                self._copied = beside.record_event()
        for owner, name, start, parameter in self._places:
            owner._parameters[name] = _as(parameter, copy[start:])

    def arrive(self) -> None:
        """Let what the device is asked for from here on wait for the copy."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def leave(self) -> None:
        """Give the copy up, behind what the device was asked for so far."""
        self.arrive()
        for owner, name, _, parameter in self._places:
            owner._parameters[name] = parameter


def _visitors(model: GPTModel) -> list[Module]:
    """The modules whose weights lie on the host, in the order in which a pass calls them."""
    reads_embedding = model.post_process and model.share_embeddings_and_output_weights
    first = [model.embedding] if model.pre_process and not reads_embedding else []
    return [*first, *model.decoder.layers]


def _parameters(module: Module) -> Iterator[tuple[Module, str, Parameter]]:
    for owner in module.modules():
        yield from (
            (owner, name, parameter)
            for name, parameter in owner._parameters.items()
            if parameter is not None
        )


def _size(module: Module) -> int:
    return sum(_room(parameter) for _, _, parameter in _parameters(module))


def _room(parameter: Tensor) -> int:
    return -(-parameter.nbytes // _ALIGNED) * _ALIGNED


def _as(parameter: Parameter, memory: Tensor) -> Parameter:
    """A parameter of the same kind at the beginning of ``memory``."""
    view = memory[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
    made = Parameter(view, requires_grad=False)
    marks = vars(parameter).items()  # Megatron's
    vars(made).update({name: mark for name, mark in marks if name not in vars(made)})
    return made


def _host_memory(size: int, owner: object) -> Tensor:
    """Bytes of the host, page-locked if there is CUDA until ``owner`` is gone.

    torch's own page-locked memory comes in powers of two: of 17 GB it takes 32.

    Raises:
        ConfigError: CUDA refuses.
    """
    if not platform.has_cuda():
        return torch.empty(size, dtype=torch.uint8)
    room = torch.empty(size + 2 * _PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % _PAGE  # pages of nobody else
    address = room.data_ptr() + start
    runtime: Any = torch.cuda.cudart()
    if error := int(runtime.cudaHostRegister(address, -(-size // _PAGE) * _PAGE, 0)):
        raise ConfigError(
            f"teacher.offload needs {size / 1e9:.1f} GB of page-locked memory of the host on each "
            f"rank, which CUDA refuses (error {error}). Give the job more memory, or remove "
            "teacher.offload."
        )
    weakref.finalize(owner, runtime.cudaHostUnregister, address)
    return room[start : start + size]
