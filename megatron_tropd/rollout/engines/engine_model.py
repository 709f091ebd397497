"""The model that an engine serves: the folder's, as our own reading of config.json has it.

vLLM gets a folder with a config.json written from what the trainer reads, and links to the files of
the weights: what else lies in the user's folder, or stands in the user's config.json, cannot make
the engine compute another model.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.accounting import expected_tensors
from megatron_tropd.convert.checks import check_engine_shards
from megatron_tropd.convert.families import ModelShape, engine_config, model_shape, plan
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.linked_folder import link_weights

# Source: CPUAttentionBackend.get_supported_head_sizes of vLLM 0.32.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of attention heads that vLLM runs on CPU."""
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def check_engine(
    hf_config: dict[str, Any], max_model_len: int, *, cuda: bool, who: str, tensor_parallel: int = 1
) -> None:
    """Refuse what vLLM would refuse later and less clearly, or would compute otherwise.

    Args:
        max_model_len: longest prompt + response in tokens.

    Raises:
        InputError: the model is not supported, its context is too short, its heads have a size
            that vLLM does not run, or its layers have different windows.
        ConfigError: ``tensor_parallel`` does not divide it.
    """
    shape = model_shape(hf_config)
    if max_model_len > shape.context:
        raise InputError(
            f"Model {who} has a context of {shape.context} tokens, prompt and response need "
            f"{max_model_len}. Lower rollout.max_new_tokens or use shorter prompts."
        )
    _check_heads(shape, cuda, who)
    if len(set(shape.windows)) > 1:
        raise InputError(
            f"Model {who} has a window of attention in some layers only, which vLLM does not "
            f"compute for {shape.family} models: the engine would sample from another model. Such "
            "a model can be a teacher that nothing samples from."
        )
    check_engine_shards(shape, tensor_parallel, who=f"model {who}")


def _check_heads(shape: ModelShape, cuda: bool, who: str) -> None:
    size = shape.head_dim
    if shape.family == "qwen2" and size * shape.heads != shape.hidden:
        raise InputError(
            f"Model {who} has {shape.heads} attention heads of size {size} and hidden_size "
            f"{shape.hidden}; vLLM runs qwen2 models with heads of size hidden_size / heads only. "
            "Use another model."
        )
    if not cuda and size not in CPU_HEAD_SIZES:
        raise InputError(
            f"Model {who} has attention heads of size {size}; vLLM on CPU runs sizes "
            f"{list(CPU_HEAD_SIZES)}. Use a model with one of these, or a machine with CUDA."
        )


def served_models(
    sources: Sequence[HFFolder], places: Sequence[Path], vocab_size: int | None
) -> dict[str, Any]:
    """What :class:`EngineSettings` says of the models.

    Args:
        sources: folder of the model, or of a student and its teacher.
        places: where vLLM finds each.
        vocab_size: columns that the engine may have at most; None: the models'.
    """
    columns = [model_shape(source.config).vocab for source in sources]
    smallest = min(columns if vocab_size is None else [vocab_size, *columns])
    # All are cut or none: vLLM loads a draft model as it loads the other.
    cut = any(width != smallest for width in columns)
    cut_from = [str(source.path.resolve()) if cut else None for source in sources]
    served = {"model_folder": str(places[-1]), "cut_from": cut_from[-1], "vocab_size": smallest}
    if len(sources) > 1:
        served |= {"draft_folder": str(places[0]), "draft_cut_from": cut_from[0]}
    return served


def write_engine_folder(source: HFFolder, place: Path, vocab_size: int) -> dict[str, Any]:
    """Make the folder that vLLM opens; an older one is replaced.

    Args:
        vocab_size: columns the engine has; fewer than the model's: no weights are linked, as
            vLLM's reader takes whole tensors (:func:`first_rows` cuts them).

    Returns:
        The config.json dictionary.
    """
    remove_engine_folder(place)
    place.mkdir(parents=True)
    config = engine_config(source.config, vocab_size)
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if vocab_size == model_shape(source.config).vocab:
        link_weights(source, place)
    return config


def remove_engine_folder(place: Path) -> None:
    """Remove what :func:`write_engine_folder` made, if it is there."""
    shutil.rmtree(place, ignore_errors=True)


def engine_tensors(
    hf_config: dict[str, Any], vocab_size: int | None = None
) -> dict[str, tuple[int, ...]]:
    """What every weight update must bring: the model's tensors and an explicit output layer.

    Args:
        vocab_size: columns the engine has; None: the model's.

    Returns:
        Shape by HF name, ``lm_head.weight`` always among them.
    """
    shapes = expected_tensors(plan(_with_columns(hf_config, vocab_size)))
    return {_OUTPUT: shapes[_EMBEDDING]} | shapes


def all_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's ``*.safetensors``, by name."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, file.get_tensor(name)


def first_rows(folder: str | Path, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model with the first columns of its vocabulary only, output layer included.

    Yields:
        HF name and tensor.
    """
    source = HFFolder(folder)
    for name, shape in engine_tensors(source.config, vocab_size).items():
        stored = name if name in source.names else _EMBEDDING
        yield name, source.read(stored, stop=shape[0])


def _with_columns(hf_config: dict[str, Any], vocab_size: int | None) -> dict[str, Any]:
    return hf_config if vocab_size is None else hf_config | {"vocab_size": vocab_size}
