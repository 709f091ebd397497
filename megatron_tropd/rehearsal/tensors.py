"""Fake tensors that say they are on a GPU, and what little of them has to be known.

Three layers of torch are told different things. Python code (ours, Megatron's) sees ``cuda:0``, so
that it takes the branches of a GPU, and a mix of devices fails. C++ sees the CPU, since autograd
would ask a driver for the streams of a CUDA device. Kernels see "meta": nothing is computed.

Tensors of the host stay real. What comes from the host and is small (ids, masks, shapes) is *known*
on the device, too: operations on known integers are also done on the host. So a mask has as many
places as the real one would have. Numbers are not known; every number is taken to be finite.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from megatron_tropd.base.errors import InputError
from megatron_tropd.rehearsal.events import Events, line_running
from megatron_tropd.rehearsal.memory import Tracker

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
_LARGEST_KNOWN = 2**22
"""Elements of a tensor whose values are kept."""
_aten = torch.ops.aten
_FILLED = {
    *(_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default),
    *(_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
    *(_aten.zero_.default, _aten.fill_.Scalar),
}
"""Operations whose values do not follow from those of their tensor."""
_COUNTED = (_aten.nonzero.default, _aten.masked_select.default)
_INDEX = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Any, eps: Any) -> tuple[Tensor, Tensor]:
    statistics = x.shape[: x.dim() - len(shape)] + (1,) * len(shape)
    return torch.empty_like(x), x.new_empty(statistics, dtype=torch.float32)


def _rms_norm_backward(
    grad: Tensor, x: Tensor, shape: Any, rstd: Tensor, weight: Any, wanted: Sequence[bool]
) -> tuple[Any, Any]:
    wants_weight = weight is not None and wanted[1]
    return (
        torch.empty_like(x) if wanted[0] else None,
        torch.empty_like(weight) if wants_weight else None,
    )


_BY_SHAPE = {
    _aten._fused_rms_norm.default: _rms_norm,
    _aten._fused_rms_norm_backward.default: _rms_norm_backward,
    # Asks C++ for the device twice, and gets two answers.
    _aten.ones_like.default: lambda x, **options: _aten.full_like.default(x, 1, **options),
}
"""Kernels of CUDA for which torch has no fake ones: what they give, by its shape."""


class CannotRehearse(InputError):
    """The step asks for something that only values on the device decide."""


def is_cuda(device: Any) -> bool:
    """Whether a device, its name or its number means the GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def on_device(tensor: Any) -> bool:
    """Whether a tensor is a fake one on the GPU."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def known(tensor: Tensor) -> Tensor | None:
    """The values of a tensor, if the rehearsal has them."""
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "_rehearsed_values", None)
    return tensor


def set_known(tensor: Tensor, values: Tensor | None) -> None:
    """Keep values of a fake tensor, or forget them; numbers are never kept."""
    if not isinstance(tensor, FakeTensor):
        return
    if values is not None and not (_is_knowable(values) and tensor.shape == values.shape):
        values = None
    tensor._rehearsed_values = values  # type: ignore[attr-defined]


class Device(TorchDispatchMode):
    """Runs every operation of a process that rehearses."""

    def __init__(self, tracker: Tracker, events: Events) -> None:
        """Nothing is on the device yet."""
        super().__init__()
        self.fake = FakeTensorMode()
        self.tracker, self.events = tracker, events
        self.host_tracker = Tracker(line_running)
        """Of large tensors of the host."""
        self.collective: Callable[..., Any] | None = None
        """Answers operations of process groups."""
        self._host = False

    @contextmanager
    def host(self) -> Iterator[None]:
        """The block's factories make real tensors, as Python asked for the host."""
        outer, self._host = self._host, True
        try:
            yield
        finally:
            self._host = outer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do ``func`` on fake tensors, and on the values of those that are known."""
        kwargs = kwargs or {}
        if func.namespace == "c10d" and self.collective is not None:
            return self.collective(func, args, kwargs)
        tensors = _tensors_of(args, kwargs)
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not fakes:
            return self._factory(func, args, kwargs)
        if func is _aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if kwargs.get("device") is not None:
            # Python's wish for another device was answered before; this is what C++ believes.
            kwargs = kwargs | {"device": fakes[0].device}
        return self._operate(func, args, kwargs, tensors)

    def _factory(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if str(kwargs.get("device")) == "meta":
            return func(*args, **kwargs)
        if not is_cuda(kwargs.get("device")):
            # C++ takes fake tensors to be on the CPU: what the engine of autograd makes like them
            # belongs on the device. Python says where it wants what.
            if not self._host and "device" in kwargs and _in_backward():
                kwargs = kwargs | {"device": CUDA}
            elif not _is_large(args):
                return func(*args, **kwargs)
        with self.fake:
            out = func(*args, **kwargs)
        self._note(out)
        if _is_knowable(out) and "empty" not in func.name():
            set_known(out, func(*args, **kwargs | {"device": CPU}))
        return out

    def _operate(
        self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        values = self._values(func, args, kwargs, tensors)
        if func is _aten.index_put_.default and _is_fill(args):
            mask = args[1][0]
            shape = [*mask.shape, *[1] * (args[0].dim() - mask.dim())]
            mask = self._operate(_aten.view.default, (mask, shape), {}, [mask])
            func, args = _aten.masked_fill_.Tensor, (args[0], mask, args[2])
        elif func in _COUNTED or (func in _INDEX and _has_mask(args)):
            return self._counted(func, args, kwargs, values)
        if func in _INDEX and any(i is not None and not on_device(i) for i in args[1]):
            self.events.wait("index from the host")
        if func is _aten.copy_.default and on_device(args[1]) and not on_device(args[0]):
            # torch's fake result would be on the GPU, with the host's memory behind it.
            if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self.events.wait("to the host")
            return args[0]
        run = _BY_SHAPE.get(func, func)
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            args, kwargs = self._faked(args), self._faked(kwargs)
        with self.fake:
            out = run(*args, **kwargs)
        self._note(out)
        if values is not None:
            for fake, value in zip(_tensors(out), _tensors(values), strict=False):
                set_known(fake, value)
        return out

    def _values(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """The result of ``func`` on known values; None if one is not."""
        if func in _FILLED and all(t.numel() <= _LARGEST_KNOWN for t in tensors):
            blank = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
            return func(
                blank, *args[1:], **kwargs | ({"device": CPU} if "device" in kwargs else {})
            )
        if any(known(t) is None or t.numel() > _LARGEST_KNOWN for t in tensors):
            if func._schema.is_mutable:
                self._forget_written(func, args, kwargs)
            return None
        args, kwargs = tree_map_only(Tensor, known, (args, kwargs))
        if is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": CPU}
        return func(*args, **kwargs)

    def _forget_written(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(value):
                set_known(tensor, None)

    def _counted(self, func: Any, args: tuple, kwargs: dict[str, Any], values: Any) -> Any:
        """An operation whose shape depends on a mask."""
        self.events.wait("nonzero" if func in _COUNTED else "boolean mask")
        if func is _aten.nonzero.default:
            if values is None:
                raise self._unknown("the number of places in a mask")
            return self.to_device(values, noted=False)
        if func is _aten.masked_select.default:
            args = (args[0], [args[1]])
        indices: list[Any] = []
        for index in args[1]:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                indices.append(index)
                continue
            mask = known(index)
            if mask is None:
                raise self._unknown("the number of places in a mask")
            indices += [self.to_device(i, noted=False) for i in mask.nonzero().unbind(1)]
        name = _aten.index.Tensor if func in _COUNTED else func
        args = (args[0], indices, *args[2:])
        return self._operate(name, args, kwargs, _tensors_of(args, kwargs))

    def _unknown(self, what: str) -> CannotRehearse:
        return CannotRehearse(
            f"{line_running()} asks the device for {what}, which depends on numbers that a "
            "rehearsal does not compute."
        )

    def _scalar(self, tensor: Tensor) -> Any:
        if on_device(tensor):
            self.events.wait("item")
        return self._made_up(tensor).item()

    def _made_up(self, tensor: Tensor) -> Tensor:
        values = known(tensor)
        return torch.ones(tensor.shape, dtype=tensor.dtype) if values is None else values

    def _faked(self, values: Any) -> Any:
        def fake(tensor: Tensor) -> Tensor:
            if isinstance(tensor, FakeTensor):
                return tensor
            return self.fake.from_tensor(tensor)

        return tree_map_only(Tensor, fake, values)

    def _note(self, out: Any) -> None:
        for tensor in _tensors(out):
            if isinstance(tensor, FakeTensor):
                (self.tracker if on_device(tensor) else self.host_tracker).note(tensor)

    def to_device(self, tensor: Tensor, *, noted: bool = True, dtype: Any = None) -> Tensor:
        """A copy of a tensor of the host on the GPU, for which the host waits."""
        if noted:
            self.events.wait("to the device")
        dtype = dtype or tensor.dtype
        fake = self.blank(tensor.shape, dtype, CUDA, stride=tensor.stride())
        self._note(fake)
        values = known(tensor)
        set_known(fake, None if values is None else values.to(dtype))
        return fake

    def to_host(self, tensor: Tensor, *, dtype: Any = None, waits: bool = True) -> Tensor:
        """A copy on the host: real if it is small, with made-up numbers; fake if it is large."""
        if waits:
            self.events.wait("to the host")
        dtype = dtype or tensor.dtype
        if tensor.numel() <= _LARGEST_KNOWN:
            return self._made_up(tensor).to(dtype).clone()
        return self.blank(tensor.shape, dtype, CPU)

    def finite(self, tensor: Tensor, answer: bool) -> Tensor:
        """Whether numbers are finite, infinite or none: all are taken to be finite."""
        with self.host():
            values = torch.full(tensor.shape, answer)
        return self.to_device(values, noted=False)

    def like_on_host(self, tensor: Tensor) -> Tensor:
        """A tensor of the host with the same shape and type, without a copy."""
        if tensor.numel() > _LARGEST_KNOWN:
            return self.blank(tensor.shape, tensor.dtype, CPU)
        with self.host():
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    def blank(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        stride: Sequence[int] | None = None,
    ) -> Tensor:
        """A fake tensor that nothing is known of and nobody counts."""
        made = torch.empty(shape, dtype=dtype, device="meta")
        if stride is not None:
            made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(self.fake, made, device)


def _is_knowable(out: Any) -> bool:
    is_small = isinstance(out, Tensor) and out.numel() <= _LARGEST_KNOWN
    return is_small and not out.dtype.is_floating_point


def _is_large(args: tuple) -> bool:
    """Whether a factory is asked for more than a laptop should hold."""
    if not args or not isinstance(args[0], list):
        return False
    return all(isinstance(size, int) for size in args[0]) and prod(args[0]) > _LARGEST_KNOWN


def _in_backward() -> bool:
    return torch._C._current_autograd_node() is not None


def _is_fill(args: tuple) -> bool:
    """Whether torch fills the places of a mask with one number, for which nobody has to wait."""
    return len(args[1]) == 1 and _has_mask(args) and args[2].numel() == 1 and len(args) < 4


def _has_mask(args: tuple) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _tensors_of(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments of an operation, and in lists of them."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [one for one in value if isinstance(one, Tensor)]
    return found


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if values is None:
        return []
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]
