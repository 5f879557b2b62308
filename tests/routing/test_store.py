from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

import pytest
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.kad import PAGE_BYTES, PAGE_ENTRIES, Message, MessageType
from swarmnode.protocol.records import TAG_BYTES, SignedEntry, sign_entry
from swarmnode.routing import store as stores
from swarmnode.routing.store import ENTRY_OVERHEAD, Put, Source, Store, StoreLimits, Verifier, iter_batches

KEY = bytes(range(32))
OTHER_KEY = bytes(32)


@lru_cache(maxsize=1000)
def signer(name):
    return PrivateKey.from_seed(sha256(str(name).encode()).digest())


def entry(name="alice", seq=1, payload=b"here", key=KEY, ttl_s=100):
    return sign_entry(signer(name), key, payload, seq=seq, issued_ms=1_700_000_000_000, ttl_s=ttl_s)


def unsigned(name, seq=1, payload=b"here", key=KEY):
    """The store does not look at signatures; making thousands of them would be the slowest part of a test."""
    return SignedEntry(
        key=key, subkey=signer(name).peer_id, payload=payload, seq=seq, issued_ms=0, ttl_s=600, signature=bytes(64)
    )


def source(name="carol", subnet=None):
    return Source(signer(name).peer_id, subnet)


def make(**limits):
    return Store(signer("own").peer_id, StoreLimits(**limits))


def names(store, key=KEY, now=0.0):
    return {leased.entry.subkey: leased.entry.seq for leased in store.live(key, now)}


def test_one_entry_per_signer_and_the_highest_number_wins():
    store = make()
    assert store.put(entry(seq=5), 100, source(), 0.0) is Put.ACCEPTED
    assert store.put(entry(seq=5), 100, source(), 0.0) is Put.STALE
    assert store.put(entry(seq=4), 100, source(), 0.0) is Put.STALE
    assert store.put(entry("bob", seq=1), 100, source(), 0.0) is Put.ACCEPTED
    assert store.put(entry(seq=6), 100, source(), 0.0) is Put.ACCEPTED
    assert names(store) == {signer("alice").peer_id: 6, signer("bob").peer_id: 1}
    assert len(store) == 2


def test_refused_entry_does_not_shorten_the_accepted_one():
    """hivemind's store re-points its expiry heap even when it refuses: whoever may write could delete."""
    store = make()
    store.put(entry(seq=5), 100, source(), 0.0)
    store.put(entry(seq=4), 2, source(), 0.0)
    store.put(entry(seq=5), 2, source(), 0.0)
    store.expire(50.0)
    assert len(store) == 1


def test_replay_does_not_lengthen_a_lease_nor_revive_an_ended_one():
    store = make()
    store.put(entry(seq=5), 100, source(), 0.0)
    assert store.put(entry(seq=5), 100, source(), 90.0) is Put.STALE
    assert names(store, now=99.5) == {}
    store.expire(100.0)
    assert len(store) == 0
    assert store.put(entry(seq=5), 100, source(), 101.0) is Put.STALE
    assert store.put(entry(seq=6), 100, source(), 102.0) is Put.ACCEPTED
    store.expire(102.0 + 100 + stores.FLOOR_S)
    assert store.known_seq(KEY, signer("alice").peer_id) == 6
    store.expire(102.0 + 100 + 2 * stores.FLOOR_S)
    assert store.known_seq(KEY, signer("alice").peer_id) == -1


def test_leases_count_down_and_too_short_ones_are_refused():
    store = make()
    assert store.put(entry(), 0.5, source(), 0.0) is Put.EXPIRED
    assert store.put(entry(), -3, source(), 0.0) is Put.EXPIRED
    store.put(entry(), 10, source(), 0.0)
    assert [leased.lease_s for leased in store.live(KEY, 4.0)] == [6]
    assert store.live(KEY, 9.5) == []
    assert store.next_expiry() == 10.0


def test_remembered_numbers_are_bounded():
    store = make(floors=5)
    for number in range(9):
        store.put(unsigned(number), 2, source(), 0.0)
    store.expire(3.0)
    known = [store.known_seq(KEY, signer(number).peer_id) for number in range(9)]
    assert known.count(1) == 5


def test_tombstones_are_kept_and_listed():
    store = make()
    store.put(entry(seq=1), 100, source(), 0.0)
    assert store.put(entry(seq=2, payload=b""), 280, source(), 0.0) is Put.ACCEPTED
    assert store.put(entry(seq=1), 100, source(), 0.0) is Put.STALE
    assert [leased.entry.tombstone for leased in store.live(KEY, 0.0)] == [True]


@pytest.mark.parametrize("size", [4, 900])
def test_pages_give_each_entry_once_within_limits(size):
    store = make()
    for number in range(200):
        store.put(unsigned(number, payload=bytes(size)), 100, source(), 0.0)
    cursor, seen = b"", []
    while True:
        page, cursor = store.page(KEY, cursor, b"", 0.0)
        assert len(page) <= PAGE_ENTRIES
        encoded = Message(type=MessageType.GET_ENTRIES, key=KEY, entries=tuple(page)).encode()
        assert len(encoded) <= PAGE_BYTES + 100
        Message.decode(encoded)
        seen += [leased.entry.subkey for leased in page]
        if not cursor:
            break
    assert len(seen) == 200
    assert seen == sorted(set(seen))


def test_a_page_leaves_out_what_the_asker_has():
    store = make()
    for number in range(5):
        store.put(unsigned(number), 100, source(), 0.0)
    have = b"".join(unsigned(number).tag for number in range(3))
    assert len(have) == 3 * TAG_BYTES
    page, cursor = store.page(KEY, b"", have, 0.0)
    assert {leased.entry.subkey for leased in page} == {signer(number).peer_id for number in (3, 4)}
    assert cursor == b""
    store.put(unsigned(0, seq=2), 100, source(), 0.0)
    assert len(store.page(KEY, b"", have, 0.0)[0]) == 3, "a newer entry is not the one it has"


def test_unknown_key_has_an_empty_page():
    assert make().page(KEY, b"", b"", 0.0) == ([], b"")
    assert make().live(KEY, 0.0) == []


def test_quota_of_a_peer():
    store = make(peer_bytes=3 * (ENTRY_OVERHEAD + 4))
    results = [store.put(unsigned(number), 100, source(), 0.0) for number in range(4)]
    assert results == [Put.ACCEPTED] * 3 + [Put.QUOTA]
    assert store.put(unsigned(0, seq=2), 100, source(), 0.0) is Put.ACCEPTED, "replacing its own is no growth"
    assert store.put(unsigned(3), 100, source("dave"), 0.0) is Put.ACCEPTED
    store.expire(101.0)
    assert store.size_bytes == 0
    assert store.put(unsigned(9), 100, source(), 101.0) is Put.ACCEPTED


def test_quota_of_a_subnet():
    store = make(subnet_bytes=3 * (ENTRY_OVERHEAD + 4))
    results = [store.put(unsigned(n), 100, source(f"peer{n}", "9.9.9.0/24"), 0.0) for n in range(4)]
    assert results == [Put.ACCEPTED] * 3 + [Put.QUOTA]
    assert store.put(unsigned(3), 100, source("peer3", "9.9.8.0/24"), 0.0) is Put.ACCEPTED


def test_our_own_entries_know_no_quota_and_survive_floods():
    store = make(peer_bytes=10, total_bytes=20 * ENTRY_OVERHEAD)
    assert store.put(unsigned("own"), 2, source("own"), 0.0) is Put.ACCEPTED
    store = make(total_bytes=20 * ENTRY_OVERHEAD)
    store.put(unsigned("own"), 2, source("own"), 0.0)
    for number in range(100):
        store.put(unsigned(number), 500, source(f"peer{number % 3}"), 0.0)
    assert signer("own").peer_id in names(store)


def test_full_store_evicts_the_soonest_expiring_of_the_fattest_source():
    store = make(total_bytes=32 * ENTRY_OVERHEAD)
    for number in range(5):
        store.put(unsigned(f"honest{number}"), 50, source(f"honest{number}", f"8.8.{number}.0/24"), 0.0)
    for number in range(200):
        key = OTHER_KEY if number % 2 else KEY
        store.put(unsigned(number, key=key), 100 + number, source(f"sybil{number}", "6.6.6.0/24"), 0.0)
        assert store.size_bytes <= 32 * ENTRY_OVERHEAD
    left = names(store)
    assert all(signer(f"honest{number}").peer_id in left for number in range(5))
    assert signer(0).peer_id not in left
    assert signer(198).peer_id in left


def test_full_key_evicts_from_the_fattest_source_too():
    store = make(entries_per_key=10)
    for number in range(30):
        store.put(unsigned(number), 100 + number, source("mallory"), 0.0)
    assert len(names(store)) == 10
    assert store.put(unsigned("alice"), 50, source("alice"), 0.0) is Put.ACCEPTED
    assert signer("alice").peer_id in names(store)
    assert len(names(store)) == 10
    early = store.put(unsigned("late"), 5, source("mallory"), 0.0)
    assert early is Put.QUOTA, "a flooder's newcomer that would expire first is itself the one to go"


def test_bookkeeping_is_clean_after_all_is_gone():
    store = make()
    for number in range(50):
        store.put(unsigned(number), 1 + number % 7, source(f"peer{number % 5}", "9.9.9.0/24"), 0.0)
    store.expire(10.0)
    assert len(store) == 0
    assert store.size_bytes == 0
    assert store.keys() == []
    assert store.next_expiry() is None


def test_rapid_replacement_does_not_grow_the_expiry_heap():
    store = make()
    for seq in range(1, 5000):
        store.put(unsigned("alice", seq=seq), 600, source(), 0.0)
    assert len(store) == 1
    assert len(store._expiries) <= 1024 + 2


def test_verifier_checks_each_entry_once_and_never_trusts_a_look_alike():
    verifier = Verifier(capacity=2)
    good = entry()
    assert verifier.check(good)
    assert verifier.check(entry())
    assert verifier.checked == 1
    forged = SignedEntry(
        key=KEY, subkey=good.subkey, payload=b"lies", seq=9, issued_ms=good.issued_ms, ttl_s=100,
        signature=good.signature,
    )  # fmt: skip
    assert not verifier.check(forged)
    for name in "abc":
        verifier.check(entry(name))
    verifier.check(good)
    assert verifier.checked == 6, "the memory is bounded: the first one was forgotten"


def test_batches_fit_messages():
    store = make()
    for number in range(150):
        store.put(unsigned(number, payload=bytes(990 if number % 2 else 10)), 100, source(), 0.0)
    batches = list(iter_batches(store.live(KEY, 0.0)))
    assert sum(map(len, batches)) == 150
    for batch in batches:
        Message.decode(Message(type=MessageType.PUT_ENTRIES, key=KEY, entries=batch).encode())
    assert list(iter_batches([])) == []
