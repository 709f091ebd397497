"""The distillation step as a whole, on models that are tables: no Megatron, one rank.

What its gradient is, test_choices.py says; here is what happens around it, and in which order.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_choices import BETA, VOCAB, Models, step_sequences

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.config.loss import preset
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.distill.engine_gap import EngineGap
from megatron_tropd.distill.step import StepResult, learn
from megatron_tropd.distill.step_parts import StepParts
from megatron_tropd.mcore.student import NotFinite, Update

LR = 0.1


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    """A world of one, so that there are groups."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class _Pair(Models):
    """Both models, with plain gradient descent; remembers what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []
        self.finite = True
        self.wait = SimpleNamespace(seconds=0.25)

    def begin(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        self.asked.append(("begin", step, len(sequences)))

    def signals(self, batches: Any) -> Any:
        self.asked.append("signals")
        return super().signals(batches)

    def update(self) -> Update:
        if not self.finite:
            raise NotFinite(float("nan"), [])
        self.asked.append("update")
        assert self.weight.grad is not None
        norm = float(self.weight.grad.norm())
        with torch.no_grad():
            self.weight -= LR * self.weight.grad
        return Update(norm, LR, False)


def _learn(pair: _Pair, sequences: list[TokenSequence], step: int = 0, **changes: Any):
    world: Any = dist.group.WORLD
    place = dict(tp_group=world, loss_group=world, dp_rank=0, dp_size=1, tp_rank=0)
    place |= dict(row_group=None, cp_size=1)
    place["local"] = lambda batch: batch
    example_rows = changes.pop("example_rows", ())
    layout: Any = SimpleNamespace(is_last_stage=True, **place | changes.pop("layout", {}))
    settings: Any = {
        "student": pair,
        "teacher": pair,
        "loss": preset("tropd", top_k=8),
        "beta": BETA,
        "vocab_size": VOCAB,
        "layout": layout,
        "device": torch.device("cpu"),
        "tokens_per_micro_batch": 24,
        "seed": 1,
    }
    return learn(StepParts(**settings | changes), sequences, step, example_rows=example_rows)


def test_the_teacher_hears_of_the_step_before_it_scores_and_the_update_comes_last():
    pair, sequences = _Pair(), step_sequences()
    before = pair.weight.clone()
    result = _learn(pair, sequences, step=3)
    assert pair.asked == [("begin", 3, len(sequences)), "signals", "update"]
    assert not torch.equal(pair.weight, before)
    assert isinstance(result, StepResult)
    teacher, student = (
        sum(t.count(w) for t in sequences) for w in (Writer.TEACHER, Writer.STUDENT)
    )
    assert result.metrics["tokens_teacher"] == teacher == result.counts.teacher
    assert result.metrics["tokens_student"] == student == result.counts.student
    assert result.metrics["grad_norm"] == result.update.grad_norm > 0
    assert (result.metrics["lr"], result.metrics["update_skipped"]) == (LR, 0)


def test_padding_and_waiting_are_told():
    sequences, pair = step_sequences(), _Pair()
    metrics = _learn(pair, sequences, tokens_per_micro_batch=1000, pad_multiple=5).metrics
    lengths = [len(sequence) - 1 for sequence in sequences]
    assert max(lengths) % 5, "so that even the longest is padded"
    padded = len(lengths) * 5 * -(-max(lengths) // 5)
    assert metrics["padding_share"] == pytest.approx(1 - sum(lengths) / padded)
    share = metrics["waiting_share"]
    pair.wait.seconds *= 4
    assert share > 0 and _learn(pair, sequences).metrics["waiting_share"] > share


def test_masked_tokens_are_told():
    loss = preset("tropd", top_k=8, mask_truncated=True)
    (cut,) = (t for t in step_sequences() if t.finish == "length")
    result = _learn(_Pair(), step_sequences(), loss=loss)
    assert result.metrics["masked_tokens"] == len(cut) - cut.prompt_length


def test_a_loss_that_switches_is_that_of_the_step():
    loss = preset("reopold", switch_step=2)
    shares = [
        _learn(_Pair(), step_sequences(), s, loss=loss).metrics["selected_share"] for s in (1, 2)
    ]
    assert shares[0] == 1 and 0.2 <= shares[1] < 0.3


def test_one_rank_of_a_vocabulary_counts():
    result = _learn(_Pair(), step_sequences(), layout={"tp_rank": 1})
    assert result.metrics["tokens_student"] == 0 and result.counts.student > 0
    assert result.examples == {}


def test_examples_are_those_of_their_sequences():
    """Several in one micro-batch, some of which are not asked for."""
    sequences, rows = step_sequences(), (1, 2, 4, 7)
    found = _learn(_Pair(), sequences, example_rows=rows, tokens_per_micro_batch=10_000).examples
    assert set(found) == set(rows)
    for row in rows:
        alone = _learn(_Pair(), [sequences[row]], example_rows=[0]).examples[0]
        written = len(sequences[row]) - sequences[row].prompt_length
        assert all(values.keys() == set(range(written)) for values in found[row].values())
        for name in ("trust", "tv", "k1"):  # the draws behind an outlier are keyed by the sample
            assert found[row][name] == pytest.approx(alone[name], rel=1e-4)


def test_a_loss_that_is_not_finite_changes_nothing():
    pair, sequences = _Pair(), step_sequences()
    read = int(sequences[1].ids_N[-2])
    pair.teacher[read] = torch.nan
    before = pair.weight.clone()
    bad = [(t.ids_N[:-1] == read).any() for t in sequences]
    with pytest.raises(TrainingError, match=r"not finite in step 4, trajectory \d") as error:
        _learn(pair, sequences, step=3)
    named = int(str(error.value).split("trajectory ")[1].split()[0])
    assert bad[named], "a trajectory in which the teacher reads that token"
    assert "update" not in pair.asked and torch.equal(pair.weight, before)


def test_a_gradient_that_is_not_finite_names_the_step():
    pair = _Pair()
    pair.finite = False
    with pytest.raises(TrainingError, match=r"Step 4 ends here.*weights were not updated"):
        _learn(pair, step_sequences(), step=3)


def test_an_engine_of_another_model_is_noticed_before_the_update_once_it_has_these_weights():
    # The log-probs of these sequences are invented, and all are of the weights of step 0.
    pair, gap = _Pair(), EngineGap(None, torch.float32, advice="Look there.")
    _learn(pair, step_sequences(), step=1, engine_gap=gap)
    pair.asked.clear()
    with pytest.raises(
        TrainingError, match=r"(?s)not compute the same model: in step 1.*Look there"
    ):
        _learn(pair, step_sequences(), step=0, engine_gap=gap)
    assert "update" not in pair.asked
    pair = _Pair()
    _learn(pair, step_sequences(), step=0, engine_gap=EngineGap(0, torch.float32))
    assert "update" in pair.asked
