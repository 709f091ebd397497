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
from megatron_tropd.mcore.load import load_checkpoint
from megatron_tropd.mcore.weights import export_weights, load_weights


class DenseModel:
    """This rank's part of a Megatron model; a :class:`~megatron_tropd.mcore.student.StudentModel`
    that is trained, saved and given away as a whole."""

    def __init__(self, module: GPTModel, hf_config: dict[str, Any], layout: Layout) -> None:
        """Hold a model.

        Args:
            module: not wrapped.
            hf_config: its config.json dictionary.
            layout: this rank's place.
        """
        self.module, self.layout = module, layout
        self.hf_config = hf_config

    def load(self, source: HFFolder | MegatronFolder) -> None:
        """Fill all parameters; collective if they come from a Megatron checkpoint."""
        if isinstance(source, MegatronFolder):
            load_checkpoint(self.module, source, self.layout)
        else:
            load_weights(self.module, source, self.layout, padded_vocab_size=self.module.vocab_size)

    def trainable(self) -> Mapping[str, Parameter]:
        """Find all parameters."""
        return dict(self.module.named_parameters())

    def state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Describe them and Megatron's extra states."""
        return self.module.sharded_state_dict(metadata=metadata)

    def restore(self, state: dict[str, Any]) -> None:
        """Copy them from a loaded state."""
        self.module.load_state_dict(state, strict=True)

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
