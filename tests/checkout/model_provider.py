"""Laid out like Megatron's file of this name: hands the arguments to a builder."""

from collections.abc import Callable
from typing import Any

from megatron.training import get_args


def model_provider(
    model_builder: Callable[..., Any],
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """The model of ``model_builder``."""
    return model_builder(
        get_args(), pre_process, post_process, vp_stage, config=config, pg_collection=pg_collection
    )
