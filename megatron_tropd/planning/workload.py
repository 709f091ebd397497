"""What one optimizer step consists of: trajectories, positions, micro-batches."""

from dataclasses import dataclass
from math import lcm

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import Config, ParallelConfig

PROMPT_TOKENS = 512
"""Assumed length of a prompt if none is given: planning reads no texts."""


@dataclass(frozen=True)
class Workload:
    """One step of one data-parallel replica. All lengths in tokens.

    Under context parallelism the ranks of a replica have parts of its rows.
    """

    trajectories: int
    """Of the whole step, all replicas together."""
    rows: int
    """Trajectories of one replica."""
    prompt: int
    longest: int
    """Positions of the longest possible trajectory: what memory must hold."""
    mean: float
    """Positions of the average one: what takes time."""
    longest_response: int
    mean_response: float
    micro_batches: int
    """Of one replica, with trajectories of average length."""
    most_micro_batches: int
    """Of one replica, with trajectories of the longest kind."""
    most_positions: int
    """Most positions that one micro-batch can hold, of whatever length its trajectories are."""
    shares: int
    """Ranks that share a row."""

    @property
    def rank_positions(self) -> int:
        """Most positions of one micro-batch on one rank."""
        return self.most_positions // self.shares

    @property
    def positions(self) -> float:
        """Average positions of one rank's step."""
        return self.rows * self.mean / self.shares

    @property
    def most_loss_tokens(self) -> int:
        """Most tokens of one micro-batch that carry loss, on one rank."""
        return self.most_positions * self._loss_of_row // self.longest

    @property
    def loss_tokens(self) -> float:
        """Average loss tokens of one rank's step."""
        return self.rows * self.mean_response / self.shares

    @property
    def step_loss_tokens(self) -> int:
        """Most loss tokens of one rank's step."""
        return self.rows * self._loss_of_row

    @property
    def _loss_of_row(self) -> int:
        """Most loss tokens of the longest row on one rank: a chunk of it and its mirror image."""
        chunk, first = self.longest // (2 * self.shares), self.prompt - 1

        def inside(number: int) -> int:
            start, stop = number * chunk, (number + 1) * chunk
            return max(0, min(stop, first + self.longest_response) - max(start, first))

        if self.shares == 1:
            return self.longest_response
        mirror = 2 * self.shares - 1
        return max(inside(rank) + inside(mirror - rank) for rank in range(self.shares))


def workload(
    config: Config,
    parallel: ParallelConfig,
    *,
    rounded_to: int = 1,
    prompt_tokens: int = PROMPT_TOKENS,
    response_tokens: float | None = None,
    filled: bool = False,
) -> Workload:
    """The step that a config asks for under a layout.

    Args:
        filled: rows that the replicas lack to have equally many are added, as a teacher does in a
            layout of its own.
        rounded_to: rows are rounded up to multiples of it, as far as a micro-batch allows.
        response_tokens: average length of a response; None: all as long as allowed.

    Raises:
        ConfigError: a trajectory does not fit a micro-batch, the replicas cannot get equally many
            trajectories, or a length is impossible.
    """
    rollout, room = config.rollout, config.train.tokens_per_micro_batch
    longest_response = rollout.max_new_tokens
    mean_response = float(longest_response if response_tokens is None else response_tokens)
    if prompt_tokens < 1:
        raise ConfigError(f"--prompt-tokens must be at least 1, found {prompt_tokens}.")
    if not 1 <= mean_response <= longest_response:
        raise ConfigError(
            f"--response-tokens must be between 1 and rollout.max_new_tokens = {longest_response}, "
            f"found {mean_response:g}."
        )
    multiple = parallel.row_shards * config.megatron.token_multiple
    real = prompt_tokens + longest_response - 1
    most = room // multiple * multiple
    longest = max(_up(real, multiple), min(_up(real, lcm(multiple, rounded_to)), most))
    if longest > room:
        raise ConfigError(
            f"train.tokens_per_micro_batch = {room} is less than the longest possible trajectory: "
            f"a prompt of {prompt_tokens} tokens and rollout.max_new_tokens make {longest} "
            "positions. Raise it or lower rollout.max_new_tokens."
        )
    trajectories = rollout.prompts_per_step * rollout.samples_per_prompt
    if trajectories % parallel.data and not filled:
        raise ConfigError(
            f"rollout.prompts_per_step x samples_per_prompt = {trajectories} must be divisible by "
            f"parallel.data = {parallel.data}. Change one of the three."
        )
    rows = -(-trajectories // parallel.data)
    if rows % parallel.batch_multiple:
        raise ConfigError(
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} needs a multiple of "
            f"parallel.pipeline = {parallel.pipeline} trajectories for each replica, found "
            f"rollout.prompts_per_step x samples_per_prompt / parallel.data = {rows}. Change one "
            "of them, or set virtual_pipeline = 1."
        )
    mean = prompt_tokens + mean_response - 1
    held = min(rows, room // longest)
    return Workload(
        trajectories=trajectories,
        rows=rows,
        prompt=prompt_tokens,
        longest=longest,
        mean=mean,
        longest_response=longest_response,
        mean_response=mean_response,
        micro_batches=_up(-(-rows // min(rows, int(room // mean))), parallel.batch_multiple),
        most_micro_batches=_up(-(-rows // held), parallel.batch_multiple),
        most_positions=max(held * longest, min(room, rows * longest)),
        shares=parallel.context,
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
