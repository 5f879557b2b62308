"""Which hop is to blame when a result does not come: ask all of them how far they are."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ...protocol.chain import ChainMachine, Hop
from ...protocol.messages import Probe, Progress
from .link import Link


async def investigate(links: Mapping[Hop, Link], wait_s: float) -> tuple[list[Hop], bool]:
    """Probe every hop. Returns those that do not answer, and whether any has moved since it was last asked."""
    before = {hop: _rows(link.progress) for hop, link in links.items()}
    answers = await asyncio.gather(*(link.probe(Probe(nonce=1), wait_s) for link in links.values()))
    silent = [hop for hop, answered in zip(links, answers, strict=True) if not answered]
    return silent, any(_rows(link.progress) != before[hop] for hop, link in links.items())


def holdup(machine: ChainMachine, links: Mapping[Hop, Link]) -> Hop:
    """The first hop that has rows it has not computed, or lacks rows the one before has sent."""
    sent = tuple(machine.position(lane) for lane in range(machine.spec.lanes))
    for hop in machine.hops:
        progress = links[hop].progress if hop in links else None
        if progress is None or progress.computed != sent:
            return hop
        sent = progress.computed
    return machine.hops[-1]


def _rows(progress: Progress | None) -> object:
    return None if progress is None else (progress.received, progress.computed, progress.sent)
