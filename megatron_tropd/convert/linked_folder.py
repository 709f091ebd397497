"""A folder that holds what our reading of a model folder holds, and nothing else.

vLLM and transformers choose files and names by rules of their own. Given this folder, they read
what the trainer reads: no adapter, no second format of the weights, the embedding under its name.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from megatron_tropd.convert.companions import CONFIG
from megatron_tropd.convert.families import FAMILIES, model_shape
from megatron_tropd.convert.hf_folder import INDEX, HFFolder

_RENAMED = "renamed-{}.safetensors"


def link_folder(source: HFFolder, out: Path) -> Path:
    """Fill ``out`` with config.json, an index, and links to the weight files.

    A tensor that is stored under another name than the plan's is written again, under the plan's.
    """
    ignored = FAMILIES[model_shape(source.config).family].ignores
    config = {key: value for key, value in source.config.items() if key not in ignored}
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    link_weights(source, out)
    return out


def link_weights(source: HFFolder, out: Path) -> None:
    """The weights of :func:`link_folder`, without config.json."""
    for file_name in source.files:
        (out / file_name).symlink_to((source.path / file_name).absolute())
    weight_map = {}
    for n, name in enumerate(sorted(source.names)):
        weight_map[name] = source.file_of(name)
        if source.stored_name(name) != name:
            weight_map[name] = _RENAMED.format(n)
            save_file({name: source.read(name)}, str(out / weight_map[name]), {"format": "pt"})
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) + "\n")
