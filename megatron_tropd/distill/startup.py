"""What happens once when a rank starts: process groups, checks that need no model, messages."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.base.environment import number
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.base.parts import load_part
from megatron_tropd.base.progress import limits
from megatron_tropd.config import Config
from megatron_tropd.config.run import TEACHER
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
from megatron_tropd.distill.inputs import Inputs
from megatron_tropd.mcore import models, parallel, platform
from megatron_tropd.mcore.bridge import Worlds
from megatron_tropd.mcore.layout import Layout
from megatron_tropd.mcore.options_check import check_options, unreviewed
from megatron_tropd.rollout.engines.wire import Model
from megatron_tropd.rollout.episodes import load_mode

Say = Callable[[str], None]
"""Tells the user something."""


def join_ranks(config: Config) -> Layout:
    """Prepare the device and join the process groups of the run; collective.

    Returns:
        This rank's place: in the student's layout, or in that of a separate teacher.
    """
    platform.prepare_platform()
    platform.check_device()
    if config.run.deterministic:
        platform.be_deterministic()
    worlds, here, multiple = None, config.parallel, config.pad_multiple
    if config.teacher.ranks is not None:
        worlds = Worlds(config.parallel.world_size, config.teacher.ranks)
        if config.teaches(number("RANK", 0)):
            here = config.teacher_parallel
            multiple = here.row_shards * config.megatron.token_multiple
    return parallel.initialize(
        here,
        seed=config.train.seed,
        pad_multiple=multiple,
        timeout_seconds=limits(config.run.timeout_minutes).collectives,
        worlds=worlds,
    )


def leave_ranks(kind: type[BaseException] | None, *_: object) -> None:
    """Destroy the process groups, unless an error ends the run."""
    # After an error other ranks may wait for us in a collective. The end of this process frees
    # them; freed earlier, they would report the lost connection before we report its cause.
    if kind is None:
        parallel.shutdown()


def check_settings(config: Config, inputs: Inputs, *, is_main: bool, say: Say) -> None:
    """Refuse what neither settings nor files could tell alone; say what a user should know.

    Raises:
        ConfigError: settings do not fit this machine, Megatron or each other.
    """
    check_options(config, **{who: folder.config for who, folder in inputs.folders.items()})
    for rollout in config.rollouts:
        load_mode(rollout.mode)
    if config.talks_to is not None:
        load_part("", config.environment.name, attribute="", setting="environment.name")
    _check_steps_ahead(config)
    if not is_main:
        return
    for who, alone in config.by_teacher.items() if config.teachers else ():
        placement = alone.teacher.placement
        print(f"{who}: {placement}, {_count(inputs, who)} of the prompts", flush=True)
        if not _count(inputs, who):
            say(f"{who} scores no prompt: no line names it, and none has one of its sources.")
    for line in config.megatron.lines():
        print(f"Megatron's options: {line}", flush=True)
    if new := unreviewed(config.megatron):
        say(
            f"{', '.join(new)}: of a Megatron-Core that this version was not made for; nobody "
            "has looked at what they do here."
        )
    if config.rollout.steps_ahead and not config.loss.needs.rollout_logprobs:
        say(
            "rollout.steps_ahead = 1 trains on samples of older weights and the loss does not "
            'correct for it; consider loss.importance = "truncated" or "band".'
        )
    if platform.has_cuda() and not models.has_transformer_engine():
        say(
            "Transformer Engine does not import: Megatron-Core's own layers run, with torch's "
            'attention and Adam. Plan with layers = "local", or install it (README.md).'
        )


def _count(inputs: Inputs, who: str) -> int:
    """Prompts of a teacher of several."""
    assert inputs.routes is not None
    numbers = list(inputs.routes.of_prompt.values())
    return numbers.count(inputs.routes.names.index(who.removeprefix(f"{TEACHER} ")))


def _check_steps_ahead(config: Config) -> None:
    rollout = config.rollout
    if rollout.steps_ahead and rollout.placement == "colocated" and platform.has_cuda():
        raise ConfigError(
            "rollout.steps_ahead = 1 samples while the student trains, but colocated engines "
            'sleep meanwhile to leave the GPU to it. Set rollout.placement = "separate" and '
            "start servers, or steps_ahead = 0."
        )


def hf_folders(
    config: Config, inputs: Inputs, folder: RunFolder, *, is_main: bool
) -> dict[str, Path]:
    """What engines start from: HF folders by what they are to the run, as ``Inputs.folders`` says.

    Made of Megatron checkpoints if need be; that of a teacher of whom no model is loaded stays what
    it is, for nobody opens it. Collective. An existing one is from the start of this run, and
    complete.
    """
    paths: dict[str, Path] = {}
    opened = {"student": True} | {w: c.loads_teacher for w, c in config.by_teacher.items()}
    for who, is_opened in opened.items():
        source = inputs.folders[who]
        paths[who] = source.path
        if isinstance(source, MegatronFolder) and is_opened:
            paths[who] = folder.initial_hf / who.replace(" ", "_")
            if is_main and not paths[who].exists():
                megatron_to_hf(ToHF(source.path, paths[who]))
    dist.barrier()
    return paths


def engines_start(model: Model, config: Config, folder: RunFolder) -> str:
    """Tell that engines start: on CUDA that takes a while, in which nothing moves."""
    where = "servers" if config.rollout.placement == "separate" else "engines"
    log = folder.logs / f"engine_{model}_000.log"
    logged = f" Its log: {log}." if where == "engines" else ""
    return (
        f"waiting for the {model}'s rollout {where}: vLLM compiles and captures graphs when it "
        f"starts, for about a minute, longer the first time.{logged}"
    )
