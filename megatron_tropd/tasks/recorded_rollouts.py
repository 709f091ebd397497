"""Writing recorded rollouts: samples of a student for training that is driven from outside.

The format is that of :mod:`megatron_tropd.data.sequence_files`. A round is to it what a step is
to the trainer: it keys the samples, chooses the prompts and shortens the teacher prefixes, so that
round k writes the trajectories of step k.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import GuidanceConfig, RolloutConfig
from megatron_tropd.data.prefixes import PlannedSample, plan_requests
from megatron_tropd.data.prompts import prompts_of_step
from megatron_tropd.data.responses import TeacherResponse
from megatron_tropd.data.samples import Sample, Sampling
from megatron_tropd.data.sequence import NO_VERSION
from megatron_tropd.data.sequence_files import FORMAT, record_of
from megatron_tropd.data.tokenizers import fingerprint
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks.exact_match import Sampler
from megatron_tropd.tasks.sample_files import WantedSample, write_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RolloutRound:
    """Which of the rounds is written, and how samples are drawn."""

    rollout: RolloutConfig
    """Prompts of the round, samples of each, their length, temperature and top-p."""
    guidance: GuidanceConfig
    """Which samples start with a teacher prefix, and how long it is."""
    number: int
    """0-based."""
    rounds: int
    """How many there will be: the prefixes fall to nothing over them."""
    seed: int
    """Keys everything drawn."""

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.rounds:
            raise ConfigError(
                f"The round must be in 0..{self.rounds - 1} for {self.rounds} rounds, found "
                f"{self.number}."
            )

    def plan(
        self,
        prompts: Sequence[Prompt],
        responses: Mapping[int, Sequence[TeacherResponse]] | None,
    ) -> list[PlannedSample]:
        """Plan the ``prompts_per_step x samples_per_prompt`` samples as the trainer plans its step.

        Args:
            responses: teacher responses by ``Prompt.index``; None: no prefixes.

        Raises:
            ConfigError: the file has fewer prompts than the round needs.
        """
        per_round = self.rollout.prompts_per_step
        indices = prompts_of_step(len(prompts), per_round, self.number, self.seed)
        return plan_requests(
            [prompts[i] for i in indices],
            responses,
            step=self.number,
            steps=self.rounds,
            rollout=self.rollout,
            guidance=self.guidance,
            seed=self.seed,
        )


def write_rollouts(
    engine: Callable[[], Sampler],
    plans: Sequence[PlannedSample],
    tokenizer: "PreTrainedTokenizerBase",
    path: str | Path,
    *,
    which: RolloutRound,
    sampling: Sampling,
    weights: str,
    template: Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Sample the rollouts a file does not have yet and append them.

    Args:
        which: the round, recorded in the header and compared when the file is continued.
        weights: identity of the student's weights (``model_identity(folder, whole=True)``).
        template: what the prompts' chat template read beside the messages, for the header.

    Raises:
        InputError: as ``write_samples``.
    """
    header = {
        "format": FORMAT,
        "tokenizer": fingerprint(tokenizer),
        "settings": {**_settings(which, plans, sampling, weights), **(template or {})},
    }

    def record(plan: PlannedSample, sample: Sample) -> dict[str, Any]:
        sequence = plan.sequence(sample, step=which.number, version=NO_VERSION)
        fields = {"weights": weights, "seed": plan.request.seed}
        return record_of(sequence.replace(fields=fields))

    wanted = [
        WantedSample((p.prompt.index, p.sample_index), p.request, partial(record, p)) for p in plans
    ]
    return write_samples(
        engine,
        wanted,
        path,
        header=header,
        key=("prompt", "sample"),
        sampling=sampling,
        resume=resume,
        progress=progress,
    )


def _settings(
    which: RolloutRound, plans: Sequence[PlannedSample], sampling: Sampling, weights: str
) -> dict[str, Any]:
    requests = [asdict(plan.request) for plan in plans]
    return {
        "weights": weights,
        "round": which.number,
        "rounds": which.rounds,
        "seed": which.seed,
        "prompts": which.rollout.prompts_per_step,
        "samples": which.rollout.samples_per_prompt,
        "max_new_tokens": which.rollout.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(sampling.stop_token_ids),
        # Prompts and prefixes as ids, so that no change of the files behind them goes unseen.
        "requests": hashlib.sha256(json.dumps(requests).encode()).hexdigest()[:16],
    }
