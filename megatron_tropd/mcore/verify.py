"""Whether an HF folder and a Megatron checkpoint are the same model: tensors, then logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_tropd.config import ParallelConfig
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.pickled_folder import open_source
from megatron_tropd.mcore import models, parallel, platform

TOLERANCE = 1e-3
"""Largest accepted difference of logits, as a share of the largest logit."""


@dataclass(frozen=True)
class Verification:
    """What was compared and how it came out."""

    tensors: int
    differing: list[str]
    """HF names whose bits differ."""
    max_difference: float
    """Of the logits, over all prompts; absolute."""
    mean_difference: float
    largest_logit: float

    @property
    def passed(self) -> bool:
        """Every tensor equal bit for bit, and logits within round-off."""
        close = self.max_difference <= TOLERANCE * self.largest_logit
        return not self.differing and math.isfinite(self.max_difference) and close

    def text(self) -> str:
        """For a person."""
        names = f": {', '.join(self.differing[:5])}" if self.differing else ""
        return (
            f"verify: {self.tensors - len(self.differing)} of {self.tensors} tensors are equal bit "
            f"for bit{names}\n"
            f"verify: logits differ by at most {self.max_difference:.2e}, on average "
            f"{self.mean_difference:.2e} (largest logit {self.largest_logit:.1f}, float32)\n"
            f"verify: {'passed' if self.passed else 'FAILED'}"
        )


def verify(
    hf: Path,
    megatron: Path,
    *,
    prompts: Sequence[Sequence[int]],
    hf_config: Path | None = None,
    written: Literal["hf", "megatron"] = "megatron",
    allow_pickle: bool = False,
) -> Verification:
    """Compare both folders; loads both models whole, in float32.

    Args:
        hf: HF folder.
        megatron: Megatron checkpoint.
        prompts: token ids, each at least one.
        hf_config: HF folder of the architecture, for a checkpoint that carries none.
        written: which of them was made from the other.
        allow_pickle: read pytorch_model.bin where the HF folder has no safetensors.

    Returns:
        What differs. Where the types differ, the wider weights are rounded first; of float16 and
        bfloat16, those that were not written.

    Raises:
        InputError: a folder is not whole.
    """
    source = open_source(hf, allow_pickle=allow_pickle)
    checkpoint = MegatronFolder(megatron, hf_config)
    names, differing = _compare_tensors(source, checkpoint, written)
    narrow = _common(
        source.dtype(names[0]), checkpoint.dtype(checkpoint.entries[0]), written=written
    )
    with torch.no_grad():
        expected = _transformers_logits(source, prompts, narrow)
        found = _megatron_logits(checkpoint, prompts, narrow)
    vocab = expected[0].shape[-1]
    gaps = torch.cat(
        [(e - f[:, :vocab]).abs().flatten() for e, f in zip(expected, found, strict=True)]
    )
    return Verification(
        tensors=len(names),
        differing=differing,
        max_difference=gaps.max().item(),
        mean_difference=gaps.mean().item(),
        largest_logit=max(e.abs().max().item() for e in expected),
    )


def _compare_tensors(
    source: HFFolder, checkpoint: MegatronFolder, written: Literal["hf", "megatron"]
) -> tuple[list[str], list[str]]:
    names, differing = [], []
    for entry in checkpoint.entries:
        for name, stored in checkpoint.read(entry).items():
            names.append(name)
            tensor = source.read(name)
            dtype = _common(tensor.dtype, stored.dtype, written=written)
            if not _same(tensor.to(dtype), stored.to(dtype)):
                differing.append(name)
    return names, differing


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (one, other)))


def _common(
    hf: torch.dtype, megatron: torch.dtype, *, written: Literal["hf", "megatron"]
) -> torch.dtype:
    """The type both can be compared in: the narrower, or the one that was converted to."""
    if hf.itemsize != megatron.itemsize:
        return min(hf, megatron, key=lambda dtype: dtype.itemsize)
    return hf if written == "hf" else megatron


def _transformers_logits(
    source: HFFolder, prompts: Sequence[Sequence[int]], dtype: torch.dtype
) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        str(source.path),
        config=AutoConfig.for_model(**source.config),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
    )
    model = model.float().eval().to(platform.device())
    return [model(torch.tensor([ids], device=platform.device())).logits[0] for ids in prompts]


def _megatron_logits(
    checkpoint: MegatronFolder, prompts: Sequence[Sequence[int]], dtype: torch.dtype
) -> list[Tensor]:
    sizes = ParallelConfig()
    layout = parallel.initialize(sizes, seed=1)
    try:
        padded = models.padded_vocab_size(checkpoint.config, tensor=1)
        built = models.build_model(
            checkpoint, layout=layout, parallel=sizes, dtype=torch.float32, padded_vocab_size=padded
        )
        model = built.module.eval()
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        return [_forward(model, ids) for ids in prompts]
    finally:
        parallel.shutdown()


def _forward(model: torch.nn.Module, ids: Sequence[int]) -> Tensor:
    tokens = torch.tensor([ids], device=platform.device())
    positions = torch.arange(len(ids), device=platform.device()).unsqueeze(0)
    return model(tokens, positions, None)[0].float()
