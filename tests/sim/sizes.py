"""The encoded length of a DHT message, computed without encoding it: runs of 10,000 nodes count bytes this way."""

from __future__ import annotations

from swarmnode.protocol.kad import Message


def message_bytes(message: Message) -> int:
    """Length of message.encode()."""
    size = 1 + _varint(int(message.type))
    size += _bytes(1, message.key) if message.key else 0
    if message.record is not None:
        size += _framed(1, _bytes(1, message.record.key) + _bytes(1, message.record.value))
    for peer in (*message.closer_peers, *message.provider_peers):
        size += _framed(1, _peer(peer))
    for leased in message.entries:
        size += _framed(2, _entry(leased))
    if message.sender is not None:
        size += _framed(2, _peer(message.sender))
    size += _bytes(2, message.cursor) if message.cursor else 0
    size += _bytes(2, message.have) if message.have else 0
    for stale in message.stale:
        size += _framed(2, _bytes(1, stale.subkey.raw) + 1 + _varint(stale.seq))
    size += _framed(2, 16) if message.coordinate is not None else 0
    return size + (2 + _varint(message.accepted) if message.accepted else 0)


def _varint(number):
    return max(1, (number.bit_length() + 6) // 7)


def _framed(tag, length):
    return tag + (1 if length < 128 else _varint(length)) + length


def _bytes(tag, value):
    length = len(value)
    return tag + (1 if length < 128 else _varint(length)) + length


def _peer(peer):
    size = 2 + len(peer.peer.raw) + (2 if peer.connection else 0)
    for addr in peer.addrs:
        size += _bytes(1, addr)
    return size


def _entry(leased):
    entry = leased.entry
    numbers = (entry.seq, entry.issued_ms, entry.ttl_s, leased.lease_s)
    text = _bytes(1, entry.subkey.raw) + _bytes(1, entry.payload) + _bytes(1, entry.signature)
    return text + sum(1 + _varint(number) for number in numbers)
