"""Which rows make a micro-batch, and which replica computes it: decided on lengths alone.

A row costs its padded length, so rows of about one length go together: the rows of all replicas are
sorted and cut into micro-batches, and those are dealt. The cuts give every micro-batch about the
same work, so that replicas and pipeline stages seldom wait for one another.

Every rank decides this for itself, from the same lengths: no collective, no draw.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_tropd.base.errors import ConfigError

Work = Callable[[int], float]
"""Padded length of a row -> its work, in any unit: attention's share grows with the square."""
_HALVINGS = 30


class BatchRows(NamedTuple):
    """A micro-batch before it is made."""

    rows: tuple[int, ...]
    """Places of its sequences in the step's list, longest first."""
    length: int
    """That all of them are padded to."""


@dataclass(frozen=True)
class Dealing:
    """The micro-batches of a step, and who computes them."""

    replicas: tuple[tuple[BatchRows, ...], ...]
    """Of each data-parallel rank, equally many, heaviest first. The n-th of all have about the same
    work, for ranks that share experts meet in each."""
    positions: int
    """Of all sequences, without padding."""

    @property
    def padding_share(self) -> float:
        """Share of the computed positions that are padding."""
        padded = sum(len(b.rows) * b.length for batches in self.replicas for b in batches)
        return 1 - self.positions / padded if padded else 0.0

    def waiting_share(self, work: Work) -> float:
        """Share of their time that replicas would wait for the slowest, if work were time."""
        each = [sum(len(b.rows) * work(b.length) for b in batches) for batches in self.replicas]
        return 1 - sum(each) / (len(each) * max(each)) if max(each) else 0.0


class _Cut(NamedTuple):
    """Rows ``start`` to ``stop`` of the sorted ones."""

    start: int
    stop: int
    work: float


def deal(
    lengths: Sequence[int],
    padded: Sequence[int],
    *,
    dp_size: int,
    tokens_per_micro_batch: int,
    batch_multiple: int = 1,
    work: Work = float,
) -> Dealing:
    """Cut a step's rows into micro-batches and deal them to the replicas by their work.

    One replica's rows are cut where the budget ends, and so is a step whose micro-batches need not
    be evened out.

    Args:
        lengths: positions of each row.
        padded: the same as they are computed; of longer rows not less.
        dp_size: number of replicas.
        tokens_per_micro_batch: most padded positions of a micro-batch; at least one row's.
        batch_multiple: the number of a replica's micro-batches is a multiple of it, as an
            interleaved pipeline asks.
        work: of a row of some padded length; grows with it.

    Raises:
        ConfigError: there are not enough rows for as many micro-batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cutter = _Cutter([padded[i] for i in order], tokens_per_micro_batch, work)
    cuts = cutter.cut(dp_size * batch_multiple)
    return Dealing(
        tuple(
            tuple(
                BatchRows(tuple(order[cut.start : cut.stop]), padded[order[cut.start]])
                for cut in mine
            )
            for mine in _dealt(cuts, dp_size)
        ),
        positions=sum(lengths),
    )


class _Cutter:
    """Cuts sorted rows into micro-batches."""

    def __init__(self, padded: Sequence[int], budget: int, work: Work) -> None:
        """``padded``: lengths, longest first."""
        self._padded, self._budget = padded, budget
        of_length = {length: work(length) for length in set(padded)}
        self._work = [of_length[length] for length in padded]

    def cut(self, multiple: int) -> list[_Cut]:
        """The fewest micro-batches that are a multiple, the heaviest as light as it can be."""
        cuts = self._below(float("inf"))
        count = -(-len(cuts) // multiple) * multiple
        if count > len(self._padded):
            raise ConfigError(
                f"{len(self._padded)} trajectories cannot make a multiple of {multiple} "
                f"micro-batches (replicas x micro-batches that their pipelines ask for), found "
                f"{len(cuts)} full ones. Change rollout.prompts_per_step, samples_per_prompt, "
                "train.tokens_per_micro_batch or the layout."
            )
        if multiple == 1:
            return cuts
        low, high = 0.0, max((cut.work for cut in cuts), default=0.0)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = self._below(middle)
            if len(found) <= count:
                high, cuts = middle, found
            else:
                low = middle
        return self._split(cuts, count)

    def _below(self, most: float) -> list[_Cut]:
        """As few micro-batches as there can be of at most ``most`` work, or of one row."""
        cuts, start, rows = [], 0, len(self._padded)
        while start < rows:
            each = self._work[start]
            fit = min(self._budget // self._padded[start], rows - start)
            if each * fit > most:
                fit = max(int(most / each), 1)
            cuts.append(_Cut(start, start + fit, each * fit))
            start += fit
        return cuts

    def _split(self, cuts: list[_Cut], count: int) -> list[_Cut]:
        """Halve the heaviest of several rows until there are ``count``."""
        cuts = list(cuts)
        while len(cuts) < count:
            heaviest = max(
                (i for i, cut in enumerate(cuts) if cut.stop - cut.start > 1),
                key=lambda i: cuts[i].work,
            )
            start, stop, _ = cuts[heaviest]
            middle = (start + stop + 1) // 2
            cuts[heaviest : heaviest + 1] = [
                _Cut(a, b, self._work[a] * (b - a)) for a, b in ((start, middle), (middle, stop))
            ]
        return cuts


def _dealt(cuts: Sequence[_Cut], dp_size: int) -> list[list[_Cut]]:
    """Deal heaviest first, one to each replica in a round, the heaviest to whom has least.

    Karmarkar and Karp's differencing finds some 1 % less for the replica that has most
    (benchmarks/balance.py).
    """
    if dp_size == 1:
        return [list(cuts)]
    heaviest_first = sorted(cuts, key=lambda cut: (-cut.work, cut.start))
    hands: list[list[_Cut]] = [[] for _ in range(dp_size)]
    loads = [0.0] * dp_size
    for start in range(0, len(cuts), dp_size):
        lightest_first = sorted(range(dp_size), key=lambda rank: (loads[rank], rank))
        for rank, cut in zip(lightest_first, heaviest_first[start : start + dp_size], strict=True):
            hands[rank].append(cut)
            loads[rank] += cut.work
    return hands
