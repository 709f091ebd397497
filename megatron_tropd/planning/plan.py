"""A config's own layout and the recommended one."""

from dataclasses import dataclass

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import Config
from megatron_tropd.planning.estimate import Estimate, estimate
from megatron_tropd.planning.hardware import Hardware
from megatron_tropd.planning.planned_run import plan_run
from megatron_tropd.planning.recommend import Recommendation, recommend
from megatron_tropd.planning.workload import PROMPT_TOKENS


@dataclass(frozen=True)
class Plan:
    """A config's own layout, and the recommended one."""

    asked: Estimate
    recommended: Recommendation


def make_plan(
    config: Config,
    hardware: Hardware,
    *,
    gpus: int | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    response_tokens: float | None = None,
    context_tokens: int | None = None,
) -> Plan:
    """Estimate a config's layout and recommend one.

    Args:
        config: the run; of its files only both models' config.json are read.
        gpus: of the recommended layout, engines' own included; None: as many as the config's
            layout has.
        response_tokens: assumed average length of a response; None: ``max_new_tokens``.
        context_tokens: assumed length of what a teacher reads in a prompt's place; None: the
            longest that there is room for.

    Raises:
        InputError: a config.json is missing, unreadable or not supported.
        ConfigError: the trainer would refuse the settings, or a value is impossible.
    """
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, found {gpus}.")
    run = plan_run(
        config,
        hardware,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        context_tokens=context_tokens,
    )
    nodes = run.training_nodes + run.engine_nodes
    # Separate engines leave GPUs of their nodes idle that another layout may use.
    configured = nodes * hardware.gpus_per_node if run.separate else run.gpus
    return Plan(estimate(run), recommend(run, gpus or configured))
