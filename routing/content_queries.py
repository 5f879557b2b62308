"""Queries for libp2p's own two kinds of records, in the manner of queries.py.

    PutValue        give a proven value to the peers nearest to its key
    GetValue        ask GET_VALUE on the way there; the first proven value ends it, for there is only one
    Provide         tell the peers nearest to a key that we have what it names; nobody answers that
    FindProviders   ask GET_PROVIDERS on the way there; all the nearest are heard, for each knows others

What holders say about providers is hearsay until one of them is dialed. Those that more holders name come first, so
that one liar's twenty inventions come last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.kad import KadPeer, Message, MessageType, Record
from ..protocol.multiaddr import Multiaddr
from .actions import Finished
from .answers import heard_of, is_local, wire_addrs
from .content import is_proven
from .lookup import Done, Lookup, Wait
from .queries import Deliver, Locate, Send
from .table import Contact

MAX_FOUND: Final = 200
"""Providers kept by one search: ten holders name at most 20 each."""


class PutValue(Deliver):
    """Give a value to the peers nearest to its key."""

    def __init__(self, query_id: int, lookup: Lookup, record: Record, replicas: int) -> None:
        put = Message(type=MessageType.PUT_VALUE, key=record.key, record=record)
        super().__init__(query_id, lookup, put, replicas)
        self._value = record.value

    def taken(self, reply: Message) -> bool:
        """Who keeps a value repeats it."""
        return reply.record is not None and reply.record.value == self._value


class GetValue(Locate):
    """Find the value of a key."""

    def __init__(self, query_id: int, key: bytes, lookup: Lookup, known: Record | None) -> None:
        super().__init__(query_id, key, lookup)
        self._record = known

    def step(self, now: float) -> Send | Wait | Done:
        """Nothing more once the value is known."""
        return Done() if self._record is not None else super().step(now)

    def request(self, peer: PeerId) -> Message:
        """Ask for the value, or for peers nearer to it."""
        return Message(type=MessageType.GET_VALUE, key=self.key, have=self._known(peer))

    def on_reply(
        self, contact: Contact, closer: list[Contact], message: Message, seen: Multiaddr | None
    ) -> Message | None:
        """Take a value that its key proves; what else the peer may say is no value."""
        record = message.record
        if record is not None and record.key == self.key and is_proven(record):
            self._record = record
        return super().on_reply(contact, closer, message, seen)

    def outcome(self, finished: Finished) -> Finished:
        """With the value."""
        return replace(finished, record=self._record)


class Provide(Deliver):
    """Tell the peers nearest to a key that we have what it names."""

    def __init__(
        self, query_id: int, key: bytes, lookup: Lookup, own: PeerId, addrs: tuple[Multiaddr, ...], replicas: int
    ) -> None:
        super().__init__(query_id, lookup, Message(type=MessageType.ADD_PROVIDER, key=key), replicas)
        self._own = own
        self._addrs = addrs

    def parcel(self, contact: Contact) -> Message:
        """We and where we are, as far as that means something at the other's place."""
        own = KadPeer(self._own, wire_addrs(self._addrs, any(map(is_local, contact.addrs))))
        return replace(self._parcel, provider_peers=(own,))

    def taken(self, reply: Message) -> bool:
        """Nobody says no."""
        return True


class FindProviders(Locate):
    """Find out who has what a key names."""

    def __init__(self, query_id: int, key: bytes, lookup: Lookup, known: Iterable[Contact]) -> None:
        super().__init__(query_id, key, lookup)
        self._found = {contact.peer: contact for contact in known}
        self._votes = dict.fromkeys(self._found, 1)

    def request(self, peer: PeerId) -> Message:
        """Ask for providers, and for peers nearer to the key."""
        return Message(type=MessageType.GET_PROVIDERS, key=self.key, have=self._known(peer))

    def on_reply(
        self, contact: Contact, closer: list[Contact], message: Message, seen: Multiaddr | None
    ) -> Message | None:
        """Count who is named."""
        for named in {peer.peer: peer for peer in message.provider_peers}.values():
            known = self._found.get(named.peer)
            if known is None and len(self._found) >= MAX_FOUND:
                continue
            if known is None or not known.addrs:
                self._found[named.peer] = heard_of(named, is_local(seen))
            self._votes[named.peer] = self._votes.get(named.peer, 0) + 1
        return super().on_reply(contact, closer, message, seen)

    def outcome(self, finished: Finished) -> Finished:
        """With the providers."""
        found = sorted(self._found.values(), key=lambda contact: -self._votes[contact.peer])
        return replace(finished, providers=tuple(found))
