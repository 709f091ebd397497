"""The student and the teacher of a run, built on its ranks; and the parts of a step they make."""

from dataclasses import dataclass

from megatron_tropd.config import Config
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.distill.step import StepParts
from megatron_tropd.mcore import models, platform
from megatron_tropd.mcore.parallel import Ranks
from megatron_tropd.mcore.step import Student
from megatron_tropd.teacher import TeacherSource, TeacherStart, load_teacher


@dataclass(frozen=True)
class Pair:
    """Who learns and who teaches."""

    student: Student
    teacher: TeacherSource
    vocab_size: int
    """Columns that are real in both models."""
    padded_vocab_size: int
    """Columns of the output layers, over all tensor-parallel ranks."""


def build_pair(
    config: Config,
    student: HFFolder | MegatronFolder,
    teacher: HFFolder | MegatronFolder,
    ranks: Ranks,
) -> Pair:
    """Build both models of a run; collective.

    Args:
        config: of the run.
        student: folder of its first weights.
        teacher: folder of the model.
        ranks: this rank's place.
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
    source = load_teacher(config.teacher.source)(
        TeacherStart(config, teacher, ranks, dtype, padded, vocab_size)
    )
    return Pair(learner, source, vocab_size, padded)


def step_parts(config: Config, pair: Pair, ranks: Ranks) -> StepParts:
    """The parts of a step as the settings say; nothing is timed, nobody looks at the engines."""
    return StepParts(
        student=pair.student,
        teacher=pair.teacher,
        loss=config.loss,
        beta=config.guidance.beta,
        vocab_size=pair.vocab_size,
        ranks=ranks,
        device=platform.device(),
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        pad_multiple=config.pad_multiple,
        rounded_to=platform.row_multiple(),
        seed=config.train.seed,
    )
