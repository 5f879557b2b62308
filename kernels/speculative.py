"""Guessing the next tokens, so that one traversal of the chain can confirm several of them.

A guess costs nothing but time: the model's own choice is made at every row anyway, a guess is kept only while it equals
that choice, and rows behind the first wrong one are taken back. So the text never depends on anything in this file.

Ngrams copies what followed the same tokens earlier in the text (prompt look-up decoding; the copying is LZ77's,
so a loop goes on as a loop). Pace decides how much to guess: guessing k tokens pays while

    expected tokens / time = (1 + a + a^2 + ... + a^k) / time of a step of k + 1 rows

is larger than without, where `a`, the share of guesses that were right, is kept per length of the match, and times per
number of rows. Guesses that were not sent are judged too, by the token that came: so `a` is known while speculation
is off, and it comes back when the text begins to repeat itself. Pure: no clock, no randomness, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_DRAFT: Final = 31
"""Guesses a traversal may carry. Windowed layers can take back 64 rows (kvcache.ROLLBACK) without a replay."""
MIN_MATCH: Final = 2
MAX_MATCH: Final = 6
"""Tokens that must have stood before, at least, and up to which a longer match makes a better class of guesses."""
MAX_INDEXED: Final = 1 << 16
"""Tokens of history that are indexed; of longer ones the end."""
MODEL: Final = MAX_MATCH + 1
"""The class of guesses that a draft model makes."""
SHADOW_EVERY: Final = 16
"""Steps between two guesses of a draft model that does not pay: its guesses cost time even when nobody sends them."""
_SIZES: Final = (0, 1, 3, 7, 15, 31)
"""Numbers of guesses to choose from: rows in powers of two, because matrix kernels pad rows."""
_PRIOR_RIGHT: Final = (0.3, 0.08)
"""Assumed of matches of MIN_MATCH tokens, and more per further token: two tokens that stood before say little."""
_PRIOR_WEIGHT: Final = 1.0
_FORGET: Final = 0.95
"""Weight of older evidence per newer one."""
_ROW_COST: Final = 0.02
"""Assumed cost of a row beside a step's, where nothing was measured."""
_MARGIN: Final = 1.05
"""Guessing must promise so much: times are noisy."""
_LEARN: Final = 0.25
_LEAST_S: Final = 1e-6
_OUTLIER: Final = 4.0
"""A step that took so many times what it should is a repair or somebody else's, not the price of its rows."""


class Ngrams:
    """Guesses by looking up what followed the last tokens the time before. Follows a history that grows, or is cut."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._follower: dict[tuple[int, ...], int] = {}

    def match(self, history: Sequence[int]) -> tuple[int, int] | None:
        """Where the text after `history` may be found: (index of the first token to copy, tokens that matched)."""
        self.follow(history)
        tokens = self._tokens
        for length in range(min(MAX_MATCH, len(tokens) - 1), MIN_MATCH - 1, -1):
            if (at := self._follower.get(tuple(tokens[-length:]))) is not None:
                return at, length
        return None

    def copy(self, at: int, count: int) -> list[int]:
        """`count` tokens from index `at` on; past the end the copy is copied."""
        tokens, made = self._tokens, list[int]()
        for index in range(at, at + count):
            made.append(tokens[index] if index < len(tokens) else made[index - len(tokens)])
        return made

    def follow(self, history: Sequence[int]) -> None:
        """Learn the tokens added since the last call; all of them if the history was cut."""
        known = len(self._tokens)
        if len(history) < known or (known and history[known - 1] != self._tokens[-1]):
            self._tokens, self._follower, known = [], {}, 0
        if not known and len(history) > MAX_INDEXED:
            # what is left out stays in the list, so that indexes are those of the history
            known = len(history) - MAX_INDEXED
            self._tokens = list(history[:known])
        for token in history[known:]:
            self._add(token)

    def _add(self, token: int) -> None:
        tokens, at = self._tokens, len(self._tokens)
        for length in range(MIN_MATCH, min(MAX_MATCH, at) + 1):
            self._follower[tuple(tokens[at - length :])] = at
        tokens.append(token)


@dataclass(slots=True)
class Guess:
    """What may come next, or how much of it a draft model is to say."""

    kind: int = 0
    """How good guesses of this kind are is learned per kind: the length of the match, or MODEL. 0: there is none."""
    tokens: list[int] | None = None
    """None: `count` tokens are wanted from the draft model."""
    count: int = 0
    """Tokens to send; with 0 the first one is only judged."""


class Speculator:
    """Guesses for one sequence: propose, send, then observe what the model chose."""

    def __init__(self, pace: Pace | None = None, *, ngrams: bool = True, model: bool = False) -> None:
        self.pace = pace or Pace()
        self._ngrams = Ngrams() if ngrams else None
        self._model = model
        self._idle = 0
        """Steps since the draft model was last asked."""
        self._guess = Guess()
        self.traversals = 0
        self.drafted = 0
        self.accepted = 0

    def follow(self, history: Sequence[int]) -> None:
        """Index a history now, which takes 0.3 s for 65,536 tokens, rather than at the next proposal."""
        if self._ngrams is not None:
            self._ngrams.follow(history)

    def propose(self, history: Sequence[int], room: int) -> Guess:
        """The best guess for what follows `history`, at most `room` tokens to send."""
        room = max(0, min(room, MAX_DRAFT))
        guess, gain = Guess(), 0.0
        if self._ngrams is not None and (found := self._ngrams.match(history)) is not None:
            at, kind = found
            count, gain = self.pace.choose(kind, room)
            guess = Guess(kind, self._ngrams.copy(at, max(1, count)), count)
        if self._model:
            guess = self._ask_model(guess, gain, room)
        self._guess = guess
        return guess

    def _ask_model(self, guess: Guess, gain: float, room: int) -> Guess:
        count, better = self.pace.choose(MODEL, room, draft_s=self.pace.draft_s)
        self._idle += 1
        if (count and better > gain) or (not guess.count and self._idle >= SHADOW_EVERY):
            self._idle = 0
            return Guess(MODEL, None, count)
        return guess

    def drafted_by_model(self, tokens: list[int], seconds: float) -> None:
        """What the draft model said to the last proposal, and how long that took."""
        self._guess.tokens = tokens
        self.pace.drafting_took(seconds / max(1, len(tokens)))

    def observe(self, chosen: Sequence[int], seconds: float) -> None:
        """The step with the last guess is back: the model chose these tokens, the first that was guessed wrong last."""
        guess = self._guess
        tokens, sent = guess.tokens or [], guess.count
        self.traversals += 1
        self.drafted += sent
        self.accepted += len(chosen) - 1
        self.pace.took(sent + 1, seconds)
        judged = tokens[: max(1, sent)]
        right = next((at for at, (a, b) in enumerate(zip(judged, chosen, strict=False)) if a != b), len(judged))
        self.pace.judge(guess.kind, right, wrong=right < min(len(judged), len(chosen)))
        self._guess = Guess()


class Pace:
    """How many tokens to guess, learned from how often guesses were right and from what steps took."""

    def __init__(self) -> None:
        self._right: dict[int, float] = {}
        self._judged: dict[int, float] = {}
        self._step_s: dict[int, float] = {}
        """By bits of the number of rows."""
        self.draft_s = 0.0
        """A draft model's time per token."""

    def choose(self, kind: int, room: int, *, draft_s: float = 0.0) -> tuple[int, float]:
        """Guesses of a class to send, at most `room`, and how many times faster than without that should be."""
        best, gain = 0, 1.0
        plain = self._time(1)
        right = self.right(kind)
        for size in _SIZES[1:]:
            if not self._may_try(size + 1):
                break
            count = min(size, room)
            tokens = sum(right**power for power in range(count + 1))
            better = tokens * plain / (self._time(count + 1) + count * draft_s)
            if count and better > max(gain, _MARGIN):
                best, gain = count, better
        return best, gain

    def right(self, kind: int) -> float:
        """The chance that a guess of this class is right, given that those before it were."""
        judged = self._judged.get(kind, 0.0) + _PRIOR_WEIGHT
        prior = _PRIOR_RIGHT[0] + _PRIOR_RIGHT[1] * max(0, kind - MIN_MATCH)
        return (self._right.get(kind, 0.0) + _PRIOR_WEIGHT * prior) / judged

    def judge(self, kind: int, right: int, *, wrong: bool) -> None:
        """So many guesses were right, and then one was `wrong`, or they were all there was."""
        for verdict in (*[1.0] * right, *[0.0] * wrong):
            self._right[kind] = self._right.get(kind, 0.0) * _FORGET + verdict
            self._judged[kind] = self._judged.get(kind, 0.0) * _FORGET + 1.0

    def took(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        size, seconds = _bucket(rows), max(seconds, _LEAST_S)
        known = self._step_s.get(size)
        if known is None:
            self._step_s[size] = seconds
        else:
            self._step_s[size] += _LEARN * (min(seconds, _OUTLIER * known) - known)
        for other in self._step_s:  # one slow step must not decide for ever: what is not used is slowly forgiven
            if other > size:
                self._step_s[other] -= _LEARN / 32 * max(0.0, self._step_s[other] - self._guessed(other))

    def drafting_took(self, seconds: float) -> None:
        """A draft model took so long per token."""
        self.draft_s += (_LEARN if self.draft_s else 1.0) * (seconds - self.draft_s)

    def _may_try(self, rows: int) -> bool:
        """Twice the rows that were tried before, not more: a step of many rows may turn out to be long."""
        return bool(self._step_s) and _bucket(rows) <= max(self._step_s) + 1

    def _time(self, rows: int) -> float:
        size = _bucket(rows)
        known = self._step_s.get(size)
        return self._guessed(size) if known is None else known

    def _guessed(self, size: int) -> float:
        """A step's time by those of smaller ones that are known, on a straight line; else by any."""
        smaller = sorted(other for other in self._step_s if other < size)
        if not smaller:
            return self._step_s[min(self._step_s)] if self._step_s else 1.0
        least, nearest = smaller[0], smaller[-1]
        known = self._step_s[nearest]
        slope = (known - self._step_s[least]) / max(1, (1 << nearest) - (1 << least))
        return known + ((1 << size) - (1 << nearest)) * max(slope, _ROW_COST * self._step_s[least])


def _bucket(rows: int) -> int:
    """0 for one row, 1 for two, 2 for three and four, 3 up to eight."""
    return (rows - 1).bit_length()
