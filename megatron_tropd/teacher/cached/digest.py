"""Short names of what scores are of: a model, a sequence, a list of sequences."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.data.sequence import TokenSequence, Writer

_SAMPLES, _SAMPLE_BYTES = 64, 4096
"""Pieces that are read of each weight file: ranks may ask often, and files be large."""
SEQUENCE_BYTES = 16


def model_digest(folder: HFFolder | MegatronFolder) -> str:
    """Hash config.json, the names and sizes of the weight files, and pieces all over each of them.

    A step of training moves some number in almost every piece, so two steps of one training have
    different digests, though no file is read whole.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for path in _weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb", buffering=0) as file:
            for place in np.linspace(0, max(size - _SAMPLE_BYTES, 0), _SAMPLES).astype(int):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _weight_files(folder: HFFolder | MegatronFolder) -> list[Path]:
    if isinstance(folder, HFFolder):
        return [folder.path / name for name in folder.files]
    return sorted(folder.checkpoint.glob("*.distcp"))


def scored_tokens(sequence: TokenSequence) -> NDArray[np.bool_]:
    """Tell which tokens are scored: those that teacher or student wrote, [N] bool."""
    return np.asarray(sequence.writer_N != Writer.CONTEXT)


def num_scored(sequences: Iterable[TokenSequence]) -> int:
    """Count the scored tokens."""
    return sum(int(scored_tokens(sequence).sum()) for sequence in sequences)


def sequence_digest(sequence: TokenSequence) -> bytes:
    """Hash the ids up to the last scored one, and which of them are scored; 16 bytes.

    What comes after it changes no score, and a data loader's row does not tell it from padding.
    """
    scored_N = scored_tokens(sequence)
    stop = int(np.flatnonzero(scored_N).max(initial=-1)) + 1
    digest = hashlib.blake2b(sequence.ids_N[:stop].tobytes(), digest_size=SEQUENCE_BYTES)
    digest.update(scored_N[:stop].tobytes())
    return digest.digest()


def rollouts_digest(sequences: Iterable[TokenSequence]) -> str:
    """Hash a list of sequences in their order; 16 hexadecimal digits."""
    digest = hashlib.sha256(b"".join(map(sequence_digest, sequences)))
    return digest.hexdigest()[:16]
