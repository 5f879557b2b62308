"""How much peers may make a node hold: bytes received that nobody is waiting to read.

The protocol gives every stream a window, so a peer with many streams, and many such peers, could fill any
memory without breaking a rule. These bytes are therefore summed up per connection and per node, and a sum that
passes its bound is brought back under it by resetting streams: on the connection that holds most, the one that
holds most. So a crowd of full connections pays for itself, and whoever reads what it is sent loses nothing. Bytes
that a reader is waiting for do not count: it has said how many it takes.

This replaces neither windows nor credit: those hold a sender up, this is for senders who mean harm, or readers
who have stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .yamux import Session

MAX_CONNECTION_HELD: Final = 64 * 1024 * 1024
"""One connection's share: all that its enlarged windows may promise."""
MAX_NODE_HELD: Final = 96 * 1024 * 1024
"""Over all connections. With what 256 busy connections need for themselves, 128 MiB."""
CONNECTION_REASON: Final = "connection-unread"
"""Under which a stream is counted that was reset for the connection's bound."""
NODE_REASON: Final = "node-unread"
"""The same for the node's bound."""


class HeldMemory:
    """The unread bytes of all sessions of a node."""

    def __init__(self, limit: int = MAX_NODE_HELD) -> None:
        self.limit = limit
        self.used = 0
        self._sessions: dict[Session, None] = {}

    @property
    def is_scarce(self) -> bool:
        """More than half is used: no time to promise more."""
        return 2 * self.used > self.limit

    def join(self, session: Session) -> None:
        """Count the session's bytes from now on."""
        self._sessions[session] = None

    def leave(self, session: Session) -> None:
        """The session is over; what is still to be read of it is the reader's."""
        if session in self._sessions:
            del self._sessions[session]
            self.used -= session.held

    def relieve(self) -> None:
        """Come back under the limit; the caller has found it passed."""
        while self.used > self.limit:
            max(self._sessions, key=lambda session: session.held).shed(NODE_REASON)
