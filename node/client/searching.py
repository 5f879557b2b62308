"""Beam search over a chain: a lane for each running beam, forked where beams part.

The prompt is computed once, on lane 0. After each step a beam goes on in its parent's lane, or, where a parent has
several children, in that of a beam that has none; the servers share what such lanes have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...kernels.beams import BeamSearch, Next
from ...protocol.messages import Want
from ...protocol.sampling import SamplingParams
from .chain import ChainSession
from .ends import Ends, chunks
from .generate import PREFILL_ROWS, GenerationStats

if TYPE_CHECKING:
    from ..clock import Clock


@dataclass(frozen=True, slots=True)
class Found:
    """A sequence that a beam search found."""

    text: str
    token_ids: tuple[int, ...]
    score: float
    """Sum of log probabilities over length ** length_penalty."""


class Searching:
    """One beam search. The caller closes the chain."""

    def __init__(
        self, chain: ChainSession, ends: Ends, clock: Clock, params: SamplingParams, stats: GenerationStats
    ) -> None:
        self._chain = chain
        self._ends = ends
        self._clock = clock
        self._params = params
        self._stats = stats

    async def run(self, prompt: Sequence[int], search: BeamSearch, began: float) -> None:
        """Search to the end."""
        stats, last = self._stats, began
        parts = list(chunks(prompt, PREFILL_ROWS))
        for number, part in enumerate(parts, 1):
            want = Want.LAST if number == len(parts) else Want.NOTHING
            self._chain.feed(await self._ends.rows(part), len(part), want)
        lanes = [0]
        while True:
            payloads: dict[int, bytes] = {}
            while len(payloads) < len(lanes):
                result, payload = await self._chain.result()
                payloads[result.lane] = payload
            texts = [[*prompt, *beam.tokens] for beam in search.running]
            offers = [
                await self._ends.continuations(payloads[lane], self._params, text, search.wanted)
                for lane, text in zip(lanes, texts, strict=True)
            ]
            moves = search.step(offers)
            last = self._note(last, stats)
            if search.done:
                return
            lanes = self._fork(lanes, moves)
            for lane, move in zip(lanes, moves, strict=True):
                self._chain.feed(await self._ends.rows([move.token]), 1, Want.LAST, lane)

    def _note(self, last: float, stats: GenerationStats) -> float:
        now = self._clock.now()
        stats.traversals += 1
        stats.new_tokens += 1
        if stats.traversals == 1:
            stats.first_token_s = now - last
        else:
            stats.decode_s += now - last
        return now

    def _fork(self, lanes: Sequence[int], moves: Sequence[Next]) -> list[int]:
        """The lane of each next beam."""
        parents = {move.parent for move in moves}
        free = [lane for lane in range(self._chain.spec.lanes) if lane not in {lanes[parent] for parent in parents}]
        chosen, taken = [], set[int]()
        for move in moves:
            if move.parent not in taken:
                taken.add(move.parent)
                chosen.append(lanes[move.parent])
            else:
                chosen.append(free.pop(0))
                self._chain.fork(lanes[move.parent], chosen[-1])
        return chosen
