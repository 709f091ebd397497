"""When and with what a run is evaluated, and what of it is written down."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_tropd.config import Config, GraderConfig, GuidanceConfig
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.linked_folder import link_folder
from megatron_tropd.data.collective import run_and_share
from megatron_tropd.data.routes import SOURCE
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill.engines import engine_dtype
from megatron_tropd.distill.inputs import Inputs
from megatron_tropd.losses.draws import Purpose, keyed_seed
from megatron_tropd.report.metrics import MetricsLog
from megatron_tropd.report.records import read_lines
from megatron_tropd.rollout.environments import shared_environments
from megatron_tropd.rollout.episodes import EpisodePlan, EpisodeStart
from megatron_tropd.rollout.episodes.multi_turn import MultiTurn
from megatron_tropd.rollout.source import play
from megatron_tropd.tasks.exact_match import Sampler, answer_greedily, grade_answers
from megatron_tropd.tasks.grading import grader_of
from megatron_tropd.tasks.reverse_kl import measure_reverse_kl

NUM_EXAMPLES = 20
"""Answers of an evaluation kept for the report."""
_TEMPLATE = "chat_template"  # in the names of the settings that say how prompts are wrapped


class Evaluator:
    """Evaluations of one run."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        folder: RunFolder,
        *,
        is_main: bool,
        log: MetricsLog | None,
    ) -> None:
        """Measure nothing yet.

        Args:
            log: where it writes; None on the other ranks.
        """
        self._config, self._inputs, self._folder = config, inputs, folder
        self._is_main, self._log = is_main, log
        self.shown: dict[str, str] = {}
        """The newest result, for the progress bar."""

    def measure_student(
        self, engines: Sampler, *, step: int, export: Callable[[Path], None], teacher: Path | None
    ) -> None:
        """Measure the student, if the run has held-out problems; collective.

        Args:
            step: optimizer steps it has seen.
            export: writes the student as an HF folder; collective.
            teacher: HF folder of the one teacher, which the reverse KL is to; None: several.
        """
        if not self._inputs.problems:
            return
        if self._config.evaluation.task == "reverse_kl":
            assert teacher is not None, "settings with several teachers are refused"
            self._measure_reverse_kl(engines, step, export, teacher)
        elif result := self._accuracy(engines):
            self.shown = {"accuracy": f"{result['accuracy']:.1%}"}
            self._write("student", step, result)

    def teacher_is_due(self) -> bool:
        """Whether the teacher is to be measured and has not been, with these settings.

        Collectives: those of :func:`run_and_share`: what rank 0 finds in the run's folder counts.
        """
        evaluation = self._config.evaluation
        exact = evaluation.task == "exact_match"
        if not (self._inputs.problems and evaluation.teacher and exact):
            return False
        settings = json.loads(json.dumps(evaluation_settings(self._config, self._inputs)))

        def due() -> bool:
            return not any(
                record["model"] == "teacher" and record.get("settings") == settings
                for record in (read_lines(self._folder.evaluations) if self._is_main else ())
            )

        return run_and_share(due, (0,))[0]

    def answers_of(self, engines: Sampler, problems: Sequence[Prompt]) -> dict[int, Sample]:
        """Answers of a teacher to its problems, by ``Prompt.index``; collective."""
        samples = sample_problems(self._config, self._inputs, engines, problems)
        return {p.index: sample for p, sample in zip(problems, samples, strict=True)}

    def measure_teacher(self, samples: Mapping[int, Sample]) -> None:
        """Grade the teachers' answers.

        Args:
            samples: to every problem, by ``Prompt.index``, each by the problem's own teacher.
        """
        if self._is_main:
            in_order = [samples[problem.index] for problem in self._inputs.problems]
            record = accuracy_of(self._config, self._inputs, in_order)
            self._write("teacher", 0, record)

    def summary(self) -> dict[str, Any]:
        """The entries of summary.json that come from evaluations."""
        records = read_lines(self._folder.evaluations)
        student = [record for record in records if record["model"] == "student"]
        teacher = [record for record in records if record["model"] == "teacher"]
        if not student:
            return {}
        first, last = student[0], student[-1]
        if "reverse_kl" in first:
            return {
                "student_before_reverse_kl": first["reverse_kl"],
                "student_after_reverse_kl": last["reverse_kl"],
            }
        return {
            "student_before": first["accuracy"],
            "student_after": last["accuracy"],
            "teacher": teacher[-1]["accuracy"] if teacher else None,
            "unjudged": last["unjudged"],
            "problems": last["total"],
        }

    def _accuracy(self, engine: Sampler) -> dict[str, Any] | None:
        """The graded answers; None on the ranks that do not grade (all have the samples)."""
        samples = sample_problems(self._config, self._inputs, engine)
        return accuracy_of(self._config, self._inputs, samples) if self._is_main else None

    def _measure_reverse_kl(
        self, engines: Sampler, step: int, export: Callable[[Path], None], teacher: Path
    ) -> None:
        samples = sample_problems(self._config, self._inputs, engines)
        with tempfile.TemporaryDirectory() as scratch:
            # Rank 0's folder counts: the export collects there, and only it measures.
            student = Path(scratch) / "student"
            export(student)
            record = run_and_share(
                lambda: (
                    reverse_kl_of(self._inputs, samples, student, teacher) if self._is_main else {}
                ),
                (0,),
            )[0]
        self.shown = {"held-out kl": f"{record['reverse_kl']:.3f}"}
        self._write("student", step, record)

    def _write(self, model: str, step: int, record: dict[str, Any]) -> None:
        if self._log is not None:
            settings = evaluation_settings(self._config, self._inputs)
            self._log.write_evaluation(
                {"step": step, "model": model, **record, "settings": settings}
            )


def evaluation_settings(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What decides the result of an evaluation beside the model and the problems, JSON-ready."""
    exact = config.evaluation.task == "exact_match"
    rollout = asdict(config.rollout)
    templates = {name: value for name, value in rollout.items() if _TEMPLATE in name}
    templates |= {n: rollout[n] for n in ("system_prompt", "prompt_template") if rollout[n]}
    return {
        "task": config.evaluation.task,
        "problems": len(inputs.problems),
        "max_new_tokens": config.max_answer_tokens,
        "stop_token_ids": list(inputs.stop_token_ids),
        **templates,
        **({"environment": asdict(config.environment)} if config.talks_to else {}),
        "dtype": engine_dtype(config.model.dtype),
        **({"temperature": 0.0, "grader": _named(config.grader)} if exact else _drawn(config)),
    }


def _named(grader: GraderConfig) -> str | dict[str, Any]:
    """The grader's name, if that says it all."""
    return grader.name if grader == GraderConfig(name="marked") else asdict(grader)


def _drawn(config: Config) -> dict[str, Any]:
    return {"temperature": 1.0, "seed": config.train.seed}


def sample_problems(
    config: Config, inputs: Inputs, engine: Sampler, problems: Sequence[Prompt] | None = None
) -> list[Sample]:
    """What a model writes to the held-out problems; collective if the engine is.

    Args:
        config: its task says whether answers are greedy or drawn at temperature 1.
        problems: some of them; None: all.
    """
    room, stops = config.max_answer_tokens, inputs.stop_token_ids
    problems = inputs.problems if problems is None else problems
    if config.talks_to is not None:
        return last_turns(config, inputs, engine, problems)
    if config.evaluation.task == "exact_match":
        return answer_greedily(engine, problems, stop_token_ids=stops, max_new_tokens=room)
    requests = [
        SampleRequest(p.token_ids, room, keyed_seed(config.train.seed, Purpose.EVALUATION, p.index))
        for p in problems
    ]
    return engine.generate(requests, Sampling(stop_token_ids=stops))


def last_turns(
    config: Config, inputs: Inputs, engine: Sampler, problems: Sequence[Prompt]
) -> list[Sample]:
    """The model's last turn in a greedy episode of each problem; collective if the engine is."""
    room = config.max_answer_tokens
    plan = EpisodePlan(
        replace(config.rollout, max_new_tokens=room, first_new_tokens=None, growth_steps=0),
        GuidanceConfig(),
        1,
        config.train.seed,
        None,
        environment=config.talks_to,
        talk=inputs.talk,
    )
    episodes = [MultiTurn(EpisodeStart(problem, 0, 0, 0, plan)) for problem in problems]
    sampling = Sampling(temperature=0.0, stop_token_ids=inputs.turn_stops)
    play(episodes, engine, sampling, shared_environments(config))
    return [episode.last_turn() for episode in episodes]


def accuracy_of(config: Config, inputs: Inputs, samples: Sequence[Sample]) -> dict[str, Any]:
    """The graded samples as a record of evaluations.jsonl, with some examples."""
    grader = grader_of(config.grader)
    record = asdict(grade_answers(inputs.problems, samples, inputs.tokenizer, grader))
    responses = record.pop("responses")
    right: dict[str, list[bool]] = {}
    for problem, response in zip(inputs.problems, responses, strict=True):
        if not response["error"]:
            right.setdefault(str(problem.fields.get(SOURCE)), []).append(
                response["correct"] is True
            )
    if len(right) > 1:
        record |= {f"accuracy/{name}": sum(each) / len(each) for name, each in right.items()}
    return {**record, "examples": responses[:NUM_EXAMPLES]}


def reverse_kl_of(
    inputs: Inputs, samples: Sequence[Sample], student: Path, teacher: Path
) -> dict[str, Any]:
    """KL(student || teacher) on the student's samples as a record of evaluations.jsonl."""
    sequences = [
        (problem.token_ids, sample.token_ids)
        for problem, sample in zip(inputs.problems, samples, strict=True)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        places = Path(scratch) / "student", Path(scratch) / "teacher"
        for place, folder in zip(places, (student, teacher), strict=True):
            place.mkdir()
            link_folder(HFFolder(folder), place)  # transformers would read what we do not
        result = measure_reverse_kl(places[0], places[1], sequences, vocab_size=inputs.vocab_size)
        return asdict(result)
