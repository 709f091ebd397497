"""The models of a run on its ranks: built, and sent to the engines."""

from collections.abc import Mapping
from functools import partial

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
from megatron_tropd.teacher import TeacherStart
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
    starts = [
        TeacherStart(
            alone,
            folders[who],
            layout,
            dtype,
            padded,
            vocab_size,
            folders.get(reference_of(who)),
            learner,
            longest,
        )
        for who, alone in config.by_teacher.items()
    ]
    return StepParts(
        student=learner,
        teacher=make_teacher(starts, config, routes),
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


def _row_work(config: Config, shapes: Mapping[str, ModelShape], length: int) -> float:
    """Work of a row in a step: a pass of each model here, and the student's backward pass."""
    here = [name for name in shapes if name == "student" or config.scores_here]
    passes = 1 + config.loss.needs_student_pass + (1 if config.model.lora else 2)
    return sum(row_flops(shapes[n], length) * (passes if n == "student" else 1) for n in here)


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
