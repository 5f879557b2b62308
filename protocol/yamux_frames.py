"""The yamux frame header and its constants. Spec: docs/spec/yamux.md.

    0       1       2           4                   8                   12
    | ver=0 | type  | flags     | stream id         | length            |   big endian

Length is the size of the payload that follows (DATA), a credit in bytes (WINDOW), an opaque number (PING)
or an error code (GO_AWAY).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

HEADER: Final = struct.Struct(">BBHII")
HEADER_SIZE: Final = HEADER.size
INITIAL_WINDOW: Final = 256 * 1024
"""Credit every new stream starts with, fixed by the specification; more is granted with SYN and ACK."""


class FrameType:
    """What a frame is.

    Plain ints, as are flags: an IntFlag's `&` costs 3 µs, twice what sealing a small frame does.
    """

    DATA: Final = 0
    WINDOW: Final = 1
    PING: Final = 2
    GO_AWAY: Final = 3


class Flag:
    """What a frame says besides; on a PING, SYN asks and ACK answers."""

    NONE: Final = 0
    SYN: Final = 1
    ACK: Final = 2
    FIN: Final = 4
    RST: Final = 8


class GoAway(IntEnum):
    """Why a session ends."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class Priority(IntEnum):
    """Which stream's bytes go first when a link is full; smaller is sooner, round robin among equals."""

    CONTROL = 0
    """Small and urgent: identify, ping, repair of a chain."""
    DECODE = 1
    """One token's activations: a user is waiting for each of them."""
    BULK = 2
    """Prefill, weights, gradients: throughput matters, latency does not."""
