from __future__ import annotations

from swarmnode.routing import cache as caches
from swarmnode.routing.cache import ReadCache


def test_only_keys_used_twice_are_read_ahead_and_cold_ones_are_forgotten():
    cache = ReadCache()
    for key, uses in ((b"once", 1), (b"hot", 2)):
        for _ in range(uses):
            cache.use(key, 0.0).read_at = 0.0
    assert cache.due(caches.AHEAD_S) == []
    assert cache.due(caches.AHEAD_S + 1) == [b"hot"]
    cache.use(b"hot", 5.0)
    assert cache.due(caches.HOT_S + 1) == [b"hot"]
    assert len(cache) == 1
    cache.due(5 + caches.HOT_S + 1)
    assert len(cache) == 0


def test_a_key_being_read_is_left_alone():
    cache = ReadCache()
    cache.use(b"hot", 0.0)
    cache.use(b"hot", 0.0).reading = 7
    assert cache.due(1000.0) == []
    assert len(cache) == 1


def test_the_key_used_longest_ago_makes_room_unless_it_is_being_read():
    cache = ReadCache()
    cache.use(b"reading", -2.0).reading = 1
    cache.use(b"oldest", -1.0)
    for number in range(caches.MAX_KEYS - 1):
        cache.use(bytes([number // 256, number % 256]), float(number))
    assert len(cache) == caches.MAX_KEYS
    assert cache.entry(b"reading", 0.0).reading == 1
    assert cache.entry(b"oldest", 0.0).uses == 0
