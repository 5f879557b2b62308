"""What the DHT machine wants done (Ask) and what has come of a query (Finished)."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.kad import Message, Record
from ..protocol.records import SignedEntry
from .table import Contact


@dataclass(frozen=True, slots=True)
class Ask:
    """Put a question to a peer; tell on_reply() or on_failure() with the id."""

    id: int
    """Number of the question."""
    contact: Contact
    """Whom."""
    request: Message
    """What."""
    limit_s: float
    """Give up after this."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A query is over."""

    query: int
    """Its id."""
    contacts: tuple[Contact, ...]
    """Nearest peers that answered, nearest first."""
    asked: int
    """Questions it took."""
    entries: tuple[SignedEntry, ...] = ()
    """Of a read: the live entries, newest per signer, without withdrawn ones, in order of signer."""
    untimely: int = 0
    """Of a read: signers whose entries do not count because by our clock they are over, or not yet made. Holders drop
    such entries, so when there are many it is our clock that is wrong."""
    holding: tuple[Contact, ...] = ()
    """Of a publication: peers that say they hold the entry, ourselves not counted."""
    subnets: int = 0
    """Of a publication: different /24s (IPv6: /48s) these peers were met in. Few holders' networks mean that few
    hands can make the entry vanish; peers of a local network count one each."""
    crowding: float = 1.0
    """Of a publication: how many times denser peers sit around the key than around ourselves. Chance stays under 4;
    far above it somebody has made ids to sit there, and may hold what is published without giving it out."""

    record: Record | None = None
    """Of a search for a value: the proven value."""
    providers: tuple[Contact, ...] = ()
    """Of a search for providers: who is said to have it, those that more holders name first."""

    @property
    def holders(self) -> int:
        """Of a publication: how many peers say they hold the entry."""
        return len(self.holding)
