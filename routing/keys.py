"""Where things live in the swarm's key space: 256-bit keys, their distance, and the names of record keys.

Kademlia (Maymounkov and Mazieres, 2002) measures nearness as the XOR of two keys. A node's own key is sha256
of its peer id, which Noise authenticates, so nobody can choose where to sit except by making many identities.
Record keys are sha256 over a domain string and length-prefixed parts: no two kinds of record, and no two
swarm names, can collide.

Servers are filed per group of 16 blocks and not per block: a server of 40 blocks stores 3 records where
Petals stores 40.
"""

from __future__ import annotations

from hashlib import sha256

KEY_BYTES = 32
KEY_BITS = 8 * KEY_BYTES
GROUP_BLOCKS = 16
"""Blocks per record key. A span that overlaps a group is announced under that group."""
DIGEST_BYTES = 32
_MULTIHASH_SHA256 = b"\x12\x20"


def models_key(swarm: str) -> bytes:
    """Key under which every server of a swarm says which model it serves (the `models` listing)."""
    return _derive(b"models", swarm.encode())


def blocks_key(swarm: str, digest: bytes, group: int) -> bytes:
    """Key under which the servers of blocks [16 * group, 16 * group + 16) of a model announce themselves.

    Raises ValueError for a digest that is not 32 bytes or a group outside [0, 2**32): our bug, not a peer's.
    """
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"a model digest has {DIGEST_BYTES} bytes, not {len(digest)}")
    if not 0 <= group < 2**32:
        raise ValueError(f"a block group is a number in [0, 2**32), not {group}")
    return _derive(b"blocks", swarm.encode(), digest, group.to_bytes(4, "big"))


def content_key(digest: bytes) -> bytes:
    """Key under which peers provide the bytes with this sha256: a multihash, as libp2p has it.

    Raises ValueError for a digest that is not 32 bytes.
    """
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"a sha256 has {DIGEST_BYTES} bytes, not {len(digest)}")
    return _MULTIHASH_SHA256 + digest


def groups_of_span(start: int, end: int) -> range:
    """Groups that the half-open span [start, end) of blocks touches."""
    if end <= start:
        return range(0)
    return range(start // GROUP_BLOCKS, (end - 1) // GROUP_BLOCKS + 1)


def position(key: bytes) -> bytes:
    """Where in the key space a DHT key, or a peer's raw id, sits: sha256, as in libp2p, whatever the key's length."""
    return sha256(key).digest()


def distance(first: bytes, second: bytes) -> int:
    """XOR distance of two keys."""
    return int.from_bytes(first, "big") ^ int.from_bytes(second, "big")


def common_prefix_bits(first: bytes, second: bytes) -> int:
    """How many leading bits two keys share; KEY_BITS when they are equal."""
    return KEY_BITS - distance(first, second).bit_length()


def _derive(kind: bytes, *parts: bytes) -> bytes:
    hasher = sha256(b"swarmnode-key-v1")
    for part in (kind, *parts):
        hasher.update(len(part).to_bytes(4, "big"))
        hasher.update(part)
    return hasher.digest()
