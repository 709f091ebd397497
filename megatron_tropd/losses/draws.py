"""Random numbers that depend on what they are for, never on which rank asks.

Every draw of a run is a hash of (seed, purpose, step, ...). So the same mask, prompt order and
samples come out under every parallel layout, after a resume, and whatever was drawn before.
The hash is SplitMix64's finaliser folded over the key; it is fast and well mixed, not
cryptographic.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """Second element of a key: keeps the draws of different uses apart.

    The numbers are part of the result of a run; new ones are appended, none is ever reused.
    """

    MASK = 1
    ROLLOUT = 2
    PROMPT_ORDER = 3
    PREFIX = 4
    EVALUATION = 5
    TEACHER_RESPONSE = 6
    DRAFT = 7
    ACCEPTANCE = 8
    REPLACEMENT = 9
    TASK = 10


def keyed_seed(*key: int) -> int:
    """Hash integers to a seed, order and number of them included.

    Args:
        key: for example ``(seed, Purpose.ROLLOUT, step, prompt, sample)``; each is taken modulo
            2**64.

    Returns:
        An integer in 0 <= seed < 2**63, as samplers want it.
    """
    return _hash(key) >> 1


def keyed_uniform(
    seed: int, step: int, trajectory: int, positions: "ArrayLike"
) -> "NDArray[np.float32]":
    """Draw uniform numbers of the trust-region mask, one per position. Needs numpy.

    Args:
        seed: ``train.seed``.
        step: training step that asked for the trajectory.
        trajectory: a key of the trajectory that no layout changes; for a prompt and a sample of
            it, ``keyed_seed(prompt_index, sample_index)``.
        positions: [...] non-negative integers, position within prefix + response.

    Returns:
        [...] float32 in [0, 1), multiples of 2**-24, same shape as ``positions``.
    """
    import numpy as np

    prefix = _signed(_hash((seed, Purpose.MASK, step, trajectory)) + _GOLDEN)
    words = _mix_tensor(torch.from_numpy(np.array(positions, np.int64)) ^ prefix)
    # 24 bits are what float32 holds exactly, so rounding can never reach 1.0.
    return (_shifted(words, 40).float() * 2.0**-24).numpy()


def keyed_noise(keys: Sequence[tuple[int, ...]], size: int, device: torch.device) -> Tensor:
    """Uniform numbers in the order of a row's columns, such as one for each token.

    Args:
        keys: [N] of the rows.
        size: columns V.
        device: where they are made.

    Returns:
        [N, V] float64 strictly between 0 and 1, odd multiples of 2**-54.
    """
    prefixes = [_signed(_hash(key) + _GOLDEN) for key in keys]
    prefix_N1 = torch.tensor(prefixes, dtype=torch.int64, device=device).unsqueeze(-1)
    words_NV = _mix_tensor(torch.arange(size, device=device) ^ prefix_N1)
    return (_shifted(words_NV, 11).double() + 0.5) * 2.0**-53


def _hash(key: tuple[int, ...]) -> int:
    word = len(key)
    for element in key:
        word = _mix(((word + _GOLDEN) ^ int(element)) & _WORD)
    return word


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX_1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX_2) & _WORD
    return word ^ (word >> 31)


def _mix_tensor(words: Tensor) -> Tensor:
    """:func:`_mix` of int64, which torch multiplies modulo 2**64."""
    words = (words ^ _shifted(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shifted(words, 27)) * _signed(_MIX_2)
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, places: int) -> Tensor:
    """Zeros come in from the left; torch's own shift repeats the sign."""
    return (words >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word
