"""Every tensor on both sides is accounted for, or the conversion does not begin."""

import hashlib
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.families import Entry, model_shape, plan
from megatron_tropd.convert.hf_folder import naming
from megatron_tropd.convert.safetensors_writer import tensor_bytes

CHECKSUMS = "tensors.json"
"""File beside the tensors of a converted checkpoint: type, shape and CRC-32 of every HF tensor."""

_IGNORED = tuple(
    f"rotary{middle}_emb.{name}"
    for middle in ("", "_pos")
    for name in ("inv_freq", "cos_cached", "sin_cached")
)
"""Ends of the names of what old checkpoints carry and every reader computes."""
_QUANTISED = re.compile(
    r"\.(weight_scale(_inv|_2)?|input_scale|weight_packed|weight_shape|weight_zero_point|qweight|"
    r"qzeros|scales|g_idx|SCB|weight_format|absmax|quant_map|quant_state\..*|nested_.*|"
    r"blocks|.*_(blocks|scales|bias_scale))$"
)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SHOWN = 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def expected_tensors(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of everything a plan consumes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        shapes |= entry.operation.hf_shapes()
    return shapes


def account(
    hf_config: dict[str, Any], names: Iterable[str], where: str
) -> tuple[list[Entry], list[str]]:
    """Compare the names that a model needs with those that a folder holds.

    Returns:
        The plan, and the names that nobody needs and that are known to be redundant: a tied output
        layer.

    Raises:
        InputError: the model is quantised or not supported, or tensors are missing or left over;
            lists them.
    """
    check_not_quantised(hf_config, names, where)
    with naming(where):
        entries = plan(hf_config)
    expected, found = expected_tensors(entries).keys(), set(names)
    redundant = {"lm_head.weight"} if model_shape(hf_config).tied else set()
    missing = sorted(expected - found)
    surplus = sorted(n for n in found - expected - redundant if not n.endswith(_IGNORED))
    if problems := differences(missing, surplus, "tensors"):
        raise InputError(
            f"{where} {problems}. Its config.json and weights do not belong together."
            + _untied(hf_config, missing)
        )
    return entries, sorted(redundant & found)


def differences(missing: list[str], surplus: list[str], what: str = "") -> str:
    """What a folder misses and what it has beside, as the end of a sentence; empty: nothing."""
    return "; it ".join(
        f"{verb} {len(names)}{what and f' {what}'}: {listed(names)}"
        for verb, names in (("misses", missing), ("has unexpected", surplus))
        if names
    )


def _untied(hf_config: dict[str, Any], missing: list[str]) -> str:
    if missing != ["lm_head.weight"]:
        return ""
    said = hf_config.get("tie_word_embeddings", "by default")
    return (
        f" tie_word_embeddings is false ({said}): if the output layer is the embedding, set it to "
        "true in config.json."
    )


def check_not_quantised(hf_config: dict[str, Any], names: Iterable[str], where: str) -> None:
    """Refuse quantised weights, by their config or by the tensors that only they have.

    Raises:
        InputError: names the method, or the tensors.
    """
    advice = "Convert it to bfloat16 first: quantised checkpoints are not supported."
    settings = hf_config.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "?") if isinstance(settings, dict) else settings
        raise InputError(f"{where} is quantised (quantization_config, method {method!r}). {advice}")
    telling = sorted(name for name in names if _QUANTISED.search(name))
    if telling:
        raise InputError(f"{where} holds tensors of quantised weights: {listed(telling)}. {advice}")


def check_types(types: Mapping[str, torch.dtype], where: str) -> None:
    """Refuse weights that are not floating point.

    Raises:
        InputError: names the tensors and their types.
    """
    strange = [f"{name} ({dtype})" for name, dtype in types.items() if dtype not in _FLOATS]
    if strange:
        raise InputError(
            f"{where} holds weights that are no 16-, 32- or 64-bit floats: {listed(strange)}. "
            "Quantised checkpoints are not supported: convert it to bfloat16 first."
        )


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    hf_config: Mapping[str, Any],
) -> None:
    """Compare shapes.

    Args:
        hf_config: the config.json dictionary; messages name the sizes that it leaves out.

    Raises:
        InputError: lists the tensors that differ.
    """
    wrong = [
        f"{name} must be {list(shape)}, found {list(found[name])}"
        for name, shape in expected.items()
        if tuple(found[name]) != shape
    ]
    if wrong:
        raise InputError(
            f"{where} holds {len(wrong)} tensors of another shape than config.json says: "
            f"{listed(wrong)}.{_left_out(hf_config)}"
        )


def _left_out(hf_config: Mapping[str, Any]) -> str:
    """A sentence on the sizes that are transformers' defaults; none: it says them all."""
    shape = model_shape(dict(hf_config))
    sizes = {"vocab_size": shape.vocab, "hidden_size": shape.hidden, "head_dim": shape.head_dim}
    sizes |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    sizes |= {"intermediate_size": shape.ffn}
    left = [f"{key} ({size})" for key, size in sizes.items() if key not in hf_config]
    if not left:
        return ""
    return f" config.json leaves out {', '.join(left)}: these are defaults; give the model's."


def listed(names: list[str]) -> str:
    """The names, the first twenty of them if there are more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes, 8 hexadecimal digits: tells damage, not intent."""
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another type; None: as it is.

    Raises:
        InputError: finite numbers would become infinite (float16 ends at 65504).
    """
    if dtype in (None, tensor.dtype):
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and (result.isinf() & tensor.isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise InputError(
            f"{name} holds {largest:.4g}, expected at most 65504 for float16. Give --dtype "
            "bfloat16, or none."
        )
    return result


def known_digests(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of weight files if the download left it beside them.

    The Hub's cache names a file by its digest, and a download into a folder keeps it in
    ``.cache/huggingface/download/<file>.metadata``.

    Returns:
        file -> 64 hexadecimal digits; files without a known digest are absent.
    """
    known = {}
    for name in files:
        blob = (folder / name).resolve()
        record = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        lines = record.read_text().split() if record.is_file() else []
        candidates = [blob.name if blob.parent.name == "blobs" else "", *lines[1:2]]
        digest = next((c for c in candidates if _SHA256.fullmatch(c)), None)
        if digest:
            known[name] = digest
    return known


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Hash files and compare.

    Raises:
        InputError: a file is not what was downloaded.
    """
    for name, digest in digests.items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise InputError(
                f"{folder / name} is damaged: its download recorded SHA-256 {digest[:12]}..., "
                f"the file has {found[:12]}.... Download it again, or give "
                "--skip-download-digests if it was changed on purpose."
            )
