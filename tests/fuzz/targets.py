"""Parsers that take one input and keep no state, each with what must hold for every input it accepts.

A target's `run` returns normally when the input was accepted, raises one of its `errors` when it was refused, and
anything else is a crash: also an AssertionError, by which the properties in here speak up.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from swarmnode.protocol import kad, messages, protobuf
from swarmnode.protocol.envelope import PeerRecord
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.frames import MAX_HEADER, MAX_ITEMS, PREFIX, pack, unpack_header, unpack_prefix
from swarmnode.protocol.identify import MAX_ADDRS, MAX_PROTOCOLS, Identify
from swarmnode.protocol.ids import PeerId, PublicKey, base58_decode, base58_encode
from swarmnode.protocol.invite import Invite
from swarmnode.protocol.manifest import Manifest
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.multistream import Dialer, Responder
from swarmnode.protocol.noise import FrameReader
from swarmnode.protocol.relay import HopMessage, StopMessage
from swarmnode.protocol.sampling import SamplingParams
from swarmnode.protocol.wire import Catalogue
from swarmnode.routing.announce import MAX_BYTES, Announcement, ModelListing

from . import seeds
from .mutate import mutate

KIB = 1024
MIB = 1024 * 1024


@dataclass(frozen=True)
class Target:
    """A parser under test. Memory while one input is handled stays below `per_byte` * size + `base`."""

    name: str
    seed: Callable[[Random], bytes]
    run: Callable[[bytes], None]
    errors: tuple[type[Exception], ...] = (RemoteProtocolError,)
    per_byte: int = 100
    base: int = 384 * KIB
    """msgpack's packer alone takes a buffer of 256 KiB, whatever it packs."""
    frames: Callable[[bytes], int] = lambda data: 1
    """How many frames an input counts for: sequences hold several."""
    weight: float = 1.0
    """Share of a campaign's frames."""
    mutate: Callable[[bytes, Random, bytes], bytes] = mutate
    """How its inputs are damaged."""


def pieces(data, largest=None):
    """The input cut up, always in the same way: how bytes arrive must not matter."""
    rng = Random(zlib.crc32(data))
    at = 0
    while at < len(data):
        size = rng.choice((1, 2, 11, 12, 64, 640, largest or len(data)))
        yield data[at : at + size]
        at += size


# -- libp2p's formats --


def run_uvarint(data):
    value, end = protobuf.read_uvarint(data)
    assert 0 <= value < 1 << 64
    assert 0 < end <= protobuf.MAX_VARINT_BYTES
    assert value == sum((byte & 0x7F) << 7 * index for index, byte in enumerate(data[:end]))
    again = protobuf.uvarint(value)
    assert len(again) <= end
    assert protobuf.read_uvarint(again) == (value, len(again))


def reference_fields(data):
    """Protocol buffers once more, from the format's description and without any limits: the oracle."""
    fields, at = [], 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        match tag & 7:
            case 0:
                value = varint()
            case 1 | 5 as kind:
                size = 8 if kind == 1 else 4
                value, at = int.from_bytes(data[at : at + size], "little"), at + size
            case 2:
                size = varint()
                value, at = bytes(data[at : at + size]), at + size
        fields.append((tag >> 3, value))
    return fields


def run_protobuf(data):
    fields = protobuf.decode(data)
    found = reference_fields(data)
    assert fields == {field: [value for other, value in found if other == field] for field, _ in found}
    again = protobuf.encode((field, value) for field, values in fields.items() for value in values)
    assert protobuf.decode(again) == fields


def run_delimited(data):
    splitter, found, size = protobuf.Delimited(1000), [], 0
    for piece in pieces(data):
        found += splitter.feed(piece)
        assert len(splitter.pending) <= 1000 + protobuf.MAX_VARINT_BYTES
    size = sum(len(message) for message in found)
    assert size + len(found) + len(splitter.pending) <= len(data)
    assert found == list(protobuf.Delimited(1000).feed(data))


def _negotiate(negotiation, data):
    sent = 0
    for piece in pieces(data):
        if negotiation.done:
            break
        sent += len(negotiation.feed(piece))
    assert len(negotiation.leftover) <= len(data)
    assert sent <= 4 * len(data) + 64
    assert negotiation.protocol is None or negotiation.done
    return negotiation


def run_multistream_dialer(data):
    assert _negotiate(Dialer(["/noise", "/yamux/1.0.0"]), data).protocol in (None, "/noise", "/yamux/1.0.0")


def run_multistream_responder(data):
    assert _negotiate(Responder({"/noise", "/a"}.__contains__), data).protocol in (None, "/noise", "/a")


def run_identify(data):
    message = Identify.decode(data)
    assert len(message.listen_addrs) <= MAX_ADDRS
    assert len(message.protocols) <= MAX_PROTOCOLS
    assert message.agent_version.isprintable()
    assert Identify.decode(message.encode()) == message


def run_public_key(data):
    key = PublicKey.unmarshal(data)
    assert PublicKey.unmarshal(key.marshal()) == key
    assert not key.verify(b"data", b"\x30" * 64)
    assert not key.verify(b"data", data[-64:])
    assert PeerId(key.peer_id.raw) == key.peer_id


def run_peer_id(data):
    peer = PeerId(data)
    assert PeerId.parse(str(peer)) == peer
    assert peer.raw == data
    peer.public_key()


def run_peer_text(data):
    text = data.decode("utf-8", "surrogateescape")
    peer = PeerId.parse(text)
    assert PeerId.parse(str(peer)) == peer


def run_base58(data):
    assert base58_decode(base58_encode(data[:128])) == data[:128]
    try:
        raw = base58_decode(data[:128].decode("latin-1"))
    except ValueError as exc:
        raise ConfigError(str(exc)) from None
    assert base58_encode(raw) == data[:128].decode("latin-1")


def run_envelope(data):
    """Damage to an envelope must show; damage inside one that its peer has signed must be borne."""
    record = PeerRecord.open(data)
    assert PeerRecord.decode(record.encode()) == record
    assert record.peer in seeds.PEERS, "signed by nobody we know"
    assert PeerRecord.open(data, peer=record.peer) == record


def run_multiaddr(data):
    address = Multiaddr.from_bytes(data)
    assert Multiaddr.parse(str(address)) == address
    assert Multiaddr.from_bytes(address.to_bytes()) == address
    _use(address)


def run_multiaddr_text(data):
    address = Multiaddr.parse(data.decode("utf-8", "surrogateescape"))
    assert Multiaddr.parse(str(address)) == address
    raw = address.to_bytes()
    if len(raw) <= 512:
        assert Multiaddr.from_bytes(raw) == address
    _use(address)


def _use(address):
    """What the node asks of any address it was told."""
    _ = address.host, address.port, address.ip, address.peer_id, address.is_tcp, address.is_relayed
    _ = address.is_loopback, address.is_unspecified, hash(address)


def run_noise_frames(data):
    """The receive buffer must hand out what a plain splitter would, whatever sizes it is filled in."""
    reader, got, at = FrameReader(), [], 0
    while at < len(data):
        buffer = reader.get_buffer()
        size = min(len(buffer), len(data) - at, 1 + zlib.crc32(data[at : at + 8]) % 3000)
        buffer[:size] = data[at : at + size]
        reader.commit(size)
        at += size
        got += map(bytes, reader.frames())
    at = 0
    for message in got:
        size = int.from_bytes(data[at : at + 2], "big")
        assert message == data[at + 2 : at + 2 + size]
        at += 2 + size
    assert bytes(reader.peek()) == data[at:]


# -- ours --


def run_kad(data):
    message = kad.Message.decode(data)
    assert kad.Message.decode(message.encode()) == message
    assert all(leased.entry.verify() in (True, False) for leased in message.entries[:2])


def run_entry(data):
    """A genuine entry with damage: it may parse, but must not be believed, unless nothing signed has changed."""
    message = kad.Message.decode(protobuf.encode([(1, 64), (2, bytes(32)), (100, data)]))
    (leased,) = message.entries
    if leased.entry.verify():
        assert leased.entry.signature in _genuine(), "a forged entry verifies"


_GENUINE: set[bytes] = set()


def seed_entry(rng):
    signed = seeds.entry(Random(rng.randrange(200)))
    return kad.encode_entry(kad.LeasedEntry(signed, rng.randint(1, signed.ttl_s)))


def _genuine():
    if not _GENUINE:
        _GENUINE.update(seeds.entry(Random(number)).signature for number in range(200))
    return _GENUINE


LONGER_FLOATS = 64
"""We write floats of 9 bytes where a peer may have written integers of one."""


def run_announcement(data):
    announcement = Announcement.decode(seeds.KEYS[0].peer_id, data)
    if len(data) <= MAX_BYTES - LONGER_FLOATS:
        assert Announcement.decode(seeds.KEYS[0].peer_id, announcement.encode()) == announcement


def run_listing(data):
    listing = ModelListing.decode(data)
    assert ModelListing.decode(listing.encode()) == listing


def run_manifest(data):
    manifest = Manifest.decode(data)
    again = Manifest.decode(manifest.encode(), manifest.digest)
    assert again == manifest


CATALOGUES = (
    messages.TO_SERVER,
    messages.TO_PREVIOUS,
    messages.TO_CLIENT,
    messages.MODEL_MESSAGES,
    messages.INFO_MESSAGES,
)
EVERYTHING = Catalogue(*seeds.KINDS)


def run_frame_header(data):
    header = unpack_header(data)
    assert len(header) <= MAX_ITEMS
    message = EVERYTHING.parse(header)
    assert type(message).from_header(unpack_header(pack(message.to_header())[PREFIX.size :])) == message
    accepted = 0
    for catalogue in CATALOGUES:
        try:
            accepted += type(catalogue.parse(header)) is type(message)
        except RemoteProtocolError:
            continue
    assert accepted


def run_frame_prefix(data):
    if len(data) < PREFIX.size:
        raise RemoteProtocolError("a stream that ends here is node/framing.py's to refuse")
    header, payload = unpack_prefix(data[: PREFIX.size], 5000)
    assert header <= MAX_HEADER
    assert payload <= 5000


def run_sampling(data):
    params = SamplingParams.from_wire(data)
    assert SamplingParams.from_wire(params.to_wire()) == params


def run_sampling_values(data):
    """What a user's JSON may hold where a number belongs."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(str(exc)) from None
    if not isinstance(values, dict) or not values.keys() <= set(SamplingParams.__dataclass_fields__):
        raise ConfigError("no such parameter")
    params = SamplingParams(**values)
    assert SamplingParams.from_wire(params.to_wire()) == params


def run_invite(data):
    invite = Invite.parse(data.decode("utf-8", "surrogateescape"))
    assert Invite.parse(str(invite)) == invite


def run_hop(data):
    message = HopMessage.decode(data)
    assert HopMessage.decode(message.encode()) == message


def run_stop(data):
    message = StopMessage.decode(data)
    assert StopMessage.decode(message.encode()) == message


STATELESS = (
    Target("uvarint", seeds.uvarint, run_uvarint),
    Target("protobuf", seeds.protobuf_message, run_protobuf, weight=2),
    Target("delimited", seeds.delimited, run_delimited),
    Target("multistream-dialer", seeds.multistream_dialog, run_multistream_dialer),
    Target("multistream-responder", seeds.multistream_dialog, run_multistream_responder),
    Target("identify", seeds.identify, run_identify),
    Target("relay-hop", seeds.hop_message, run_hop),
    Target("relay-stop", seeds.stop_message, run_stop),
    Target("envelope", seeds.envelope, run_envelope),
    Target("public-key", seeds.public_key, run_public_key),
    Target("peer-id", seeds.peer_id, run_peer_id),
    Target("peer-id-text", lambda rng: seeds.peer_text(rng).encode(), run_peer_text, errors=(ConfigError,)),
    Target("base58", lambda rng: seeds.peer_text(rng).encode(), run_base58, errors=(ConfigError,)),
    Target("multiaddr", seeds.multiaddr, run_multiaddr, weight=2),
    Target("multiaddr-text", lambda rng: seeds.multiaddr_text(rng).encode(), run_multiaddr_text, errors=(ConfigError,)),
    Target("noise-frames", seeds.delimited, run_noise_frames),
    Target("kad", seeds.kad_message, run_kad, weight=2),
    Target("entry", seed_entry, run_entry),
    Target("announcement", seeds.announcement, run_announcement),
    Target("listing", seeds.listing, run_listing),
    Target("manifest", seeds.manifest_bytes, run_manifest, per_byte=20),
    Target("frame-header", seeds.frame_header, run_frame_header, weight=3),
    Target("frame-prefix", lambda rng: PREFIX.pack(seeds.number(rng, 17), seeds.number(rng, 13)), run_frame_prefix),
    Target("sampling", seeds.sampling, run_sampling),
    Target("sampling-values", seeds.sampling_values, run_sampling_values, errors=(ConfigError,)),
    Target("invite", seeds.invite, run_invite, errors=(ConfigError,)),
)
