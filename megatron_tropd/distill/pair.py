"""The models of a run on its ranks: built, and sent to the engines."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_tropd.config import Config
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.distill.step_parts import StepParts
from megatron_tropd.mcore import models, platform, weights
from megatron_tropd.mcore.parallel import Ranks
from megatron_tropd.mcore.step import Student
from megatron_tropd.rollout.weights.interface import WeightChannel
from megatron_tropd.rollout.weights.weight_sync import Export
from megatron_tropd.teacher import TeacherStart, load_teacher


def step_parts(
    config: Config,
    student: HFFolder | MegatronFolder,
    teacher: HFFolder | MegatronFolder,
    ranks: Ranks,
) -> StepParts:
    """Build both models, and with them what a step is made with; collective.

    Args:
        config: of the run.
        student: folder of its first weights.
        teacher: folder of the model.
        ranks: this rank's place.

    Returns:
        The parts, without a clock and without a look at the engines.
    """
    dtype = models.resolve_dtype(config.model.dtype)
    padded = models.padded_vocab_size(student.config, teacher.config, tensor=config.parallel.tensor)
    vocab_size = min(model_shape(folder.config).vocab for folder in (student, teacher))
    learner = Student(
        models.build_model(
            student,
            ranks=ranks,
            parallel=config.parallel,
            dtype=dtype,
            padded_vocab_size=padded,
            who="student",
            options=config.megatron.model,
        ),
        train=config.train,
        parallel=config.parallel,
        ranks=ranks,
        dtype=dtype,
        megatron=config.megatron,
    )
    start = TeacherStart(config, teacher, ranks, dtype, padded, vocab_size)
    return StepParts(
        student=learner,
        teacher=load_teacher(config.teacher.source)(start),
        loss=config.loss,
        beta=config.guidance.beta,
        vocab_size=vocab_size,
        ranks=ranks,
        device=platform.device(),
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        pad_multiple=config.pad_multiple,
        rounded_to=platform.row_multiple(),
        seed=config.train.seed,
    )


def send_weights(
    parts: StepParts, config: Mapping[str, Any], channel: WeightChannel, *, version: int
) -> None:
    """Stream the student's weights as HF tensors to every engine; collective.

    Args:
        parts: of the step.
        config: of the student's folder.
        channel: to the engines.
        version: optimizer steps that the weights have seen.
    """
    export = partial(
        weights.export_weights,
        parts.student.model,
        # Columns that the teacher lacks are not sampled: the loss knows nothing of them.
        {**config, "vocab_size": parts.vocab_size},
        parts.ranks,
        padded_vocab_size=parts.student.model.vocab_size,
        receivers=channel.receivers,
        explicit_lm_head=True,
    )
    channel.send(Export(export), version)
