"""The runs of the study: tasks, methods, learning rates, seeds, and the config of each."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 60
MAIN_SEEDS, OTHER_SEEDS, GRID_SEED = (1, 2, 3, 4, 5), (1, 2, 3), 101
"""Seeds of the methods whose answers are wanted, of the rest, and of the choice of the rate."""


@dataclass(frozen=True)
class Task:
    """One pair of models, its prompts and its yardstick."""

    folder: str
    """Of the repository; holds what the next names say, relative to it."""
    student: str
    teacher: str
    prompts: str
    responses: str
    """What the teacher answers: prefixes are cut from it."""
    problems: str
    """Held out."""
    lrs: tuple[float, ...]
    """The grid, from small to large. Every method's search begins with the two in the middle."""
    measure: str
    """Task of the evaluation: exact_match or reverse_kl."""
    num_problems: int
    goal: float
    """Tokens are counted until the measure is as good as this: out of reach at the start."""
    goal_kl: float
    """And until the reverse KL of the samples is this."""
    samples: tuple[int, int] = (16, 4)
    """Prompts of a step, samples of a prompt."""
    temperature: float = 1.0
    """Of the teacher's distribution: its logits are divided by this before the run."""

    @property
    def larger_is_better(self) -> bool:
        """Whether a larger value of the measure is better."""
        return self.measure == "exact_match"

    def missing(self) -> list[str]:
        """Files that have to be made first."""
        names = (self.student, self.teacher, self.prompts, self.responses, self.problems)
        return [n for n in names if not (REPOSITORY / self.folder / n).exists()]


TASKS = {
    "arithmetic": Task(
        "examples/arithmetic",
        "student",
        "teacher",
        "prompts.jsonl",
        "responses.jsonl",
        "heldout.jsonl",
        lrs=(3e-5, 1e-4, 3e-4, 1e-3),
        measure="exact_match",
        num_problems=500,
        goal=0.6,
        goal_kl=0.45,
    ),
    "dialect": Task(
        "examples/dialect",
        "student",
        "../arithmetic/teacher",
        "../arithmetic/prompts.jsonl",
        "../arithmetic/responses.jsonl",
        "../arithmetic/heldout.jsonl",
        lrs=(3e-5, 1e-4, 3e-4, 1e-3),
        measure="exact_match",
        num_problems=500,
        goal=0.45,
        goal_kl=1.0,
    ),
    "stories": Task(
        "examples/stories/data",
        "student",
        "teacher",
        "prompts.jsonl",
        "responses.jsonl",
        "heldout.jsonl",
        lrs=(1.5e-4, 5e-4, 1.5e-3, 4e-3),
        measure="reverse_kl",
        num_problems=128,
        goal=0.75,
        goal_kl=0.75,
        samples=(16, 2),
    ),
}
TASKS |= {
    f"arithmetic, {name} teacher": replace(TASKS["arithmetic"], temperature=temperature)
    for name, temperature in (("soft", 2.0), ("sharp", 0.5))
}


@dataclass(frozen=True)
class Entry:
    """A method of the study."""

    loss: dict[str, Any]
    """Its ``[loss]`` table."""
    guidance: bool = False
    """Whether responses begin with teacher prefixes."""
    main: bool = False
    """Whether it is one of those whose answers are wanted."""
    rollout: dict[str, Any] = field(default_factory=dict)
    """Settings of ``[rollout]`` beside the task's."""
    reference: str | None = None
    """What the teacher is measured against."""


def _of(method: str, **rest: Any) -> Entry:
    loss = rest.pop("loss", {})
    return Entry({"method": method} | loss, **rest)


METHODS = {
    "OPD": _of("opd", main=True),
    "OPD, exact": _of("gkd_reverse_kl", main=True),
    "TrOPD, as published": _of("tropd", guidance=True, main=True),
    "TrOPD, no guidance": _of("tropd", main=True),
    "TrOPD, expected": _of("tropd_expected", main=True),
    "TrOPD, exact": _of("tropd_exact", main=True),
    "TrOPD, exact, guidance": _of("tropd_exact", guidance=True, main=True),
    "TrOPD, clip": _of("tropd_clip", main=True),
    "TrOPD, clip, guidance": _of("tropd_clip", guidance=True, main=True),
    "TrOPD, exact, clip": _of("tropd_exact", loss={"outlier": "clip", "tau": -2.5}, main=True),
    "TrOPD, mask": _of("tropd_mask", main=True),
    "OPD, guidance": _of("opd", guidance=True, main=True),
    "TRB": _of(
        "trb",
        main=True,
        rollout={"behaviour": "blended", "epsilon": 0.02, "warmup_steps": STEPS // 8},
    ),
    "TRB's loss": _of("trb", main=True),
    "TRB's loss, cooled": _of(
        "trb",
        main=True,
        rollout={"behaviour": "cooled", "warmup_temperature": 0.8, "warmup_steps": STEPS // 8},
    ),
    "forward KL": _of("gkd_forward_kl"),
    "JSD": _of("gkd_jsd"),
    "static clip": _of("static_clip"),
    "static mask": _of("static_mask"),
    "REOPOLD": _of("reopold"),
    "EOPD": _of("eopd"),
    "entropy OPD": _of("entropy_opd"),
    "local support": _of("local_support"),
    "proximal teacher": _of("proximal_teacher"),
    "TOP-D": _of("top_d"),
    "MiniLLM, one step": _of("minillm_single_step", guidance=True),
    "AOPD": _of("aopd"),
    "PowerOPD": _of("power_opd"),
    "PowerOPD, exact": _of("power_opd_exact"),
    "IW-OPD": _of("iw_opd"),
    "Veto, reverse KL": _of("veto_reverse_kl", loss={"decay_steps": STEPS // 2}),
    "ExOPD": _of("exopd", reference="student"),
    "ExOPD, exact": _of("exopd_exact", reference="student"),
    "delta": _of("delta", reference="student"),
    "delta, exact": _of("delta_exact", reference="student"),
    "OPSA": _of("opsa"),
}


def _every(methods: Iterable[str], tasks: Iterable[str]) -> list[tuple[str, str]]:
    chosen = list(tasks)
    return [(task, method) for method in methods for task in chosen]


_PAIRS = ("dialect", "arithmetic")
_FIRST = ("OPD", "OPD, exact", "TrOPD, as published", "TrOPD, clip")
_PARTS = (
    "TrOPD, no guidance",
    "TrOPD, exact",
    "TrOPD, exact, clip",
    "TrOPD, mask",
    "OPD, guidance",
)
_OUTLIERS = ("OPD", "TrOPD, no guidance", "TrOPD, clip")
_BEHAVIOURS = ("TRB", "TRB's loss, cooled", "TRB's loss")
_SOFT, _SHARP = "arithmetic, soft teacher", "arithmetic, sharp teacher"
STAGES = (
    (_every(_FIRST, _PAIRS), OTHER_SEEDS),
    (_every(_PARTS[:1], _PAIRS), OTHER_SEEDS),
    (_every(_FIRST[:2], _PAIRS), MAIN_SEEDS),
    (_every(_OUTLIERS[:2], (_SOFT,)), OTHER_SEEDS),
    (_every(_PARTS[:3], _PAIRS), OTHER_SEEDS),
    (_every(("OPSA", *_BEHAVIOURS), _PAIRS[1:]), OTHER_SEEDS),
    (_every(_OUTLIERS, (_SOFT,)), OTHER_SEEDS),
    (_every(_PARTS, _PAIRS), OTHER_SEEDS),
    (_every((*_FIRST, *_PARTS), _PAIRS), MAIN_SEEDS),
    (_every((*_BEHAVIOURS, "OPSA"), _PAIRS), MAIN_SEEDS),
    (_every(_OUTLIERS, (_SOFT, _SHARP)), MAIN_SEEDS),
    (_every((*_FIRST, *_PARTS), ("stories",)), MAIN_SEEDS),
    (_every(METHODS, (*_PAIRS, "stories")), MAIN_SEEDS),
)
"""(task, method) and seeds, in the order in which they are made: what is asked first."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    method: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """Its name, and its folder's."""
        name = f"{self.task} {self.method}"
        name = "".join(c if c.isalnum() else "-" for c in name).replace("--", "-")
        return f"{name}-{self.lr:g}-{self.seed}"

    def teacher(self, runs: Path) -> Path:
        """The folder of its teacher: one of the repository, or a softer copy in ``runs``."""
        task = TASKS[self.task]
        if task.temperature == 1:
            return REPOSITORY / task.folder / task.teacher
        return runs / f"{Path(task.folder).name}-teacher-{task.temperature:g}"

    def toml(self, folder: Path) -> str:
        """Its config, for ``tropd distill``."""
        task, entry = TASKS[self.task], METHODS[self.method]
        where = REPOSITORY / task.folder
        tables: dict[str, dict[str, Any]] = {
            "model": {
                "student": str(where / task.student),
                "teacher": str(self.teacher(folder.parent)),
            },
            "rollout": {
                "prompts": str(where / task.prompts),
                "max_new_tokens": 64,
                "prompts_per_step": task.samples[0],
                "samples_per_prompt": task.samples[1],
                "engine_cpu_kv_gib": 0.25,
                **entry.rollout,
            },
            "loss": entry.loss,
            "train": {
                "steps": STEPS,
                "lr": self.lr,
                "lr_schedule": "cosine",
                "warmup_steps": 5,
                "adam_betas": [0.9, 0.99],
                "clip_grad": 0.5,
                "tokens_per_micro_batch": 8192,
                "seed": self.seed,
            },
            "evaluation": {
                "problems": str(where / task.problems),
                "task": task.measure,
                "num_problems": task.num_problems,
                "every": 0 if self.seed == GRID_SEED else STEPS // 5,
                "teacher": False,
            },
            "run": {
                "dir": str(folder),
                "checkpoint_every": STEPS // 2,
                "trajectories_every": 0,
                "tensorboard": False,
            },
        }
        if entry.reference:
            tables["teacher"] = {"reference": entry.reference}
        if entry.guidance:
            tables["guidance"] = {"responses": str(where / task.responses)}
        return "\n".join(
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(v)}\n" for key, v in table.items())
            for name, table in tables.items()
        )


Values = dict[Run, float]
"""Complete runs -> their last value, larger is better."""


def rate(task: str, method: str, values: Values) -> tuple[float | None, list[Run]]:
    """The rate of a method on a task, or the runs that its choice waits for.

    The search is the same for all: the two rates in the middle of the grid, then the neighbours of
    the best so far, until both of them are there, or the grid ends.
    """
    lrs = TASKS[task].lrs
    runs = [Run(task, method, lr, GRID_SEED) for lr in lrs]
    middle = len(lrs) // 2
    wanted = runs[middle - 1 : middle + 1]
    if all(run in values for run in wanted):
        best = max((run for run in runs if run in values), key=values.__getitem__)
        place = runs.index(best)
        wanted = runs[max(place - 1, 0) : place + 2]
    missing = [run for run in wanted if run not in values]
    return (None, missing) if missing else (best.lr, [])


def seeds(method: str) -> tuple[int, ...]:
    """Seeds of the runs that are reported."""
    return MAIN_SEEDS if METHODS[method].main else OTHER_SEEDS


def next_runs(values: Values) -> list[Run]:
    """What can be made now, by urgency: stage by stage, rates, then seed after seed."""
    found: list[Run] = []
    for stage, stage_seeds in STAGES:
        rates = {of: rate(*of, values) for of in stage}
        found += [run for _, missing in rates.values() for run in missing]
        found += [
            run
            for seed in stage_seeds
            for (task, method), (lr, _) in rates.items()
            if lr is not None
            and seed in seeds(method)
            and (run := Run(task, method, lr, seed)) not in values
        ]
    return list(dict.fromkeys(found))
