"""DNS questions for TXT records (RFC 1035), which the standard library does not ask, and what /dnsaddr makes of them.

`/dnsaddr/example.org` stands for the addresses in the TXT records `dnsaddr=/ip4/…` of `_dnsaddr.example.org`. Sans-IO.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from .errors import ConfigError, RemoteProtocolError
from .multiaddr import Multiaddr

PORT: Final = 53
MAX_UDP: Final = 1232
"""Bytes of an answer that we say we take by UDP: what passes everywhere unbroken."""
MAX_ANSWER: Final = 65535
MAX_RECORDS: Final = 256
"""Records looked at in one answer."""
MAX_LABELS: Final = 128
MAX_TEXT: Final = 1024
"""Characters of one TXT record that are looked at."""
PREFIX: Final = "dnsaddr="
_TXT, _IN, _OPT = 16, 1, 41
_RESPONSE, _TRUNCATED, _RECURSE = 0x8000, 0x0200, 0x0100
_POINTER: Final = 0xC0


class Truncated(Exception):
    """The answer did not fit into a datagram: ask by TCP."""


class NoSuchName(RemoteProtocolError):
    """The name server says that there is nothing of that name."""


def txt_query(number: int, name: str) -> bytes:
    """A question for a name's TXT records. Raises ConfigError for what is no name."""
    labels = [label.encode("ascii", "replace") for label in name.rstrip(".").split(".")]
    if not all(0 < len(label) < 64 for label in labels) or len(name) > 253:
        raise ConfigError(f"{name!r} is not a DNS name")
    question = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    extra = struct.pack("!BHHIH", 0, _OPT, MAX_UDP, 0, 0)
    return struct.pack("!6H", number, _RECURSE, 1, 0, 0, 1) + question + struct.pack("!HH", _TXT, _IN) + extra


def txt_answer(number: int, query: bytes, answer: bytes) -> list[str]:
    """The texts in an answer. Raises NoSuchName, Truncated, or RemoteProtocolError when it is none to this query."""
    if len(answer) < 12 or len(answer) > MAX_ANSWER:
        raise RemoteProtocolError(f"a DNS answer of {len(answer)} bytes")
    given, flags, questions, records, _, _ = struct.unpack_from("!6H", answer)
    if given != number or not flags & _RESPONSE or questions != 1:
        raise RemoteProtocolError("a DNS answer to another question")
    code = flags & 0xF
    if code == 3:
        raise NoSuchName("there is no such name")
    if code:
        raise RemoteProtocolError(f"the name server refuses, code {code}")
    if flags & _TRUNCATED:
        raise Truncated
    end = _skip_name(answer, 12) + 4
    if answer[12:end].lower() != query[12:end].lower():
        raise RemoteProtocolError("a DNS answer to another question")
    return list(_texts(answer, end, min(records, MAX_RECORDS)))


def _texts(answer: bytes, offset: int, records: int) -> Iterator[str]:
    for _ in range(records):
        offset = _skip_name(answer, offset)
        if offset + 10 > len(answer):
            raise RemoteProtocolError("a DNS record is cut short")
        kind, network, _, size = struct.unpack_from("!HHIH", answer, offset)
        offset += 10
        if offset + size > len(answer):
            raise RemoteProtocolError("a DNS record is cut short")
        if (kind, network) == (_TXT, _IN):
            yield _text(answer[offset : offset + size])
        offset += size


def _text(data: bytes) -> str:
    """The strings of one TXT record, put together."""
    out, offset = b"", 0
    while offset < len(data) and len(out) < MAX_TEXT:
        size = data[offset]
        out += data[offset + 1 : offset + 1 + size]
        offset += 1 + size
    return out[:MAX_TEXT].decode("ascii", "replace")


def _skip_name(data: bytes, offset: int) -> int:
    """The offset behind a name; a pointer ends it, and need not be followed."""
    for _ in range(MAX_LABELS):
        if offset >= len(data):
            break
        size = data[offset]
        if size & _POINTER == _POINTER:
            return offset + 2
        if not size:
            return offset + 1
        offset += 1 + size
    raise RemoteProtocolError("a DNS name without an end")


def dnsaddr_name(address: Multiaddr) -> str | None:
    """The name whose TXT records hold what a /dnsaddr address stands for; None for other addresses."""
    return f"_dnsaddr.{address.parts[0][1]}" if address.parts and address.parts[0][0] == "dnsaddr" else None


def dnsaddr_targets(address: Multiaddr, texts: Sequence[str]) -> list[Multiaddr]:
    """The addresses in a name's TXT records that a /dnsaddr address means: those that end like it."""
    suffix = address.parts[1:]
    found = []
    for text in texts:
        if not text.startswith(PREFIX):
            continue
        try:
            target = Multiaddr.parse(text.removeprefix(PREFIX))
        except ConfigError:
            continue
        if not suffix or target.parts[-len(suffix) :] == suffix:
            found.append(target)
    return found
