"""What it takes to run Megatron-Core on a machine without a GPU, all in one place.

Megatron-Core 0.19 writes ``device="cuda"`` into its code, keeps its random states in CUDA
generators and asks gradients for the type name ``torch.cuda.FloatTensor``. :func:`patch` points
these at the CPU; models, schedules, DDP, optimizers and dist_checkpointing then run on gloo
unchanged. Megatron's own training loop needs more, :func:`patch_training`.
"""

import contextlib
import dataclasses
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")
FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)


def patch() -> None:
    """Point Megatron-Core at the CPU, for good."""
    torch.compile = _compile_nothing
    _patch_factories()
    _patch_tensors()
    _patch_streams()
    _patch_random_states()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Apex is not installed.*")
        _patch_megatron()


def patch_training() -> None:
    """Let ``megatron.training`` run, too; before it is imported."""
    _patch_device_queries()
    _patch_norms()
    _patch_attention()
    from megatron.core.datasets import utils as dataset_utils

    # A wheel has the compiled helpers, not the Makefile that this looks for.
    if not Path(dataset_utils.__file__).with_name("Makefile").exists():
        dataset_utils.compile_helpers = lambda: None


def _compile_nothing(model: Any = None, **kwargs: Any) -> Any:
    """Stands for ``torch.compile``, which needs a C++ compiler and 5 s for its import alone."""
    return (lambda function: function) if model is None else model


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # for copies to a GPU
        return factory(*args, **kwargs)

    return call


def _patch_factories() -> None:
    # ``with torch.device(...)`` knows the factories by identity, from a list made at first use.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _patch_tensors() -> None:
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    # The optimizers accept gradients and parameters by this name only.
    @functools.wraps(original_type)
    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    def cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign]
    torch.nn.Module.cuda = cuda  # type: ignore[method-assign]


class _Done:
    """Stands for CUDA's streams and events: work on the CPU is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    record = wait = wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Done()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Done") -> float:
        return 0.0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


def _nothing() -> Callable[..., None]:
    """A function that does nothing, another each time: torch._dynamo wants no name twice."""
    return lambda *args, **kwargs: None


def _patch_streams() -> None:
    stream = _Done()
    replacements = {
        "Stream": _Done,
        "Event": _Done,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": _nothing(),
        "synchronize": _nothing(),
        "set_device": _nothing(),
        "empty_cache": _nothing(),
        "current_device": lambda: CPU,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = _nothing()
    torch.cuda.nvtx.range_pop = _nothing()
    torch.Tensor.record_stream = _nothing()  # type: ignore[method-assign]


def _get_state(device: Any = None, **_: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_state(new_state: torch.Tensor, device: Any = None, **_: Any) -> None:
    torch.default_generator.set_state(new_state)


def _patch_random_states() -> None:
    replacements: dict[str, Callable[..., Any]] = {
        "get_rng_state": _get_state,
        "set_rng_state": _set_state,
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
    }
    for module in (torch.cuda, torch.cuda.random):
        for name, value in replacements.items():
            setattr(module, name, value)


def _sizes_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron leaves tensors that are on the CPU as they are; all-to-all wants no tensor."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _lengthened(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _gather_padded(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Gloo gathers equal parts only: those of unequal length (experts' tokens) are padded."""

    @functools.wraps(gather)
    def call(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or not max(output_split_sizes):
            return gather(input_, group, None, *args, **kwargs)
        longest = int(max(output_split_sizes))
        parts = gather(_lengthened(input_, longest), group).split(longest)
        return torch.cat([p[:size] for p, size in zip(parts, output_split_sizes, strict=True)])

    return call


def _reduce_scatter_padded(
    reduce_scatter: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """The transpose of :func:`_gather_padded`."""

    @functools.wraps(reduce_scatter)
    def call(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if input_split_sizes is None or not max(input_split_sizes):
            return reduce_scatter(input_, group, None, *args, **kwargs)
        sizes = [int(size) for size in input_split_sizes]
        padded = torch.cat([_lengthened(part, max(sizes)) for part in input_.split(sizes)])
        return reduce_scatter(padded, group)[: sizes[group.rank()]]

    return call


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Any:
        return _get_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        _set_state(new_state)

    # Here the two are one, and a draw within its context changes it.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in str(record.msg)
    )
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    token_dispatcher.maybe_move_tensor_to_cpu = _sizes_to_cpu
    mappings._gather_along_first_dim = _gather_padded(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_padded(
        mappings._reduce_scatter_along_first_dim
    )


def _for_training(query: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    """``answer`` to those who ask from Megatron's training loop, the truth to everybody else."""

    @functools.wraps(query)
    def call(*args: Any, **kwargs: Any) -> Any:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        return answer if asker.startswith("megatron.training") else query(*args, **kwargs)

    return call


def _patch_device_queries() -> None:
    """The loop refuses to start without CUDA, and asks for the architecture."""
    answers = {"is_available": True, "device_count": 1, "get_device_capability": (10, 0)}
    for name, answer in answers.items():
        setattr(torch.cuda, name, _for_training(getattr(torch.cuda, name), answer))
    from megatron.training import arguments

    arguments.get_device_arch_version = lambda: 10


def _patch_attention() -> None:
    """Our attention for Megatron's own, which refuses context parallelism."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_tropd.mcore.attention import FusedAttention

    def choose(cls: type, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        shared = cls is DotProductAttention and config and config.context_parallel_size > 1
        return object.__new__(FusedAttention if shared else cls)

    DotProductAttention.__new__ = choose


def _patch_norms() -> None:
    """Torch's norms under sequence parallelism: Megatron refuses them as nobody marks the weights.

    Marked, ``finalize_model_grads`` sums their gradients over the tensor-parallel ranks.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build = WrappedTorchNorm.__new__

    def build_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        norm: torch.nn.Module = build(
            cls, dataclasses.replace(config, sequence_parallel=False), *args, **kwargs
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    WrappedTorchNorm.__new__ = build_marked
