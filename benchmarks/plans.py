"""Tables of plans and rehearsals for the texts; and the recipes' files, made anew.

    python benchmarks/plans.py recipes          # plan and rehearsal of each: docs/planning.md
    python benchmarks/plans.py layouts          # one pair under ten layouts: docs/parallelism.md
    python benchmarks/plans.py write [NAME...]  # plan and rehearse recipes anew: a minute each

Nothing runs on a GPU. The first table is read from the committed rehearsals, the second is
arithmetic.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.config import load_config
from megatron_tropd.planning.estimate import Estimate, estimate
from megatron_tropd.planning.hardware import load_hardware
from megatron_tropd.planning.plan import make_plan
from megatron_tropd.planning.planned_run import plan_run
from megatron_tropd.planning.report import plan_table

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"
PHASES = ("teacher", "student", "optimizer", "sync", "checkpoint")
PAIR = "qwen3_8b_one_node"
"""The recipe whose pair is laid out in ten ways."""
LAYOUTS = (
    {"tensor": 8},
    {"tensor": 4, "data": 2},
    {"tensor": 4, "context": 2},
    {"tensor": 4, "pipeline": 2},
    {"tensor": 2, "data": 4},
    {"tensor": 2, "pipeline": 2, "data": 2},
    {"tensor": 2, "context": 2, "pipeline": 2},
    {"tensor": 2, "context": 4},
    {"tensor": 2, "pipeline": 4},
    {"pipeline": 8},
)
SAVING = (
    "megatron.model.recompute_granularity=full",
    "megatron.model.recompute_method=uniform",
    "megatron.model.recompute_num_layers=1",
    "teacher.offload=host_by_layer",
)


@dataclass(frozen=True)
class Peaks:
    """Of one stage: phase -> GB that are rehearsed, and planned."""

    recipe: str
    stage: str
    rehearsed: dict[str, float]
    planned: dict[str, float]

    @property
    def difference(self) -> float:
        """The largest, as a share of the plan."""
        return max(abs(self.rehearsed[p] / self.planned[p] - 1) for p in self.rehearsed)


def recipes() -> list[str]:
    """Names of all recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def committed_peaks(name: str) -> list[Peaks]:
    """What a recipe's committed rehearsal says of each stage."""
    text = (RECIPES / f"{name}.rehearsal.txt").read_text()
    table = text[text.index("peak GB") :].split("\n\n")[0].splitlines()[1:]
    rows = {
        phase.strip(): [float(number) for number in re.findall(r"(\d+\.\d+)", cells)]
        for phase, cells in (re.split(r"\s{2,}(?=\d)", line, maxsplit=1) for line in table)
    }
    stages = re.findall(r"^rank \d+ \(stage (\d+),", text, re.MULTILINE)
    return [
        Peaks(
            name,
            stage,
            {phase: numbers[2 * i] for phase, numbers in rows.items()},
            {phase: numbers[2 * i + 1] for phase, numbers in rows.items()},
        )
        for i, stage in enumerate(stages)
    ]


def recipe_table() -> Iterator[str]:
    """Peaks of every recipe and stage, plan / rehearsal, and the largest difference."""
    yield f"| recipe, stage | {' | '.join(PHASES)} | largest difference |"
    yield "|---|" + "---|" * (len(PHASES) + 1)
    for name in recipes():
        for one in committed_peaks(name):
            cells = [f"{one.planned[p]:.1f} / {one.rehearsed[p]:.1f}" for p in PHASES]
            where = f"`{name}`, {one.stage}"
            yield f"| {where} | {' | '.join(cells)} | {100 * one.difference:.1f} % |"


def layout_table() -> Iterator[str]:
    """One pair under ten layouts of one node: bytes, and seconds without the rollout."""
    head = [
        *("layout", "weights, gradients, optimizer", "teacher's weights, hidden states"),
        *("activations", "largest", "with all layers recomputed, teacher on the host by layer"),
        *("sent in a step", "seconds to score and learn"),
    ]
    yield f"| {' | '.join(head)} |"
    yield "|---|" + "---|" * (len(head) - 1)
    for layout in LAYOUTS:
        plain, saving = (_laid_out(layout, words) for words in ((), SAVING))
        yield f"| {' | '.join([_name(layout), *_cells(plain, saving)])} |"


def _laid_out(layout: dict[str, int], words: tuple[str, ...]) -> Estimate:
    axes = {"tensor": 1, "context": 1, "pipeline": 1, "data": 1} | layout
    replicas = axes["context"] * axes["data"]
    switches = {
        "sequence_parallel": axes["tensor"] > 1,
        "distributed_optimizer": replicas > 1,
        "uneven_stages": axes["pipeline"] > 4,
    }
    settings = [f"parallel.{name}={size}" for name, size in axes.items()]
    settings += [f"parallel.{name}={str(is_on).lower()}" for name, is_on in switches.items()]
    config = load_config(RECIPES / f"{PAIR}.toml", [*_without_savings(), *settings, *words])
    return estimate(plan_run(config, load_hardware("h100")))


def _without_savings() -> list[str]:
    """The recipe's own are left out: each layout is shown without and with all of them."""
    return ["megatron.model={}", "teacher.offload=none"]


def _cells(plain: Estimate, saving: Estimate) -> Iterator[str]:
    fullest = max(plain.memory, key=lambda stage: stage.peak)
    phases = max(stage.peak for stage in saving.memory)
    yield _gb(fullest.weights + fullest.gradients + fullest.optimizer)
    yield f"{_gb(fullest.teacher_weights)} + {_gb(fullest.teacher_hidden)}"
    yield _gb(fullest.activations)
    yield f"{_gb(plain.peak)}{'' if plain.fits else ' (too much)'}"
    yield f"{_gb(phases)}{'' if saving.fits else ' (too much)'}"
    sent = vars(plain.communication)
    yield f"{sum(size for name, size in sent.items() if name != 'weight_sync') / 1e9:.0f}"
    yield f"{plain.seconds.teacher + plain.seconds.student:.0f}"


def _name(layout: dict[str, int]) -> str:
    short = {"tensor": "TP", "context": "CP", "pipeline": "PP", "data": "DP"}
    return " x ".join(f"{short[name]} {size}" for name, size in layout.items())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def write(name: str) -> None:
    """Plan and rehearse a recipe, and keep what both print."""
    from megatron_tropd.rehearsal import rehearsal_table, rehearse

    config = load_config(RECIPES / f"{name}.toml")
    plan = make_plan(config, load_hardware("h100"))
    (RECIPES / f"{name}.plan.txt").write_text(f"{plan_table(plan)}\n")
    rehearsed = rehearse(config)
    (RECIPES / f"{name}.rehearsal.txt").write_text(f"{rehearsal_table(rehearsed)}\n")


def main() -> None:
    """Print a table, or write the recipes' files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["recipes", "layouts", "write"])
    parser.add_argument("names", nargs="*", help="of recipes to write; default: all")
    arguments = parser.parse_args()
    if arguments.what == "write":
        for name in arguments.names or recipes():
            write(name)
    else:
        print("\n".join(recipe_table() if arguments.what == "recipes" else layout_table()))


if __name__ == "__main__":
    main()
