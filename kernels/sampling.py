"""Choosing the next token from logits: a pure function of (logits, parameters, history, position).

Whoever holds the tail of the chain may die and be replaced in the middle of a text, so no sampler keeps state.
The random number of a position is a hash of (seed, position): every machine draws the same one, in any order.
Ties are broken by the lower id everywhere, so equal logits give an equal token.

Filters act in this order, each on what the one before left: biases, penalties, top-k, temperature, top-p, min-p. They
only choose a set; the draw then runs through the set by rising id. A vocabulary has 262,144 entries and a token
some 15 ms, so nothing here sorts it all: greedy takes 0.6 ms, a draw 1 to 5 ms.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ..protocol.errors import ServerFailed
from ..protocol.sampling import Choice, SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_DOMAIN: Final = b"swarmnode/sampling/1"
_MANTISSA_BITS: Final = 53
_SUM_BLOCK: Final = 512


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) of a position: the first 53 bits of a hash, exact in a float and the same anywhere."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8, key=_DOMAIN)
    return (int.from_bytes(digest.digest(), "big") >> (64 - _MANTISSA_BITS)) / 2.0**_MANTISSA_BITS


def sample(logits: torch.Tensor, params: SamplingParams, history: Sequence[int], position: int) -> tuple[int, float]:
    """Choose the token that stands at `position` of the text.

    `logits` [vocab] are raw, of any float dtype; `history` is every token before `position`, the prompt's too.
    Returns the token id and its natural log probability under the raw logits (temperature 1, nothing filtered),
    which is what can be compared between runs. Raises ServerFailed when the logits are not finite.
    """
    choice = choose(logits, params, history, position)
    return choice.token, choice.logprob


def choose(logits: torch.Tensor, params: SamplingParams, history: Sequence[int], position: int, top: int = 0) -> Choice:
    """The same, with the `top` likeliest tokens beside it. Raises ServerFailed when the logits are not finite."""
    raw = logits.detach().float().cpu().numpy()  # [vocab]
    peak = raw.max()
    if not math.isfinite(peak):  # numpy's max is NaN as soon as one logit is; -inf below the peak is a mask
        raise ServerFailed("the logits are not finite: a server of the chain computed nonsense; ban it and retry")
    adjusted = _adjust(raw, params, history) if params.adjusts else raw
    token = int(adjusted.argmax()) if params.greedy else _draw(adjusted, params, position)
    total = float(peak) + math.log(float(np.exp(raw - peak).sum(dtype=np.float64)))
    return Choice(token, float(raw[token]) - total, _likeliest(raw, total, top))


def choose_rows(
    logits: torch.Tensor, params: SamplingParams, history: Sequence[int], guesses: Sequence[int], top: int = 0
) -> list[Choice]:
    """Choose after `history`, and after each of the guesses [rows - 1] as long as those before it were right.

    `logits` [rows, vocab] stand behind the last token of `history` and behind each guess. Every choice is the one that
    would be made without guesses; the last one returned is the first that was guessed wrong, or comes behind them all.
    """
    known, made = list(history), list[Choice]()
    for row, guess in enumerate((*guesses, None)):
        made.append(choose(logits[row], params, known, len(known), top))
        if made[-1].token != guess:
            break
        known.append(made[-1].token)
    return made


def continuations(
    logits: torch.Tensor, params: SamplingParams, history: Sequence[int], count: int
) -> list[tuple[int, float]]:
    """The `count` likeliest tokens and their log probabilities, for a beam search; biases and penalties come after the
    softmax, as transformers has it. Raises ServerFailed when the logits are not finite."""
    if not torch.isfinite(logits.max()):
        raise ServerFailed("the logits are not finite: a server of the chain computed nonsense; ban it and retry")
    scores = torch.log_softmax(logits.detach().float().cpu(), -1).numpy()
    scores = _adjust(scores, params, history) if params.adjusts else scores
    return list(_likeliest(scores, 0.0, count))


def _likeliest(raw: Floats, total: float, top: int) -> tuple[tuple[int, float], ...]:
    """The `top` likeliest tokens with their log probabilities, the likeliest first, of equals the lower id."""
    if top == 0:
        return ()
    ids = _top_k(raw, top) if top < len(raw) else np.arange(len(raw))
    order = ids[np.argsort(-raw[ids], kind="stable")]
    return tuple((int(token), float(raw[token]) - total) for token in order)


def _adjust(raw: Floats, params: SamplingParams, history: Sequence[int]) -> Floats:
    """Biases, then penalties; biases of ids outside the vocabulary do nothing."""
    adjusted = raw.copy()
    for token, bias in params.logit_bias:
        if token < len(raw):
            adjusted[token] += np.float32(bias)
    if params.penalized:
        _penalize(adjusted, params, history)
    return adjusted


def _penalize(adjusted: Floats, params: SamplingParams, history: Sequence[int]) -> None:
    """Repetition (as in CTRL, arXiv 1909.05858), frequency and presence penalties over the recent history, in place."""
    recent = history[-params.penalty_last_n :] if params.penalty_last_n else history
    counts = Counter(token for token in recent if 0 <= token < len(adjusted))
    seen = np.fromiter(counts.keys(), np.int64, len(counts))
    times = np.fromiter(counts.values(), np.float64, len(counts))
    values = adjusted[seen].astype(np.float64)
    values = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    adjusted[seen] = values - times * params.frequency_penalty - params.presence_penalty


def _draw(logits: Floats, params: SamplingParams, position: int) -> int:
    """Filter, then invert the cumulative sum over the kept ids at the position's uniform."""
    ids, weights = _filter(logits, params)
    place = _invert(weights, uniform(params.seed, position))
    return place if ids is None else int(ids[place])


def _filter(logits: Floats, params: SamplingParams) -> tuple[Ids | None, Floats]:
    """The ids that may be drawn, rising (None: all), and their weights."""
    ids = _top_k(logits, params.top_k) if 0 < params.top_k < len(logits) else None
    kept = logits if ids is None else logits[ids]
    weights = kept - kept.max()
    np.divide(weights, np.float32(params.temperature), out=weights)
    np.exp(weights, out=weights)
    if params.top_p < 1:
        inside = _nucleus(weights, params.top_p)
        ids, weights = inside if ids is None else ids[inside], weights[inside]
    if params.min_p > 0:
        inside = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = inside if ids is None else ids[inside], weights[inside]
    return ids, weights


def _invert(weights: Floats, draw: float) -> int:
    """The first place where the running sum of the weights passes `draw` of the total.

    In two levels, blocks and then inside one block: a running sum over the whole vocabulary takes 2.5 ms, this 0.2.
    """
    whole = len(weights) // _SUM_BLOCK * _SUM_BLOCK
    sums = weights[:whole].reshape(-1, _SUM_BLOCK).sum(axis=1, dtype=np.float64)
    reached = np.cumsum(np.append(sums, weights[whole:].sum(dtype=np.float64)))
    threshold = draw * reached[-1]
    block = int(np.searchsorted(reached, threshold, side="right"))
    if block == len(reached):  # the product was rounded up to the total
        return int(np.flatnonzero(weights)[-1])
    first = block * _SUM_BLOCK
    inner = np.cumsum(weights[first : first + _SUM_BLOCK], dtype=np.float64)
    before = reached[block - 1] if block else 0.0
    place = first + int(np.searchsorted(inner, threshold - before, side="right"))
    if place == first + len(inner):  # the two levels round differently
        return first + int(np.flatnonzero(weights[first : first + _SUM_BLOCK])[-1])
    return place


def _top_k(logits: Floats, k: int) -> Ids:
    """The k largest logits' ids, rising; of equals at the border the lower ids. 0 < k < len(logits)."""
    border = np.partition(logits, len(logits) - k)[len(logits) - k]
    above = np.flatnonzero(logits > border)
    equal = np.flatnonzero(logits == border)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Places of the likeliest tokens that together reach top_p of the weight, rising.

    Only candidates are sorted: what lies below (1 - p) * total / count sums to less than 1 - p of the total, so
    it is never inside.
    """
    total = weights.sum(dtype=np.float64)
    candidates = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    reached = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), top_p * total))
    return np.sort(order[: reached + 1])
