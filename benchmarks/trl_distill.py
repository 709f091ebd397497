"""The TRL side of ``step.py``: on-policy distillation by TRL's ``DistillationTrainer``, timed.

    python benchmarks/trl_distill.py JOB.json RESULT.json

Runs in an environment of its own (``requirements-trl.txt``) and imports nothing of this project.
The trainer is TRL's as released; the subclass here only reads the clock. Settings are those a
careful user would pick for small models: one generation batch and one training batch per step,
KV cache on, no gradient checkpointing, fused AdamW, no logging.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Stopwatch:
    """Seconds of each phase of the step in progress."""

    def __init__(self) -> None:
        """Start at zero."""
        self.seconds: dict[str, float] = {}

    def time(self, phase: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Call and add the time it took to ``phase``."""
        start = now()
        result = call(*args, **kwargs)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now() - start
        return result


def now() -> float:
    """Seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class TimedTrainer(DistillationTrainer):
    """TRL's trainer with a clock around its phases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Same arguments as TRL's."""
        self.stopwatch = Stopwatch()
        self.step_tokens = 0
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = self.stopwatch.time("rollout", super()._generate_and_score_completions, inputs)
        self.step_tokens = int(output["completion_mask"].sum())
        return output

    def _get_last_hidden_state(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model is not self.accelerator.unwrap_model(self.teacher_model):
            return super()._get_last_hidden_state(model, *args, **kwargs)
        return self.stopwatch.time(
            "teacher", super()._get_last_hidden_state, model, *args, **kwargs
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Generation, both forwards, loss, backward."""
        return self.stopwatch.time("training_step", super().training_step, *args, **kwargs)


class Recorder(TrainerCallback):
    """Turns the clock into one record per optimizer step."""

    def __init__(self) -> None:
        """Nothing recorded yet."""
        self.trainer: TimedTrainer | None = None
        self.records: list[dict[str, float]] = []
        self._start = self._update = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the first step."""
        self._start = now()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Start the optimizer phase: after backward and clipping."""
        self._update = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the step: everything since the end of the one before it."""
        end, seconds = now(), self.trainer.stopwatch.seconds
        total, inside = end - self._start, seconds["training_step"]
        self.records.append(
            {
                "tokens": self.trainer.step_tokens,
                "rollout": seconds["rollout"],
                "teacher": seconds["teacher"],
                "student": inside - seconds["rollout"] - seconds["teacher"],
                "optimizer": end - self._update,
                "total": total,
            }
        )
        self.trainer.stopwatch.seconds = {}
        self._start = end


def settings(job: dict[str, Any], folder: Path) -> DistillationConfig:
    """TRL's config for the job.

    Args:
        job: written by ``step.py``.
        folder: where TRL may write.

    Returns:
        The config.
    """
    return DistillationConfig(
        output_dir=str(folder / "trl"),
        max_steps=job["steps"],
        per_device_train_batch_size=job["samples_per_step"],
        gradient_accumulation_steps=1,
        max_completion_length=job["max_new_tokens"],
        temperature=1.0,
        beta=1.0,  # reverse KL, what on-policy distillation minimises
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        adam_beta1=job["adam_betas"][0],
        adam_beta2=job["adam_betas"][1],
        adam_epsilon=job["adam_eps"],
        weight_decay=0.0,
        max_grad_norm=job["clip_grad"],
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        teacher_model_init_kwargs={"dtype": "float32"},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=job["seed"],
    )


def main(job_path: str, result_path: str) -> None:
    """Run the job and write its steps.

    Args:
        job_path: JSON written by ``step.py``.
        result_path: JSON to write.

    Raises:
        ValueError: TRL's tokenizer reads a prompt otherwise than ours.
    """
    job = json.loads(Path(job_path).read_text())
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(
        job["student"], padding_side="left", local_files_only=True
    )
    if tokenizer(text=job["prompts"])["input_ids"] != job["prompt_ids"]:
        raise ValueError("TRL's tokenizer gives other ids for the prompts: not comparable.")
    recorder = Recorder()
    trainer = TimedTrainer(
        model=job["student"],
        teacher_model=job["teacher"],
        args=settings(job, Path(result_path).parent),
        train_dataset=Dataset.from_dict({"prompt": job["prompts"]}),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    recorder.trainer = trainer
    trainer.train()
    dtypes = {str(p.dtype) for m in (trainer.model, trainer.teacher_model) for p in m.parameters()}
    result = {
        "records": recorder.records,
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        "dtype": ", ".join(sorted(dtypes)),
        "threads": torch.get_num_threads(),
    }
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
