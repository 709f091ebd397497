"""The models of a run on its ranks: built, and sent to the engines."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tropd.config import Config
from megatron_tropd.config.run import reference_of
from megatron_tropd.convert.families import ModelShape, model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.sizes import row_flops
from megatron_tropd.data.routes import Routes
from megatron_tropd.distill.step_parts import StepParts
from megatron_tropd.mcore import models, platform
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.lora import LoraModel
from megatron_tropd.mcore.student import Student, StudentModel
from megatron_tropd.rollout.weights.interface import RepeatableExport, WeightChannel
from megatron_tropd.teacher import TeacherSource, TeacherStart
from megatron_tropd.teacher._routed import make_teacher


def step_parts(
    config: Config,
    folders: Mapping[str, HFFolder | MegatronFolder],
    layout: Layout,
    routes: Routes | None = None,
    *,
    longest: int = 0,
) -> StepParts:
    """Build all models, and with them what a step is made with; collective.

    Args:
        folders: "student": its first weights; "teacher"; "reference", if the loss reads it; of
            several teachers "teacher NAME" and "reference NAME".
        routes: whose the prompts are, if there are several teachers.
        longest: tokens of the longest sequence; 0: not known.

    Returns:
        The parts, without a clock and without a look at the engines.
    """
    dtype = models.resolve_dtype(config.model.dtype)
    configs = [folder.config for folder in folders.values()]
    padded = models.padded_vocab_size(*configs, tensor=config.parallel.tensor)
    vocab_size = min(model_shape(each).vocab for each in configs)
    learner = Student(
        _student_model(config, folders["student"], layout, padded),
        train=config.train,
        parallel=config.parallel,
        dtype=dtype,
        megatron=config.megatron,
    )
    return StepParts(
        student=learner,
        teacher=build_teacher(
            config,
            folders,
            layout,
            routes,
            dtype=dtype,
            padded_vocab_size=padded,
            vocab_size=vocab_size,
            student=learner,
            longest=longest,
            run_dir=Path(config.run.dir),
        ),
        routes=routes,
        loss=config.loss,
        beta=config.guidance.beta,
        vocab_size=vocab_size,
        layout=layout,
        device=platform.device(),
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        pad_multiple=layout.pad_multiple,
        rounded_to=layout.row_multiple,
        work=partial(_row_work, config, {n: model_shape(f.config) for n, f in folders.items()}),
        batch_multiple=layout.batch_multiple,
        seed=config.train.seed,
    )


def build_teacher(
    config: Config,
    folders: Mapping[str, HFFolder | MegatronFolder],
    layout: Layout,
    routes: Routes | None,
    **known: Any,
) -> TeacherSource:
    """Make the source of a run's signals, of one teacher or of several; collective.

    Args:
        folders: of each teacher and reference, as ``step_parts`` takes them.
        routes: whose the prompts are, if there are several, and what they read.
        known: the other fields of ``TeacherStart``.
    """
    starts = [
        TeacherStart(
            config=alone,
            folder=folders[who],
            layout=layout,
            reference=folders.get(reference_of(who)),
            **known,
        )
        for who, alone in config.by_teacher.items()
    ]
    return make_teacher(starts, config, routes)


def _row_work(config: Config, shapes: Mapping[str, ModelShape], length: int) -> float:
    """Work of a row in a step: the student's passes, and those of models that read this row.

    Teachers in a layout of their own are dealt rows of their own. Of several teachers one scores a
    row, which is not known of a length: each counts by its part.
    """
    passes = 1 + config.loss.needs_student_pass + (1 if config.model.lora else 2)
    work, each = row_flops(shapes["student"], length) * passes, config.by_teacher
    for who, alone in each.items():
        if alone.scores_here and alone.teacher.parallel is None:
            read = [shapes[name] for name in (who, reference_of(who)) if name in shapes]
            work += sum(row_flops(shape, length) for shape in read) / len(each)
    return work


def _student_model(
    config: Config, folder: HFFolder | MegatronFolder, layout: Layout, padded_vocab_size: int
) -> StudentModel:
    """Build the student, with adapters if it has any."""
    built = models.build_of_run(
        config, folder, "student", layout=layout, padded_vocab_size=padded_vocab_size
    )
    lora = config.model.lora
    return built if lora is None else LoraModel(built, lora, seed=config.train.seed)


def send_weights(parts: StepParts, channel: WeightChannel, *, version: int) -> None:
    """Stream the student's weights as HF tensors to every engine; collective.

    Args:
        version: optimizer steps that the weights have seen.
    """
    export = partial(
        parts.student.model.exported,
        channel.receivers,
        # Columns that the teacher lacks are not sampled: the loss knows nothing of them.
        vocab_size=parts.vocab_size,
        explicit_lm_head=True,
    )
    channel.send(RepeatableExport(export), version)
