"""Serves rollouts of a run, from its config, for ``tropd serve``."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_tropd.base import environment, exits
from megatron_tropd.base.deterministic import set_environment
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import Config
from megatron_tropd.config.run_folder import RunFolder, with_date
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.distill.engines import make_engine
from megatron_tropd.distill.inputs import Inputs, load_inputs
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.keeper import EngineKeeper
from megatron_tropd.rollout.engines.server import RolloutServer, ServerAddress
from megatron_tropd.rollout.engines.wire import TOKEN_VARIABLE, Model, served_settings
from megatron_tropd.rollout.weights.versions import WeightVersions


def serve(config: Config, *, number: int, host: str, port: int) -> int:
    """Serve rollouts for the run of ``config`` until it is complete or a signal comes.

    Args:
        config: the run's; ``rollout.placement`` must be "separate".
        number: of this server, below ``rollout.num_engines``.
        host: address to listen on, the one by which the trainer reaches it.
        port: 0: any free one.

    Returns:
        0 when the run is complete, 128 + the signal that ended it.

    Raises:
        ConfigError, InputError: the settings or the model cannot be served.
        TrainingError: the engine keeps dying.
    """
    _check(config, number)
    set_environment(config.run.deterministic)
    folder = RunFolder(Path(config.run.dir).resolve())
    if folder.read_summary():
        return exits.COMPLETE
    server = RolloutServer(
        ServerAddress(folder.servers, number, host, port, os.environ.get(TOKEN_VARIABLE)),
        partial(_keeper, config, folder, number),
        settings=served_settings(config),
        pid=os.getpid(),
    )
    stops: list[int] = []
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda number, _: stops.append(number))
    # The warning of a time limit is the trainer's: it may need us once more before it saves.
    signal.signal(exits.TIME_LIMIT_SIGNAL, signal.SIG_IGN)
    # Slurm may deliver SIGTERM more than once: only Ctrl-C asks twice.
    server.run(
        complete=folder.summary.exists,
        told_to_stop=lambda: max(stops.count(signal.SIGINT), min(len(stops), 1)),
    )
    return exits.stopped_by(stops[0]) if stops else exits.COMPLETE


def _check(config: Config, number: int) -> None:
    rollout = config.rollout
    if rollout.placement != "separate":
        raise ConfigError(
            'tropd serve needs rollout.placement = "separate", found "colocated": the trainer '
            "starts colocated engines itself."
        )
    if not 0 <= number < rollout.num_engines:
        raise ConfigError(
            f"--number must be in 0..{rollout.num_engines - 1} (rollout.num_engines servers), "
            f"found {number}."
        )


def _keeper(
    config: Config,
    folder: RunFolder,
    number: int,
    wait: Callable[[float], object],
) -> EngineKeeper:
    inputs: list[Inputs] = []

    def make(model: Model) -> RolloutEngine:
        # Here and not before: the server answers while texts and headers are read.
        if not inputs:
            inputs.append(load_inputs(with_date(config)))
        return _engine(config, inputs[0], folder, number, model, wait)

    return EngineKeeper(make, WeightVersions(folder.weights), wait=wait)


def _engine(
    config: Config,
    inputs: Inputs,
    folder: RunFolder,
    number: int,
    model: Model,
    wait: Callable[[float], object],
) -> RolloutEngine:
    source = inputs.folders[model]
    path = source.path
    if isinstance(source, MegatronFolder):
        path = folder.initial_hf / model
        while not path.exists():  # the trainer makes it when it starts
            wait(1.0)
    return make_engine(
        config,
        inputs,
        path,
        threads=environment.number("OMP_NUM_THREADS", 0) or None,
        log_file=folder.logs / f"server_{number:03d}_{model}.log",
    )
