"""Every recipe is rehearsed at its full size, and agrees with its plan."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import load_config
from megatron_tropd.rehearsal import Rehearsal, rehearsal_table, rehearse
from megatron_tropd.rehearsal.report import findings

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.fixture(scope="module")
def rehearsals() -> dict[str, Rehearsal]:
    """One rank of the last stage of each, which has the loss, with one micro-batch run of all."""

    def one(name: str) -> Rehearsal:
        config = load_config(RECIPES / f"{name}.toml")
        parallel = config.parallel
        last = (parallel.pipeline - 1) * parallel.tensor * parallel.data
        return rehearse(config, ranks=[last], micro_batches=1)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(one, NAMES), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_agrees_with_its_plan(name: str, rehearsals: dict[str, Rehearsal]):
    rehearsal = rehearsals[name]
    assert findings(rehearsal) == []
    (rank,) = rehearsal.ranks
    phases = {phase.name: phase for phase in rank.phases}
    assert list(phases) == [
        *("build", "teacher", "student", "optimizer", "between steps", "sync", "checkpoint"),
    ]
    resident = phases["between steps"].difference
    assert resident is not None and abs(resident) < 0.01
    assert rank.resident_bytes < 6 * 2**30
    assert rank.collectives and rank.waits and rank.kernels
    assert f"rank {rank.rank}" in rehearsal_table(rehearsal)


def test_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="--rank must be between 0 and 31, found 32"):
        rehearse(load_config(RECIPES / "qwen3_8b.toml"), ranks=[32])


def test_a_layout_that_does_not_fit_is_refused():
    config = load_config(RECIPES / "qwen3_8b.toml", ["parallel.tensor=16", "parallel.data=1"])
    with pytest.raises((ConfigError, InputError), match="must divide"):
        rehearse(config)
