"""The samples of each step: asked for, waited for, and kept while they are pending."""

from pathlib import Path

from megatron_tropd.base.files import read_patiently
from megatron_tropd.config import Config
from megatron_tropd.data.prefixes import PlannedSample, assemble, plan_requests
from megatron_tropd.data.prompts import prompts_of_step
from megatron_tropd.data.samples import Sampling
from megatron_tropd.data.sequence import TokenSequence
from megatron_tropd.data.sequence_files import dump_sequences, read_sequences
from megatron_tropd.distill.inputs import Inputs
from megatron_tropd.rollout.engines.pool import EnginePool
from megatron_tropd.rollout.engines.served import ServerPool

PENDING_FILE = "pending_rollouts.jsonl"
"""In a checkpoint: what was sampled for its next step, with older weights than it holds."""


class Rollouts:
    """One step's samples at a time; every method is collective."""

    def __init__(self, config: Config, inputs: Inputs, engines: EnginePool | ServerPool) -> None:
        """``engines`` sample with the weights they were given last."""
        self._config = config
        self._inputs = inputs
        self._engines = engines
        self._sampling = Sampling(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            stop_token_ids=inputs.stop_token_ids,
        )
        self.weights_version = 0
        """Optimizer steps that the engines' weights have seen."""
        self._asked: tuple[int, int, list[PlannedSample]] | None = None
        """Step, version and plans of what is being sampled."""
        self._made: list[TokenSequence] = []

    def request(self, step: int) -> None:
        """Ask for the samples of a step with the engines' weights; harmless if done before."""
        if self._asked is not None or self._made:
            return
        plans = self._plan(step)
        self._engines.start_generate([plan.request for plan in plans], self._sampling)
        self._asked = step, self.weights_version, plans

    def finish(self) -> list[TokenSequence]:
        """The trajectories asked for last, the same on every rank."""
        self._wait()
        made, self._made = self._made, []
        return made

    def forget(self) -> None:
        """Give up what was asked for."""
        self._asked = None

    def pending_files(self, *, is_main: bool) -> dict[str, bytes]:
        """What a checkpoint needs so that a resumed run trains on the same samples.

        Waits for samples that were asked for; they stay pending. Only the rank that writes
        (``is_main``) gets the text: it is long.
        """
        self._wait()
        if not (is_main and self._made):
            return {}
        return {PENDING_FILE: dump_sequences(self._made)}

    def restore(self, checkpoint: Path) -> None:
        """Take up what was pending when ``checkpoint`` was written."""
        path = checkpoint / PENDING_FILE
        if path.exists():
            self._made = read_patiently(lambda: read_sequences(path))

    def _wait(self) -> None:
        if self._asked is None:
            return
        step, version, plans = self._asked
        samples = self._engines.finish_generate()
        self._made = assemble(plans, samples, step=step, weights_version=version)
        self._asked = None

    def _plan(self, step: int) -> list[PlannedSample]:
        config, inputs = self._config, self._inputs
        indices = prompts_of_step(
            len(inputs.prompts), config.rollout.prompts_per_step, step, config.train.seed
        )
        return plan_requests(
            [inputs.prompts[i] for i in indices],
            inputs.responses,
            step=step,
            steps=config.train.steps,
            rollout=config.rollout,
            guidance=config.guidance,
            seed=config.train.seed,
        )
