"""A short plan of moves that makes the slowest block faster for few reloaded blocks; numbers only, no peers.

Raising a minimum by single moves gets stuck: with several blocks equally slow, no one move raises it. So moves are
ranked on a soft bottleneck, the power mean of the block rates, greedily, best gain per reloaded block first. How soft
is best depends on the swarm, so a few settings are tried and the plan whose end is worth most, by the true bottleneck
less the price of its moves, wins; only as much of it is kept as pays.

It cannot cycle: after the first move of a plan, the rest of that plan is found again by the same setting, and is worth
as much as before plus the price already paid. So the value of the best plan rises with every move made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

SETTINGS: Final = ((8.0, 1.0), (8.0, 0.6), (20.0, 1.0), (20.0, 0.6))
"""(sharpness of the soft bottleneck, power of the reloaded blocks in a move's rank); measured in docs/routing.md."""
MAX_MOVERS: Final = 48
"""Servers considered as movers; in bigger swarms, those whose blocks can best spare them."""
MAX_MOVES: Final = 32
"""Longest plan."""
HOLE: Final = 0.1
"""A block below this share of the mean rate is a hole: filling it comes before any speed."""
_WORTH: Final = 2e-4
"""Smallest gain of the soft bottleneck per reloaded block."""
_NOISE: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Holding:
    """One server as numbers."""

    start: int
    length: int
    rate: float
    """Tokens a second it gives each of its blocks."""


@dataclass(frozen=True, slots=True)
class Shift:
    """One server's move."""

    index: int
    """Which of the holdings moves."""
    start: int
    """Its new first block."""
    reloaded: int
    """Blocks it did not hold before."""
    gain: float
    """Relative gain of the true bottleneck at the end of the plan, less the price of the plan's moves."""


Price = Callable[[int, int], float]
"""(index of a holding, blocks reloaded) -> what the move costs, as a part of the swarm's mean rate."""


def first_move(holdings: Sequence[Holding], movable: Sequence[int], num_blocks: int, price: Price) -> Shift | None:
    """The first move of the best plan, or None when staying is best."""
    rates = block_rates(holdings, num_blocks)
    mean = sum(rates) / num_blocks
    if mean <= 0.0:
        return None
    best: Shift | None = None
    now = worth = min(rates) / mean
    for setting in SETTINGS:
        for value, first in _plan(holdings, _movers(holdings, movable, rates), rates, setting, price):
            if value > worth + _NOISE:
                worth, best = value, replace(first, gain=value - now)
    return best


def block_rates(holdings: Sequence[Holding], num_blocks: int) -> list[float]:
    """For each block, the sum of the rates of its holders."""
    rates = [0.0] * num_blocks
    for holding in holdings:
        _add(rates, holding, holding.start, holding.rate)
    return rates


def _movers(holdings: Sequence[Holding], movable: Sequence[int], rates: Sequence[float]) -> list[int]:
    """At most MAX_MOVERS of the movable ones, those whose slowest block would stay fastest without them first."""

    def spare(index: int) -> float:
        holding = holdings[index]
        return holding.rate - min(rates[holding.start : holding.start + holding.length])

    return sorted(sorted(movable, key=spare)[:MAX_MOVERS])


def _plan(
    holdings: Sequence[Holding],
    movers: Sequence[int],
    rates: Sequence[float],
    setting: tuple[float, float],
    price: Price,
) -> Iterator[tuple[float, Shift]]:
    """(worth, first move) after every move of one greedy plan."""
    held, now, paid = list(holdings), list(rates), 0.0
    mean = sum(rates) / len(rates)
    first: Shift | None = None
    for _ in range(MAX_MOVES):
        move = _Field(now, *setting).best(held, movers)
        if move is None:
            return
        first = first or move
        mover = held[move.index]
        _add(now, mover, mover.start, -mover.rate)
        _add(now, mover, move.start, mover.rate)
        held[move.index] = replace(mover, start=move.start)
        paid += price(move.index, move.reloaded)
        yield min(now) / mean - paid, first


class _Field:
    """The block rates of one moment, and how good it would be to move any server."""

    def __init__(self, rates: Sequence[float], sharpness: float, power: float) -> None:
        self._rates, self._sharpness, self._power = rates, sharpness, power
        self._mean = sum(rates) / len(rates)
        self._hole = HOLE * self._mean
        self._holes = sum(map(self._emptiness, rates))
        self._pain = sum(map(self._painfulness, rates))

    def best(self, holdings: Sequence[Holding], movers: Sequence[int]) -> Shift | None:
        """The best worthwhile move; holes first, the lowest index and start on a tie."""
        best: tuple[bool, float] | None = None
        shift: Shift | None = None
        for index in movers:
            for rank, start, reloaded in self._moves(holdings[index]):
                if best is None or rank > best:
                    best, shift = rank, Shift(index, start, reloaded, 0.0)
        return shift

    def _emptiness(self, rate: float) -> float:
        """1 for a block nobody holds, 0 for one that is no hole."""
        return max(0.0, 1.0 - rate / self._hole)

    def _painfulness(self, rate: float) -> float:
        """A block's term of the power mean; holes are counted apart, for they would drown all others."""
        return float((rate / self._mean) ** -self._sharpness) if rate >= self._hole else 0.0

    def _moves(self, holding: Holding) -> Iterator[tuple[tuple[bool, float], int, int]]:
        """(rank, new start, reloaded blocks) of each worthwhile move of one server."""
        length = holding.length
        without = list(self._rates)
        _add(without, holding, holding.start, -holding.rate)
        pains, pain_to = _windows(without, holding.rate, self._painfulness)
        holes, holes_to = _windows(without, holding.rate, self._emptiness)
        for start in range(len(without) - length + 1):
            reloaded = min(abs(start - holding.start), length)
            if reloaded:
                filled = self._holes - (holes + holes_to[start + length] - holes_to[start])
                pain = pains + pain_to[start + length] - pain_to[start]
                rank = self._rank(filled, pain, reloaded)
                if rank is not None:
                    yield rank, start, reloaded

    def _rank(self, filled: float, pain: float, reloaded: int) -> tuple[bool, float] | None:
        """How good a move is; None when it opens a hole or gains too little."""
        if filled > _NOISE:
            return True, filled / reloaded**self._power
        if filled < -_NOISE or pain <= 0.0:
            return None
        gain = (self._pain / pain) ** (1 / self._sharpness) - 1
        return (False, gain / reloaded**self._power) if gain > _WORTH * reloaded else None


def _add(rates: list[float], holding: Holding, start: int, amount: float) -> None:
    for block in range(start, start + holding.length):
        rates[block] = max(rates[block] + amount, 0.0)


def _windows(without: Sequence[float], rate: float, term: Callable[[float], float]) -> tuple[float, list[float]]:
    """The sum of a term over all blocks without the server, and running sums of what it changes per block."""
    before = [term(value) for value in without]
    change = (term(value + rate) - old for value, old in zip(without, before, strict=True))
    return sum(before), list(accumulate(change, initial=0.0))
