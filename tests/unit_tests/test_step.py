"""The step as a function of its parts: what it hands back, and when it leaves the weights alone."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_choices import BETA, VOCAB, Models, step_sequences

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.base.progress import Progress, failed_in, failed_phase
from megatron_tropd.config.loss import preset
from megatron_tropd.distill import loop
from megatron_tropd.distill.engine_gap import EngineGap
from megatron_tropd.distill.reporter import Clock
from megatron_tropd.distill.step import learn
from megatron_tropd.distill.step_parts import StepParts
from megatron_tropd.mcore.step import NotFinite, Update


class Pair(Models):
    """Both models, and an optimizer that only counts."""

    def __init__(self, grad_norm: float = 1.0) -> None:
        super().__init__()
        self.grad_norm, self.updates = grad_norm, 0
        self.begun: list[int] = []

    def begin(self, step: int, sequences: Any) -> None:
        self.begun.append(step)

    def update(self) -> Update:
        if not math.isfinite(self.grad_norm):
            raise NotFinite(self.grad_norm, ["embedding"])
        self.updates += 1
        return Update(self.grad_norm, 0.1, False)


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    """A world of one, so that there are groups."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parts_of(pair: Pair, **changes: Any) -> StepParts:
    world = dist.group.WORLD
    place = {"dp_rank": 0, "dp_size": 1, "tp_rank": 0, "is_last_stage": True}
    both: Any = pair
    ranks: Any = SimpleNamespace(tp_group=world, dp_group=world, **place)
    return StepParts(
        student=both,
        teacher=both,
        ranks=ranks,
        beta=BETA,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        tokens_per_micro_batch=24,
        seed=1,
        **({"loss": preset("opd")} | changes),
    )


def test_a_step_hands_back_its_numbers_and_the_examples_that_were_asked_for():
    pair, progress = Pair(), Progress()
    clock = Clock(progress)
    result = learn(parts_of(pair, clock=clock), step_sequences(), 3, example_rows=[1])
    assert pair.begun == [3] and pair.updates == 1
    assert result.metrics["grad_norm"] == 1.0 and math.isfinite(result.metrics["loss"])
    assert result.counts.student == result.metrics["tokens_student"]
    assert result.examples.keys() == {1}
    phases = {"seconds_teacher", "seconds_student", "seconds_optimizer", "seconds_total"}
    assert phases == set(clock.lap())


def test_the_loss_is_that_of_the_step():
    losses = {
        step: learn(parts_of(Pair(), loss=preset("reopold", switch_step=3)), step_sequences(), step)
        for step in (2, 3)
    }
    assert losses[2].metrics["selected_share"] == 1.0
    assert losses[3].metrics["selected_share"] < 0.5


def test_a_loss_that_is_no_number_leaves_the_weights_alone():
    pair = Pair()
    pair.weight[5] = math.nan
    with pytest.raises(TrainingError, match="not finite in step 4, trajectory") as caught:
        learn(parts_of(pair), step_sequences(), 3)
    assert pair.updates == 0 and "checkpoint" not in str(caught.value)


def test_a_gradient_that_is_no_number_leaves_the_weights_alone():
    with pytest.raises(TrainingError, match=r"norm is nan.*embedding.*Step 4 ends here"):
        learn(parts_of(Pair(math.nan)), step_sequences(), 3)


def test_an_engine_that_computes_another_model_is_found_before_the_update():
    pair = Pair()
    gap = EngineGap(None, torch.float32, advice="Compare.")
    with pytest.raises(TrainingError, match="in step 1 the log-probs"):
        learn(parts_of(pair, engine_gap=gap), step_sequences(), 0)
    assert pair.updates == 0


@pytest.mark.parametrize(
    ("kind", "steps", "said"),
    [
        ("training", [2, 4], "no number. Last good checkpoint: checkpoints/step_000004."),
        ("training", [], "no number. No checkpoint."),
        ("engine", [2, 4], "no number."),
    ],
)
def test_the_loop_says_where_to_go_on(monkeypatch, kind: str, steps: list[int], said: str):
    """And the error keeps its kind and phase."""

    def fail(*_: object, **__: object) -> None:
        error = TrainingError("no number.", kind=kind)
        failed_in(error, "student")
        raise error

    monkeypatch.setattr(loop, "learn", fail)
    run: Any = SimpleNamespace(
        progress=Progress(),
        parts=None,
        reporter=SimpleNamespace(example_rows=lambda _: []),
        checkpoints=SimpleNamespace(steps=lambda: steps),
        folder=SimpleNamespace(checkpoints="checkpoints"),
    )
    with pytest.raises(TrainingError) as caught:
        loop.learn_from(run, [])
    assert str(caught.value) == said
    assert (caught.value.kind, failed_phase(caught.value)) == (kind, "student")
