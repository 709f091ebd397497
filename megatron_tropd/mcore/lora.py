"""A student whose own weights are frozen, with low-rank adapters beside its linear layers.

An adapter is a module of its layer, W x + alpha / rank B A x, and is sharded as the layer is:

=================  ==================  ======================================
layer              sharded             between A and B
=================  ==================  ======================================
linear_qkv, _fc1   B, by rows          nothing; all-gather of [s, b, rank]
linear_proj, _fc2  A, by columns       all-reduce; reduce-scatter of the same
=================  ==================  ======================================

(without and with sequence parallelism). The other matrix is on all tensor-parallel ranks. Experts'
tokens are gathered and summed by their dispatcher, so that between A and B of theirs nothing is
sent; the gradient of the matrix that is on all of an expert's ranks is summed over them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_tropd.config import LoraConfig
from megatron_tropd.convert.adapters import (
    COLUMN_PARALLEL,
    FirstAdapters,
    adapter_plan,
    check_lora,
    target_of,
)
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.mcore.dense import DenseModel
from megatron_tropd.mcore.weights import export_entries, export_weights, fill, in_whole_model

_BETWEEN: dict[tuple[bool, bool], Callable[[Tensor], Tensor]] = {
    (True, False): copy_to_tensor_model_parallel_region,
    (True, True): gather_from_sequence_parallel_region,
    (False, False): reduce_from_tensor_model_parallel_region,
    (False, True): reduce_scatter_to_sequence_parallel_region,
}
"""(rows are sharded, sequence parallelism) -> what happens to A x."""
_ADAPTER = "adapter"
"""Name of an adapter within its layer."""


class Adapter(Module):
    """A and B of one linear layer on this rank."""

    A: Parameter
    """[rank, in / t]: t is 1 unless the layer's columns are sharded."""
    B: Parameter
    """[out / t, rank]; beside gate and up projection [2, out / 2t, rank], so that one dimension
    is sharded, whatever the layout."""

    def __init__(self, layer: Any, target: str, lora: LoraConfig, *, is_expert: bool) -> None:
        """Make zeros beside a layer.

        Args:
            layer: this rank's part of it.
            target: its name.
            lora: the settings.
            is_expert: whether it belongs to an expert.
        """
        super().__init__()
        weight: Tensor = layer.weight
        self.is_column, self.is_expert = target in COLUMN_PARALLEL, is_expert
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        halves = (2, weight.shape[0] // 2) if target == "linear_fc1" else (weight.shape[0],)
        self.A = Parameter(weight.new_zeros(lora.rank, weight.shape[1]))
        self.B = Parameter(weight.new_zeros(*halves, lora.rank))
        self.sharded_dim = len(halves) - 1 if self.is_column else 1
        self._lay_out(layer.config.sequence_parallel)
        # Not a child: its parameters are the layer's.
        self._norm = partial(_fused_norm, layer) if hasattr(layer, "layer_norm_weight") else None

    @property
    def sharded(self) -> Parameter:
        """The matrix of which each tensor-parallel rank has a part."""
        return self.B if self.is_column else self.A

    @property
    def shared(self) -> Parameter:
        """The matrix that is on all of them."""
        return self.A if self.is_column else self.B

    def _lay_out(self, sequence_parallel: bool) -> None:
        """Choose what is sent between A and B, and tell Megatron how both are laid out."""
        set_tensor_model_parallel_attributes(self.sharded, True, self.sharded_dim, 1)
        self._between: Callable[[Tensor], Tensor] = _as_it_is
        self._shared_of: Callable[[Tensor], Tensor] = _as_it_is
        if self.is_expert:
            group = parallel_state.get_expert_tensor_parallel_group()
            # Forward as it is; the gradient is summed.
            self._shared_of = partial(copy_to_tensor_model_parallel_region, group=group)
            self.A.allreduce = self.B.allreduce = False  # type: ignore[attr-defined]
            input_is_shared = self.is_column and group.size() > 1
            of_a_part: tuple[str, ...] = (get_expert_parallel_rng_tracker_name(),)
        else:
            # It sees a part of the positions: Megatron sums such gradients.
            self.shared.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            self._between = _BETWEEN[self.is_column, sequence_parallel]
            input_is_shared = self.is_column and not sequence_parallel
            of_a_part = ()
        # Ranks that have the same input drop the same of it.
        of_all = (get_data_parallel_rng_tracker_name(),)
        self._random_state: tuple[str, ...] = of_all if input_is_shared else of_a_part

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in / t] or a part of the positions -> [..., out / t], to be added."""
        if self._norm is not None:
            inputs = self._norm(inputs)
        if self.training and self.dropout:
            with get_cuda_rng_tracker().fork(*self._random_state):
                inputs = F.dropout(inputs, self.dropout)
        first: Tensor = self.A
        last: Tensor = self.B.flatten(0, -2)
        if self.is_column:
            first = self._shared_of(first)
        else:
            last = self._shared_of(last)
        return F.linear(self._between(F.linear(inputs, first)) * self.scale, last)

    def delta(self) -> Tensor:
        """[out / t, in / t] float32: what the adapter adds to the layer's weight."""
        return self.scale * (self.B.flatten(0, -2).float() @ self.A.float())


class LoraModel:
    """This rank's part of a frozen Megatron model with adapters; a
    :class:`~megatron_tropd.mcore.student.StudentModel` whose adapters are trained and saved, and
    which is given away merged.
    """

    def __init__(self, base: DenseModel, lora: LoraConfig, *, seed: int) -> None:
        """Put adapters, which change nothing yet, into a model.

        Args:
            base: the model, not wrapped; its weights are loaded.
            lora: the settings.
            seed: of the first A.

        Raises:
            ConfigError: the model cannot have them.
        """
        self.chunks, self.layout, self.lora = base.chunks, base.layout, lora
        self.hf_config, self._base = base.hf_config, base
        self.shape = model_shape(base.hf_config)
        grouped = bool(base.module.config.moe_grouped_gemm)
        check_lora(self.shape, lora, grouped_experts=grouped)
        self._layers = _attach(base.chunks, lora)
        self.entries = adapter_plan(base.hf_config, lora)
        first = FirstAdapters(self.entries, seed)
        fill(self.trainable(), self.entries, self.shape, first, self.layout)
        if self.layout.is_first_stage:
            # Else nothing before the first adapter would have a gradient, and Megatron's
            # recomputation would end there.
            base.chunks[0].embedding.register_forward_hook(_ask_for_gradient)

    @property
    def module(self) -> GPTModel:
        """The last chunk."""
        return self.chunks[-1]

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Run the model as if it had no adapters, while the block lasts."""
        adapters = {name: layer._modules.pop(_ADAPTER) for name, layer in self._layers.items()}
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                layer._modules[_ADAPTER] = adapters[name]

    def load(self, source: HFFolder | MegatronFolder) -> None:
        """Fill the frozen weights; the adapters stay as they are."""
        with self.base_only():
            self._base.load(source)

    def adapters(self) -> dict[str, Adapter]:
        """Find this rank's adapters by the names of their layers."""
        return {name: layer.get_submodule(_ADAPTER) for name, layer in self._layers.items()}  # type: ignore[misc]

    def trainable(self) -> dict[str, Parameter]:
        """Find A and B of all adapters."""
        return {
            f"{name}.{_ADAPTER}.{matrix}": getattr(adapter, matrix)
            for name, adapter in self.adapters().items()
            for matrix in "AB"
        }

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Describe the adapters; the frozen weights are in the folder they came from."""
        return {
            f"{name}.{_ADAPTER}.{matrix}": self._described(name, adapter, matrix)
            for name, adapter in self.adapters().items()
            for matrix in "AB"
        }

    def _described(self, name: str, adapter: Adapter, matrix: str) -> ShardedTensor:
        """A matrix in the checkpoint: all layers, and all experts of a layer, are one tensor."""
        layout, data = self.layout, getattr(adapter, matrix)
        before, key = self._offsets(name)
        tp_rank, tp_size, replica = layout.tp_rank, layout.tp_size, layout.loss_group.rank()
        if adapter.is_expert:
            tp_rank, tp_size = layout.expert_shard()
            replica = parallel_state.get_expert_data_parallel_rank()
        offsets = [(axis, part, count) for axis, (part, count) in enumerate(before)]
        if data is adapter.sharded:
            offsets.append((len(before) + adapter.sharded_dim, tp_rank, tp_size))
            tp_rank = 0
        return ShardedTensor.from_rank_offsets(
            f"{key}.{_ADAPTER}.{matrix}",
            data,
            *offsets,
            replica_id=(0, tp_rank, replica),
            prepend_axis_num=len(before),
        )

    def _offsets(self, name: str) -> tuple[list[tuple[int, int]], str]:
        """(layer, of how many), perhaps (expert, of how many), and the name without both."""
        parts = name.split(".")
        offsets = [(int(parts.pop(2)), self.shape.layers)]
        if "local_experts" in parts and self.shape.experts is not None:
            count, at = self.shape.experts.count, parts.index("local_experts") + 1
            mine = self.layout.ep_rank * count // self.layout.ep_size
            offsets.append((mine + int(parts.pop(at)), count))
        return offsets, ".".join(parts)

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Copy the adapters from a loaded state."""
        for name, parameter in self.trainable().items():
            parameter.copy_(state[name])

    def exported(
        self,
        receivers: Sequence[int] = (0,),
        *,
        vocab_size: int | None = None,
        dtype: torch.dtype | None = None,
        explicit_lm_head: bool = False,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Walk the merged model as HF tensors; see
        :func:`~megatron_tropd.mcore.weights.export_weights`.

        Sums are taken in float32, one layer at a time, and rounded once.
        """
        rows = {} if vocab_size is None else {"vocab_size": vocab_size}
        return export_weights(
            _Merged(self._base.parameters(), self.adapters()),
            self.hf_config | rows,
            self.layout,
            padded_vocab_size=self.module.vocab_size,
            dtype=dtype,
            receivers=receivers,
            explicit_lm_head=explicit_lm_head,
        )

    def exported_adapters(self) -> Iterator[tuple[str, Tensor | None]]:
        """Walk the adapters as PEFT names them, on rank 0; every rank must exhaust the iterator."""
        return export_entries(self.trainable(), self.entries, self.shape, self.layout)


class _Merged(Mapping[str, Tensor]):
    """Parameters of the base by their names, those with an adapter merged when asked for."""

    def __init__(self, own: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> None:
        self._adapters = {f"{name}.weight": adapter for name, adapter in adapters.items()}
        part = f".{_ADAPTER}."
        self._own = {name: parameter for name, parameter in own.items() if part not in name}

    def __len__(self) -> int:
        return len(self._own)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        adapter = self._adapters.get(name)
        return self._own[name] if adapter is None else self._own[name] + adapter.delta()


def _attach(chunks: Sequence[GPTModel], lora: LoraConfig) -> dict[str, Module]:
    """Give every target an adapter; returns the layers that have one by their names in the whole
    model.
    """
    layers = {
        in_whole_model(chunk, name): layer
        for chunk in chunks
        for name, layer in chunk.named_modules()
        if name.startswith("decoder.layers.") and name.rpartition(".")[2] in lora.targets
    }
    for name, layer in layers.items():
        made = Adapter(layer, target_of(f"{name}.weight"), lora, is_expert=".experts." in name)
        layer.add_module(_ADAPTER, made)
        layer.register_forward_hook(_add_adapter)
    return layers


def _add_adapter(layer: Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> Any:
    """Forward hook of a linear layer, which returns its output and perhaps a bias."""
    adapter = layer._modules.get(_ADAPTER)
    if adapter is None:
        return output
    return output[0] + adapter(inputs[0]), *output[1:]


def _ask_for_gradient(module: Module, inputs: Any, output: Tensor) -> None:
    """Forward hook of the frozen embedding."""
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _fused_norm(layer: Module, inputs: Tensor) -> Tensor:
    """The norm that Transformer Engine's layer takes first; it keeps its output to itself."""
    weight: Tensor = layer.layer_norm_weight  # type: ignore[assignment]
    return F.rms_norm(inputs, weight.shape, weight, layer.eps)  # type: ignore[arg-type]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
