"""Self-describing network addresses: `/ip4/1.2.3.4/tcp/4001/p2p/12D3KooW…`, as text and as bytes.

Text comes from users and configuration (ConfigError naming the part that is wrong); bytes come from peers
(RemoteProtocolError). What libp2p peers announce nowadays is known, so that it can be kept and passed on,
though only TCP is ever dialed; an address with another part is refused whole, for the part's length on the
wire cannot be known. Codes: the multiaddr protocol table.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

from . import protobuf
from .errors import ConfigError, RemoteProtocolError
from .ids import PeerId

MAX_BYTES: Final = 512
"""Longest binary address accepted: a relayed DNS address takes about 380."""
MAX_TEXT: Final = 1024
MAX_PARTS: Final = 12
"""Components of one address: a relayed, secure websocket has 8."""

_VARIABLE: Final = -1
# name -> (code, size of the value in bytes; 0 = none, -1 = uvarint length in front)
_PROTOCOLS: Final = {
    "ip4": (4, 4),
    "tcp": (6, 2),
    "dccp": (33, 2),
    "ip6": (41, 16),
    "ip6zone": (42, _VARIABLE),
    "dns": (53, _VARIABLE),
    "dns4": (54, _VARIABLE),
    "dns6": (55, _VARIABLE),
    "dnsaddr": (56, _VARIABLE),
    "sctp": (132, 2),
    "udp": (273, 2),
    "webrtc-direct": (280, 0),
    "webrtc": (281, 0),
    "p2p-circuit": (290, 0),
    "udt": (301, 0),
    "utp": (302, 0),
    "p2p": (421, _VARIABLE),
    "https": (443, 0),
    "tls": (448, 0),
    "sni": (449, _VARIABLE),
    "noise": (454, 0),
    "quic": (460, 0),
    "quic-v1": (461, 0),
    "webtransport": (465, 0),
    "certhash": (466, _VARIABLE),
    "ws": (477, 0),
    "wss": (478, 0),
    "http": (480, 0),
    # private-use range: addresses of the in-memory transport, never on a real wire
    "memory": (777, 8),
}
_NAMES: Final = {code: (name, size) for name, (code, size) in _PROTOCOLS.items()}
_ALIASES: Final = {"ipfs": "p2p"}
_HOSTS: Final = ("ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr")
_PORTS: Final = ("tcp", "udp", "dccp", "sctp")
_NAMED: Final = ("dns", "dns4", "dns6", "dnsaddr", "sni")
_DNS_NAME: Final = re.compile(
    r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?"
)
_MAX_DNS: Final = 255


@dataclass(frozen=True, order=True)
class Multiaddr:
    """An address as a tuple of (protocol name, value text); value is "" for protocols without one.

    Build with parse() or from_bytes(), which check every part; the bare constructor does not.
    """

    parts: tuple[tuple[str, str], ...]
    """Components in order, values in canonical text form."""

    @classmethod
    def parse(cls, text: str) -> Multiaddr:
        """Read the text form. Raises ConfigError naming the part that is wrong."""
        if len(text) > MAX_TEXT:
            raise ConfigError(f"address of {len(text)} characters is too long (at most {MAX_TEXT})")
        try:
            return cls(_parse_text(text))
        except ValueError as exc:
            raise ConfigError(
                f"malformed address {text!r}: {exc}; one looks like /ip4/1.2.3.4/tcp/4001/p2p/12D3KooW…"
            ) from None

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Multiaddr:
        """Read the binary form a peer sent. Raises RemoteProtocolError."""
        raw = bytes(data)
        if not 0 < len(raw) <= MAX_BYTES:
            raise RemoteProtocolError(f"binary address of {len(raw)} bytes (1 to {MAX_BYTES} allowed)")
        try:
            return cls(_parse_bytes(raw))
        except (ValueError, ConfigError) as exc:
            raise RemoteProtocolError(f"malformed binary address: {exc}") from None

    def to_bytes(self) -> bytes:
        """The binary form: per part a uvarint code, then the value."""
        return b"".join(_part_bytes(name, value) for name, value in self.parts)

    def __str__(self) -> str:
        return "".join(f"/{name}/{value}" if value else f"/{name}" for name, value in self.parts)

    def __repr__(self) -> str:
        return f"Multiaddr({self})"

    def value(self, name: str) -> str | None:
        """Text value of the first part with this protocol name, or None."""
        return next((value for part, value in self.parts if part == name), None)

    @cached_property
    def peer_id(self) -> PeerId | None:
        """The peer at the end of the address: of a relayed address the target, not the relay."""
        if self.parts and self.parts[-1][0] == "p2p":
            return PeerId.parse(self.parts[-1][1])
        return None

    def with_peer(self, peer: PeerId) -> Multiaddr:
        """The same address ending in /p2p/<peer>."""
        return Multiaddr((*self.without_peer().parts, ("p2p", str(peer))))

    def without_peer(self) -> Multiaddr:
        """The same address without a trailing /p2p/… part."""
        return Multiaddr(self.parts[:-1]) if self.parts and self.parts[-1][0] == "p2p" else self

    @property
    def host(self) -> str | None:
        """IP address or DNS name, or None (memory and relayed-only addresses)."""
        if self.parts and self.parts[0][0] == "ip6zone" and len(self.parts) > 1:
            return f"{self.parts[1][1]}%{self.parts[0][1]}"
        return self.parts[0][1] if self.parts and self.parts[0][0] in _HOSTS else None

    @property
    def port(self) -> int | None:
        """TCP or UDP port, or None."""
        text = self.value("tcp") or self.value("udp")
        return int(text) if text else None

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The IP address when the host is one."""
        for name, value in self.parts[:2]:
            if name in ("ip4", "ip6"):
                return ipaddress.ip_address(value)
        return None

    @property
    def is_loopback(self) -> bool:
        """True for 127.0.0.0/8, ::1, localhost and in-memory addresses."""
        if self.parts and self.parts[0][0] == "memory":
            return True
        ip = self.ip
        return ip.is_loopback if ip is not None else self.host == "localhost"

    @property
    def is_unspecified(self) -> bool:
        """True for the wildcards 0.0.0.0 and :: that a listener expands to its real addresses."""
        ip = self.ip
        return ip is not None and ip.is_unspecified

    @property
    def is_relayed(self) -> bool:
        """True when the address goes through a circuit relay."""
        return any(name == "p2p-circuit" for name, _ in self.parts)

    @property
    def is_tcp(self) -> bool:
        """True for a plain TCP address, the only kind this node dials over a network."""
        names = [name for name, _ in self.without_peer().parts if name != "ip6zone"]
        return len(names) == 2 and names[0] in ("ip4", "ip6", "dns", "dns4", "dns6") and names[1] == "tcp"


def _parse_text(text: str) -> tuple[tuple[str, str], ...]:
    words = text.split("/")
    if words[0]:
        raise ValueError("it must start with '/'")
    words = words[1:-1] if words[-1] == "" else words[1:]
    if not words:
        raise ValueError("it is empty")
    parts = []
    rest = iter(words)
    for word in rest:
        name = _ALIASES.get(word, word)
        if name not in _PROTOCOLS:
            raise ValueError(f"unknown protocol {word!r}")
        value = ""
        if _PROTOCOLS[name][1]:
            value = next(rest, "")
            if not value:
                raise ValueError(f"/{name} needs a value")
        parts.append((name, _canonical(name, value)))
    if len(parts) > MAX_PARTS:
        raise ValueError(f"more than {MAX_PARTS} parts")
    return tuple(parts)


def _canonical(name: str, value: str) -> str:
    """Check a value's text and return its one canonical spelling. Raises ValueError."""
    if name == "ip4":
        return str(ipaddress.IPv4Address(value))
    if name == "ip6":
        if "%" in value:
            raise ValueError("an IPv6 zone goes in front, as /ip6zone/<zone>/ip6/…")
        return str(ipaddress.IPv6Address(value))
    if name in _PORTS:
        return str(_number(name, value, 65535))
    if name == "memory":
        return str(_number(name, value, (1 << 64) - 1))
    if name == "p2p":
        return _canonical_peer(value)
    if name == "certhash":
        return _hash_text(_hash_bytes(value))
    if name in _NAMED:
        if len(value) > _MAX_DNS or not _DNS_NAME.fullmatch(value):
            raise ValueError(f"{value!r} is not a DNS name")
        return value
    if name == "ip6zone":
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", value):
            raise ValueError(f"{value!r} is not a network zone")
        return value
    return value


@lru_cache(maxsize=4096)
def _canonical_peer(value: str) -> str:
    try:
        return str(PeerId.parse(value))
    except ConfigError as exc:
        raise ValueError(str(exc)) from None


def _hash_bytes(text: str) -> bytes:
    """The multihash of a certificate, whose text form is base64url behind a `u`."""
    if text[:1] != "u" or not re.fullmatch(r"[A-Za-z0-9_-]+", text[1:]):
        raise ValueError(f"{text[:24]!r} is not a certificate hash, which looks like uEi…")
    return base64.urlsafe_b64decode(text[1:] + "=" * (-len(text[1:]) % 4))


def _hash_text(value: bytes) -> str:
    return "u" + base64.urlsafe_b64encode(value).decode().rstrip("=")


def _number(name: str, value: str, largest: int) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 20 or int(value) > largest:
        raise ValueError(f"/{name}/{value[:24]} must be a number from 0 to {largest}")
    return int(value)


def _part_bytes(name: str, value: str) -> bytes:
    code, size = _PROTOCOLS[name]
    head = protobuf.uvarint(code)
    if size == 0:
        return head
    if name == "ip4":
        return head + ipaddress.IPv4Address(value).packed
    if name == "ip6":
        return head + ipaddress.IPv6Address(value).packed
    if size > 0:
        return head + int(value).to_bytes(size, "big")
    if name == "p2p":
        return head + protobuf.delimited(PeerId.parse(value).raw)
    return head + protobuf.delimited(_hash_bytes(value) if name == "certhash" else value.encode())


def _parse_bytes(raw: bytes) -> tuple[tuple[str, str], ...]:
    parts: list[tuple[str, str]] = []
    offset = 0
    while offset < len(raw):
        if len(parts) == MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} parts")
        code, offset = protobuf.read_uvarint(raw, offset)
        if code not in _NAMES:
            raise ValueError(f"unknown protocol code {code}")
        name, size = _NAMES[code]
        if size == _VARIABLE:
            size, offset = protobuf.read_uvarint(raw, offset)
            if not size:
                raise ValueError(f"/{name} needs a value")
        if offset + size > len(raw):
            raise ValueError(f"the value of /{name} is truncated")
        parts.append((name, _value_text(name, raw[offset : offset + size])))
        offset += size
    return tuple(parts)


def _value_text(name: str, value: bytes) -> str:
    if not value:
        if _PROTOCOLS[name][1]:
            raise ValueError(f"/{name} needs a value")
        return ""
    if name == "ip4":
        return str(ipaddress.IPv4Address(value))
    if name == "ip6":
        return str(ipaddress.IPv6Address(value))
    if name in _PORTS or name == "memory":
        return str(int.from_bytes(value, "big"))
    if name == "p2p":
        return str(PeerId(value))
    return _hash_text(value) if name == "certhash" else _canonical(name, value.decode("ascii"))
