"""A small model in this process that guesses what a bigger one will say.

It keeps a KV cache of its own per sequence, so a guess costs one step of it, not the whole text. It chooses as the big
model does, by the same parameters and the same draw of the position: where the two agree about probabilities they
agree about the token, greedy or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from ..protocol.sampling import SamplingParams
from .engine import Source, default_quant, load_embedding, load_head, load_span
from .kvcache import KVPool, LaneCache, NeedReplay
from .sampling import sample
from .span import Piece

CHUNK: Final = 256
"""Rows of a pass over a prompt."""
KV_BYTES: Final = 1 << 30
"""Memory its caches may take; a sequence that finds none goes without guesses."""


class Drafter:
    """The whole model. Not thread-safe: one thread owns it."""

    def __init__(self, source: Source, *, dtype: torch.dtype = torch.bfloat16, free_bytes: int = 1 << 62) -> None:
        config = source.config
        quant = default_quant(config, config.num_blocks, free_bytes)
        self._span = load_span(source, 0, config.num_blocks, dtype=dtype, quant=quant)
        self._embedding = load_embedding(source, dtype=dtype)
        self._head = load_head(source, dtype=dtype)
        self._pool = KVPool(KV_BYTES, config, 0, config.num_blocks, dtype)
        self._lanes: dict[object, tuple[LaneCache, list[int]]] = {}
        self.max_positions = config.max_positions

    @property
    def lanes(self) -> int:
        """Sequences it holds caches of."""
        return len(self._lanes)

    def guess(self, key: object, history: Sequence[int], count: int, params: SamplingParams) -> list[int]:
        """What it would write after `history`: `count` tokens, fewer at the end of its positions.

        `key` names the sequence. Raises ServerBusy when its caches are full.
        """
        if key not in self._lanes:
            self._lanes[key] = self._pool.open_lane(), []
        cache, cached = self._lanes[key]
        text = list(history)
        for _ in range(min(count, self.max_positions - len(history))):
            hidden = self._feed(cache, cached, text)
            token, _ = sample(self._head.logits(hidden)[-1], params, text, len(text))
            text.append(token)
        return text[len(history) :]

    def _feed(self, cache: LaneCache, cached: list[int], text: list[int]) -> torch.Tensor:
        """Bring the cache up to `text`; the hidden states behind its last token."""
        same = _common(cached, text[:-1])
        try:
            cache.truncate(same)
        except NeedReplay:  # windowed blocks have forgotten what stood there
            cache.reset()
            same = 0
        del cached[same:]
        hidden = torch.empty(0)
        for at in range(same, len(text), CHUNK):
            part = text[at : at + CHUNK]
            rows = self._embedding(torch.tensor(part, dtype=torch.int64))
            hidden = self._span.run(rows, [Piece(cache, at, len(part))])
            cached += part
        return hidden[-1:]

    def free(self, key: object) -> None:
        """Forget a sequence. Safe to call twice."""
        if key in self._lanes:
            self._lanes.pop(key)[0].free()


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(at for at in range(length) if left[at] != right[at])
