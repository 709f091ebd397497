"""Count where a program on a GPU would make its host wait, while it runs on a CPU.

Two kinds of calls do: those whose result has a size or a value that only the device knows, and
copies between the two that do not say ``non_blocking``. torch's own warning for the first kind
(``torch.cuda.set_sync_debug_mode``) needs a GPU; here every call is looked at as it is dispatched.
A boolean mask as an index is a ``nonzero`` in disguise.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tropd.mcore import cpu

_aten = torch.ops.aten
_ASKS = {
    _aten._local_scalar_dense,
    _aten._unique2,
    _aten.argwhere,
    _aten.bincount,
    _aten.equal,
    _aten.is_nonzero,
    _aten.masked_select,
    _aten.nonzero,
    _aten.unique_consecutive,
    _aten.unique_dim,
}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_READS = (Tensor.tolist, Tensor.cpu, Tensor.numpy)


class _Dispatched(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet, given = func.overloadpacket, kwargs or {}
        asks = packet in _ASKS or (packet in _INDEXED and _has_mask(args[1]))
        if packet == _aten.repeat_interleave and "output_size" not in given:
            asks = any(isinstance(leaf, Tensor) for leaf in tree_leaves(args[1:]))
        if asks:
            self._note(str(packet))
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Calls that on a CPU read memory without a dispatch, or write it where a GPU has a copy."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        given = name in ("tensor", "as_tensor") and not isinstance(args[0], Tensor)
        # Without a device the tensor is the host's.
        uploaded = given and (kwargs or {}).get("device") is not None
        if func in _READS or func is Tensor.new_tensor or uploaded:
            self._note(name)
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices
    )


def _line() -> str:
    """Of whoever calls torch: our package, Megatron, a test."""
    frame = sys._getframe(3)
    while frame.f_back is not None and _is_between(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno}"


def _is_between(name: str) -> bool:
    return "/torch/" in name or name in (cpu.__file__, __file__)


@contextmanager
def host_syncs() -> Iterator[Counter[str]]:
    """Count them within the block.

    Yields:
        "file:line call" -> how often.
    """
    found: Counter[str] = Counter()

    def note(call: str) -> None:
        found[f"{_line()} {call}"] += 1

    with _Called(note), _Dispatched(note):
        yield found
