"""Nodes that lie. Each strategy wraps a machine's answers; the node joins and is found like any other.

    drop         takes questions and says nothing
    empty        knows nobody and holds nothing, whatever it was given
    accomplices  names only other villains, the nearest to the target there are, and holds nothing
    junk         names peers that do not exist: ids ground until they lie nearer to the target than anybody real
    wrong        names the right peers at wrong addresses, and holds nothing
    stale        answers truly, but with the first entries it ever held instead of the newest

All of them say that they hold what they are given, and do not.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

from sim.network import SILENCE, address
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.kad import KadPeer, MessageType
from swarmnode.routing.keys import position
from swarmnode.routing.table import K

GROUND_IDS = 20_000
STRATEGIES = ("drop", "empty", "accomplices", "junk", "wrong", "stale")


class Gang:
    """Villains who know each other."""

    def __init__(self, network):
        self._network = network
        self._members = []
        self._ground = []
        self.counts = {}

    def recruit(self, nodes, strategy):
        """Turn nodes into villains."""
        for node in nodes:
            self._members.append((int.from_bytes(node.peer.kad_key, "big"), node))
            node.answer = getattr(self, f"_{strategy}")(node, node.dht.handle)
            self.counts[strategy] = self.counts.get(strategy, 0) + 1

    def _nearest(self, key):
        place = int.from_bytes(position(key), "big")
        found = sorted(self._members, key=lambda member: member[0] ^ place)[:K]
        return tuple(KadPeer(node.peer, (node.addr.to_bytes(),)) for _, node in found)

    def _invented(self, key):
        if not self._ground:
            for number in range(GROUND_IDS):
                peer = PeerId(b"\x12\x20" + sha256(number.to_bytes(4, "big")).digest())
                self._ground.append((int.from_bytes(peer.kad_key, "big"), peer))
        place = int.from_bytes(position(key), "big")
        found = sorted(self._ground, key=lambda member: member[0] ^ place)[:K]
        return tuple(KadPeer(peer, (self._nowhere(),)) for _, peer in found)

    def _nowhere(self):
        number = self._network.rng.randrange(60_000)
        return address(number, (203, number >> 8, number & 255)).to_bytes()

    def _drop(self, node, honest):
        return lambda *question: SILENCE

    def _empty(self, node, honest):
        return self._liar(honest, lambda request, reply: ())

    def _accomplices(self, node, honest):
        return self._liar(honest, lambda request, reply: self._nearest(request.key))

    def _junk(self, node, honest):
        return self._liar(honest, lambda request, reply: self._invented(request.key))

    def _wrong(self, node, honest):
        def closer(request, reply):
            return tuple(replace(peer, addrs=(self._nowhere(),)) for peer in reply.closer_peers)

        return self._liar(honest, closer)

    def _liar(self, honest, closer):
        def answer(remote, seen, request, now, wall):
            if request.type is MessageType.PUT_ENTRIES:
                reply = honest(remote, seen, replace(request, entries=()), now, wall)
                return replace(reply, accepted=len(request.entries))
            reply = honest(remote, seen, request, now, wall)
            if request.type is MessageType.PING:
                return reply
            return replace(reply, closer_peers=closer(request, reply), entries=(), cursor=b"")

        return answer

    def _stale(self, node, honest):
        first = {}

        def answer(remote, seen, request, now, wall):
            for leased in request.entries:
                first.setdefault((leased.entry.key, leased.entry.subkey), leased)
            reply = honest(remote, seen, request, now, wall)
            if request.type is not MessageType.GET_ENTRIES:
                return reply
            old = tuple(leased for (key, _), leased in first.items() if key == request.key)[:K]
            return replace(reply, entries=old, cursor=b"")

        return answer
