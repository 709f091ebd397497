"""What environment variables say. One that is set to nothing counts as not set.

Schedulers, job files and containers set variables to nothing if they mean none.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping

from megatron_tropd.base.errors import ConfigError

STORE_DESCRIPTOR = "TROPD_STORE_FD"
"""Variable of rank 0: the listening socket on which it is to open the store of the run."""


def variable(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Its value; None if it is not set, or blank."""
    return environment.get(name, "").strip() or None


def number(
    name: str,
    default: int | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
    advice: str = "Set it to one, or unset it.",
) -> int:
    """Its value as a number that is not negative.

    Args:
        default: if it is not set; None: it must be.
        advice: what the user is to do about a bad value.

    Raises:
        ConfigError: it is no such number, or not set though it must be.
    """
    text = variable(name, environment)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdigit()):
        found = repr(text) if text else "nothing"
        raise ConfigError(
            f"The environment variable {name} must be a number, found {found}. {advice}"
        )
    return int(text)


def hidden_gpus(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether CUDA_VISIBLE_DEVICES names none: somebody wants the CPU."""
    return environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def listed_gpus() -> int:
    """How many GPUs the driver's own tool lists; 0 without it."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
