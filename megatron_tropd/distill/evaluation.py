"""When and with what a run is evaluated, and what of it is written down.

`tropd evaluate` measures through the same functions (:mod:`megatron_tropd.cli.measure`).
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import batched, islice
from pathlib import Path
from typing import Any

from megatron_tropd.base.files import replace_text
from megatron_tropd.base.text_files import read_json_object
from megatron_tropd.config import Config, EvaluationSet, GraderConfig, GuidanceConfig
from megatron_tropd.config.run import MULTI_TURN
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.linked_folder import link_folder
from megatron_tropd.data.collective import run_and_share
from megatron_tropd.data.routes import SOURCE
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill.engines import engine_dtype
from megatron_tropd.distill.inputs import Inputs, ProblemSet
from megatron_tropd.losses.draws import Purpose, keyed_seed
from megatron_tropd.report.metrics import MetricsLog
from megatron_tropd.report.records import read_lines
from megatron_tropd.rollout.environments import shared_environments
from megatron_tropd.rollout.episodes import EpisodePlan, EpisodeStart
from megatron_tropd.rollout.episodes.multi_turn import MultiTurn
from megatron_tropd.rollout.source import check_environments, play
from megatron_tropd.tasks.answer_files import dump_answers, file_name, header_of
from megatron_tropd.tasks.exact_match import (
    Asking,
    GradedResponse,
    Sampler,
    grade_samples,
    result_of,
    set_digest,
)
from megatron_tropd.tasks.grading import Grader, grader_of
from megatron_tropd.tasks.reverse_kl import measure_reverse_kl
from megatron_tropd.teacher.cached.digest import model_digest

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
        sets = self._inputs.problem_sets
        if not sets:
            return
        asked = [(each, each.problems) for each in sets]
        samples = sample_problems(self._config, self._inputs, engines, asked)
        if self._config.evaluation.task == "reverse_kl":
            assert teacher is not None, "settings with several teachers are refused"
            records = self._reverse_kls(samples, export, teacher)
        elif self._is_main:
            name = f"student_step_{step:06d}"
            graded = zip(sets, samples, strict=True)
            records = [self._graded(each, found, name, f"step {step}") for each, found in graded]
        else:
            return
        self.shown = _shown(sets, records)
        for each, record in zip(sets, records, strict=True):
            self._write("student", step, each, record)

    def teachers_due(self) -> list[ProblemSet]:
        """Find the sets on which the teacher is to be measured and has not been, with all settings.

        What another run has kept (``evaluation.teacher_results``) is taken up.

        Collectives: those of :func:`run_and_share`: what rank 0 finds in the run's folder counts.
        """
        sets = [each for each in self._inputs.problem_sets if each.of_teachers]
        if not sets:
            return []

        def due() -> list[str]:
            known = read_lines(self._folder.evaluations) if self._is_main else ()
            return [
                each.name
                for each in sets
                if not any(self._is_of(record, each) for record in known)
                and not self._taken_up(each)
            ]

        names = run_and_share(due, (0,))[0]
        return [each for each in sets if each.name in names]

    def answers_of(
        self, engines: Sampler, sets: Sequence[ProblemSet], who: str
    ) -> list[dict[int, list[Sample]]]:
        """Answers of a teacher to its problems of each set, by ``Prompt.index``; collective."""
        asked = [(each, each.of_teachers.get(who, ())) for each in sets]
        samples = sample_problems(self._config, self._inputs, engines, asked)
        found = []
        for (each, problems), mine in zip(asked, samples, strict=True):
            count = each.settings.samples or 1
            groups = (list(group) for group in batched(mine, count))
            found.append(dict(zip((p.index for p in problems), groups, strict=True)))
        return found

    def measure_teacher(self, each: ProblemSet, samples: Mapping[int, Sequence[Sample]]) -> None:
        """Grade the teachers' answers to a set, and keep what they reached.

        Args:
            samples: to every problem, by ``Prompt.index``, each by the problem's own teacher.
        """
        if not self._is_main:
            return
        in_order = [one for problem in each.problems for one in samples[problem.index]]
        digests = self._digests(each)
        record = self._graded(each, in_order, "teacher", " ".join(digests["models"].values()))
        self._write("teacher", 0, each, record | {"digests": digests})
        if place := self._shared(each):
            place.parent.mkdir(parents=True, exist_ok=True)
            if self._config.evaluation.keep_answers:
                answers = self._folder.answers / "teacher" / file_name(each.name)
                replace_text(place.with_suffix(".jsonl"), answers.read_text(encoding="utf-8"))
            replace_text(place, json.dumps(record) + "\n")

    def summary(self) -> dict[str, Any]:
        """The entries of summary.json that come from evaluations.

        Those of sets with names are in ``sets``, by name.
        """
        records = read_lines(self._folder.evaluations)
        by_set: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            by_set.setdefault(record.get("set", ""), []).append(record)
        found = {name: summary_of(mine) for name, mine in by_set.items()}
        only = found.pop("", {})
        return only | ({"sets": found} if found else {})

    def _graded(
        self, each: ProblemSet, samples: Sequence[Sample], folder: str, model: str
    ) -> dict[str, Any]:
        """Grade the answers to a set; the record, and a file of them in the run's folder."""
        keep = self._config.evaluation.keep_answers
        path = self._folder.answers / folder / file_name(each.name) if keep else None
        return graded(self._config, self._inputs, each, samples, path, model)

    def _reverse_kls(
        self,
        samples: Sequence[Sequence[Sample]],
        export: Callable[[Path], None],
        teacher: Path,
    ) -> list[dict[str, Any]]:
        """Measure the divergence on the samples of each set; collective."""
        with tempfile.TemporaryDirectory() as scratch:
            # Rank 0's folder counts: the export collects there, and only it measures.
            student = Path(scratch) / "student"
            export(student)

            def measure() -> list[dict[str, Any]]:
                sets = zip(self._inputs.problem_sets, samples, strict=True)
                return [
                    reverse_kl_of(self._inputs, each, found, student, teacher)
                    for each, found in (sets if self._is_main else ())
                ]

            return run_and_share(measure, (0,))[0]

    def _digests(self, each: ProblemSet) -> dict[str, Any]:
        """What tells a teacher's result on a set from others, beside the settings."""
        folders = self._inputs.folders
        models = {who: model_digest(folders[who]) for who in each.of_teachers if who in folders}
        return {"models": models, "problems": set_digest(each.problems)}

    def _is_of(self, record: Mapping[str, Any], each: ProblemSet) -> bool:
        """Whether a record is the teacher's on this set with these settings."""
        wanted = {
            "model": "teacher",
            "settings": evaluation_settings(self._config, self._inputs, each),
            "digests": self._digests(each),
        }
        return all(record.get(name) == _plain(value) for name, value in wanted.items())

    def _shared(self, each: ProblemSet) -> Path | None:
        """Where runs keep what the teacher reached on a set."""
        folder = self._config.evaluation.teacher_results
        if folder is None:
            return None
        settings = evaluation_settings(self._config, self._inputs, each)
        text = json.dumps([self._digests(each), settings], sort_keys=True)
        name = file_name(each.name).removesuffix(".jsonl")
        return Path(folder) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def _taken_up(self, each: ProblemSet) -> bool:
        """Write down what another run has kept of the teacher; whether there is anything."""
        place = self._shared(each) if self._is_main else None
        if place is None or not place.exists():
            return False
        record = read_json_object(place)
        answers = place.with_suffix(".jsonl")
        if self._config.evaluation.keep_answers and answers.exists():
            copy = self._folder.answers / "teacher" / file_name(each.name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(answers, copy)
        self._write("teacher", 0, each, record | {"digests": self._digests(each)})
        return True

    def _write(self, model: str, step: int, each: ProblemSet, record: dict[str, Any]) -> None:
        if self._log is not None:
            settings = evaluation_settings(self._config, self._inputs, each)
            named = {"set": each.name} if each.name else {}
            self._log.write_evaluation(
                {"step": step, "model": model, **named, **record, "settings": settings}
            )


def _plain(value: Any) -> Any:
    """A value as a JSON file gives it back."""
    return json.loads(json.dumps(value))


def _shown(sets: Sequence[ProblemSet], records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the progress bar says of the newest results."""
    shown = {}
    for each, record in zip(sets, records, strict=True):
        exact = "accuracy" in record
        value = f"{record['accuracy']:.1%}" if exact else f"{record['reverse_kl']:.3f}"
        shown[each.name or ("accuracy" if exact else "held-out kl")] = value
    return shown


def summary_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the evaluations of one set: the student's first and last, and the teacher's."""
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


def evaluation_settings(config: Config, inputs: Inputs, each: ProblemSet) -> dict[str, Any]:
    """What decides the result of an evaluation beside the model and the problems, JSON-ready."""
    exact = config.evaluation.task == "exact_match"
    form = vars(each.settings.prompts_as(config.rollout))
    templates = {name: value for name, value in form.items() if _TEMPLATE in name}
    templates |= {n: form[n] for n in ("system_prompt", "prompt_template") if form[n]}
    return {
        "task": config.evaluation.task,
        "problems": len(each.problems),
        "max_new_tokens": each.max_new_tokens,
        "stop_token_ids": list(inputs.stop_token_ids),
        **templates,
        **({"environment": asdict(config.environment)} if config.talks_to else {}),
        "dtype": engine_dtype(config.model.dtype),
        **(_asked(config, each.settings) if exact else _drawn(config)),
    }


def _asked(config: Config, each: EvaluationSet) -> dict[str, Any]:
    assert each.grader is not None, "Config.evaluation_sets says it"
    drawn = {"samples": each.samples, "top_p": each.top_p, "seed": seed_of(config)}
    return {
        "temperature": each.temperature,
        **(drawn if each.temperature else {}),
        "grader": _named(each.grader),
    }


def seed_of(config: Config) -> int:
    """The seed of an evaluation's samples."""
    seed = config.evaluation.seed
    return config.train.seed if seed is None else seed


def _named(grader: GraderConfig) -> str | dict[str, Any]:
    """The grader's name, if that says it all."""
    return grader.name if grader == GraderConfig(name="marked") else asdict(grader)


def _drawn(config: Config) -> dict[str, Any]:
    return {"temperature": 1.0, "seed": seed_of(config)}


def grader_of_set(each: ProblemSet) -> Grader:
    """The grader of a set."""
    assert each.settings.grader is not None, "Config.evaluation_sets says it"
    return grader_of(each.settings.grader)


def asking_of(config: Config, inputs: Inputs, each: ProblemSet) -> Asking:
    """How the problems of a set are asked."""
    chosen = each.settings
    return Asking(
        max_new_tokens=each.max_new_tokens,
        stop_token_ids=inputs.stop_token_ids,
        samples=chosen.samples or 1,
        temperature=chosen.temperature or 0.0,
        top_p=chosen.top_p or 1.0,
        seed=seed_of(config),
    )


def sample_problems(
    config: Config,
    inputs: Inputs,
    engine: Sampler,
    asked: Sequence[tuple[ProblemSet, Sequence[Prompt]]],
) -> list[list[Sample]]:
    """What a model writes to problems of some sets; collective if the engine is.

    Sets that are sampled alike are sampled together, so that engines stay full.

    Args:
        config: its task says whether answers are as the sets ask or drawn at temperature 1.
        asked: the sets, and problems of each.
    """
    if any(in_episodes(config, each) for each, _ in asked):
        return [_by_its_form(config, inputs, engine, *one) for one in asked]
    wanted = [_requests(config, inputs, each, problems) for each, problems in asked]
    found: list[list[Sample]] = [[] for _ in wanted]
    for sampling in dict.fromkeys(alike for _, alike in wanted):
        mine = [number for number, (_, alike) in enumerate(wanted) if alike == sampling]
        requests = [request for number in mine for request in wanted[number][0]]
        samples = iter(engine.generate(requests, sampling) if requests else ())
        for number in mine:
            found[number] = list(islice(samples, len(wanted[number][0])))
    return found


def _requests(
    config: Config, inputs: Inputs, each: ProblemSet, problems: Sequence[Prompt]
) -> tuple[list[SampleRequest], Sampling]:
    if config.evaluation.task == "exact_match":
        asking = asking_of(config, inputs, each)
        return asking.requests(problems), asking.sampling
    room, seed = each.max_new_tokens, seed_of(config)
    requests = [
        SampleRequest(p.token_ids, room, keyed_seed(seed, Purpose.EVALUATION, p.index))
        for p in problems
    ]
    return requests, Sampling(stop_token_ids=inputs.stop_token_ids)


def graded(
    config: Config,
    inputs: Inputs,
    each: ProblemSet,
    samples: Sequence[Sample],
    path: Path | None,
    model: str,
) -> dict[str, Any]:
    """Grade all answers to a set; its record.

    Args:
        path: file of the answers; None: they are not kept.
        model: digest of whoever answered.
    """
    count = each.settings.samples or 1
    asked = [problem for problem in each.problems for _ in range(count)]
    numbers = [number for _ in each.problems for number in range(count)]
    responses = grade_samples(asked, samples, inputs.tokenizer, grader_of_set(each), numbers)
    if path is not None:
        settings = evaluation_settings(config, inputs, each)
        dump_answers(path, header_of(each.name, each.problems, settings, model), responses)
    return accuracy_of(each, responses, count)


def in_episodes(config: Config, each: ProblemSet) -> bool:
    """Whether the problems of a set are played with an environment: those of its task are."""
    task = config.task_of(each.settings)
    rollout = config.rollout if task is None else config.rollout_of(task)
    return config.talks_to is not None and rollout.mode == MULTI_TURN


def _by_its_form(
    config: Config, inputs: Inputs, engine: Sampler, each: ProblemSet, problems: Sequence[Prompt]
) -> list[Sample]:
    if in_episodes(config, each):
        return last_turns(config, inputs, engine, each, problems)
    requests, sampling = _requests(config, inputs, each, problems)
    return engine.generate(requests, sampling) if requests else []


def last_turns(
    config: Config, inputs: Inputs, engine: Sampler, each: ProblemSet, problems: Sequence[Prompt]
) -> list[Sample]:
    """Return the model's last turn in the episodes of problems; collective if the engine is."""
    asking = asking_of(config, inputs, each)
    plan = EpisodePlan(
        replace(
            config.rollout,
            max_new_tokens=each.max_new_tokens,
            first_new_tokens=None,
            growth_steps=0,
        ),
        GuidanceConfig(),
        1,
        keyed_seed(seed_of(config), Purpose.EVALUATION),  # other samples than a step's
        None,
        environment=config.talks_to,
        talk=inputs.talk,
    )
    episodes = [
        MultiTurn(EpisodeStart(problem, sample, 0, 0, plan))
        for problem in problems
        for sample in range(asking.samples)
    ]
    sampling = replace(asking.sampling, stop_token_ids=inputs.turn_stops)
    environments = shared_environments(config)
    play(episodes, engine, sampling, environments)
    played = [episode.sequence() for episode in episodes]
    say = environments is not None and environments.is_first
    check_environments(played, config.talks_to, say=say)
    return [episode.last_turn() for episode in episodes]


def accuracy_of(
    each: ProblemSet, responses: Sequence[GradedResponse], samples: int
) -> dict[str, Any]:
    """The graded answers as a record of evaluations.jsonl, with some examples."""
    record = result_of(responses, samples).record()
    sources = {problem.index: str(problem.fields.get(SOURCE)) for problem in each.problems}
    right: dict[str, list[bool]] = {}
    for response in responses:
        if not response.error:
            right.setdefault(sources[response.prompt_index], []).append(response.correct is True)
    if len(right) > 1:
        record |= {f"accuracy/{name}": sum(mine) / len(mine) for name, mine in right.items()}
    first = [response for response in responses if response.sample == 0]
    return {**record, "examples": [asdict(response) for response in first[:NUM_EXAMPLES]]}


def reverse_kl_of(
    inputs: Inputs, each: ProblemSet, samples: Sequence[Sample], student: Path, teacher: Path
) -> dict[str, Any]:
    """KL(student || teacher) on the student's samples as a record of evaluations.jsonl."""
    sequences = [
        (problem.token_ids, sample.token_ids)
        for problem, sample in zip(each.problems, samples, strict=True)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        places = Path(scratch) / "student", Path(scratch) / "teacher"
        for place, folder in zip(places, (student, teacher), strict=True):
            place.mkdir()
            link_folder(HFFolder(folder), place)  # transformers would read what we do not
        result = measure_reverse_kl(places[0], places[1], sequences, vocab_size=inputs.vocab_size)
        return asdict(result)
