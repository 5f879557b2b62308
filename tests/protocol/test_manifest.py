"""Manifests: golden digest, what changes it and what does not, bounded decoding of hostile bytes."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import manifest as module
from swarmnode.protocol.errors import CorruptCheckpoint, LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.manifest import FileEntry, Manifest, TensorEntry, root


def entry(name: str, data: bytes, shape: tuple[int, ...] = (2, 2)) -> TensorEntry:
    return TensorEntry(name, "BF16", shape, len(data), hashlib.sha256(data).digest())


def sample() -> Manifest:
    return Manifest(
        name="tiny",
        config=b'{"hidden_size":2}',
        blocks=tuple((entry(f"b{i}.k", b"kkkkkkkk"), entry(f"b{i}.q", bytes([i]) * 8)) for i in range(3)),
        head=(entry("embed", b"eeeeeeee"), entry("norm", b"nnnn", (2,))),
        files=(FileEntry.pack("chat_template.jinja", b"{{ x }}"), FileEntry.pack("tokenizer.json", b"{}" * 500)),
    )


def tampered(**changes: object) -> bytes:
    values = msgpack.unpackb(sample().encode(), strict_map_key=False)
    values.update({int(key[1:]): value for key, value in changes.items()})
    return msgpack.packb(values)


def test_golden_digest():
    """docs/spec/manifest.md: every implementation must find this root."""
    assert sample().digest.hex() == "b7eb13ae5b09df1bd82f3aeae9679fab40cbdc1e94e912e42d1cde142363b86c"
    assert sample().block_leaf(1).hex() == "193d9ea864ff8fa7e70e10cb39c0be89e374d63fb36fdb95f15661db5efa2c85"


def test_decode_is_the_inverse_of_encode():
    manifest = sample()
    again = Manifest.decode(manifest.encode(), manifest.digest)
    assert again == manifest
    assert again.file("tokenizer.json") == b"{}" * 500
    assert again.has_file("chat_template.jinja")
    assert not again.has_file("x")
    with pytest.raises(KeyError):
        again.file("x")


def test_the_name_is_no_part_of_the_digest_and_all_else_is():
    manifest = sample()
    assert replace(manifest, name="other").digest == manifest.digest
    others = [
        replace(manifest, config=b"{}"),
        replace(manifest, blocks=manifest.blocks[:2]),
        replace(manifest, blocks=manifest.blocks[::-1]),
        replace(manifest, head=manifest.head[:1]),
        replace(manifest, files=manifest.files[:1]),
        replace(manifest, head=(replace(manifest.head[0], dtype="F16"), manifest.head[1])),
        replace(manifest, head=(replace(manifest.head[0], shape=(4, 1)), manifest.head[1])),
    ]
    assert len({other.digest for other in others} | {manifest.digest}) == len(others) + 1


def test_the_packing_of_a_file_does_not_change_the_digest():
    manifest = sample()
    text = manifest.files[1]
    stored = replace(text, packed=zlib.compress(text.unpack(), 0))
    other = replace(manifest, files=(manifest.files[0], stored))
    assert Manifest.decode(other.encode(), manifest.digest).file("tokenizer.json") == text.unpack()


def test_one_leaf_can_be_checked_with_the_hashes_of_the_others():
    manifest = sample()
    leaves = [manifest.block_leaf(index) for index in range(3)]
    assert root(leaves, manifest.head_leaf(), manifest.text_leaf()) == manifest.digest


def test_stored_bytes_are_checked_against_their_leaf():
    manifest = sample()
    good = {"b1.k": b"kkkkkkkk", "b1.q": bytearray(b"\1" * 8)}
    assert manifest.mismatches(manifest.blocks[1], good) == []
    assert manifest.mismatches(manifest.blocks[1], {"b1.k": b"kkkkkkk", "b1.q": b"\2" * 8}) == ["b1.k", "b1.q"]
    assert manifest.mismatches(manifest.blocks[1], {}) == ["b1.k", "b1.q"]
    assert manifest.matches_file("tokenizer.json", b"{}" * 500)
    assert not manifest.matches_file("tokenizer.json", b"{}")
    assert not manifest.matches_file("chat_template.jinja", b"{}" * 500)


def test_a_manifest_of_another_model_is_refused():
    with pytest.raises(RemoteProtocolError, match="does not match the model digest"):
        Manifest.decode(sample().encode(), bytes(32))


ENTRY = ["n", "F32", [1], 4, bytes(32)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb({0: 2}),
        b"\x91" * 5000,
        tampered(_1=5),
        tampered(_1="n" * (module.MAX_NAME + 1)),
        tampered(_2="text"),
        tampered(_2=bytes(module.MAX_CONFIG_BYTES + 1)),
        tampered(_3={}),
        tampered(_3=[[]] * (module.MAX_BLOCKS + 1)),
        tampered(_4=[ENTRY] * (module.MAX_TENSORS + 1)),
        tampered(_4=[ENTRY, ENTRY]),
        tampered(_4=[["b", *ENTRY[1:]], ["a", *ENTRY[1:]]]),
        tampered(_4=[ENTRY[:4]]),
        tampered(_4=[["n", "F32", [-1], 4, bytes(32)]]),
        tampered(_4=[["n", "F32", [1] * (module.MAX_DIMENSIONS + 1), 4, bytes(32)]]),
        tampered(_4=[["n", "F32", [1], True, bytes(32)]]),
        tampered(_4=[["n", "F32", [1], module.MAX_SIZE + 1, bytes(32)]]),
        tampered(_4=[["n", "F32", [1], 4, bytes(31)]]),
        tampered(_5=[["a", 1, bytes(32)]]),
        tampered(_5=[["a", 1, bytes(32), b"no zlib"]]),
        tampered(_5=[["a", 1, bytes(32), zlib.compress(b"x")]]),
        tampered(_5=[["a", module.MAX_FILE_BYTES + 1, bytes(32), b""]]),
        tampered(_5=[["a", 0, hashlib.sha256(b"").digest(), zlib.compress(b"")]] * (module.MAX_FILES + 1)),
        tampered(_5=[["a", 5, hashlib.sha256(b"0" * 5).digest(), zlib.compress(b"0" * 5_000_000)]]),
        tampered(_5=[["a", 5, hashlib.sha256(b"0" * 5).digest(), zlib.compress(b"0" * 5)[:-6]]]),
        bytes(module.MAX_MANIFEST_BYTES + 1),
    ],
    ids=range(28),
)
def test_hostile_manifests_are_the_peers_fault(data):
    with pytest.raises(RemoteProtocolError):
        Manifest.decode(data)


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_junk_is_the_peers_fault_and_never_another_error(junk, place, byte):
    flipped = bytearray(sample().encode())
    flipped[place % len(flipped)] ^= byte
    for data in (junk, bytes(flipped)):
        try:
            Manifest.decode(data)
        except RemoteProtocolError:
            continue


def test_our_own_oversized_parts_are_told():
    with pytest.raises(CorruptCheckpoint, match="bytes: a model"):
        FileEntry.pack("tokenizer.json", bytes(module.MAX_FILE_BYTES + 1))
    huge = FileEntry("a", 1, bytes(32), bytes(module.MAX_MANIFEST_BYTES))
    with pytest.raises(LocalProtocolError, match="at most"):
        replace(sample(), files=(huge,)).encode()
