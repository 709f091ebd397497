"""The record of tokens: its columns fit together, and what callers ask of it."""

import numpy as np
import pytest

from megatron_tropd.data.sequence import COLUMNS, NO_VERSION, SampleKey, TokenSequence, Writer
from megatron_tropd.losses.draws import keyed_seed

TURNS = (
    (Writer.CONTEXT, (10, 11)),
    (Writer.TEACHER, (20,)),
    (Writer.STUDENT, (30, 31)),
    (Writer.CONTEXT, (40,)),
    (Writer.STUDENT, (32, 2)),
)


def turns(**changed) -> TokenSequence:
    """Two turns of a student, a tool's answer between them."""
    settings = {"logprobs": (-0.1, -0.2, -0.3, -0.4), "version": 5} | changed
    return TokenSequence.of_runs(SampleKey(7, 3, 1), *TURNS, **settings)


def test_columns_of_several_turns():
    t = turns()
    assert t.ids_N.tolist() == [10, 11, 20, 30, 31, 40, 32, 2]
    assert t.writer_N.tolist() == [0, 0, 1, 2, 2, 0, 2, 2]
    assert t.weight_N.tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    assert t.version_N.tolist() == [NO_VERSION] * 3 + [5, 5, NO_VERSION, 5, 5]
    known = ~np.isnan(t.engine_logprobs_N)
    assert known.tolist() == (t.writer_N == Writer.STUDENT).tolist()
    assert t.behaviour_logprobs_N[known].tolist() == np.float32([-0.1, -0.2, -0.3, -0.4]).tolist()


def test_what_callers_ask():
    t = turns()
    assert (len(t), t.prompt_length, t.prompt_ids) == (8, 2, [10, 11])
    assert t.response_ids == [20, 30, 31, 40, 32, 2]
    assert t.writers[:2] == [Writer.TEACHER, Writer.STUDENT]
    assert t.by(Writer.STUDENT).tolist() == [30, 31, 32, 2]
    assert [t.count(writer) for writer in Writer] == [3, 1, 4, 0]
    assert t.key.draw == keyed_seed(3, 1)
    assert t.oldest_version == 5
    assert t.replace(version_N=t.version_N + np.arange(8)).oldest_version == 8


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_another_type_or_length_are_refused(name: str):
    column = getattr(turns(), name)
    with pytest.raises(TypeError, match=f"{name} must be an array of .*, found float16"):
        turns().replace(**{name: column.astype(np.float16)})
    with pytest.raises(ValueError, match="must hold one value for each of the"):
        turns().replace(**{name: column[:-1]})


def test_sequences_without_sense_are_refused():
    with pytest.raises(ValueError, match=r"start with a token of Writer\.CONTEXT"):
        TokenSequence.of_runs(SampleKey(0, 0, 0), (Writer.STUDENT, (1,)), logprobs=(-1,))
    with pytest.raises(ValueError, match="each of the student's 4 tokens, found 3"):
        turns(logprobs=(-1, -1, -1))
    for weight in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="finite and at least 0"):
            turns().replace(weight_N=np.full(8, weight, np.float32))
    with pytest.raises(ValueError, match=r"must be 0 for tokens of Writer\.CONTEXT"):
        turns().replace(weight_N=np.ones(8, np.float32))
