from __future__ import annotations

import dataclasses

import pytest
from swarmnode.protocol import records
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.ids import PeerId, PrivateKey
from swarmnode.protocol.records import SignedEntry, sign_entry

ALICE = PrivateKey.from_seed(bytes(31) + b"\x01")
BOB = PrivateKey.from_seed(bytes(31) + b"\x02")
KEY = bytes(range(32))
WALL = 1_700_000_000.0
GOLDEN = (
    "6e942a9a8a36e94853af021c2dad79390058314a41f3a060d3a7c947d77a6f88"
    "2852e62d49c48c9ab38729746f5a18bea614efecf82456c700ef439b3f3de001"
)
GOLDEN_TAG = "c91413f18e534cdd"


def entry(**changes):
    fields = {"payload": b"blocks 0..9", "seq": 7, "issued_ms": int(WALL * 1000), "ttl_s": 100} | changes
    return sign_entry(ALICE, KEY, fields.pop("payload"), **fields)


def test_golden_signature():
    assert entry().verify()
    assert entry().signature.hex() == GOLDEN
    assert entry().tag.hex() == GOLDEN_TAG


@pytest.mark.parametrize(
    "change",
    [
        {"key": bytes(32)},
        {"subkey": BOB.peer_id},
        {"payload": b"blocks 0..8"},
        {"payload": b""},
        {"seq": 8},
        {"issued_ms": int(WALL * 1000) + 1},
        {"ttl_s": 101},
        {"signature": bytes(64)},
        {"subkey": PeerId(b"\x12\x20" + bytes(32))},  # a hashed id holds no key to check with
    ],
    ids=str,
)
def test_any_changed_field_breaks_the_signature(change):
    assert not dataclasses.replace(entry(), **change).verify()


@pytest.mark.parametrize(
    "change",
    [
        {"key": bytes(31)},
        {"payload": bytes(records.MAX_PAYLOAD_BYTES + 1)},
        {"ttl_s": 0},
        {"ttl_s": records.MAX_TTL_S + 1},
        {"seq": -1},
        {"seq": records.MAX_SEQ + 1},
        {"issued_ms": records.MAX_SEQ + 1},
        {"signature": bytes(63)},
    ],
    ids=str,
)
def test_bounds_hold_for_peers_and_for_us(change):
    good = entry()
    with pytest.raises(RemoteProtocolError):
        dataclasses.replace(good, **change)
    if "signature" in change or "key" in change:
        return
    with pytest.raises(LocalProtocolError):
        entry(**change)


def test_largest_entry_is_fine():
    assert entry(payload=bytes(records.MAX_PAYLOAD_BYTES), ttl_s=records.MAX_TTL_S).verify()


def test_tombstone_is_an_empty_payload():
    assert entry(payload=b"").tombstone
    assert not entry().tombstone


@pytest.mark.parametrize(
    ("wall_offset_s", "offered_s", "lease_s"),
    [
        (0, None, 100),
        (0, 30, 30),
        (0, 1000, 100),  # a holder cannot offer more than the signer allowed
        (60, None, 100),  # its clock may just be behind
        (150, None, 40),  # issue + ttl + skew bounds a replay
        (190, None, 0),
        (500, None, -310),
        (-89, None, 100),
        (-91, None, 0),  # dated beyond the skew
    ],
)
def test_lease_is_bounded_by_ttl_offer_and_clock(wall_offset_s, offered_s, lease_s):
    assert entry().lease_s(WALL + wall_offset_s, offered_s) == pytest.approx(lease_s)


def test_sequence_numbers_only_grow():
    assert records.next_seq(0, WALL) == int(WALL * 1000)
    assert records.next_seq(int(WALL * 1000) + 5, WALL) == int(WALL * 1000) + 6


def test_signed_bytes_of_different_entries_differ():
    """The payload is last and all else has a fixed width or a length, so no field can flow into the next."""
    first = records.signed_bytes(KEY, ALICE.peer_id, b"ab", seq=1, issued_ms=2, ttl_s=3)
    second = records.signed_bytes(KEY, BOB.peer_id, b"ab", seq=1, issued_ms=2, ttl_s=3)
    assert first != second
    assert first.endswith(b"ab")


def test_constructor_takes_only_keywords():
    with pytest.raises(TypeError):
        SignedEntry(KEY)  # type: ignore[call-arg,misc]
