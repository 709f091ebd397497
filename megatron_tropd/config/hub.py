"""Models named by their id on the Hugging Face hub, ``hf://OWNER/NAME``: where they lie here.

The hub's own library keeps them in its cache (``HF_HOME``); what is there is not downloaded again,
and with ``HF_HUB_OFFLINE=1`` nothing is. A command names its models' folders before it does
anything else, so that no process of a run but the first asks the hub.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config.run import HUB, HUB_MODEL, Config

_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")
"""Settings and tokenizer."""
_WEIGHTS = ("*.safetensors",)
_OTHER_FORMATS = ("consolidated*", "original/*")


def with_local_models(config: Config, *, weights: bool = True) -> Config:
    """Replace each ``hf://OWNER/NAME`` of a model by its folder in the local cache.

    Args:
        weights: false: config.json and tokenizers are enough, as for a plan.

    Raises:
        ConfigError, InputError: as :func:`local_model`.
    """

    places = _Places(weights)
    alone = config.by_teacher.values() if config.teachers else ()
    return replace(
        config,
        model=replace(
            config.model,
            student=places.of(config.model.student),
            teacher=places.of(config.model.teacher, loaded=config.loads_teacher),
        ),
        teacher=replace(config.teacher, reference=places.of_any(config.teacher.reference)),
        teachers=tuple(
            replace(
                named,
                model=places.of(named.model, loaded=its.loads_teacher),
                reference=places.of_any(named.reference),
            )
            for named, its in zip(config.teachers, alone, strict=True)
        ),
    )


@dataclass(frozen=True)
class _Places:
    weights: bool

    def of(self, name: str, *, loaded: bool = True) -> str:
        return local_model(name, weights=self.weights and loaded)

    def of_any(self, name: str | None) -> str | None:
        return None if name is None else self.of(name)


def local_model(name: str, *, weights: bool = True) -> str:
    """The folder of a model: a name of the hub's becomes one in its cache, downloaded if need be.

    Args:
        name: ``hf://OWNER/NAME``, ``hf://OWNER/NAME@REVISION``, or a path, which is returned.
        weights: false: settings and tokenizer alone are downloaded.

    Raises:
        ConfigError: the name has another form, or huggingface_hub is not installed.
        InputError: the hub has no such model, asks for a token, or cannot be reached.
    """
    if not name.startswith(HUB_MODEL):
        return name
    model, _, revision = name.removeprefix(HUB_MODEL).partition("@")
    if name.startswith(HUB) or len(model.split("/")) != 2:
        raise ConfigError(
            "Expected a model of the hub, hf://OWNER/NAME or hf://OWNER/NAME@REVISION, found "
            f"{name!r}."
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{name} is read by huggingface_hub ({error}). Install it, or give a folder."
        ) from None
    where = "taken from the cache of the hub's library, or downloaded"
    print(f"tropd: {name} is {where}.", file=sys.stderr)
    try:
        return snapshot_download(
            model,
            revision=revision or None,
            allow_patterns=[*_TEXTS, *_WEIGHTS] if weights else [*_TEXTS],
            ignore_patterns=[*_OTHER_FORMATS],
        )
    except Exception as error:  # the library raises whatever files and networks do
        reason = " ".join(str(error).split())[:400]
        raise InputError(
            f"{name} cannot be had: {reason} Correct the name, log in (`hf auth login`), or "
            "download it where there is a network and give its folder."
        ) from None


def model_argument(name: str) -> Path:
    """The folder of a model that an argument names, for ``type=`` of argparse."""
    try:
        return Path(local_model(name))
    except (ConfigError, InputError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
