"""The size of a teacher's cached signals: plans state it, ``tropd score`` writes as much."""

_NUMBER = 4
"""Bytes of an id, and of a float32."""
_OF_TYPE = {"float32": 4, "bfloat16": 2}


def bytes_per_token(top_k: int, dtype: str, *, reference: bool = False) -> int:
    """Bytes on disk of a scored token; each sequence takes 64 more, whatever its length.

    Args:
        top_k: ids of each token.
        dtype: of their log-probs.
        reference: whether the reference's log-prob is kept, too.
    """
    # The token, its log-prob and the log-sum-exp.
    return _NUMBER * (3 + reference) + top_k * (_NUMBER + _OF_TYPE[dtype])


def signal_bytes_per_token(top_k: int, *, reference: bool = False) -> int:
    """Bytes on a training rank of the signal of a token: ids in 64 bits, numbers in float32."""
    return _NUMBER * (1 + reference) + top_k * (8 + _NUMBER)
