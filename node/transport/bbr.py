"""Helping BBR out of its start.

BBR leaves STARTUP, in which it sends at 2.89 times the bandwidth it sees, when three round trips bring no more of
it; but those count only in which the sender had more to send than the window allowed. On a path of more than about
1 MB per round trip the kernel's send buffer (tcp_wmem, 4 MB) is full before that window is, so no round trip ever
counts: BBR stays in STARTUP for good, with the bottleneck's queue full. Measured at 100 Mbit/s and 100 ms: 9.8 MB/s,
a tenth of it sent again, echoes of others 155 ms; once helped, 12.0 MB/s and 101 ms.

The help: hold the socket a little below the bandwidth BBR has seen, until it has noticed that there is no more.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final

from .tcp import Tunable

TCP_CC_INFO: Final = 26
SO_MAX_PACING_RATE: Final = 47
_INFO: Final = struct.Struct("=IIIII")  # struct tcp_bbr_info: bandwidth low, high, min_rtt, pacing_gain, cwnd_gain
_RATE: Final = struct.Struct("=Q")
UNLIMITED: Final = (1 << 64) - 1
UNIT: Final = 256
"""Gains are in 256ths."""
STARTUP_GAIN: Final = 2.0
"""Only in STARTUP does BBR pace at more than this; it is 1.25 at most later."""
PLATEAU: Final = 1.25
"""Growth from one look to the next below which the bandwidth is what the path has; BBR's own measure."""
FLOWING: Final = 0.5
"""A path that moved less than this part of its bandwidth since the last look says nothing."""
HOLD: Final = 0.8
"""Pace held, in parts of the bandwidth seen."""
MAX_HELD: Final = 8
"""Looks after which a socket is let go though BBR has not noticed."""


class Startup:
    """Watches one socket that sends bulk, and helps when it is needed. Call look() every half second or so."""

    def __init__(self, sock: Tunable) -> None:
        self._sock = sock
        self._seen = 0.0
        self._held = 0

    @property
    def is_held(self) -> bool:
        """The socket is being held back."""
        return self._held > 0

    def look(self, rate: float) -> None:
        """See how BBR is doing; `rate`: bytes a second that were sent since the last look."""
        bandwidth = startup_bandwidth(self._sock)
        if self._held:
            self._held += 1
            if bandwidth is None or self._held > MAX_HELD:
                self._pace(UNLIMITED)
                self._held = 0
                self._seen = 0.0
        elif bandwidth is not None:
            if rate >= FLOWING * bandwidth and bandwidth < PLATEAU * self._seen:
                self._pace(int(HOLD * bandwidth))
                self._held = 1
            self._seen = bandwidth

    def _pace(self, rate: int) -> None:
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, _RATE.pack(rate))
        except OSError:
            pass  # an old kernel; it goes on as it was


def startup_bandwidth(sock: Tunable) -> float | None:
    """Bytes a second that BBR has seen, while it is in STARTUP; None afterwards, and for other congestion controls."""
    if sys.platform != "linux":
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, TCP_CC_INFO, _INFO.size)
        if len(info) < _INFO.size or not _is_bbr(sock):
            return None
    except OSError:
        return None
    low, high, _, pacing_gain, _ = _INFO.unpack(info)
    return float(high << 32 | low) if pacing_gain > STARTUP_GAIN * UNIT else None


def _is_bbr(sock: Tunable) -> bool:
    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.split(b"\0", 1)[0] == b"bbr"
