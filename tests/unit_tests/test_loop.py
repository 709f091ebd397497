"""The story of a run: what it says if a step fails."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.base.progress import Progress, failed_in, failed_phase
from megatron_tropd.distill import loop


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
