"""The few dozen lines of protocol buffers that libp2p's messages need: varints, bytes, fixed ints.

No schema compiler and no run-time dependency: a message is a list of (field number, value) pairs going out
and a dict of lists coming in, and each protocol module turns that into its own frozen dataclass at once.
Input is hostile: every length is checked against what is there before anything is sliced, and the number of
fields is capped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from .errors import LocalProtocolError, RemoteProtocolError

MAX_FIELDS: Final = 4096
"""Fields in one message. Ours have under 100; a 4 KiB message of two-byte fields must not cost a megabyte."""
MAX_VARINT_BYTES: Final = 10
"""A 64-bit varint is at most this long."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

Fields = dict[int, list[int | bytes]]
Buffer = bytes | bytearray | memoryview


def uvarint(value: int) -> bytes:
    """Encode an unsigned integer below 2**64 as a base-128 varint."""
    if value < 0x80:
        if value < 0:
            raise LocalProtocolError(f"varint of a negative number: {value}")
        return bytes((value,))
    if value >> 64:
        raise LocalProtocolError(f"varint of a number over 64 bits: {value}")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_uvarint(buffer: Buffer, offset: int = 0) -> tuple[int, int]:
    """Return (value, offset after it).

    Raises RemoteProtocolError when truncated, too long or over 64 bits.
    """
    found = _try_uvarint(buffer, offset)
    if found is None:
        raise RemoteProtocolError("truncated varint")
    return found


def _try_uvarint(buffer: Buffer, offset: int) -> tuple[int, int] | None:
    """read_uvarint, but None while the varint may still be completed by more bytes."""
    value = shift = 0
    for position in range(offset, min(len(buffer), offset + MAX_VARINT_BYTES)):
        byte = buffer[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                raise RemoteProtocolError("varint over 64 bits")
            return value, position + 1
        shift += 7
    if len(buffer) - offset >= MAX_VARINT_BYTES:
        raise RemoteProtocolError("varint longer than 10 bytes")
    return None


def encode(fields: Iterable[tuple[int, int | bytes | str | memoryview]]) -> bytes:
    """Serialize (field number, value) pairs in the given order: ints as varints, the rest length-
    delimited."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += uvarint(number << 3 | _VARINT)
            out += uvarint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += uvarint(number << 3 | _LENGTH)
            out += uvarint(len(data))
            out += data
    return bytes(out)


def decode(data: Buffer) -> Fields:
    """Parse one message into {field number: [values in order]}; fixed32 and fixed64 come as unsigned ints.

    Raises RemoteProtocolError on anything malformed: truncation, groups, field number 0, too many fields.
    """
    buffer = bytes(data)
    fields: Fields = {}
    offset = count = 0
    while offset < len(buffer):
        count += 1
        if count > MAX_FIELDS:
            raise RemoteProtocolError(f"protobuf message has over {MAX_FIELDS} fields")
        tag, offset = read_uvarint(buffer, offset)
        if not 0 < tag >> 3 < 1 << 29:
            raise RemoteProtocolError(f"protobuf field number {tag >> 3} is out of range")
        value, offset = _read_value(buffer, offset, tag & 7)
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _read_value(buffer: bytes, offset: int, wire_type: int) -> tuple[int | bytes, int]:
    if wire_type == _VARINT:
        return read_uvarint(buffer, offset)
    if wire_type == _LENGTH:
        size, offset = read_uvarint(buffer, offset)
    elif wire_type == _FIXED64:
        size = 8
    elif wire_type == _FIXED32:
        size = 4
    else:
        raise RemoteProtocolError(f"protobuf wire type {wire_type} is not supported")
    end = offset + size
    if end > len(buffer):
        raise RemoteProtocolError(f"protobuf field of {size} bytes is truncated")
    chunk = buffer[offset:end]
    return (chunk if wire_type == _LENGTH else int.from_bytes(chunk, "little")), end


def first_bytes(fields: Fields, number: int, default: bytes = b"") -> bytes:
    """The last bytes value of a field (protobuf: last one wins), or the default.

    Raises if it is an integer.
    """
    values = fields.get(number)
    if not values:
        return default
    value = values[-1]
    if isinstance(value, int):
        raise RemoteProtocolError(f"protobuf field {number} must be bytes")
    return value


def first_int(fields: Fields, number: int, default: int = 0) -> int:
    """The last integer value of a field (protobuf: last one wins), or the default. Raises if it is bytes."""
    values = fields.get(number)
    if not values:
        return default
    value = values[-1]
    if not isinstance(value, int):
        raise RemoteProtocolError(f"protobuf field {number} must be an integer")
    return value


def all_bytes(fields: Fields, number: int) -> list[bytes]:
    """Every value of a repeated bytes field. Raises if one is an integer."""
    values = fields.get(number, [])
    found = [value for value in values if isinstance(value, bytes)]
    if len(found) != len(values):
        raise RemoteProtocolError(f"protobuf field {number} must be bytes")
    return found


def text(value: bytes) -> str:
    """Decode a protobuf string. Raises RemoteProtocolError when it is not UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RemoteProtocolError("protobuf string is not UTF-8") from None


def delimited(message: bytes) -> bytes:
    """A message with its length as a uvarint in front, the way libp2p protocols put them on a stream."""
    return uvarint(len(message)) + message


class Delimited:
    """Splits a byte stream into uvarint-length-prefixed messages. Sans-IO: feed bytes, iterate messages.

    A length over `max_size` raises RemoteProtocolError before any of the message is buffered.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._buffer = bytearray()

    def feed(self, data: Buffer) -> Iterator[bytes]:
        """Add bytes, then yield every message completed so far. Consume the iterator before feeding again."""
        self._buffer += data
        while (message := self._take()) is not None:
            yield message

    def _take(self) -> bytes | None:
        head = _try_uvarint(self._buffer, 0)
        if head is None:
            return None
        size, start = head
        if size > self._max_size:
            raise RemoteProtocolError(f"message of {size} bytes is over the limit of {self._max_size}")
        if len(self._buffer) < start + size:
            return None
        message = bytes(self._buffer[start : start + size])
        del self._buffer[: start + size]
        return message

    @property
    def pending(self) -> bytes:
        """Bytes fed but not yet part of a complete message."""
        return bytes(self._buffer)
