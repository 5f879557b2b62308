"""Asking a router for an open port: NAT-PMP (RFC 6886) and PCP (RFC 6887), packets and one mapping's life. Sans-IO.

Both speak UDP to port 5351 of the gateway. PCP is tried first; an old router answers it in NAT-PMP, or not at
all, and is asked in that.

    start -> asking -> mapped -> renewing at half the lifetime -> mapped ...
                    -> refused or silent: asked again later
    epoch of the router's answers runs backwards: it has lost its state, so the mapping is asked for at once

A mapping that is not renewed ends by itself at the router; one that is not wanted any more is deleted.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final

from .errors import RemoteProtocolError

PORT: Final = 5351
LIFETIME_S: Final = 7200
"""Asked for, as RFC 6886 recommends."""
MIN_LIFETIME_S: Final = 2
"""A router that gives less is renewed as if it gave this much, for it must not keep us busy."""
MAX_LIFETIME_S: Final = 24 * 3600
"""A router that promises more is asked again after half of this."""
FIRST_RETRY_S: Final = 0.25
BOTH_FROM: Final = 2
"""After so many packets in vain a router is asked in both protocols: some old ones do not answer the newer."""
TRIES: Final = 5
"""Packets of one attempt, each waited for twice as long as the one before: 7.75 s in all."""
AGAIN_S: Final = 60.0
"""After an attempt in vain, doubled each time."""
AGAIN_CAP_S: Final = 1800.0
MAX_PACKET: Final = 1100
"""Bytes of a PCP message."""
EPOCH_SLACK_S: Final = 2.0
_PMP, _PCP = 0, 2
_MAP: Final = 1
_TCP: Final = 6
_PMP_TCP: Final = 2
_RESPONSE: Final = 0x80
_NONCE: Final = 12


class Protocol(StrEnum):
    """What a router speaks."""

    PCP = "PCP"
    NAT_PMP = "NAT-PMP"


class Failure(StrEnum):
    """Why there is no mapping."""

    SILENT = "no answer"
    """Nobody speaks either protocol there."""
    UNSUPPORTED = "unsupported version"
    NOT_AUTHORIZED = "not authorized"
    """Switched off in the router's settings."""
    NETWORK = "the router has no outside address"
    RESOURCES = "out of resources"
    OPCODE = "unsupported operation"
    CONFLICT = "the port is taken"
    OTHER = "refused"


_PMP_RESULTS: Final = {
    1: Failure.UNSUPPORTED,
    2: Failure.NOT_AUTHORIZED,
    3: Failure.NETWORK,
    4: Failure.RESOURCES,
    5: Failure.OPCODE,
}
_PCP_RESULTS: Final = {
    1: Failure.UNSUPPORTED,
    2: Failure.NOT_AUTHORIZED,
    4: Failure.OPCODE,
    7: Failure.NETWORK,
    8: Failure.RESOURCES,
    10: Failure.RESOURCES,
    11: Failure.CONFLICT,
}

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Mapped:
    """A router's promise."""

    ip: IpAddress | None
    """Outside; None: NAT-PMP says it in an answer of its own."""
    port: int
    lifetime_s: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One packet from a router, read."""

    protocol: Protocol
    epoch_s: int
    failure: Failure | None = None
    mapped: Mapped | None = None
    """Of our port; a lifetime of 0 confirms that it is deleted."""
    outside: ipaddress.IPv4Address | None = None
    """NAT-PMP's answer to the question for the outside address."""


# Packets.


def ask_pcp(
    client: IpAddress, nonce: bytes, inner: int, outer: int, outer_ip: IpAddress | None, lifetime_s: int
) -> bytes:
    """A PCP MAP request for a TCP port; a lifetime of 0 deletes."""
    suggested = outer_ip or (ipaddress.IPv4Address(0) if client.version == 4 else ipaddress.IPv6Address(0))
    head = struct.pack("!BBHI16s", _PCP, _MAP, 0, lifetime_s, _sixteen(client))
    return head + struct.pack("!12sB3xHH16s", nonce, _TCP, inner, outer, _sixteen(suggested))


def ask_pmp(inner: int, outer: int, lifetime_s: int) -> bytes:
    """A NAT-PMP request for a TCP port; a lifetime of 0 deletes."""
    return struct.pack("!BBHHHI", _PMP, _PMP_TCP, 0, inner, outer if lifetime_s else 0, lifetime_s)


ASK_OUTSIDE: Final = bytes((_PMP, 0))
"""NAT-PMP's question for the outside address."""


def read(packet: bytes, *, nonce: bytes, inner: int) -> Answer | None:
    """A router's packet; None when it is about something else. Raises RemoteProtocolError."""
    if len(packet) < 8 or len(packet) > MAX_PACKET or not packet[1] & _RESPONSE:
        raise RemoteProtocolError(f"a packet of {len(packet)} bytes is no answer of a port mapper")
    if packet[0] == _PMP:
        return _read_pmp(packet, inner)
    return _read_pcp(packet, nonce, inner)


def _read_pmp(packet: bytes, inner: int) -> Answer | None:
    operation, result, epoch = struct.unpack_from("!xBHI", packet)
    if result:
        return Answer(Protocol.NAT_PMP, epoch, _PMP_RESULTS.get(result, Failure.OTHER))
    if operation == _RESPONSE and len(packet) >= 12:
        return Answer(Protocol.NAT_PMP, epoch, outside=ipaddress.IPv4Address(packet[8:12]))
    if operation == _RESPONSE | _PMP_TCP and len(packet) >= 16:
        port, outer, lifetime = struct.unpack_from("!HHI", packet, 8)
        return Answer(Protocol.NAT_PMP, epoch, mapped=Mapped(None, outer, lifetime)) if port == inner else None
    raise RemoteProtocolError(f"a NAT-PMP answer of kind {operation} and {len(packet)} bytes")


def _read_pcp(packet: bytes, nonce: bytes, inner: int) -> Answer | None:
    if len(packet) < 24:
        raise RemoteProtocolError(f"a PCP answer of {len(packet)} bytes")
    version, operation, result, lifetime, epoch = struct.unpack_from("!BBxBII", packet)
    if version != _PCP or result == 1:
        return Answer(Protocol.PCP, epoch, Failure.UNSUPPORTED)
    if operation != _RESPONSE | _MAP or len(packet) < 60:
        raise RemoteProtocolError(f"a PCP answer of kind {operation} and {len(packet)} bytes")
    given, protocol, port, outer, raw = struct.unpack_from("!12sB3xHH16s", packet, 24)
    if given != nonce or port != inner or protocol != _TCP:
        return None
    if result:
        return Answer(Protocol.PCP, epoch, _PCP_RESULTS.get(result, Failure.OTHER))
    ip = ipaddress.IPv6Address(raw)
    return Answer(Protocol.PCP, epoch, mapped=Mapped(ip.ipv4_mapped or ip, outer, lifetime))


def _sixteen(ip: IpAddress) -> bytes:
    return ip.packed if ip.version == 6 else b"\0" * 10 + b"\xff\xff" + ip.packed


# One mapping.


class Mapping:
    """One TCP port at one gateway: send what packets() says, feed what comes, look again at next_timer()."""

    def __init__(self, inner: int, client: IpAddress, *, rng: Random, now: float, lifetime_s: int = LIFETIME_S) -> None:
        self.inner = inner
        self._client = client
        self._rng = rng
        self._nonce = rng.randbytes(_NONCE)
        self._lifetime_s = lifetime_s
        self.protocol: Protocol | None = None
        """What the router speaks; None: not known yet."""
        self.mapped: Mapped | None = None
        """What we hold now, its outside address included."""
        self.failure: Failure | None = None
        """Why the last attempt was in vain."""
        self._want = inner
        self._outside: ipaddress.IPv4Address | None = None
        self._given: Mapped | None = None
        self._ends_at = 0.0
        self._tries = 0
        self._vain = 0
        self._send_at = now
        self._epoch: tuple[int, float] | None = None

    @property
    def patient(self) -> bool:
        """It has waited for an answer so long that asking otherwise, too, is in order."""
        return self.mapped is None and self._tries > BOTH_FROM

    def next_timer(self) -> float:
        """When to call packets() next."""
        return min(self._send_at, self._ends_at) if self.mapped is not None else self._send_at

    def packets(self, now: float) -> list[bytes]:
        """What to send now; empty: nothing is due."""
        if self.mapped is not None and now >= self._ends_at:
            self._lose()
        if now < self._send_at:
            return []
        if self._tries >= TRIES:
            self._give_up(Failure.SILENT, now)
            return []
        self._send_at = now + FIRST_RETRY_S * 2**self._tries
        self._tries += 1
        if self.protocol is Protocol.NAT_PMP:
            return [ASK_OUTSIDE, ask_pmp(self.inner, self._want, self._lifetime_s)]
        outer_ip = self.mapped.ip if self.mapped else None
        pcp = ask_pcp(self._client, self._nonce, self.inner, self._want, outer_ip, self._lifetime_s)
        if self.protocol is None and self._tries > BOTH_FROM:
            return [pcp, ASK_OUTSIDE, ask_pmp(self.inner, self._want, self._lifetime_s)]
        return [pcp]

    def feed(self, packet: bytes, now: float) -> None:
        """Take a packet from the gateway. Raises RemoteProtocolError."""
        answer = read(packet, nonce=self._nonce, inner=self.inner)
        if answer is None:
            return
        if self._epoch_was_reset(answer.epoch_s, now) and not self._tries:
            self._send_at = now  # it has forgotten what it promised
        if answer.failure is Failure.UNSUPPORTED and self.protocol is None:
            self.protocol, self._tries, self._send_at = Protocol.NAT_PMP, 0, now
        elif answer.failure is not None:
            if self._tries:
                self._give_up(answer.failure, now)
        else:
            self.protocol = answer.protocol
            self._outside = answer.outside or self._outside
            self._take(answer.mapped, now)

    def _take(self, mapped: Mapped | None, now: float) -> None:
        if mapped is not None and mapped.lifetime_s == 0:  # deleted, by whoever
            return
        self._given = mapped or self._given
        ip = self._given.ip if self._given is not None and self._given.ip is not None else self._outside
        if self._given is None or ip is None or not self._tries:
            return
        lifetime = min(MAX_LIFETIME_S, max(MIN_LIFETIME_S, self._given.lifetime_s))
        self.mapped = Mapped(ip, self._given.port, lifetime)
        self.failure = None
        self._want = self._given.port
        self._given = self._outside = None
        self._tries = self._vain = 0
        self._ends_at = now + lifetime
        self._send_at = now + lifetime / 2

    def _give_up(self, failure: Failure, now: float) -> None:
        """Later again. What we hold is held until its end."""
        self.failure = failure
        self._tries = 0
        self._given = self._outside = None
        if self.mapped is None:
            self.protocol = None if failure is Failure.SILENT else self.protocol
        pause = min(AGAIN_CAP_S, AGAIN_S * 2**self._vain) * self._rng.uniform(0.9, 1.1)
        self._vain = min(self._vain + 1, 16)
        if self.mapped is not None:  # half of what is left, each time: RFC 6887, 11.2.1
            pause = min(pause, max(FIRST_RETRY_S, (self._ends_at - now) / 2))
        self._send_at = now + pause

    def _lose(self) -> None:
        self.mapped = None
        self._tries = 0
        self.failure = self.failure or Failure.SILENT

    def _epoch_was_reset(self, epoch_s: int, now: float) -> bool:
        """RFC 6886 3.6: a clock that went on less than 7/8 of what ours did has started anew."""
        before, self._epoch = self._epoch, (epoch_s, now)
        if before is None:
            return False
        return epoch_s < before[0] + (now - before[1]) * 7 / 8 - EPOCH_SLACK_S

    def renew(self, now: float) -> None:
        """Ask again now: the router may have been restarted, or be another one."""
        self._send_at, self._tries, self._vain = now, 0, 0

    def moved(self, client: IpAddress, now: float) -> None:
        """Our own address is another one, and so may be the router."""
        if client != self._client:
            self._client = client
            self._lose()
            self.protocol = self._epoch = self.failure = None
        self.renew(now)

    def deletion(self) -> bytes | None:
        """What to send when the port is no longer wanted; None: there is nothing to delete."""
        if self.mapped is None or self.protocol is None:
            return None
        held, self.mapped = self.mapped, None
        if self.protocol is Protocol.NAT_PMP:
            return ask_pmp(self.inner, held.port, 0)
        return ask_pcp(self._client, self._nonce, self.inner, held.port, held.ip, 0)
