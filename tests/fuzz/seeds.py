"""Valid inputs, made from the grammar of each format with a seeded generator: what the mutators start from."""

import base64
import hashlib
import json
import struct

import msgpack
from swarmnode.protocol import kad, manifest, messages, multistream, protobuf
from swarmnode.protocol.envelope import RECORD_DOMAIN, RECORD_TYPE, Envelope, PeerRecord
from swarmnode.protocol.frames import pack
from swarmnode.protocol.identify import Identify
from swarmnode.protocol.ids import KeyType, PeerId, PrivateKey, PublicKey, base58_decode, base58_encode
from swarmnode.protocol.invite import Invite
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.records import sign_entry
from swarmnode.protocol.relay import HopMessage, HopType, Limit, Reservation, Status, StopMessage, StopType
from swarmnode.protocol.sampling import SamplingParams
from swarmnode.protocol.wire import Message
from swarmnode.routing.announce import Announcement, ModelListing, State, kv_bucket
from swarmnode.routing.coordinates import Coordinate

from .mutate import mutate

KEYS = tuple(PrivateKey.from_seed(bytes(31) + bytes([number])) for number in range(1, 9))
HASHED = PeerId(b"\x12\x20" + hashlib.sha256(b"an RSA key").digest())
PEERS = (*(key.peer_id for key in KEYS), HASHED)
KINDS = tuple(
    item
    for item in vars(messages).values()
    if isinstance(item, type) and issubclass(item, Message) and item is not Message
)
WORDS = ("", "a", "gemma3", "model name", "Größe", "模型", "\U0001f41d", "x" * 64, "../../etc/passwd", "\x1b[2J")
EDGES = (0, 1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-30, 1e30, 3600.0, float("inf"), float("-inf"), float("nan"))


def number(rng, bits=64):
    """An integer of any magnitude, often one at a border."""
    value = rng.choice(EDGES) if rng.random() < 0.4 else rng.getrandbits(rng.randint(1, bits))
    return value % (1 << bits)


def blob(rng, most=64):
    return rng.randbytes(rng.choice((0, 1, 8, 16, 32, rng.randint(0, most))))


# -- libp2p's formats --


def uvarint(rng):
    return protobuf.uvarint(number(rng)) + blob(rng, 4)


def protobuf_message(rng, depth=2):
    """Fields of all wire types in any order, messages within messages."""
    out = bytearray()
    for _ in range(rng.choice((0, 1, 2, 4, 8, 40 if depth == 2 else 4))):
        field = rng.choice((1, 2, 3, 15, 16, 100, 2047, (1 << 29) - 1))
        kind = rng.choice((0, 0, 1, 2, 2, 2, 5))
        out += protobuf.uvarint(field << 3 | kind)
        if kind == 0:
            out += protobuf.uvarint(number(rng))
        elif kind == 2:
            body = protobuf_message(rng, depth - 1) if depth and rng.random() < 0.3 else blob(rng)
            out += protobuf.delimited(body)
        else:
            out += rng.randbytes(8 if kind == 1 else 4)
    return bytes(out)


def delimited(rng):
    return b"".join(protobuf.delimited(blob(rng, 200)) for _ in range(rng.randint(0, 6)))


def multistream_dialog(rng):
    """What a dialer or a listener might say, and what the protocol behind it might."""
    lines = [multistream.HEADER] if rng.random() < 0.9 else []
    lines += [
        rng.choice(("/noise", "/yamux/1.0.0", "/a", "na", "ls", "/ipfs/ping/1.0.0", "x" * 1000, "é"))
        for _ in range(rng.choice((0, 1, 1, 2, 3, 40)))
    ]
    return b"".join(map(multistream.message, lines)) + blob(rng, 20)


def multiaddr_text(rng):
    host = rng.choice(
        (
            "/ip4/1.2.3.4",
            "/ip4/0.0.0.0",
            "/ip6/::1",
            "/ip6/2001:db8::1:2",
            "/ip6zone/eth0/ip6/fe80::1",
            "/dns4/example.com",
            "/dns/a.b-c.example",
            "/dnsaddr/bootstrap.libp2p.io",
            "/memory/7",
        )
    )
    transport = rng.choice(("", "/tcp/4001", "/tcp/0", "/udp/65535/quic-v1", "/tcp/443/tls/ws", "/tcp/80/wss"))
    peer = f"/p2p/{rng.choice(PEERS)}" if rng.random() < 0.6 else ""
    relayed = f"/p2p-circuit/p2p/{rng.choice(PEERS)}" if peer and rng.random() < 0.3 else ""
    return host + transport + peer + relayed + rng.choice(("", "", "/"))


def multiaddr(rng):
    return Multiaddr.parse(multiaddr_text(rng)).to_bytes()


def peer_id(rng):
    return rng.choice(PEERS).raw


def peer_text(rng):
    raw = rng.choice(PEERS).raw
    cid = b"\x01\x72" + raw
    base32 = base64.b32encode(cid).decode().lower().rstrip("=")
    return rng.choice((base58_encode(raw), "z" + base58_encode(cid), "b" + base32))


def public_key(rng):
    return rng.choice(_public_keys())


_CACHE: dict[str, tuple[bytes, ...]] = {}


def _public_keys():
    """One marshalled key of each type; RSA and ECDSA keys are parsed as DER, the deepest of these formats."""
    if "keys" not in _CACHE:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, rsa

        der = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        point = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
        private = ec.derive_private_key(5, ec.SECP256R1()).public_key()
        secp = ec.derive_private_key(7, ec.SECP256K1()).public_key()
        modulus = (1 << 2047) + int.from_bytes(hashlib.shake_256(b"modulus").digest(255), "big") | 1
        big = rsa.RSAPublicNumbers(65537, modulus).public_key()
        _CACHE["keys"] = (
            KEYS[0].public.marshal(),
            PublicKey(KeyType.ECDSA, private.public_bytes(*der)).marshal(),
            PublicKey(KeyType.SECP256K1, secp.public_bytes(*point)).marshal(),
            PublicKey(KeyType.RSA, big.public_bytes(*der)).marshal(),
        )
    return _CACHE["keys"]


def identify(rng):
    return Identify(
        public_key=public_key(rng) if rng.random() < 0.8 else b"",
        listen_addrs=tuple(Multiaddr.parse(multiaddr_text(rng)) for _ in range(rng.choice((0, 1, 3, 40)))),
        protocols=tuple(rng.choice(("/a/1", "/ipfs/id/1.0.0", "", "é")) for _ in range(rng.choice((0, 1, 5, 150)))),
        observed_addr=Multiaddr.parse(multiaddr_text(rng)) if rng.random() < 0.5 else None,
        protocol_version=rng.choice(WORDS),
        agent_version=rng.choice(WORDS),
    ).encode()


def envelope(rng):
    """A peer record as its peer seals it, sometimes with a payload that is signed and yet damaged."""
    key = rng.choice(KEYS)
    addrs = tuple(Multiaddr.parse(multiaddr_text(rng)).without_peer() for _ in range(rng.choice((0, 1, 3, 40))))
    payload = PeerRecord(peer=key.peer_id, seq=number(rng), addrs=addrs).encode()
    if rng.random() < 0.5:
        payload = mutate(payload, rng)
    return Envelope.seal(key, RECORD_DOMAIN, RECORD_TYPE, payload).encode()


def hop_message(rng):
    """Any message of a circuit relay's hop protocol, sensible or not."""
    place = Reservation(
        expires=number(rng),
        addrs=tuple(Multiaddr.parse(multiaddr_text(rng)) for _ in range(rng.choice((0, 1, 3, 20)))),
        voucher=blob(rng),
    )
    return HopMessage(
        type=rng.choice(list(HopType)),
        peer=rng.choice((None, *(key.peer_id for key in KEYS))),
        reservation=rng.choice((None, place)),
        limit=rng.choice((None, Limit(duration_s=number(rng, 32), data_bytes=number(rng)))),
        status=rng.choice((None, *Status)),
    ).encode()


def stop_message(rng):
    """The same of the stop protocol."""
    return StopMessage(
        type=rng.choice(list(StopType)),
        peer=rng.choice((None, *(key.peer_id for key in KEYS))),
        limit=rng.choice((None, Limit(duration_s=number(rng, 32), data_bytes=number(rng)))),
        status=rng.choice((None, *Status)),
    ).encode()


# -- ours --


def entry(rng):
    """A soundly signed entry."""
    return sign_entry(
        rng.choice(KEYS),
        bytes(32),
        blob(rng, 1000),
        seq=number(rng, 63),
        issued_ms=number(rng, 63),
        ttl_s=rng.choice((1, 100, 600)),
    )


def kad_message(rng):
    peers = tuple(
        kad.KadPeer(
            rng.choice(PEERS),
            tuple(multiaddr(rng) for _ in range(rng.choice((0, 1, 8)))),
            rng.choice(list(kad.Connection)),
        )
        for _ in range(rng.choice((0, 0, 1, 3, 20)))
    )
    leased = tuple(_leased(entry(rng), rng) for _ in range(rng.choice((0, 0, 1, 3))))
    return kad.Message(
        type=rng.choice(list(kad.MessageType)),
        key=bytes(32) if leased else blob(rng, 128),
        record=kad.Record(blob(rng), blob(rng)) if rng.random() < 0.2 else None,
        closer_peers=peers,
        provider_peers=peers[:1],
        entries=leased,
        sender=kad.KadPeer(rng.choice(PEERS), (multiaddr(rng),)) if rng.random() < 0.5 else None,
        cursor=blob(rng, 64)[:64],
        have=rng.randbytes(8 * rng.choice((0, 1, 40))),
        stale=tuple(kad.Stale(rng.choice(PEERS), number(rng, 63)) for _ in range(rng.choice((0, 0, 2)))),
        accepted=rng.randint(0, 64),
        coordinate=(rng.uniform(-20, 20), 0.5, 0.1, 1.0) if rng.random() < 0.2 else None,
    ).encode()


def _leased(signed, rng):
    return kad.LeasedEntry(signed, rng.randint(1, signed.ttl_s))


def announcement(rng):
    start = rng.choice((0, 0, 4, 100))
    end = start + rng.randint(1, 40)
    return Announcement(
        model=rng.choice(("gemma", "模型", "x" * 64)),
        digest=rng.randbytes(32),
        peer=KEYS[0].peer_id,
        addrs=tuple(Multiaddr.parse(f"/ip4/10.0.0.{n}/tcp/4001") for n in range(rng.randint(0, 4))),
        start=start,
        end=end,
        num_blocks=end + rng.choice((0, 10)),
        state=rng.choice(list(State)),
        compute_class=rng.randbytes(8),
        prefill_s=rng.choice((0, 0.5, 3600)),
        decode_s=rng.choice((0, 0.001)),
        kv_free=kv_bucket(number(rng, 32)),
        embed=start == 0,
        quant=rng.choice(("none", "int8")),
        public_name=rng.choice(("", "bee", "蜂")),
        coordinate=Coordinate(x=rng.uniform(-1, 1), y=0.5, height=0.1, error=0.5) if rng.random() < 0.5 else None,
    ).encode()


def listing(rng):
    return ModelListing(
        name=rng.choice(("gemma", "模型")),
        digest=rng.randbytes(32),
        num_blocks=rng.randint(1, 99),
        family="gemma3",
        hidden_size=640,
    ).encode()


def _tensors(rng):
    names = sorted({f"t{rng.randint(0, 99)}" for _ in range(rng.randint(0, 6))})
    return tuple(
        manifest.TensorEntry(
            name, rng.choice(("BF16", "Q5_0")), (rng.randint(0, 9), 64), rng.randint(0, 999), rng.randbytes(32)
        )
        for name in names
    )


def manifest_bytes(rng):
    files = [
        manifest.FileEntry.pack(name, rng.choice((b"", b"{}", bytes(5000)))) for name in ("a.jinja", "tokenizer.json")
    ]
    return manifest.Manifest(
        name=rng.choice(WORDS),
        config=b'{"hidden_size":64}',
        blocks=tuple(_tensors(rng) for _ in range(rng.choice((0, 1, 3)))),
        head=_tensors(rng),
        files=tuple(files[: rng.randint(0, 2)]),
    ).encode()


def sampling(rng):
    return SamplingParams(
        temperature=rng.choice((0, 0.7, 100)),
        top_k=rng.choice((0, 40, 2**31 - 1)),
        top_p=rng.choice((0.1, 1)),
        min_p=rng.choice((0, 0.05)),
        seed=number(rng, 63),
        repetition_penalty=rng.choice((1, 1.1)),
        penalty_last_n=rng.choice((0, 64)),
    ).to_wire()


def a_message(rng, kinds=KINDS):
    """A message of any kind, each field with a value that is legal, often at a border."""
    kind = rng.choice(kinds)
    values = {}
    for name, field in kind.__dataclass_fields__.items():
        check = field.metadata["wire"].check
        legal = [value for value in _candidates(rng) if check(value)]
        value = rng.choice(legal)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _candidates(rng):
    small = number(rng, 10)
    blobs = [rng.randbytes(16) if rng.random() < 0.2 else b"s" * 16, b"", b"p" * 34, b"d" * 32, b"c" * 8]
    lists = [[], [0], [1, 2, 3], [small] * 4, ["/ip4/1.2.3.4/tcp/1"], [""]]
    return [
        0,
        1,
        2,
        small,
        number(rng, 24),
        number(rng, 50),
        True,
        False,
        *blobs,
        *rng.sample(WORDS, 3),
        0.5,
        3600,
        -1.5,
        *lists,
    ]


def frame_header(rng):
    """A message's header, or any msgpack map that headers may look like."""
    if rng.random() < 0.8:
        return pack(a_message(rng).to_header())[8:]
    values = [
        None,
        True,
        number(rng),
        -number(rng, 63),
        rng.choice(FLOATS),
        rng.choice(WORDS),
        blob(rng),
        [1, "a", b"b", None],
    ]
    return msgpack.packb(
        {rng.choice((*range(20), "key", b"key", -1)): rng.choice(values) for _ in range(rng.randint(0, 12))}
    )


def frame(rng, kinds=KINDS, payload=b""):
    return pack(a_message(rng, kinds).to_header(), len(payload)) + payload


def bomb(rng):
    """Small on the wire, large in memory, if a parser lets it: many of the smallest things there are."""
    count = rng.choice((100, 2000, 20_000))
    nothing = rng.choice((b"\x90", b"\x80", b"\xa0", b"\xc0", b"\x91\x90", b"\x0a\x00", b"\x08\x00"))
    start = rng.choice((b"\xdd" + count.to_bytes(4, "big"), b"\xdc" + (count & 0xFFFF).to_bytes(2, "big"), b""))
    return rng.choice((b"\x81\x03", b"\x86\x00\x01\x03", b"\x81\x01", b"")) + start + nothing * count


def sampling_values(rng):
    """Parameters as JSON, with numbers that only JSON and Python know."""
    names = [*SamplingParams.__dataclass_fields__]
    values = (0, 1, 1, 0.5, 40, -1, True, None, "1", [1], 10**400, 2**63, 1e308, float("nan"), float("inf"))
    return json.dumps({rng.choice(names): rng.choice(values) for _ in range(rng.choice((0, 1, 1, 2, 4)))}).encode()


def invite(rng):
    addrs = [
        Multiaddr.parse(f"/ip4/1.2.3.4/tcp/{rng.randint(1, 9)}/p2p/{rng.choice(PEERS)}")
        for _ in range(rng.randint(1, 5))
    ]
    word = str(Invite.of(rng.choice(("public", "a.b-c", "x" * 64)), addrs))
    if rng.random() < 0.7:  # a checksum that is right, over fields that are not
        fields = bytearray(base58_decode(word[3:])[:-4])
        fields[rng.randrange(len(fields))] = rng.randrange(256)
        word = word[:3] + base58_encode(bytes(fields) + hashlib.sha256(fields).digest()[:4])
    return word.encode()


# -- files --


def gguf(rng):
    """The head of a GGUF file with metadata of every type and a few tensors, and their bytes."""
    string = lambda text: struct.pack("<Q", len(text.encode())) + text.encode()  # noqa: E731
    entries = [string("general.alignment") + struct.pack("<II", 4, 32)]
    for index in range(rng.randint(0, 6)):
        kind = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11, 12))
        value = {
            8: lambda: string(rng.choice(WORDS)),
            9: lambda: (
                struct.pack("<IQ", 4, 3) + bytes(12)
                if rng.random() < 0.5
                else struct.pack("<IQ", 8, 2) + string("a") + string("é")
            ),
        }.get(kind, lambda kind=kind: rng.randbytes({0: 1, 1: 1, 2: 2, 3: 2, 7: 1}.get(kind, 8 if kind > 9 else 4)))()
        entries.append(string(f"key.{index}") + struct.pack("<I", kind) + value)
    tensors = [
        string(f"blk.{n}.w") + struct.pack("<IQQIQ", 2, 32, 2, rng.choice((0, 1, 2, 8)), 0)
        for n in range(rng.randint(0, 4))
    ]
    head = b"GGUF" + struct.pack("<IQQ", rng.choice((2, 3)), len(tensors), len(entries))
    return head + b"".join(entries) + b"".join(tensors) + bytes(32 + 64 * 4)


def safetensors(rng):
    """A safetensors file: length, JSON header, bytes."""
    header, at = {}, 0
    if rng.random() < 0.5:
        header["__metadata__"] = {"format": "pt"}
    for index in range(rng.randint(0, 5)):
        dtype, size = rng.choice((("F32", 4), ("BF16", 2), ("I8", 1), ("U9", 1)))
        shape = [rng.choice((0, 1, 3)) for _ in range(rng.randint(0, 3))]
        count = size
        for extent in shape:
            count *= extent
        header[rng.choice(WORDS) + str(index)] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
        at += count
    body = json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + bytes(at)
