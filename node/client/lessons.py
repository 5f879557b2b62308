"""What a running chain teaches about its servers: for the plans that come after it.

A server reports on its own control stream, so it can speak for itself and its way to the next hop, and for nobody else.
"""

from __future__ import annotations

from typing import Final

from ...protocol.chain import ChainMachine, Hop
from ...protocol.ids import PeerId
from ...protocol.messages import Report
from ...routing.metrics import Metrics

QUICKEST_S: Final = 1e-6
"""No block takes less: whoever says so would attract everybody."""
SLOWEST_S: Final = 10.0
"""Of a block, and of a hop: a wilder claim is cut to this."""


def note_report(metrics: Metrics, machine: ChainMachine, hop: Hop, report: Report, now: float) -> None:
    """Learn from a hop's report. One from a hop replaced meanwhile teaches nothing."""
    if hop not in machine.hops:
        return
    peer, blocks = PeerId(hop.peer), hop.end - hop.start
    seconds = min(max(report.compute_s, QUICKEST_S * blocks), SLOWEST_S * blocks)
    metrics.observe_step(peer, blocks, report.rows, seconds, now)
    index = machine.hops.index(hop) + 1
    if report.hop_s and index < len(machine.hops) and (hop, machine.hops[index]) not in machine.relayed:
        metrics.observe_hop(peer, PeerId(machine.hops[index].peer), min(report.hop_s, SLOWEST_S), now)
