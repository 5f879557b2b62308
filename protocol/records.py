"""Signed, expiring entries: what a peer says about itself in the DHT, in a form that others can only pass on.

Many peers write under one key (every server of a block group, say), each exactly one entry: (key, subkey) names it
and the subkey is the signer's own peer id, whose Ed25519 key is inside the id. So nobody can write, change or
withdraw another's entry, and nobody can move it to another key: the signature covers every field behind a domain
string. Of two entries of one signer the higher sequence number wins.

Time. `issued_ms` is the signer's clock, `ttl_s` how long it may live. Clocks may be off by CLOCK_SKEW_S, so the
clock only bounds a lease (no entry lives longer than issue + ttl + skew, whoever replays it); the lease itself
counts from local receipt. A withdrawal is an ordinary entry with an empty payload, a tombstone, which outlives
whatever it withdraws. Measured reasons for these rules: rival DHTs let anybody overwrite, delete or immortalize.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from .errors import LocalProtocolError, RemoteProtocolError
from .ids import KeyType, PeerId, PrivateKey

KEY_BYTES: Final = 32
MAX_PAYLOAD_BYTES: Final = 1000
MAX_TTL_S: Final = 600
"""Nothing lives longer than ten minutes without its signer; far-future leases would lock a key."""
CLOCK_SKEW_S: Final = 90
"""How far a peer's clock may be off. Laptops without NTP were seen a minute off."""
TAG_BYTES: Final = 8
SIGNATURE_BYTES: Final = 64
MAX_SEQ: Final = 2**63 - 1
_DOMAIN: Final = b"swarmnode-entry-v1:"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedEntry:
    """What one peer says under one key. Fields are bounded at construction; only verify() makes them true.

    Raises RemoteProtocolError from the constructor for a field out of bounds.
    """

    key: bytes
    """32-byte DHT key the entry is filed under."""
    subkey: PeerId
    """The signer; its id contains its public key."""
    payload: bytes
    """What is said, at most 1000 bytes; empty: a tombstone."""
    seq: int
    """Grows with every entry this signer makes."""
    issued_ms: int
    """Signer's wall clock at signing, milliseconds since 1970."""
    ttl_s: int
    """Longest life from issue, seconds, at most 600."""
    signature: bytes
    """Ed25519 over the domain string and all the fields above."""

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise RemoteProtocolError(f"entry key has {len(self.key)} bytes instead of {KEY_BYTES}")
        if len(self.payload) > MAX_PAYLOAD_BYTES:
            raise RemoteProtocolError(f"entry payload of {len(self.payload)} bytes is over {MAX_PAYLOAD_BYTES}")
        if not 0 < self.ttl_s <= MAX_TTL_S:
            raise RemoteProtocolError(f"entry ttl of {self.ttl_s} s is outside 1..{MAX_TTL_S}")
        if not 0 <= self.seq <= MAX_SEQ or not 0 <= self.issued_ms <= MAX_SEQ:
            raise RemoteProtocolError("entry number is outside 0..2**63-1")
        if len(self.signature) != SIGNATURE_BYTES:
            raise RemoteProtocolError(f"entry signature has {len(self.signature)} bytes, not 64")

    @property
    def tombstone(self) -> bool:
        """True when the entry withdraws what the signer said before."""
        return not self.payload

    @property
    def tag(self) -> bytes:
        """Short name of this very entry, for telling a holder which entries one already has."""
        text = self.subkey.raw + self.seq.to_bytes(8, "big")
        return hashlib.blake2b(text, digest_size=TAG_BYTES).digest()

    def verify(self) -> bool:
        """True when the signer made exactly this entry. Costs about 0.1 ms: check what is cheaper first."""
        try:
            public = self.subkey.public_key()
        except RemoteProtocolError:
            return False
        if public is None or public.type is not KeyType.ED25519:
            return False
        signed = signed_bytes(
            self.key, self.subkey, self.payload, seq=self.seq, issued_ms=self.issued_ms, ttl_s=self.ttl_s
        )
        return public.verify(signed, self.signature)

    def lease_s(self, wall: float, offered_s: float | None = None) -> float:
        """Seconds the entry may still live here, by our wall clock; 0 or less: refuse it.

        `offered_s` is what a holder that hands it on says is left of its lease. Future-dated entries get 0.
        """
        age_s = wall - self.issued_ms / 1000
        if age_s < -CLOCK_SKEW_S:
            return 0.0
        left_s = self.ttl_s if offered_s is None else min(self.ttl_s, offered_s)
        return min(left_s, self.ttl_s + CLOCK_SKEW_S - age_s)


def signed_bytes(key: bytes, subkey: PeerId, payload: bytes, *, seq: int, issued_ms: int, ttl_s: int) -> bytes:
    """The bytes a signature covers. Fixed-width or length-prefixed, so no two entries share them."""
    return b"".join(
        (
            _DOMAIN,
            key,
            len(subkey.raw).to_bytes(2, "big"),
            subkey.raw,
            seq.to_bytes(8, "big"),
            issued_ms.to_bytes(8, "big"),
            ttl_s.to_bytes(4, "big"),
            payload,
        )
    )


def sign_entry(signer: PrivateKey, key: bytes, payload: bytes, *, seq: int, issued_ms: int, ttl_s: int) -> SignedEntry:
    """Make and sign an entry. Raises LocalProtocolError when a field is out of bounds: our caller's mistake."""
    signed = b""
    if 0 <= seq <= MAX_SEQ and 0 <= issued_ms <= MAX_SEQ and 0 < ttl_s <= MAX_TTL_S:
        signed = signed_bytes(key, signer.peer_id, payload, seq=seq, issued_ms=issued_ms, ttl_s=ttl_s)
    try:
        return SignedEntry(
            key=key,
            subkey=signer.peer_id,
            payload=payload,
            seq=seq,
            issued_ms=issued_ms,
            ttl_s=ttl_s,
            signature=signer.sign(signed),
        )
    except RemoteProtocolError as exc:
        raise LocalProtocolError(f"cannot sign this entry: {exc}") from exc


def next_seq(last: int, wall: float) -> int:
    """The sequence number after `last`: wall milliseconds, so that a restart without memory still moves on."""
    return max(int(wall * 1000), last + 1)
