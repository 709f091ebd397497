"""Teachers of a file of settings through the real ``pretrain``: as ``tropd distill`` has them.

A layout of the teacher's own, several teachers, a context, a reference; each beside the resident
teacher in the student's layout, or beside our own trainer on one rank.
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_lm import MICRO_BATCHES, ROWS, SEQUENCE, Run, error_of, history, run_all
from test_megatron_lm_pretrain import Setting

from megatron_tropd.config import NamedTeacher, ParallelConfig, TeacherConfig, TrainConfig
from megatron_tropd.config.loss import preset
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.recorded import training_item
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.data.tokenizers import load_tokenizer
from tests.ranks import leave_layout, run_with_env
from tests.step_parts import BETA, build_parts

pytestmark = pytest.mark.slow

STEPS, SIZE, PROMPTS = 4, ROWS * MICRO_BATCHES, 6
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
CONTEXT = "{prompt} it is {hint}:"
CASES = {
    "one": ("gkd_jsd", ""),
    "own_layout": ("gkd_jsd", "[teacher.parallel]\npipeline = 2"),
    "several": ("tropd", "several"),
    "several_exact": ("gkd_reverse_kl", "several"),
    "context": ("gkd_jsd", f'[teacher]\ncontext = "{CONTEXT}"'),
    "reference": ("exopd", '[teacher]\nreference = "REFERENCE"'),
    "reference_elsewhere": (
        "exopd",
        '[teacher]\nreference = "REFERENCE"\n[teacher.parallel]\npipeline = 2',
    ),
}
"""Name -> method, and what the file of settings says."""
OPTIONS = {"tensor": "--tensor-model-parallel-size 2", "data": ""}
LAYOUTS = {"tensor": tuple(CASES), "data": ("one", "own_layout", "several", "context")}
"""Layout of the student -> the cases that are run in it."""
OWN = {"one", "several", "several_exact", "context", "reference"}
"""Cases that our trainer runs, too."""
LIKE = {"own_layout": "one", "reference_elsewhere": "reference"}
"""Case -> the one in the student's layout."""


class Pair(Setting):
    """Folders of the runs, with another teacher and prompts that say whose they are."""

    def __init__(self, root: Path, student: Path, teacher: Path, other: Path) -> None:
        super().__init__(root, student, teacher)
        self.other, self.prompts = other, root / "prompts.jsonl"
        lines = [
            {"prompt": f"what is {n}", "hint": f"{7 * n}", "teacher": ("a", "b")[n % 2]}
            for n in range(PROMPTS)
        ]
        self.prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def sequence(self, index: int) -> TokenSequence:
        """A trajectory of one of the prompts."""
        prompts = load_prompts(self.prompts, load_tokenizer(self.student))
        number, generator = index % PROMPTS, torch.Generator().manual_seed(index)
        ids = prompts[number].token_ids
        length = int(torch.randint(4, SEQUENCE - len(ids), (), generator=generator))
        response = torch.randint(3, 259, (length,), generator=generator).tolist()
        return TokenSequence.of_runs(
            SampleKey(index // SIZE, number, index // PROMPTS),
            (Writer.CONTEXT, tuple(ids)),
            (Writer.TEACHER, tuple(response[:1])),
            (Writer.STUDENT, tuple(response[1:])),
            logprobs=(-5.0,) * (length - 1),
            version=0,
        )

    def file(self, name: str, **other_prompts: str) -> Path:
        """The file of settings of a case."""
        said = CASES[name][1].replace("REFERENCE", str(self.other))
        text = f'[rollout]\nprompts = "{other_prompts.get("prompts", self.prompts)}"\n'
        if said == "several":
            text += "".join(
                f'[[teachers]]\nname = "{n}"\nmodel = "{folder}"\n'
                for n, folder in (("a", self.teacher), ("b", self.other))
            )
        else:
            text += f'[model]\nteacher = "{self.teacher}"\n{said}\n'
        path = self.root / f"{'-'.join([name, *other_prompts])}.toml"
        path.write_text(text)
        return path

    def case(self, name: str, layout: str, **more: str) -> Run:
        """A run of a case."""
        method = CASES[name][0]
        teacher = self.teacher if name == "one" else self.file(name, **more)
        arguments = (
            f"--tropd-trajectories here --tropd-teacher-load {teacher} --tropd-beta {BETA} "
            f"--tropd-method {method} --train-iters {STEPS} {OPTIONS[layout]} "
            f"--pretrained-checkpoint {self.root / 'student'} "
            f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {self.student}"
        )
        label = "-".join([name, layout, *more])
        return Run(label, arguments, before=partial(_serve, self))


class Trajectories(torch.utils.data.Dataset):
    """Recorded trajectories of the prompts."""

    def __init__(self, pair: Pair) -> None:
        self.items = [training_item(pair.sequence(n), SEQUENCE) for n in range(STEPS * SIZE)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


def _serve(pair: Pair) -> Callable[[], None]:
    from megatron_tropd.integrations import megatron_lm

    dataset = megatron_lm.recorded_trajectories
    megatron_lm.recorded_trajectories = lambda args: Trajectories(pair)

    def after() -> None:
        megatron_lm.recorded_trajectories = dataset

    return after


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_model: Callable[..., Path]) -> Pair:
    """A tied Llama and two teachers of other shapes."""
    student = tiny_model("llama", tie_word_embeddings=True)
    teacher = tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)
    other = tiny_model("llama", num_hidden_layers=4, seed=9)
    return Pair(tmp_path_factory.mktemp("teachers"), student, teacher, other)


@pytest.fixture(scope="module")
def logs(pair: Pair) -> dict[str, str]:
    """Name of a run -> its log."""
    runs = [pair.case(name, layout) for layout, names in LAYOUTS.items() for name in names]
    others = pair.root / "others.jsonl"
    others.write_text('{"prompt": "another", "hint": "1", "teacher": "a"}\n' * PROMPTS)
    runs.append(pair.case("several", "tensor", prompts=str(others)))
    return run_all(2, runs, pair.logs)


@pytest.fixture(scope="module")
def own(pair: Pair) -> dict[str, list[list[float]]]:
    """Case -> [steps, 2] loss and gradient norm of our own trainer on one rank."""
    run_with_env(1, _own_trainer, pair)
    found: dict[str, list[list[float]]] = json.loads((pair.root / "own.json").read_text())
    return found


def _own_trainer(pair: Pair) -> None:
    (pair.root / "own.json").write_text(json.dumps({name: _train(pair, name) for name in OWN}))


def _train(pair: Pair, name: str) -> list[list[float]]:
    from megatron_tropd.data.contexts import contexts_of
    from megatron_tropd.data.routes import Routes, routes_of
    from megatron_tropd.distill.step import learn

    tokenizer = load_tokenizer(pair.student)
    prompts = load_prompts(pair.prompts, tokenizer)
    teacher: Any = pair.teacher
    source, routes = None, None
    if name.startswith("several"):
        teacher = (
            NamedTeacher(name="a", model=str(pair.teacher)),
            NamedTeacher(name="b", model=str(pair.other)),
        )
        routes = routes_of(pair.prompts, prompts, teacher)
    elif name == "reference":
        source = TeacherConfig(reference=str(pair.other))
    elif name == "context":
        settings = _plain_prompts(pair)
        read = contexts_of(pair.prompts, prompts, CONTEXT, tokenizer, settings, max_tokens=200)
        routes = Routes(("teacher",), dict.fromkeys(range(PROMPTS), 0), read)
        source = TeacherConfig(context=CONTEXT)
    parts = build_parts(
        pair.student,
        teacher,
        ParallelConfig(),
        TrainConfig(steps=STEPS, lr=1e-2, tokens_per_micro_batch=ROWS * SEQUENCE),
        preset(CASES[name][0]),
        routes=routes,
        source=source,
        seed=1234,  # Megatron's own --seed
    )
    rows = []
    for step in range(STEPS):
        sequences = [pair.sequence(step * SIZE + n) for n in range(SIZE)]
        found = learn(parts, sequences, step).metrics
        rows.append([found["loss"], found["grad_norm"]])
    leave_layout()
    return rows


def _plain_prompts(pair: Pair) -> Any:
    from megatron_tropd.config import RolloutConfig

    return RolloutConfig(prompts=str(pair.prompts), max_new_tokens=1)


def _runs(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(n, layout) for n in sorted(names) for layout, cases in LAYOUTS.items() if n in cases]


@pytest.mark.parametrize(("name", "layout"), _runs(LIKE))
def test_the_plug_ins_teacher_may_have_another_layout(name, layout, logs) -> None:
    for value in ("tropd loss", "grad norm", "k1"):
        found, expected = (history(logs[f"{n}-{layout}"], value) for n in (name, LIKE[name]))
        assert len(found) == STEPS
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(("name", "layout"), _runs(OWN))
def test_the_plug_in_trains_with_the_teachers_of_our_trainer(name, layout, logs, own) -> None:
    loss, norm = torch.tensor(own[name], dtype=torch.float64).T
    log = logs[f"{name}-{layout}"]
    torch.testing.assert_close(history(log, "tropd loss"), loss, **CLOSE)
    torch.testing.assert_close(history(log, "grad norm"), norm, rtol=1e-3, atol=6e-4)


def test_the_plug_in_says_how_much_each_teacher_scores(logs) -> None:
    shares = torch.stack([history(logs["several-tensor"], f"{n} share") for n in ("a", "b")])
    torch.testing.assert_close(shares.sum(0), torch.ones(STEPS).double(), rtol=0, atol=2e-6)
    assert shares.min() > 0.2 and history(logs["several-tensor"], "a k1").isfinite().all()


def test_the_plug_in_refuses_trajectories_of_other_prompts(logs) -> None:
    error = error_of(logs["several-tensor-prompts"])
    assert "expected the ids that" in error and "others.jsonl has for this prompt" in error
