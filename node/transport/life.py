"""One connection's life: a few numbers and the last events that explain how it went and why it ended.

Always on, and cheap: a wire reports turns of its life here, never single frames. With a tap (see trace.py) the same
events also go into a file.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, Protocol

from ...protocol.trace import TraceEvent, clean
from ..clock import Clock

MAX_EVENTS: Final = 32
"""Events kept of one connection, the last ones; a peer cannot make us keep more."""


class Tap(Protocol):
    """Hears everything besides: a trace on its way to a file."""

    def event(self, event: TraceEvent) -> None:
        """Something happened."""

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Something happened just now."""

    def authenticated(self, peer: str) -> None:
        """The peer has proven its identity."""

    def close(self) -> None:
        """The connection has ended."""


class Life:
    """What a wire says about itself."""

    __slots__ = (
        "_clock",
        "_paused_at",
        "began_at",
        "early_muxer",
        "ended_at",
        "events",
        "handshake_s",
        "paused_s",
        "pauses",
        "phase",
        "pings",
        "pongs",
        "reason",
        "rtt_last_s",
        "rtt_min_s",
        "tap",
    )

    def __init__(self, clock: Clock, tap: Tap | None = None) -> None:
        self._clock = clock
        self.tap = tap
        """Hears of every event, and of more; None unless the connection is traced."""
        self.events: deque[TraceEvent] = deque(maxlen=MAX_EVENTS)
        self.began_at = clock.now()
        self.handshake_s: float | None = None
        """From the link to the peer's proven identity and an agreed muxer; None before."""
        self.early_muxer = False
        """The muxer was agreed inside the Noise handshake, a round trip earlier."""
        self.ended_at: float | None = None
        self.reason = ""
        """Why it ended; empty before."""
        self.phase = ""
        """How far it had come when it ended."""
        self.pings = 0
        self.pongs = 0
        self.rtt_last_s: float | None = None
        self.rtt_min_s: float | None = None
        self.pauses = 0
        """Times the link took no more and we had to wait."""
        self.paused_s = 0.0
        """Sum of these waits, the finished ones."""
        self._paused_at: float | None = None

    def note(self, name: str, **data: Any) -> None:
        """Keep an event. Texts are cut and made printable."""
        safe = {key: clean(value) if isinstance(value, str) else value for key, value in data.items()}
        event = TraceEvent(self._clock.now(), name, safe)
        self.events.append(event)
        if self.tap is not None:
            self.tap.event(event)

    def secured(self, peer: str, *, early_muxer: bool) -> None:
        """The handshake is over."""
        self.handshake_s = self._clock.now() - self.began_at
        self.early_muxer = early_muxer
        if self.tap is not None:
            self.tap.authenticated(peer)
        self.note("security:peer_authenticated", peer=peer, handshake_s=self.handshake_s, early_muxer=early_muxer)

    def pinged(self) -> None:
        """A keepalive went out."""
        self.pings += 1

    def measured(self, rtt_s: float) -> None:
        """A round trip was measured."""
        self.pongs += 1
        self.rtt_last_s = rtt_s
        self.rtt_min_s = rtt_s if self.rtt_min_s is None else min(self.rtt_min_s, rtt_s)

    def paused(self) -> None:
        """The link takes no more for now."""
        self.pauses += 1
        self._paused_at = self._clock.now()
        if self.tap is not None:
            self.tap.emit("connectivity:link_paused", {})

    def resumed(self) -> None:
        """The link has room again."""
        if self._paused_at is not None:
            self.paused_s += self._clock.now() - self._paused_at
            self._paused_at = None
            if self.tap is not None:
                self.tap.emit("connectivity:link_resumed", {})

    def ended(self, reason: str, *, phase: str, streams: int) -> None:
        """The connection is gone. `streams` were open until now."""
        self.resumed()
        self.ended_at = self._clock.now()
        self.reason = clean(reason)
        self.phase = phase
        self.note("connectivity:connection_closed", reason=reason, phase=phase, open_streams=streams)
