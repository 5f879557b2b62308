"""Beam search as transformers' generate(num_beams=...) does it, without the model: scores in, beams to go on with out.

Each running beam offers its likeliest continuations; of all of them together the best are kept, enough that as many
beams as before can go on even if every end token is among them. A beam that ends is scored by its log probability over
its length to the power of `length_penalty`. Pure, and no tensors: the caller computes log probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_BEAMS: Final = 64
NEVER: Final = "never"


@dataclass(frozen=True, slots=True)
class Beam:
    """A sequence and what it is worth."""

    tokens: tuple[int, ...]
    """What was written, the prompt left out."""
    score: float
    """While it runs: the sum of log probabilities. Ended: that over length ** length_penalty."""


@dataclass(frozen=True, slots=True)
class Next:
    """A beam of the next step."""

    parent: int
    """Which of the running beams it continues."""
    token: int


class BeamSearch:
    """The search after one prompt. `step` until `done`; then `best`."""

    def __init__(
        self,
        beams: int,
        max_new_tokens: int,
        ends: frozenset[int],
        *,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
    ) -> None:
        self._beams = beams
        self._max_new_tokens = max_new_tokens
        self._ends = ends
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self.running = [Beam((), 0.0)]
        """Beams to compute the next step of; at first there is only the prompt."""
        self._ended: list[Beam] = []
        self.done = False

    @property
    def wanted(self) -> int:
        """Continuations each running beam has to offer."""
        return max(2, 1 + len(self._ends)) * self._beams

    def step(self, offers: Sequence[Sequence[tuple[int, float]]]) -> list[Next]:
        """Go on with (token, log probability) offers of each running beam; returns who continues whom."""
        made = [
            (beam.score + logprob, parent, token)
            for parent, (beam, offer) in enumerate(zip(self.running, offers, strict=True))
            for token, logprob in offer
        ]
        made.sort(key=lambda one: (-one[0], one[1], one[2]))
        best = made[: self.wanted]
        length = len(self.running[0].tokens) + 1
        over = length >= self._max_new_tokens
        self._end([one for one in best[: self._beams] if over or one[2] in self._ends], length)
        going = [] if over else [one for one in best if one[2] not in self._ends][: self._beams]
        self.running = [Beam((*self.running[parent].tokens, token), score) for score, parent, token in going]
        self.done = not going or not self._can_improve(length)
        return [Next(parent, token) for _, parent, token in going]

    def _end(self, ending: Sequence[tuple[float, int, int]], length: int) -> None:
        worth = length**self._length_penalty
        self._ended += [Beam((*self.running[parent].tokens, token), score / worth) for score, parent, token in ending]
        self._ended.sort(key=lambda beam: -beam.score)
        del self._ended[self._beams :]

    def _can_improve(self, length: int) -> bool:
        """Whether a running beam may yet beat the worst that ended, by transformers' estimate."""
        if len(self._ended) < self._beams:
            return True
        if self._early_stopping is True:
            return False
        longest = self._early_stopping == NEVER and self._length_penalty > 0
        worth: float = (self._max_new_tokens if longest else length) ** self._length_penalty
        return self.running[0].score / worth > self._ended[-1].score

    def best(self, count: int) -> list[Beam]:
        """The best sequences that ended, the best first."""
        return self._ended[:count]
