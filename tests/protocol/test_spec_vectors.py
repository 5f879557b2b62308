"""The example bytes of the spec pages, made again from what the pages say they are.

A block begins with three backticks and `vector.<name>`. In it hex stands on the left and, behind three or more
spaces, words on the right.
"""

import re
import struct
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from swarmnode.protocol import kad, messages, protobuf, reachability, token_rows
from swarmnode.protocol.connection import Connection
from swarmnode.protocol.frames import PREFIX, pack, unpack_header, unpack_prefix
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.manifest import Manifest, TensorEntry
from swarmnode.protocol.messages import Data, Open, Result
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.multistream import Dialer
from swarmnode.protocol.noise import MAX_PLAINTEXT, XX, StaticKey
from swarmnode.protocol.records import sign_entry, signed_bytes
from swarmnode.protocol.sampling import Choice, SamplingParams
from swarmnode.protocol.tensors import Codec, payload_size
from swarmnode.protocol.wire import Catalogue
from swarmnode.routing import keys
from swarmnode.routing.announce import Announcement, ModelListing, State

PAGES = Path(__file__).parents[2] / "docs" / "spec"
BLOCK = re.compile(r"^```vector\.(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def hex_of(block):
    return "".join(re.split(r" {3,}", line)[0] for line in block.splitlines())


VECTORS = {
    name: bytes.fromhex(hex_of(block))
    for page in sorted(PAGES.glob("*.md"))
    for name, block in BLOCK.findall(page.read_text())
}
SESSION, DIGEST = bytes(range(16)), bytes(32)
DIALER, LISTENER = (PrivateKey.from_seed(bytes(31) + bytes([number])) for number in (1, 2))

FRAMES = {
    "frames.probe": messages.Probe(nonce=42),
    "frames.refused": messages.Refused(code=1, reason="full", retry_after_s=1.0),
    "info.request": messages.GetInfo(digest=DIGEST),
    "info.reply": messages.Info(
        start=0, end=18, kv_free=65536, queue_s=0.25, sessions=3, decode_s=0.002, prefill_s=0.05
    ),
    "model.request": messages.GetManifest(digest=DIGEST),
    "model.reply": messages.ManifestReply(found=False),
    "session.open": Open(
        session=SESSION,
        digest=DIGEST,
        start=0,
        end=18,
        codec=3,
        cuts=(9,),
        lanes=1,
        max_length=2048,
        epoch=0,
        embed=True,
        output=2,
    ),
    "session.opened": messages.Opened(compute_class=bytes(8), log_bytes=1 << 28),
    "session.data": Data(session=SESSION, epoch=0, position=0, count=2, payload_kind=1),
    "session.result": Result(epoch=0, position=0, count=2, token=506, logprob=-0.5),
    "session.truncate": messages.Truncate(session=SESSION, epoch=1, position=1),
    "session.fork": messages.Fork(session=SESSION, epoch=2, lane=1, position=2),
    "session.results": Result(epoch=2, position=2, count=2, want=2),
    "session.close": messages.Close(),
    "session.attach": messages.Attach(session=SESSION, start=9),
    "session.attached": messages.Attached(received=(2,)),
}
PAYLOADS = {
    "session.data": struct.pack("<II", 2, 105),
    "session.results": token_rows.encode([Choice(506, -0.5), Choice(107, -2.0)]),
}
ALL = Catalogue(*{type(message) for message in FRAMES.values()})


@pytest.mark.parametrize("name", FRAMES)
def test_frames(name):
    raw, payload = VECTORS[name], PAYLOADS.get(name, b"")
    assert pack(FRAMES[name].to_header(), len(payload)) + payload == raw
    header, size = unpack_prefix(raw[: PREFIX.size], len(payload))
    assert size == len(payload)
    assert ALL.parse(unpack_header(raw[PREFIX.size :][:header])) == FRAMES[name]


def an_entry():
    return sign_entry(DIALER, DIGEST, b"hello", seq=1_700_000_000_000, issued_ms=1_700_000_000_000, ttl_s=100)


def test_records():
    entry = an_entry()
    signed = signed_bytes(entry.key, entry.subkey, b"hello", seq=entry.seq, issued_ms=entry.issued_ms, ttl_s=100)
    assert signed == VECTORS["records.signed"]
    assert entry.signature == VECTORS["records.signature"]
    assert entry.tag == VECTORS["records.tag"]
    assert str(DIALER.peer_id) in (PAGES / "records.md").read_text()


def test_what_servers_say():
    announcement = Announcement(
        model="tiny",
        digest=DIGEST,
        peer=DIALER.peer_id,
        addrs=(Multiaddr.parse("/ip4/192.0.2.1/tcp/4001"),),
        start=0,
        end=9,
        num_blocks=18,
        state=State.ONLINE,
        compute_class=bytes(8),
        prefill_s=0.05,
        decode_s=0.002,
        kv_free=65536,
        embed=True,
        public_name="bee",
    )
    assert announcement.encode() == VECTORS["records.announcement"]
    assert Announcement.decode(DIALER.peer_id, VECTORS["records.announcement"]) == announcement
    listing = ModelListing(name="tiny", digest=DIGEST, num_blocks=18, family="gemma3", hidden_size=640)
    assert listing.encode() == VECTORS["records.listing"]
    assert ModelListing.decode(VECTORS["records.listing"]) == listing


def test_kad():
    question = kad.Message(type=kad.MessageType.FIND_NODE, key=DIALER.peer_id.raw)
    assert protobuf.delimited(question.encode()) == VECTORS["kad.find_node"]
    answer = kad.Message(type=kad.MessageType.GET_ENTRIES, key=DIGEST, entries=(kad.LeasedEntry(an_entry(), 60),))
    assert protobuf.delimited(answer.encode()) == VECTORS["kad.entries"]
    (received,) = protobuf.Delimited(kad.MAX_MESSAGE_BYTES).feed(VECTORS["kad.entries"])
    assert kad.Message.decode(received) == answer
    places = keys.models_key("public"), keys.blocks_key("public", DIGEST, 0), keys.position(DIALER.peer_id.raw)
    assert b"".join(places) == VECTORS["kad.keys"]


def test_autonat():
    addrs = tuple(map(Multiaddr.parse, ("/ip4/203.0.113.7/tcp/4001", "/ip6/2001:db8::7/tcp/4001")))
    ok = reachability.DialResponse(reachability.ResponseStatus.OK, 1, reachability.DialStatus.OK)
    assert reachability.DialRequest(addrs, 0x0123456789ABCDEF).encode() == VECTORS["autonat.request"]
    assert reachability.DialDataRequest(1, 54321).encode() == VECTORS["autonat.data_request"]
    assert ok.encode() == VECTORS["autonat.response"]
    assert reachability.encode_dial_back(0x0123456789ABCDEF) == VECTORS["autonat.dial_back"]


def test_manifest():
    tensor = TensorEntry("w", "F32", (2,), 8, sha256(bytes(8)).digest())
    manifest = Manifest(name="tiny", config=b"{}", blocks=((tensor,),), head=(), files=())
    assert manifest.encode() == VECTORS["manifest.tiny"]
    leaves = manifest.block_leaf(0), manifest.head_leaf(), manifest.text_leaf(), manifest.digest
    assert b"".join(leaves) == VECTORS["manifest.tiny.leaves"]
    assert Manifest.decode(VECTORS["manifest.tiny"], manifest.digest) == manifest


def test_sampling():
    params = SamplingParams(temperature=0.8, top_k=40, seed=7)
    assert params.to_wire() == VECTORS["session.sampling"]
    assert SamplingParams.from_wire(VECTORS["session.sampling"]) == params


def bf16(value):
    """The upper half of binary32, rounded to nearest, ties to even: as tensors.md has it."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def test_tensors():
    """By the page's own words; tests/kernels/test_spec_tensors.py checks the arithmetic against the same blocks."""
    row = (1.0, -2.5, 0.0, 103794.0)
    assert struct.pack("<4f", *row) == VECTORS["tensors.fp32"]
    assert b"".join(map(bf16, row)) == VECTORS["tensors.bf16"]
    outliers = {6: 1000.0, 1: -100.0, 5: 64.0, 2: 8.0}
    levels = [
        0 if index in outliers else round(127 * (value / 2) ** 0.5)
        for index, value in enumerate((0.5, 0, 0, 2, 2, 0, 0, 0))
    ]
    levels[4] = -levels[4]
    whole = (
        struct.pack("<8b", *levels) + bf16(2.0) + struct.pack("<4H", *outliers) + struct.pack("<4f", *outliers.values())
    )
    assert whole == VECTORS["tensors.int8s"]
    for codec, hidden in ((Codec.FP32, 4), (Codec.BF16, 4), (Codec.INT8S, 8)):
        assert payload_size(codec, 1, hidden) == len(VECTORS[f"tensors.{codec.label}"])


def x25519(byte):
    return X25519PrivateKey.from_private_bytes(bytes([byte]) * 32)


def pulled(connection):
    out = b""
    while (piece := connection.pull()) is not None:
        out += bytes(piece)
    return out


def test_transport():
    dialer = Connection(
        StaticKey.create(DIALER, x25519(0x11)), initiator=True, expected=LISTENER.peer_id, ephemeral=x25519(0x12)
    )
    listener = Connection(StaticKey.create(LISTENER, x25519(0x21)), initiator=False, ephemeral=x25519(0x22))
    for flight, (source, target) in enumerate(((dialer, listener), (listener, dialer), (dialer, listener)), start=1):
        sent = pulled(source)
        assert sent == VECTORS[f"transport.flight{flight}"]
        target.receive(sent)
    assert dialer.is_open
    assert listener.remote == DIALER.peer_id
    stream = dialer.session.open()
    stream.send((Dialer(["/ipfs/ping/1.0.0"]).opening, bytes(32)))
    out = memoryview(bytearray(MAX_PLAINTEXT))
    assert bytes(out[: dialer.session.fill(out)]) == VECTORS["transport.ping"]


def test_the_keys_of_the_transcript_open_its_messages():
    """What flight 2 and 3 hold can be read by whoever has the page alone: the keys follow from the private ones."""
    sides = [
        XX(initiator=initiator, static=x25519(static), ephemeral=x25519(static + 1))
        for initiator, static in ((True, 0x11), (False, 0x21))
    ]
    greeting = len(VECTORS["transport.flight2"]) - 2 - 216
    first = VECTORS["transport.flight1"][greeting + 2 :]
    second = VECTORS["transport.flight2"][greeting + 2 :]
    third = VECTORS["transport.flight3"][2:]
    sides[1].read(first)
    sides[0].write()
    assert sides[1].write(VECTORS["transport.payload2"]) == second
    assert sides[0].read(second) == VECTORS["transport.payload2"]
    proof = protobuf.decode(sides[1].read(third))
    assert proof[1] == [DIALER.public.marshal()]
    derived = sides[1].keys()
    assert b"".join(derived) == VECTORS["transport.keys"]
    sealed = StaticKey.create(LISTENER, x25519(0x21))
    assert protobuf.decode(VECTORS["transport.payload2"])[2] == [sealed.signature]


CHECKED = {
    *FRAMES,
    *(f"records.{part}" for part in ("signed", "signature", "tag", "announcement", "listing")),
    *(f"kad.{part}" for part in ("find_node", "entries", "keys")),
    *("manifest.tiny", "manifest.tiny.leaves", "session.sampling"),
    *(f"autonat.{part}" for part in ("request", "data_request", "response", "dial_back")),
    *("tensors.fp32", "tensors.bf16", "tensors.int8s"),
    *(f"transport.{part}" for part in ("flight1", "flight2", "flight3", "payload2", "keys", "ping")),
}


def test_every_block_is_checked_by_a_test_here():
    assert set(VECTORS) == CHECKED


def test_blocks_are_read_as_the_pages_say():
    assert hex_of("00 01   two bytes, 3 of them words\n02\n") == "00 0102"
    assert len(BLOCK.findall("```vector.a.b\n00\n```\ntext\n```vector.c\n01\n```\n")) == 2
