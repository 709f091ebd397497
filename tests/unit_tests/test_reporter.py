"""The clock of a step: seconds and phases, errors included."""

import pytest

from megatron_tropd.base.errors import TrainingError
from megatron_tropd.base.progress import START, Progress, failed_phase
from megatron_tropd.distill.reporter import Clock


def test_an_error_ends_its_phase_and_carries_its_name() -> None:
    progress = Progress()
    clock = Clock(progress)
    with pytest.raises(TrainingError) as caught, clock("evaluation"), clock("rollout"):
        raise TrainingError("no engine", kind="engine")
    assert failed_phase(caught.value) == "rollout", "the innermost one"
    assert progress.phase == START, "as before both"
    assert {"seconds_evaluation", "seconds_rollout", "seconds_total"} == set(clock.lap())


def test_an_error_outside_of_phases_has_none() -> None:
    assert failed_phase(ValueError()) is None
