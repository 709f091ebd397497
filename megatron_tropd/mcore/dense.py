"""A model whose weights are all its own: what students are unless they have adapters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.load import load_checkpoint, load_state, sharded_state
from megatron_tropd.mcore.weights import export_weights, load_weights, named_parameters


class DenseModel:
    """This rank's part of a Megatron model; a :class:`~megatron_tropd.mcore.student.StudentModel`
    that is trained, saved and given away as a whole.
    """

    def __init__(
        self, chunks: Sequence[GPTModel], hf_config: dict[str, Any], layout: Layout
    ) -> None:
        """Hold a model.

        Args:
            chunks: not wrapped; several of an interleaved pipeline.
            hf_config: its config.json dictionary.
            layout: this rank's place.
        """
        self.chunks, self.layout = tuple(chunks), layout
        self.hf_config = hf_config

    @property
    def module(self) -> GPTModel:
        """The last chunk."""
        return self.chunks[-1]

    def load(self, source: HFFolder | MegatronFolder) -> None:
        """Fill all parameters; collective if they come from a Megatron checkpoint."""
        if isinstance(source, MegatronFolder):
            load_checkpoint(self.chunks, source, self.layout)
        else:
            padded = self.module.vocab_size
            load_weights(self.parameters(), source, self.layout, padded_vocab_size=padded)

    def parameters(self) -> dict[str, Parameter]:
        """Find all parameters by their names in the whole model."""
        return named_parameters(self.chunks)

    def trainable(self) -> Mapping[str, Parameter]:
        """Find all parameters."""
        return self.parameters()

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Describe them and Megatron's extra states."""
        return sharded_state(self.chunks, metadata)

    def restore(self, state: dict[str, Any]) -> None:
        """Copy them from a loaded state."""
        load_state(self.chunks, state)

    def exported(
        self,
        receivers: Sequence[int] = (0,),
        *,
        vocab_size: int | None = None,
        dtype: torch.dtype | None = None,
        explicit_lm_head: bool = False,
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Walk them as HF tensors: see :func:`~megatron_tropd.mcore.weights.export_weights`."""
        rows = {} if vocab_size is None else {"vocab_size": vocab_size}
        return export_weights(
            self.trainable(),
            self.hf_config | rows,
            self.layout,
            padded_vocab_size=self.module.vocab_size,
            dtype=dtype,
            receivers=receivers,
            explicit_lm_head=explicit_lm_head,
        )
