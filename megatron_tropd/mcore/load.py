"""Weights of a Megatron checkpoint into a model under any TP x PP x EP, by Megatron's reader."""

from argparse import Namespace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.mcore.layout import Layout


def load_checkpoint(model: torch.nn.Module, folder: MegatronFolder, layout: Layout) -> None:
    """Fill this rank's parameters; nothing but the model is read from the checkpoint.

    Args:
        model: an unwrapped GPTModel; its vocabulary may be padded otherwise than the checkpoint's.
        folder: the checkpoint; opening it has checked its names and shapes.
        layout: this rank's place.

    Raises:
        InputError: a file of it is damaged or cannot be read; raised by the rank that notices.

    Collectives: those of ``dist_checkpointing.load``, on all ranks.
    """
    metadata: dict[str, Any] = {
        "singleton_local_shards": False,
        "non_homogeneous_layers": folder.per_layer,
        "dp_cp_group": layout.loss_group,
    }
    # Megatron's reader compares no checksums. Its files are then in the page cache.
    folder.check_data(part=layout.rank, parts=layout.world_size)
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}  # type: ignore[operator]
    try:
        # Megatron reads common.pt with torch's list of harmless classes.
        with torch.serialization.safe_globals([Namespace]):
            state = dist_checkpointing.load(wanted, str(folder.checkpoint))
    except (Exception, CheckpointException) as error:  # half a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"Checkpoint {folder.checkpoint} cannot be read: {reason}") from error
    model.load_state_dict(state["model"], strict=True)
