"""When and with what a run is evaluated, and what of it is written down."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from megatron_tropd.config import PromptConfig
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.linked_folder import link_folder
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.tokenizers import load_tokenizer, stop_token_ids
from megatron_tropd.data.types import Trajectory
from megatron_tropd.errors import InputError
from megatron_tropd.losses.draws import Purpose, keyed_seed
from megatron_tropd.report.records import read_lines
from megatron_tropd.rollout.engine import RolloutEngine, context_length
from megatron_tropd.rollout.types import SampleRequest, Sampling
from megatron_tropd.run_folder import RunFolder
from megatron_tropd.tasks.exact_match import Engine, evaluate_exact_match
from megatron_tropd.tasks.graders import grade
from megatron_tropd.tasks.reverse_kl import measure_reverse_kl

if TYPE_CHECKING:
    from megatron_tropd.job import Job

NUM_EXAMPLES = 20
"""Answers of an evaluation kept for the report."""


class Evaluator:
    """Evaluations of one run; :meth:`run` is called by all ranks."""

    def __init__(self, job: "Job") -> None:
        """``job``: the run; its engines and inputs are used when an evaluation is due."""
        self._job = job
        self.shown: dict[str, str] = {}
        """The newest result, for the progress bar."""

    def run(self) -> None:
        """Measure the student; before the first step the teacher too."""
        job = self._job
        if not job.inputs.problems:
            return
        if job.config.evaluation.task == "reverse_kl":
            self._measure_reverse_kl()
            return
        if job.step == 0:
            # Two engines share the device for a moment: the student's gives its memory back.
            job.engines.sleep()
            with job.start_engines("teacher") as engines:
                self._measure_accuracy(engines, "teacher")
        self._measure_accuracy(job.engines, "student")

    def summary(self) -> dict[str, Any]:
        """The entries of summary.json that come from evaluations."""
        records = read_lines(self._job.folder.evaluations)
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
            "teacher": teacher[-1]["accuracy"],
            "problems": last["total"],
        }

    def example_line(self, trajectory: Trajectory, values: Mapping[str, list[float]]) -> str:
        """One trajectory with its per-token values, as a line of a dump for the report."""
        tokenizer, ids = self._job.inputs.tokenizer, trajectory.prefix_ids + trajectory.response_ids
        # Their positions are no indices: prompts may have been left out.
        prompt = next(p for p in self._job.inputs.prompts if p.index == trajectory.prompt_index)
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
        answer = prompt.fields.get("answer")
        record = {
            "step": trajectory.step,
            "prompt": prompt.text,
            "tokens": spell(tokenizer, ids),
            "segment": ["teacher"] * len(trajectory.prefix_ids)
            + ["student"] * len(trajectory.response_ids),
            "correct": None if answer is None else grade(text, str(answer)),
            **values,
        }
        return json.dumps(record) + "\n"

    def _measure_accuracy(self, engine: Engine, model: Literal["student", "teacher"]) -> None:
        job = self._job
        result = evaluate_exact_match(
            engine,
            job.inputs.problems,
            job.inputs.tokenizer,
            stop_token_ids=job.inputs.stop_token_ids,
            max_new_tokens=job.config.evaluation.max_new_tokens
            or job.config.rollout.max_new_tokens,
        )
        if model == "student":
            self.shown = {"accuracy": f"{result.accuracy:.1%}"}
        examples = [asdict(response) for response in result.responses[:NUM_EXAMPLES]]
        self._write(
            model,
            {
                "accuracy": result.accuracy,
                "ci_low": result.ci_low,
                "ci_high": result.ci_high,
                "correct": result.correct,
                "total": result.total,
                "examples": examples,
            },
        )

    def _measure_reverse_kl(self) -> None:
        job = self._job
        room = job.config.evaluation.max_new_tokens or job.config.rollout.max_new_tokens
        seed = job.config.train.seed
        requests = [
            SampleRequest(p.token_ids, room, keyed_seed(seed, Purpose.EVALUATION, p.index))
            for p in job.inputs.problems
        ]
        sampling = Sampling(stop_token_ids=job.inputs.stop_token_ids)
        samples = job.engines.generate(requests, sampling)
        sequences = [
            (request.token_ids, sample.token_ids)
            for request, sample in zip(requests, samples, strict=True)
        ]
        record: list[Any] = [None]
        with tempfile.TemporaryDirectory() as scratch:
            teacher = Path(scratch) / "teacher"
            # Rank 0's folder counts: the export collects there, and only it measures.
            job.export_student(Path(scratch) / "student")
            if job.is_main:
                teacher.mkdir()
                result = measure_reverse_kl(
                    Path(scratch) / "student",
                    link_folder(HFFolder(job.hf_folders["teacher"]), teacher),
                    sequences,
                    vocab_size=job.inputs.vocab_size,
                )
                record = [asdict(result)]
        dist.broadcast_object_list(record, src=0)
        self.shown = {"held-out kl": f"{record[0]['reverse_kl']:.3f}"}
        self._write("student", record[0])

    def _write(self, model: str, record: dict[str, Any]) -> None:
        if self._job.log_file is not None:
            self._job.log_file.write_evaluation({"step": self._job.step, "model": model, **record})


def spell(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text each token adds, so that joined they are the text (spaces included)."""
    pieces, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[:end]), skip_special_tokens=False)
        pieces.append(text[len(before) :])
        before = text
    return pieces


def evaluate_folder(
    model: Path,
    problems: Path,
    *,
    max_new_tokens: int | None = None,
    num_problems: int | None = None,
    apply_chat_template: bool = False,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> dict[str, Any]:
    """Greedy exact-match accuracy of an HF folder, or of a run's trained student.

    Args:
        model: HF folder or run folder.
        problems: JSON lines with "prompt" and "answer".
        max_new_tokens: longest answer; None: the run's, or what the context leaves, at most 1024.
        num_problems: only the first ones; None: all.
        apply_chat_template: wrap prompts in the tokenizer's template.
        dtype: of the engine; auto: bfloat16 with CUDA, else float32.

    Returns:
        accuracy, ci_low, ci_high, correct, total, model.

    Raises:
        InputError: a folder or file is missing or unusable.
    """
    import torch

    folder, run_tokens = _model_of(model)
    tokenizer = load_tokenizer(folder)
    context = context_length(folder)
    prompts = load_prompts(
        problems,
        tokenizer,
        PromptConfig(apply_chat_template=apply_chat_template),
        max_prompt_tokens=context - 1,
    )[:num_problems]
    longest = max(len(p.token_ids) for p in prompts)
    room = max_new_tokens or run_tokens or min(1024, context - longest)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as logs:
        engine = RolloutEngine(
            folder,
            dtype={"auto": "bfloat16" if cuda else "float32"}.get(dtype, dtype),
            max_model_len=longest + room,
            memory=0.8 if cuda else 1.0,
            log_file=Path(logs) / "engine.log",
        )
        with engine:
            result = evaluate_exact_match(
                engine,
                prompts,
                tokenizer,
                stop_token_ids=stop_token_ids(folder),
                max_new_tokens=room,
            )
    record = asdict(result)
    record.pop("responses")
    return {**record, "model": str(folder)}


def _model_of(path: Path) -> tuple[Path, int | None]:
    """(HF folder, longest answer of its run if it is one)."""
    run = RunFolder(path)
    if (path / "model.safetensors.index.json").exists() or not run.summary.parent.is_dir():
        return path, None
    config_text = run.config.read_text() if run.config.exists() else "{}"
    if "rollout" not in json.loads(config_text):
        return path, None
    if not run.student.is_dir():
        raise InputError(
            f"Run {path} has no trained student yet: {run.student} is missing. Let the run finish "
            "(the same command resumes it) or give an HF folder."
        )
    config = run.read_config()
    return run.student, config.evaluation.max_new_tokens or config.rollout.max_new_tokens
