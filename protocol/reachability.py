"""AutoNAT: asking a peer to dial one of our addresses, and answering such a request. Spec: docs/spec/autonat.md.

    client                       server
    DialRequest(addrs, nonce) ->             dial-request stream
                              <- DialDataRequest(index, bytes)     only when the address has another IP than the client
    DialDataResponse(data)... ->
                              <- DialBack(nonce)                   on a new connection to the address, dial-back stream
    DialBackResponse          ->
                              <- DialResponse(status, index, dial status)

The nonce on the new connection is the proof: what a server merely says may be wrong. The data that a client sends first
makes it dearer to have somebody else dialed than to dial. Version 1 is in autonat_v1.py. Sans-IO: who is dialed and
how often is for the node to decide, `choose` says which address may be.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from . import protobuf
from .errors import LocalProtocolError, RemoteProtocolError
from .multiaddr import Multiaddr

DIAL_REQUEST: Final = "/libp2p/autonat/2/dial-request"
DIAL_BACK: Final = "/libp2p/autonat/2/dial-back"
MAX_MESSAGE: Final = 8192
"""Bytes of one message, as other implementations have it."""
MAX_DIAL_BACK: Final = 1024
"""The same on a dial-back stream."""
MAX_ADDRS: Final = 50
"""Addresses of a request that a server looks at, as go-libp2p has it."""
MIN_DIAL_DATA: Final = 30_000
MAX_DIAL_DATA: Final = 100_000
"""What a server asks for, and what a client pays at most: more than any handshake costs."""
CHUNK: Final = 4096
"""Data in one message, as the specification bounds it."""
MIN_CHUNK: Final = 100
"""Data in all messages but the last: smaller ones would only make the server work."""
NONCE_BITS: Final = 64
_FIXED64: Final = 1

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class ResponseStatus(IntEnum):
    """What became of a request. Numbers we do not know are read as INTERNAL_ERROR: no result."""

    INTERNAL_ERROR = 0
    REQUEST_REJECTED = 100
    """Too many requests."""
    DIAL_REFUSED = 101
    """None of the addresses is one the server would dial."""
    OK = 200


class DialStatus(IntEnum):
    """What became of the dial."""

    UNUSED = 0
    DIAL_ERROR = 100
    """Nobody answered there."""
    DIAL_BACK_ERROR = 101
    """Somebody did, but the nonce could not be handed over."""
    OK = 200


@dataclass(frozen=True, slots=True)
class DialRequest:
    """Dial the first of these addresses that you are willing to."""

    addrs: tuple[Multiaddr | None, ...]
    """In order of interest; None stands for one that we cannot read."""
    nonce: int

    def encode(self) -> bytes:
        """The message, without length."""
        fields = [(1, address.to_bytes()) for address in self.addrs if address is not None]
        return protobuf.encode([(1, protobuf.encode(fields) + _fixed64(2, self.nonce))])


@dataclass(frozen=True, slots=True)
class DialDataRequest:
    """Dialing this address costs so many bytes."""

    index: int
    size: int

    def encode(self) -> bytes:
        """The message, without length."""
        return protobuf.encode([(3, protobuf.encode(_numbers((1, self.index), (2, self.size))))])


@dataclass(frozen=True, slots=True)
class DialDataResponse:
    """A part of those bytes."""

    data: bytes

    def encode(self) -> bytes:
        """The message, without length."""
        return protobuf.encode([(4, protobuf.encode([(1, self.data)]))])


@dataclass(frozen=True, slots=True)
class DialResponse:
    """How it went."""

    status: ResponseStatus
    index: int = 0
    dial: DialStatus = DialStatus.UNUSED

    def encode(self) -> bytes:
        """The message, without length."""
        return protobuf.encode([(2, protobuf.encode(_numbers((1, self.status), (2, self.index), (3, self.dial))))])


Message = DialRequest | DialResponse | DialDataRequest | DialDataResponse


def decode(data: bytes) -> Message:
    """One message of a dial-request stream. Raises RemoteProtocolError."""
    outer = protobuf.decode(data)
    for number, read in _READERS.items():
        if number in outer:
            return read(protobuf.decode(protobuf.first_bytes(outer, number)))
    raise RemoteProtocolError("an AutoNAT message of no known kind")


def _read_request(fields: protobuf.Fields) -> Message:
    addrs = tuple(_address(raw) for raw in protobuf.all_bytes(fields, 1)[:MAX_ADDRS])
    return DialRequest(addrs, protobuf.first_int(fields, 2))


def _read_response(fields: protobuf.Fields) -> Message:
    status, dial = protobuf.first_int(fields, 1), protobuf.first_int(fields, 3)
    return DialResponse(
        ResponseStatus(status) if status in _STATUSES else ResponseStatus.INTERNAL_ERROR,
        protobuf.first_int(fields, 2),
        DialStatus(dial) if dial in _DIALS else DialStatus.UNUSED,
    )


def _read_data_request(fields: protobuf.Fields) -> Message:
    return DialDataRequest(protobuf.first_int(fields, 1), protobuf.first_int(fields, 2))


def _read_data(fields: protobuf.Fields) -> Message:
    return DialDataResponse(protobuf.first_bytes(fields, 1))


_READERS: Final[dict[int, Callable[[protobuf.Fields], Message]]] = {
    1: _read_request,
    2: _read_response,
    3: _read_data_request,
    4: _read_data,
}
_STATUSES: Final = frozenset(ResponseStatus)
_DIALS: Final = frozenset(DialStatus)


def encode_dial_back(nonce: int) -> bytes:
    """What is said on a dial-back stream, without length."""
    return _fixed64(1, nonce)


def decode_dial_back(data: bytes) -> int:
    """The nonce of a dial-back. Raises RemoteProtocolError."""
    return protobuf.first_int(protobuf.decode(data), 1)


DIAL_BACK_OK: Final = b""
"""The answer on a dial-back stream, without length: status OK is 0, and zeros are not sent."""


def _address(raw: bytes) -> Multiaddr | None:
    try:
        return Multiaddr.from_bytes(raw).without_peer()
    except RemoteProtocolError:
        return None


def _numbers(*fields: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Zeros are left out, as in every implementation of proto3."""
    return ((number, int(value)) for number, value in fields if value)


def _fixed64(number: int, value: int) -> bytes:
    return protobuf.uvarint(number << 3 | _FIXED64) + value.to_bytes(8, "little") if value else b""


# The two ends of a dial-request stream.


class Client:
    """One request: write `opening`, feed what comes, write what feed() returns, until `response` is there."""

    def __init__(self, addrs: Sequence[Multiaddr], nonce: int) -> None:
        self._addrs = tuple(addrs)
        self._split = protobuf.Delimited(MAX_MESSAGE)
        self._paid = False
        self.opening = protobuf.delimited(DialRequest(self._addrs, nonce).encode())
        self.response: DialResponse | None = None

    @property
    def dialed(self) -> Multiaddr | None:
        """The address that the response is about."""
        if self.response is None or self.response.status is not ResponseStatus.OK:
            return None
        return self._addrs[self.response.index]

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take the server's bytes; yields what to write. Raises RemoteProtocolError."""
        for raw in self._split.feed(data):
            if self.response is not None:
                raise RemoteProtocolError("an AutoNAT server says more after its response")
            match decode(raw):
                case DialDataRequest() as bill:
                    yield from self._pay(bill)
                case DialResponse() as response:
                    if response.status is ResponseStatus.OK:
                        self._check(response.index)
                    self.response = response
                case _:
                    raise RemoteProtocolError("an AutoNAT server sent a client's message")

    def _pay(self, bill: DialDataRequest) -> Iterator[bytes]:
        self._check(bill.index)
        if self._paid or bill.size > MAX_DIAL_DATA:
            raise RemoteProtocolError(f"an AutoNAT server asks for {bill.size} bytes of dial data, or asks twice")
        self._paid = True
        piece = protobuf.delimited(DialDataResponse(bytes(CHUNK)).encode())
        for _ in range(0, bill.size, CHUNK):
            yield piece

    def _check(self, index: int) -> None:
        if index >= len(self._addrs):
            raise RemoteProtocolError(f"an AutoNAT server dialed address {index} of {len(self._addrs)}")


class Server:
    """The other end: feed until `request` is there, then bill() if it costs, feed until `paid`, then respond()."""

    def __init__(self) -> None:
        self._split = protobuf.Delimited(MAX_MESSAGE)
        self._owed = 0
        self.request: DialRequest | None = None

    @property
    def paid(self) -> bool:
        """Nothing is owed."""
        return self._owed <= 0

    def feed(self, data: bytes) -> None:
        """Take the client's bytes. Raises RemoteProtocolError."""
        for raw in self._split.feed(data):
            match decode(raw):
                case DialRequest() as request if self.request is None:
                    self.request = request
                case DialDataResponse(data=piece) if self._owed > 0:
                    self._owed -= len(piece)
                    if self._owed > 0 and len(piece) < MIN_CHUNK:
                        raise RemoteProtocolError(f"dial data in pieces of {len(piece)} bytes")
                case _:
                    raise RemoteProtocolError("an AutoNAT client sent what nobody asked for")

    def bill(self, index: int, size: int) -> bytes:
        """What to write when the dial costs data."""
        if self.request is None or self._owed:
            raise LocalProtocolError("a request is billed once, after it came")
        self._owed = size
        return protobuf.delimited(DialDataRequest(index, size).encode())


def respond(status: ResponseStatus, index: int = 0, dial: DialStatus = DialStatus.UNUSED) -> bytes:
    """A server's last words."""
    return protobuf.delimited(DialResponse(status, index, dial).encode())


# Which addresses may be dialed, and what counts as one place.


@dataclass(frozen=True, slots=True)
class Choice:
    """The address a server dials."""

    index: int
    address: Multiaddr
    costs: bool
    """It has another IP than the client: dial data first."""


def choose(
    addrs: Sequence[Multiaddr | None], seen: Multiaddr, may_dial: Callable[[Multiaddr], bool] = lambda _: True
) -> Choice | None:
    """The first address worth dialing for a client seen at this address; None: refuse.

    Public, direct, by IP and TCP. A client that we see at a private address shares our network: what we could tell it
    would not be the view from outside.
    """
    if not is_public(seen):
        return None
    for index, address in enumerate(addrs):
        if address is not None and is_public(address) and may_dial(address):
            return Choice(index, address, place(address) != place(seen))
    return None


_PRIVATE: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            # IANA's special-purpose registries; documentation ranges are left out: nobody can be attacked there, and
            # test networks use them
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3"),
            *("::/8", "64:ff9b:1::/48", "100::/64", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
        ),
    )
)
_SUBNET_BITS: Final = {4: 24, 6: 48}


def is_public_ip(ip: IpAddress) -> bool:
    """Whether others on the internet could reach the address, if nothing stood in between."""
    return not any(ip.version == network.version and ip in network for network in _PRIVATE)


def is_public(address: Multiaddr) -> bool:
    """The same of a direct TCP address; in-memory networks have no private ranges."""
    if address.value("memory") is not None:
        return True
    ip = address.ip
    return ip is not None and address.is_tcp and bool(address.port) and is_public_ip(ip)


def place(address: Multiaddr) -> Hashable:
    """Equal for addresses of one machine, or of those behind one router."""
    return address.ip or "memory"


def vicinity(address: Multiaddr) -> Hashable:
    """Equal for addresses that one party easily has many of: an IPv4 /24, an IPv6 /48."""
    ip = address.ip
    if ip is None:
        return str(address)
    return ipaddress.ip_network((ip, _SUBNET_BITS[ip.version]), strict=False)
