"""Writing recorded rollouts: samples of a student for training that is driven from outside.

The format is that of :mod:`megatron_tropd.data.sequence_files`. A round is to it what a step is
to the trainer: it keys the samples, chooses the prompts and shortens the teacher prefixes, so that
round k writes the trajectories of step k.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import GuidanceConfig, RolloutConfig
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.prefixes import PlannedSample, plan_requests
from megatron_tropd.data.prompts import prompts_of_step
from megatron_tropd.data.responses import TeacherResponse
from megatron_tropd.data.resumable import ResumableLines
from megatron_tropd.data.samples import Sampling
from megatron_tropd.data.sequence import NO_VERSION
from megatron_tropd.data.sequence_files import FORMAT, record_of
from megatron_tropd.data.tokenizers import fingerprint
from megatron_tropd.data.types import Prompt
from megatron_tropd.tasks.exact_match import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REQUESTS_PER_BATCH = 256


@dataclass(frozen=True)
class Round:
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
        """Every sample of the round, as the trainer plans its step of that number.

        Args:
            prompts: of the whole file.
            responses: teacher responses by ``Prompt.index``; None: no prefixes.

        Returns:
            ``prompts_per_step x samples_per_prompt`` plans.

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
    engine: Callable[[], Engine],
    plans: Sequence[PlannedSample],
    tokenizer: "PreTrainedTokenizerBase",
    path: str | Path,
    *,
    which: Round,
    sampling: Sampling,
    weights: str,
    template: Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Sample the rollouts a file does not have yet and append them.

    Every batch is on disk before the next one starts; a last line torn by a kill is dropped. The
    file is the same, byte for byte, wherever the writing was cut: a batch that is there in part is
    sampled again as a whole.

    Args:
        engine: makes an engine that serves the student; not called when nothing is missing.
        plans: of :meth:`Round.plan`, in the order of the file.
        tokenizer: the student's.
        path: the file; made if absent.
        which: the round, recorded in the header and compared when the file is continued.
        sampling: temperature, top-p and stop ids.
        weights: identity of the student's weights (:func:`weights_identity`).
        template: what the prompts' chat template read beside the messages, for the header.
        resume: continue an existing file; False: an existing file is an error.
        progress: called with (rollouts in the file, rollouts wanted) after every batch.

    Returns:
        How many rollouts were added.

    Raises:
        InputError: the file exists and may not be continued, was made with other settings, is
            broken before its last line, or is being written by another process.
    """
    header = {
        "format": FORMAT,
        "tokenizer": fingerprint(tokenizer),
        "settings": {**_settings(which, plans, sampling, weights), **(template or {})},
    }
    key = ("prompt", "sample")
    with ResumableLines(path, header, key=key, resume=resume) as file:
        before, server = len(file.done), None
        for batch in batched(plans, _REQUESTS_PER_BATCH):
            if all((plan.prompt.index, plan.sample_index) in file.done for plan in batch):
                continue
            server = server or engine()
            samples = server.generate([plan.request for plan in batch], sampling)
            sequences = [
                plan.sequence(sample, step=which.number, version=NO_VERSION)
                for plan, sample in zip(batch, samples, strict=True)
            ]
            file.append(
                [
                    record_of(
                        sequence.replace(fields={"weights": weights, "seed": plan.request.seed})
                    )
                    for plan, sequence in zip(batch, sequences, strict=True)
                    if sequence.key[1:] not in file.done
                ]
            )
            progress(len(file.done), len(plans))
        return len(file.done) - before


def weights_identity(folder: str | Path) -> str:
    """Hash of everything in an HF folder that decides its samples: config.json and the weights.

    Args:
        folder: HF folder.

    Returns:
        16 hexadecimal digits. Reads the weight files whole.
    """
    folder = Path(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in HFFolder(folder).files:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _settings(
    which: Round, plans: Sequence[PlannedSample], sampling: Sampling, weights: str
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
