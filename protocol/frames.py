"""Frames of our own protocols: u32 header length | u32 payload length | header | payload (big endian).

The header is one msgpack map with integer keys whose values are scalars or lists of scalars: no ext types, depth at
most 2, at most 64 KiB. Tensors travel as raw bytes in the payload, never inside msgpack, and its length is checked
against the receiver's limit before a byte is allocated. One `unpackb` per frame and never a long-lived Unpacker:
reusing one after a caught error reads out of bounds in msgpack < 1.2.1, and nested input is what crashed hivemind.
Spec: docs/spec/frames.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

import msgpack

from .errors import LocalProtocolError, RemoteProtocolError

Scalar = int | float | str | bytes | bool | None
Value = Scalar | list[Scalar]
Header = dict[int, Value]

PREFIX: Final = struct.Struct(">II")
MAX_HEADER: Final = 64 * 1024
MAX_ITEMS: Final = 1024
"""Entries a header map, or a list in it, may have."""


def pack(header: Mapping[int, Value], payload_size: int = 0) -> bytes:
    """Prefix and header of a frame; the caller sends `payload_size` payload bytes right after it, uncopied."""
    body: bytes = msgpack.packb(header, use_bin_type=True)
    if len(body) > MAX_HEADER:
        raise LocalProtocolError(f"frame header of {len(body)} bytes is over the {MAX_HEADER} byte limit")
    return PREFIX.pack(len(body), payload_size) + body


def unpack_prefix(prefix: bytes, max_payload: int) -> tuple[int, int]:
    """Header and payload length of a frame, checked against the limits before anything is read for it."""
    header_size, payload_size = PREFIX.unpack(prefix)
    if header_size > MAX_HEADER:
        raise RemoteProtocolError(f"frame header of {header_size} bytes is over the {MAX_HEADER} byte limit")
    if payload_size > max_payload:
        raise RemoteProtocolError(f"frame payload of {payload_size} bytes is over this stream's {max_payload} bytes")
    return header_size, payload_size


def unpack_header(body: bytes) -> Header:
    """Parse and schema-check a header. Raises RemoteProtocolError on anything but a flat integer-keyed map."""
    try:
        header = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=False,
            max_map_len=MAX_ITEMS,
            max_array_len=MAX_ITEMS,
            max_ext_len=0,
            max_str_len=MAX_HEADER,
            max_bin_len=MAX_HEADER,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise RemoteProtocolError(f"frame header is not valid msgpack: {exc}") from exc
    if not isinstance(header, dict):
        raise RemoteProtocolError("frame header is not a map")
    for key, value in header.items():
        _check_entry(key, value)
    return header


def _check_entry(key: object, value: object) -> None:
    if type(key) is not int:
        raise RemoteProtocolError(f"frame header key {key!r:.40} is not an integer")
    items: Sequence[object] = value if isinstance(value, list) else (value,)
    for item in items:
        if type(item) not in _SCALARS:
            raise RemoteProtocolError(f"frame header field {key} holds a {type(item).__name__}, which is not allowed")


_SCALARS: Final = frozenset({int, float, str, bytes, bool, type(None)})
