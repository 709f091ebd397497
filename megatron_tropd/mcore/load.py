"""Weights of a Megatron checkpoint into a model under any TP x PP x EP, by Megatron's reader."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.base.errors import InputError
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.mcore.layout import Layout


def load_checkpoint(chunks: Sequence[GPTModel], folder: MegatronFolder, layout: Layout) -> None:
    """Fill this rank's parameters; nothing but the model is read from the checkpoint.

    Args:
        chunks: not wrapped; their vocabulary may be padded otherwise than the checkpoint's.
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
    wanted = {"model": sharded_state(chunks, metadata)}
    try:
        # Megatron reads common.pt with torch's list of harmless classes.
        with torch.serialization.safe_globals([Namespace]):
            state = dist_checkpointing.load(wanted, str(folder.checkpoint))
    except (Exception, CheckpointException) as error:  # half a dozen unrelated types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"Checkpoint {folder.checkpoint} cannot be read: {reason}") from error
    load_state(chunks, state["model"])


def sharded_state(chunks: Sequence[GPTModel], metadata: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of a model as Megatron's sharded state dictionary; of several chunks, one
    for each. A file has layers by their numbers in the whole model, so it fits either.
    """
    states = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    return states[0] if len(states) == 1 else {f"model{i}": s for i, s in enumerate(states)}


def load_state(chunks: Sequence[GPTModel], state: dict[str, Any]) -> None:
    """Copy what :func:`sharded_state` described, loaded."""
    states = [state] if len(chunks) == 1 else [state[f"model{i}"] for i in range(len(chunks))]
    for chunk, part in zip(chunks, states, strict=True):
        chunk.load_state_dict(part, strict=True)
