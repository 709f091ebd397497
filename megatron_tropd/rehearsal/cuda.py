"""A process that believes in a GPU: what Python asks of CUDA is answered, nothing is started.

Called before anything of Megatron is imported, so that no difference of a machine without a GPU
(``mcore.cpu``) gets in. There is no way back: a process rehearses and ends.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing import reductions
from torch.utils._pytree import tree_map_only

from megatron_tropd.rehearsal.events import Events
from megatron_tropd.rehearsal.tensors import CPU, CUDA, Device, is_cuda, on_device

_FACTORIES = (
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint"),
    *("randn", "randperm", "zeros"),
)
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")
_MEMORY = 80 * 10**9


def believe(device: Device, *, gpus: int, capability: tuple[int, int] = (9, 0)) -> None:
    """Let this process take the branches of a GPU, and send its tensors to ``device``."""
    torch.utils._device._device_constructors()
    _answer_queries(gpus, capability, device.events)
    _answer_streams(device.events)
    _launch_nothing(device)  # before Megatron decides what to compile
    _answer_random_states()
    _send_factories(device)
    _send_tensors(device)
    _tell_python()
    _tell_cpp()
    _swap_parameters()
    _take_kernels_of_cuda()


def _replace(owner: Any, **replacements: Any) -> None:
    for name, value in replacements.items():
        setattr(owner, name, value)


def _answer_queries(gpus: int, capability: tuple[int, int], events: Events) -> None:
    properties = type(
        "Properties",
        (),
        {
            "name": "rehearsed GPU",
            "total_memory": _MEMORY,
            "multi_processor_count": 132,
            "major": capability[0],
            "minor": capability[1],
            "uuid": "rehearsed",
        },
    )()
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "device_count": lambda: gpus,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: events.wait("synchronize"),
    }
    _replace(torch.cuda, **replacements)
    _replace(torch.accelerator, current_device_index=lambda: 0)
    _replace(torch.cuda, cudart=_Runtime)
    _replace(FakeTensor, data_ptr=lambda self: 0)
    # What another process needs to open a tensor of the device.
    _replace(reductions, reduce_tensor=lambda tensor: (None, (tensor.shape,)))
    # Of the optimizers: whether a graph is being captured; whether tensors are many at a time.
    _replace(torch.optim.Optimizer, _accelerator_graph_capture_health_check=lambda self: None)
    for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
        importlib.import_module(module)._foreach_supported_types.append(FakeTensor)


class _Runtime:
    """CUDA's library, as far as the trainer calls it itself: page-locked memory."""

    def _done(self, *args: Any) -> int:
        return 0

    cudaHostRegister = cudaHostUnregister = _done


class _Stream:
    events: Events

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device, self.cuda_stream = CUDA, 0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = _nothing

    def synchronize(self) -> None:
        self.events.wait("synchronize a stream")

    def record_event(self, event: Any = None) -> Any:
        return event or torch.cuda.Event()

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5


class _Event:
    events: Events

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    record = wait = _nothing

    def synchronize(self) -> None:
        self.events.wait("synchronize an event")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _answer_streams(events: Events) -> None:
    # Classes, as annotations have them.
    known = {"events": events}
    stream_type, event_type = (type(one.__name__, (one,), known) for one in (_Stream, _Event))
    stream = stream_type()
    replacements: dict[str, Any] = {
        "Stream": stream_type,
        "Event": event_type,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
    }
    _replace(torch.cuda, **replacements)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_, **__: None)


def _answer_random_states() -> None:
    generator = torch.default_generator

    def get_state(device: Any = None, **_: Any) -> Tensor:
        return generator.get_state()

    def set_state(state: Tensor, device: Any = None, **_: Any) -> None:
        generator.set_state(state)

    seed = generator.manual_seed
    for module in (torch.cuda, torch.cuda.random):
        _replace(module, get_rng_state=get_state, set_rng_state=set_state)
        _replace(module, manual_seed=seed, manual_seed_all=seed)
    from megatron.core.tensor_parallel import random

    _replace(
        random,
        _get_cuda_rng_state=lambda device=None, clone=False, graph_safe=False: get_state(),
        _set_cuda_rng_state=lambda state, device=-1, graph_safe=False: set_state(state),
    )


def _send_factories(device: Device) -> None:
    def sent(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> Tensor:
            wanted = kwargs.get("device")
            if is_cuda(wanted):
                kwargs["device"] = CUDA
                return factory(*args, **kwargs)
            kwargs.pop("pin_memory", None)
            with device.host():
                return factory(*args, **kwargs)

        return call

    def sent_like(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(factory)
        def call(like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            wanted = kwargs.pop("device", None)
            if str(wanted) == "meta":
                dtype = kwargs.get("dtype") or like.dtype
                return torch.empty(like.shape, dtype=dtype, device="meta")
            if wanted is not None and is_cuda(wanted) != on_device(like):
                like = (
                    device.blank(like.shape, like.dtype, CUDA)
                    if is_cuda(wanted)
                    else device.like_on_host(like)
                )
            return factory(like, *args, **kwargs)

        return call

    def from_data(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(factory)
        def call(data: Any, *args: Any, **kwargs: Any) -> Tensor:
            wanted = kwargs.pop("device", None)
            kwargs.pop("pin_memory", None)
            if on_device(data):
                return data
            if isinstance(data, (list, tuple)):
                data = tree_map_only(FakeTensor, lambda number: number.item(), data)
            with device.host():
                made = factory(data, *args, **kwargs)
            return device.to_device(made) if is_cuda(wanted) else made

        return call

    for names, wrap in (
        (_FACTORIES, sent),
        (_LIKE, sent_like),
        (("tensor", "as_tensor"), from_data),
    ):
        for name in names:
            setattr(torch, name, wrap(getattr(torch, name)))


def _send_tensors(device: Device) -> None:
    original_to = Tensor.to

    @functools.wraps(original_to)
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted, args = _wanted_device(args, kwargs)
        waits = not kwargs.pop("non_blocking", False)
        if wanted is None or is_cuda(wanted) == on_device(self):
            return original_to(self, *args, **kwargs) if args or kwargs else self
        dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
        if is_cuda(wanted):
            return device.to_device(self, dtype=dtype, noted=waits)
        return device.to_host(self, dtype=dtype, waits=waits)

    def cuda(self: Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        return self.to("cuda", non_blocking=non_blocking)

    def cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def reading(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            return original(device.to_host(self) if on_device(self) else self, *args, **kwargs)

        return call

    def asking(original: Callable[..., Tensor], answer: bool) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def call(tensor: Tensor) -> Tensor:
            return device.finite(tensor, answer) if on_device(tensor) else original(tensor)

        return call

    _replace(Tensor, to=to, cuda=cuda, cpu=cpu)
    for owner in (torch, Tensor):
        for name, answer in (("isnan", False), ("isinf", False), ("isfinite", True)):
            setattr(owner, name, asking(getattr(owner, name), answer))
    del FakeTensor.tolist  # asks for one number after the other
    for name in ("tolist", "numpy", "__array__"):
        setattr(Tensor, name, reading(getattr(Tensor, name)))
    _replace(
        Tensor, pin_memory=lambda self, *_, **__: self, record_stream=lambda self, stream: None
    )


def _wanted_device(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple]:
    """The device that ``Tensor.to`` was given, and the other arguments."""
    if "device" in kwargs:
        return kwargs.pop("device"), args
    if args and isinstance(args[0], Tensor):
        return args[0].device, (args[0].dtype, *args[1:])
    if args and not isinstance(args[0], torch.dtype):
        if len(args) > 2:
            kwargs["non_blocking"] = args[2]
        return args[0], args[1:2]
    return None, args


def _tell_python() -> None:
    """What fake tensors say of themselves."""
    original_type = Tensor.type

    @functools.wraps(original_type)
    def type_name(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)
        # C++ names a fake tensor by the device it takes it to be on.
        name = original_type(self).replace("torch.cuda.", "torch.")
        return name.replace("torch.", "torch.cuda.", 1) if on_device(self) else name

    _replace(Tensor, type=type_name)
    _replace(
        FakeTensor,
        is_cuda=property(lambda self: self.device.type == "cuda"),
        is_cpu=property(lambda self: self.device.type == "cpu"),
        get_device=lambda self: 0 if on_device(self) else -1,
    )


def _tell_cpp() -> None:
    """Autograd's engine wants a driver for what is on CUDA: to C++ all is on the CPU."""
    _replace(fake_tensor, init_gpu_context=lambda device=None: None)

    def device_of(args: Any) -> torch.device:
        return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else CPU

    fake_tensor._DISPATCH_META_HANDLERS[torch.ops.prim.device.default] = device_of
    original = FakeTensor.__torch_dispatch__.__func__  # type: ignore[attr-defined]

    def dispatch(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return device_of(args)
        return original(cls, func, types, args, kwargs or {})

    _replace(FakeTensor, __torch_dispatch__=classmethod(dispatch))


def _swap_parameters() -> None:
    """``Module.to`` and its kin for fake parameters, whose data torch does not let one exchange.

    As on a GPU a parameter keeps what is written on it (marks of Megatron) when it moves.
    """

    def apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                applied = fn(parameter)
            if applied is parameter:
                continue
            if not isinstance(applied, FakeTensor):
                parameter.data = applied
                continue
            moved = torch.nn.Parameter(applied, parameter.requires_grad)
            marks = vars(parameter).items()
            vars(moved).update({k: v for k, v in marks if k not in vars(moved)})
            self._parameters[name] = moved
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    _replace(torch.nn.Module, _apply=apply)


def _launch_nothing(device: Device) -> None:
    """Compiled functions are one kernel each; Triton's are noted, their outputs exist already."""

    def compile(model: Any = None, **kwargs: Any) -> Any:
        if model is None:
            return lambda function: compile(function, **kwargs)
        if isinstance(model, torch.nn.Module):
            return model

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            with device.tracker.one_kernel():
                return model(*args, **kwargs)

        return call

    _replace(torch, compile=compile)
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        device.events.kernel(self.fn.__name__)

    _replace(JITFunction, run=run)


def _take_kernels_of_cuda() -> None:
    """Functions of torch that choose a kernel in C++, which takes the tensors to be on the CPU."""
    from torch.nn.attention import bias

    functional, aten, lower_right = torch.nn.functional, torch.ops.aten, object()
    original_norm, original_attention = functional.rms_norm, functional.scaled_dot_product_attention

    @functools.wraps(original_norm)
    def rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        if not on_device(x):
            return original_norm(x, shape, weight, eps)
        return aten._fused_rms_norm(x, shape, weight, eps)[0]

    @functools.wraps(original_attention)
    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if not on_device(query):
            return original_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        if attn_mask is None or attn_mask is lower_right:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal or attn_mask is not None, scale=scale
            )[0]
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]

    _replace(functional, rms_norm=rms_norm, scaled_dot_product_attention=attention)
    _replace(bias, causal_lower_right=lambda *lengths: lower_right)
