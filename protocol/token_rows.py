"""Tokens that a tail chose for several rows, as a Result's payload: for each row u32 token, f32 log probability.

Little endian, rows one after another, so that results of parts of a step join by joining their bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from math import inf
from typing import Final

from .errors import RemoteProtocolError
from .sampling import Choice

_ROW: Final = struct.Struct("<If")
ROW_BYTES: Final = _ROW.size
LEAST_LOGPROB: Final = -3.0e38
"""Travels in place of minus infinity, which a peer has no use for."""


def encode(choices: Iterable[Choice]) -> bytes:
    """The payload of these choices."""
    return b"".join(_ROW.pack(c.token, min(0.0, max(LEAST_LOGPROB, c.logprob))) for c in choices)


def decode(payload: bytes, vocab: int) -> list[Choice]:
    """The choices in a payload. Raises RemoteProtocolError for torn rows, tokens past `vocab` and impossible odds."""
    if len(payload) % ROW_BYTES:
        raise RemoteProtocolError(f"{len(payload)} bytes are no rows of {ROW_BYTES}")
    choices = [Choice(token, logprob) for token, logprob in _ROW.iter_unpack(payload)]
    for choice in choices:
        if choice.token >= vocab or not -inf < choice.logprob <= 0:
            raise RemoteProtocolError(f"token {choice.token} with log probability {choice.logprob} of {vocab}")
    return choices
