"""Which span a server should hold, so that the swarm's slowest block gets faster.

A server of n blocks gives each of them 1 / (n * block time) tokens a second; a block's rate is the sum over its
servers, and the swarm can be no faster than its slowest block. A joining server takes the window whose blocks are
slowest (Petals' rule). An idle one moves when that pays. Petals simulates everybody moving at will and reloads 255
blocks to bring 40 servers back to 89 % of the possible after 30 % have left. Here a move costs only the blocks not
already held, must pay within HORIZON_S for the time the mover is away (a gain rule with a price),
and is part of a plan for the whole swarm that everybody computes alike from the same view: only the plan's first mover
moves. That needs no messages, and no two servers fill one hole. See rebalance.py for the plan.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from ..protocol.errors import ConfigError
from ..protocol.ids import PeerId
from .announce import PREFILL_TOKENS, Announcement, State
from .rebalance import Holding, first_move
from .rebalance import block_rates as sum_rates
from .swarm import SwarmView

HORIZON_S: Final = 1800.0
"""How long a placement is expected to last: a move must pay for itself within this time."""
DRAIN_S: Final = 30.0
"""Time to hand over sessions before moving."""
_MIN_BLOCK_S: Final = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A worthwhile change of one server's span."""

    peer: PeerId
    start: int
    """First block of the new span."""
    end: int
    """One past the last block of the new span."""
    reloaded: int
    """Blocks of it not held before."""
    gain: float
    """What the plan it begins gains, price of its moves taken off, as a part of the mean block rate."""


def rate(announcement: Announcement) -> float:
    """Tokens a second this server gives each of its blocks when all of them are used alike."""
    block_s = max(announcement.prefill_s / PREFILL_TOKENS, _MIN_BLOCK_S)
    return 1.0 / (block_s * (announcement.end - announcement.start))


def block_rates(view: SwarmView) -> list[float]:
    """For each block, tokens a second of all its servers that stay; joining ones count, leaving ones do not."""
    return sum_rates([_holding(announced) for announced in _staying(view)], view.num_blocks)


def choose_span(view: SwarmView, blocks_that_fit: int, rng: random.Random) -> tuple[int, int]:
    """The span a joining server should hold: the window of slowest blocks, compared from the slowest on.

    Among equally good windows those that touch an end of the model or of another span are kept, so that no sliver is
    left over, and `rng` picks one, so that two servers that join at once need not choose alike. Our own speed does
    not matter: whatever we add helps the slowest window most. Raises ConfigError when not even one block fits.
    """
    if blocks_that_fit < 1:
        raise ConfigError(f"no block of {view.model} fits in memory: use --quant, or give it more memory")
    length = min(blocks_that_fit, view.num_blocks)
    rates = block_rates(view)
    windows = {start: sorted(rates[start : start + length]) for start in range(view.num_blocks - length + 1)}
    slowest = min(windows.values())
    best = [start for start, window in windows.items() if window == slowest]
    borders = {0, view.num_blocks}
    borders |= {server.start for server in view.servers} | {server.end for server in view.servers}
    aligned = [start for start in best if start in borders or start + length in borders]
    start = rng.choice(aligned or best)
    return start, start + length


def next_move(view: SwarmView, *, reload_s: float) -> Move | None:
    """The one move the swarm should make now, or None. Everybody with the same view computes the same.

    `reload_s` is what fetching and loading one block takes, assumed alike for everybody. Pure but slow, 0.1 to 1 s:
    call it off the event loop.
    """
    staying = _staying(view)
    holdings = [_holding(announced) for announced in staying]
    movable = [index for index, announced in enumerate(staying) if announced.state is State.ONLINE]
    work = [holding.rate * holding.length for holding in holdings]

    def price(index: int, reloaded: int) -> float:
        return work[index] / sum(work) * (DRAIN_S + reloaded * reload_s) / HORIZON_S

    shift = first_move(holdings, movable, view.num_blocks, price)
    if shift is None:
        return None
    return Move(
        peer=staying[shift.index].peer,
        start=shift.start,
        end=shift.start + holdings[shift.index].length,
        reloaded=shift.reloaded,
        gain=shift.gain,
    )


def choose_move(view: SwarmView, peer: PeerId, *, reload_s: float) -> Move | None:
    """The move `peer` should make now, or None: it stays, or another goes first. See next_move()."""
    server = view.server(peer)
    if server is None or server.announcement.state is not State.ONLINE:
        return None
    move = next_move(view, reload_s=reload_s)
    return move if move is not None and move.peer == peer else None


def _staying(view: SwarmView) -> list[Announcement]:
    return [s.announcement for s in view.servers if s.announcement.state is not State.DRAINING]


def _holding(announced: Announcement) -> Holding:
    return Holding(announced.start, announced.end - announced.start, rate(announced))
