"""What a server tells the swarm about itself, one small record per server and block group, and the list of models.

The record is the payload of a signed entry of the DHT, so the signer is the peer and is not repeated inside. It is a
msgpack map with integer keys: unknown keys are ignored, so that a newer peer may say more; everything known is checked
for type and range before an Announcement exists. What changes within a second (queue, exact KV room) is not here: the
planned candidates are asked for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import msgpack

from ..protocol.errors import ConfigError, RemoteProtocolError
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from .coordinates import Coordinate

MAX_BYTES: Final = 700
"""Largest encoded announcement: a page of 64 KiB then holds about 90 of them."""
MAX_ADDRESSES: Final = 4
MAX_ADDRESS_BYTES: Final = 96
MAX_NAME: Final = 64
MAX_PUBLIC_NAME: Final = 32
MAX_QUANT: Final = 16
MAX_BLOCKS: Final = 10_000
MAX_BLOCK_S: Final = 3600.0
MAX_HIDDEN: Final = 1 << 17
PREFILL_TOKENS: Final = 128
"""`prefill_s` is the time of one block for a chunk of this many tokens."""
DIGEST_BYTES: Final = 32
CLASS_BYTES: Final = 8
_KV_BUCKETS: Final = (0, *(1 << n for n in range(6, 31)))
_EMBED: Final = 1
_HEAD: Final = 2


class State(IntEnum):
    """Where a server is in its life."""

    JOINING = 0
    """Loading weights: counts when others choose a span, takes no sessions yet."""
    ONLINE = 1
    DRAINING = 2
    """Leaving: finishes its sessions, takes no new ones."""


class _Key(IntEnum):
    MODEL = 1
    DIGEST = 2
    ADDRESSES = 3
    START = 4
    END = 5
    NUM_BLOCKS = 6
    STATE = 7
    CLASS = 8
    PREFILL = 9
    DECODE = 10
    KV_FREE = 11
    FLAGS = 12
    QUANT = 13
    PUBLIC_NAME = 14
    COORDINATE = 15
    FAMILY = 16
    HIDDEN = 17


def kv_bucket(tokens: int) -> int:
    """Round free KV room down to a power of two: the record then changes rarely and promises nothing it has not."""
    return max(bucket for bucket in _KV_BUCKETS if bucket <= max(tokens, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """One server's promise: blocks [start, end) of a model, at this speed, at these addresses.

    Raises ConfigError when a field is out of range, so our own node cannot publish nonsense.
    """

    model: str
    """The model's name, for people; `digest` is what identifies it."""
    digest: bytes
    """The manifest digest, 32 bytes."""
    peer: PeerId
    """Who signed the record."""
    addrs: tuple[Multiaddr, ...]
    """Where to dial it, best first; at most 4."""
    start: int
    """First block served."""
    end: int
    """One past the last block served."""
    num_blocks: int
    """Blocks of the whole model."""
    state: State
    compute_class: bytes
    """8 bytes; within one class results are equal to the bit."""
    prefill_s: float
    """Seconds one block takes for PREFILL_TOKENS tokens."""
    decode_s: float
    """Seconds one block takes for one token."""
    kv_free: int
    """Tokens for which its whole span still has KV room, as a bucket: see kv_bucket()."""
    head: bool = False
    """It runs the final norm and LM head after the last block."""
    embed: bool = False
    """It turns token ids into hidden states before block 0."""
    quant: str = "none"
    """How its weights are quantized, for people."""
    public_name: str = ""
    """What its owner calls it."""
    coordinate: Coordinate | None = None
    """Its network coordinate, if it has one yet."""

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ConfigError(f"cannot announce: {problem}")

    def encode(self) -> bytes:
        """The record's payload. Raises ConfigError when it would be over MAX_BYTES."""
        fields: dict[int, object] = {
            _Key.MODEL: self.model,
            _Key.DIGEST: self.digest,
            _Key.ADDRESSES: [addr.to_bytes() for addr in self.addrs],
            _Key.START: self.start,
            _Key.END: self.end,
            _Key.NUM_BLOCKS: self.num_blocks,
            _Key.STATE: int(self.state),
            _Key.CLASS: self.compute_class,
            _Key.PREFILL: self.prefill_s,
            _Key.DECODE: self.decode_s,
            _Key.KV_FREE: self.kv_free,
            _Key.FLAGS: _EMBED * self.embed | _HEAD * self.head,
            _Key.QUANT: self.quant,
            _Key.PUBLIC_NAME: self.public_name,
        }
        if self.coordinate is not None:
            fields[_Key.COORDINATE] = list(self.coordinate.as_floats())
        return _pack(fields)

    @classmethod
    def decode(cls, peer: PeerId, payload: bytes) -> Announcement:
        """Parse what `peer` signed. Raises RemoteProtocolError naming what is wrong."""
        fields = _unpack(payload)
        state, flags = _integer(fields, _Key.STATE, 2), _integer(fields, _Key.FLAGS, (1 << 32) - 1)
        try:
            return cls(
                model=_text(fields, _Key.MODEL, MAX_NAME),
                digest=_bytes(fields, _Key.DIGEST, DIGEST_BYTES),
                peer=peer,
                addrs=_addresses(fields.get(_Key.ADDRESSES)),
                start=_integer(fields, _Key.START, MAX_BLOCKS),
                end=_integer(fields, _Key.END, MAX_BLOCKS),
                num_blocks=_integer(fields, _Key.NUM_BLOCKS, MAX_BLOCKS),
                state=State(state),
                compute_class=_bytes(fields, _Key.CLASS, CLASS_BYTES),
                prefill_s=_number(fields, _Key.PREFILL),
                decode_s=_number(fields, _Key.DECODE),
                kv_free=_integer(fields, _Key.KV_FREE, _KV_BUCKETS[-1]),
                embed=bool(flags & _EMBED),
                head=bool(flags & _HEAD),
                quant=_text(fields, _Key.QUANT, MAX_QUANT),
                public_name=_text(fields, _Key.PUBLIC_NAME, MAX_PUBLIC_NAME),
                coordinate=_coordinate(fields.get(_Key.COORDINATE)),
            )
        except ConfigError as exc:
            raise RemoteProtocolError(f"announcement of {peer.short}: {exc}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelListing:
    """One entry of the swarm's list of models. Raises ConfigError when a field is out of range."""

    name: str
    digest: bytes
    """The manifest digest, 32 bytes."""
    num_blocks: int
    family: str
    """The kind of model, such as "gemma3"."""
    hidden_size: int

    def __post_init__(self) -> None:
        if not (
            _printable(self.name, 1, MAX_NAME)
            and _printable(self.family, 0, MAX_QUANT)
            and len(self.digest) == DIGEST_BYTES
            and 1 <= self.num_blocks <= MAX_BLOCKS
            and 1 <= self.hidden_size <= MAX_HIDDEN
        ):
            raise ConfigError(f"cannot list model {self.name[:MAX_NAME]!r}: a field is out of range")

    def encode(self) -> bytes:
        """The record's payload."""
        return _pack(
            {
                _Key.MODEL: self.name,
                _Key.DIGEST: self.digest,
                _Key.NUM_BLOCKS: self.num_blocks,
                _Key.FAMILY: self.family,
                _Key.HIDDEN: self.hidden_size,
            }
        )

    @classmethod
    def decode(cls, payload: bytes) -> ModelListing:
        """Parse a peer's entry. Raises RemoteProtocolError."""
        fields = _unpack(payload)
        try:
            return cls(
                name=_text(fields, _Key.MODEL, MAX_NAME),
                digest=_bytes(fields, _Key.DIGEST, DIGEST_BYTES),
                num_blocks=_integer(fields, _Key.NUM_BLOCKS, MAX_BLOCKS),
                family=_text(fields, _Key.FAMILY, MAX_QUANT),
                hidden_size=_integer(fields, _Key.HIDDEN, MAX_HIDDEN),
            )
        except ConfigError as exc:
            raise RemoteProtocolError(str(exc)) from None


def _problem(a: Announcement) -> str | None:
    """What is out of range in an announcement, in words; None when it is sound."""
    checks = (
        (_printable(a.model, 1, MAX_NAME), f"model name must be 1 to {MAX_NAME} printable characters"),
        (len(a.digest) == DIGEST_BYTES, f"digest must be {DIGEST_BYTES} bytes"),
        (len(a.addrs) <= MAX_ADDRESSES, f"at most {MAX_ADDRESSES} addresses"),
        (0 <= a.start < a.end <= a.num_blocks <= MAX_BLOCKS, f"span {a.start}:{a.end} of {a.num_blocks} blocks"),
        (len(a.compute_class) == CLASS_BYTES, f"compute class must be {CLASS_BYTES} bytes"),
        (_is_time(a.prefill_s) and _is_time(a.decode_s), f"block times must be 0 to {MAX_BLOCK_S:.0f} s"),
        (a.kv_free in _KV_BUCKETS, f"KV room {a.kv_free} is not one of the buckets"),
        (not a.embed or a.start == 0, "only a server of block 0 embeds"),
        (not a.head or a.end == a.num_blocks, "only a server of the last block runs the head"),
        (_printable(a.quant, 1, MAX_QUANT), f"quant must be 1 to {MAX_QUANT} printable characters"),
        (_printable(a.public_name, 0, MAX_PUBLIC_NAME), f"public name over {MAX_PUBLIC_NAME} printable characters"),
    )
    return next((words for ok, words in checks if not ok), None)


def _printable(text: str, low: int, high: int) -> bool:
    """Names end up in people's terminals: no control characters, and the size is that of the UTF-8 bytes."""
    return low <= len(text) and len(text.encode(errors="replace")) <= high and text.isprintable()


def _is_time(seconds: float) -> bool:
    return 0.0 <= seconds <= MAX_BLOCK_S


def _pack(fields: Mapping[int, object]) -> bytes:
    payload: bytes = msgpack.packb({int(key): value for key, value in fields.items()})
    if len(payload) > MAX_BYTES:
        raise ConfigError(f"announcement of {len(payload)} bytes is over {MAX_BYTES}: use fewer or shorter addresses")
    return payload


def _unpack(payload: bytes) -> dict[object, object]:
    if len(payload) > MAX_BYTES:
        raise RemoteProtocolError(f"announcement of {len(payload)} bytes is over {MAX_BYTES}")
    try:
        fields = msgpack.unpackb(payload, strict_map_key=False, ext_hook=_no_ext)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as exc:
        raise RemoteProtocolError(f"announcement is not msgpack: {exc}") from None
    if type(fields) is not dict:
        raise RemoteProtocolError("announcement is not a map")
    return fields


def _no_ext(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code}")


def _text(fields: Mapping[object, object], key: _Key, high: int) -> str:
    value = fields.get(key)
    if type(value) is not str or len(value) > high:
        raise RemoteProtocolError(f"announcement: {key.name} must be a text of at most {high} bytes")
    return value


def _bytes(fields: Mapping[object, object], key: _Key, size: int) -> bytes:
    value = fields.get(key)
    if type(value) is not bytes or len(value) != size:
        raise RemoteProtocolError(f"announcement: {key.name} must be {size} bytes")
    return value


def _integer(fields: Mapping[object, object], key: _Key, high: int) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= high:
        raise RemoteProtocolError(f"announcement: {key.name} must be an integer from 0 to {high}")
    return value


def _number(fields: Mapping[object, object], key: _Key) -> float:
    value = fields.get(key)
    if (type(value) is not float and type(value) is not int) or not math.isfinite(value):
        raise RemoteProtocolError(f"announcement: {key.name} must be a finite number")
    return float(value)


def _addresses(value: object) -> tuple[Multiaddr, ...]:
    if type(value) is not list or len(value) > MAX_ADDRESSES:
        raise RemoteProtocolError(f"announcement: addresses must be a list of at most {MAX_ADDRESSES}")
    return tuple(_address(item) for item in value)


def _address(value: object) -> Multiaddr:
    if type(value) is not bytes or len(value) > MAX_ADDRESS_BYTES:
        raise RemoteProtocolError(f"announcement: an address must be at most {MAX_ADDRESS_BYTES} bytes")
    return Multiaddr.from_bytes(value)


def _coordinate(value: object) -> Coordinate | None:
    if value is None:
        return None
    if type(value) is not list or len(value) != 4 or not all(type(item) is float for item in value):
        raise RemoteProtocolError("announcement: a coordinate is four floats")
    return Coordinate.from_floats(value)


def newest(announcements: Iterable[Announcement]) -> tuple[Announcement, ...]:
    """One announcement a peer, the last given of each, sorted by peer: give them oldest first."""
    by_peer = {announcement.peer: announcement for announcement in announcements}
    return tuple(by_peer[peer] for peer in sorted(by_peer))
