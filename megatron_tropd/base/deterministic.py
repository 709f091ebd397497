"""What ``run.deterministic`` asks of the machine: the same run again gives the same bits on GPUs.

Torch, NCCL, Transformer Engine, cuBLAS and vLLM each have a switch of their own. Those in the
environment are read once: NCCL's when the first group is made, cuBLAS's with its first product,
vLLM's when it is imported. So they are set before any of that, in whatever process comes first, and
its children inherit them: launcher, ranks, engines, servers. What follows from settings alone is
refused when a config is read. Standard library only.

On a CPU a run gives the same bits with the mode and without it; not the same in both, for a few
sums are made in another order.
"""

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from megatron_tropd.base.environment import variable
from megatron_tropd.base.errors import ConfigError

ENVIRONMENT: dict[str, tuple[str, ...]] = {
    # A tree adds in an order that the topology decides; SHARP and what is left without NVLS are
    # those that Megatron accepts in its own --deterministic-mode (megatron.training.determinism).
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # What a sample gets does not depend on what else is in its batch. vLLM 0.32 then sets NCCL,
    # cuBLAS and its all-reduce by itself, and takes an attention backend that can do it.
    "VLLM_BATCH_INVARIANT": ("1",),
}
"""Variable -> values that give equal bits; the first is set if there is none."""

_MODEL_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "deterministic_mode": ((True,), "run.deterministic turns it on"),
    "moe_token_dispatcher_type": (
        ("alltoall", "allgather"),
        "the others receive tokens in the order of their arrival",
    ),
    "moe_enable_deepep": ((False,), "it receives tokens in the order of their arrival"),
    "moe_permute_fusion": ((False,), "its kernels promise no order of their sums"),
}
"""Option of Megatron's -> (values that give equal bits, why others do not)."""


def set_environment(
    deterministic: bool, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Set what CUDA's libraries read, if ``run.deterministic`` is on; before they start.

    Raises:
        ConfigError: a variable has a value under which bits differ.
    """
    if not deterministic:
        return
    for name, accepted in ENVIRONMENT.items():
        found = variable(name, environment)
        if found is None:
            environment[name] = accepted[0]
        elif not {part.strip() for part in found.split(",")} <= set(accepted):
            raise ConfigError(
                f"run.deterministic needs {name} = {' or '.join(accepted)}, found {found!r} in the "
                "environment. Unset it: it is set by itself."
            )


def check_options(table: str, options: Mapping[str, Any]) -> None:
    """Refuse options of Megatron's under which two runs may differ.

    Raises:
        ConfigError: one has such a value.
    """
    for name, (accepted, why) in _MODEL_OPTIONS.items():
        if name in options and options[name] not in accepted:
            raise ConfigError(
                f"run.deterministic needs megatron.{table}.{name} = "
                f"{' or '.join(map(repr, accepted))} ({why}), found {options[name]!r}. Remove one "
                "of the two."
            )
