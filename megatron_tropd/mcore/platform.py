"""The machine this process computes on, and what is done for it before Megatron is imported.

Importing ``megatron_tropd.mcore`` calls :func:`prepare_platform`. With CUDA that changes nothing.
"""

import os
import socket
from collections.abc import Mapping

import torch

from megatron_tropd.base.environment import hidden_gpus, listed_gpus, variable
from megatron_tropd.base.errors import TrainingError
from megatron_tropd.mcore.cpu import CPU, patch, patch_training
from megatron_tropd.mcore.torch_adam import accept_torch_adam

_prepared = False
_training_prepared = False


def has_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process' models: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else CPU


def be_deterministic() -> None:
    """Have torch take algorithms that give equal bits, or raise where an operation has none."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def distributed_backend() -> str:
    """Backends of every process group: gloo, and NCCL for what lies on :func:`device`.

    With NCCL alone objects travel as kernels, and a rank that waits for them (for the engine of
    another rank, say) spins on its GPU, where an engine may be computing.
    """
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


def check_device(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to train on the CPU of a machine that has GPUs, if nobody asked for that.

    Raises:
        TrainingError: torch does not find GPUs that the site file promises or the driver lists;
            another node's may work.
    """
    if has_cuda() or hidden_gpus(environment):
        return
    promised = variable("TROPD_GPUS_PER_NODE", environment)
    listed = 0 if promised else listed_gpus()
    if not promised and not listed:
        return
    who = f"should have {promised} GPUs (gpus_per_node of the site file)"
    if listed:
        who = f"has {listed} (nvidia-smi -L)"
    raise TrainingError(
        f"{socket.gethostname()} {who}, and torch finds none: the node's driver does not work, or "
        "torch is a build without CUDA (`tropd doctor`). To train on the CPU all the same, set "
        'CUDA_VISIBLE_DEVICES="".',
        kind="device",
    )


def is_prepared() -> bool:
    """Whether the CPU differences are in place in this process."""
    return _prepared


def prepare_platform() -> None:
    """Let Megatron-Core run on this machine. Calling it again changes nothing.

    With CUDA only :func:`accept_torch_adam` may apply, where neither Transformer Engine nor Apex
    brings an optimizer.
    """
    global _prepared
    if not (_prepared or has_cuda()):
        patch()
        _prepared = True
    accept_torch_adam()


def prepare_training() -> None:
    """Let ``megatron.training.pretrain`` run here, with ``--distributed-backend gloo``.

    Without CUDA only; call it before ``megatron.training`` is imported. Calling it again changes
    nothing.
    """
    global _training_prepared
    prepare_platform()
    if not (_training_prepared or has_cuda()):
        patch_training()
        _training_prepared = True
