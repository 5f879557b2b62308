"""Values and providers kept for others: only what is proven, only so much, only so long."""

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import protobuf
from swarmnode.protocol.ids import PeerId, PrivateKey, PublicKey
from swarmnode.protocol.kad import KadPeer, Record
from swarmnode.routing import content
from swarmnode.routing.content import Providers, Values, is_proven


def public(number):
    return PrivateKey.from_seed(number.to_bytes(32, "big")).public


def record(number):
    return Record(b"/pk/" + PeerId.from_public_key(public(number)).raw, public(number).marshal())


def kad_peer(number):
    return KadPeer(PeerId.from_public_key(public(number)))


def test_a_key_proves_its_value():
    assert is_proven(record(1))
    assert not is_proven(Record(record(1).key, record(2).value))
    assert not is_proven(Record(b"/v/hello", b"world"))
    assert not is_proven(Record(b"/pk/short", record(1).value))
    assert not is_proven(Record(record(1).key, b"\x08\x01\x12\x20short"))
    assert not is_proven(Record(record(1).key, record(1).value + bytes(content.MAX_VALUE_BYTES)))


def test_an_rsa_key_under_its_hashed_id():
    der = (
        rsa.generate_private_key(65537, 2048).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    marshalled = protobuf.encode([(1, 0), (2, der)])
    peer = PeerId.from_public_key(PublicKey.unmarshal(marshalled))
    assert peer.raw[0] == 0x12
    assert is_proven(Record(b"/pk/" + peer.raw, marshalled))


def test_values_end_and_are_bounded(monkeypatch):
    monkeypatch.setattr(content, "MAX_VALUES", 3)
    values = Values()
    assert not values.put(Record(b"/v/a", b"b"), 0.0)
    for number in range(3):
        assert values.put(record(number), float(number))
    assert values.put(record(0), 3.0)  # put anew: now the youngest
    assert values.put(record(3), 4.0)
    assert [values.get(record(number).key, 5.0) is not None for number in range(4)] == [True, False, True, True]
    values.expire(2.0 + content.VALUE_S)
    assert len(values) == 2
    assert values.get(record(3).key, 4.0 + content.VALUE_S) is None


def test_providers_end_one_by_one():
    providers = Providers()
    assert providers.add(b"key", kad_peer(1), 0.0)
    assert providers.add(b"key", kad_peer(2), 1.0)
    assert providers.add(b"key", kad_peer(1), 2.0)
    assert providers.get(b"key", 3.0) == (kad_peer(1), kad_peer(2))
    providers.expire(1.0 + content.PROVIDER_S)
    assert providers.get(b"key", 1.0 + content.PROVIDER_S) == (kad_peer(1),)
    providers.expire(2.0 + content.PROVIDER_S + content.EXPIRY_EVERY_S)
    assert len(providers) == 0
    assert providers._keys_of == {}


@pytest.mark.parametrize("key", [b"", bytes(content.MAX_KEY_BYTES + 1)])
def test_a_key_of_no_use(key):
    assert not Providers().add(key, kad_peer(1), 0.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.booleans()), max_size=80))
def test_providers_never_pass_a_bound(steps):
    limits = {"MAX_PROVIDED": 4, "PROVIDERS_PER_KEY": 3, "KEYS_PER_PROVIDER": 2}
    before = {name: getattr(content, name) for name in limits}
    try:
        for name, value in limits.items():
            setattr(content, name, value)
        check(steps, limits)
    finally:
        for name, value in before.items():
            setattr(content, name, value)


def check(steps, limits):
    """A model beside it: every add that is taken is found, every bound holds at every step."""
    providers, now = Providers(), 0.0
    for peer, key, late in steps:
        now += content.PROVIDER_S / 3 if late else 1.0
        providers.expire(now)
        taken = providers.add(bytes([key + 1]), kad_peer(peer), now)
        assert taken == (kad_peer(peer) in providers.get(bytes([key + 1]), now))
        shelves = [providers.get(bytes([k + 1]), now) for k in range(10)]
        assert sum(map(bool, shelves)) <= limits["MAX_PROVIDED"]
        assert max(map(len, shelves)) <= limits["PROVIDERS_PER_KEY"]
        for p in range(6):
            assert sum(kad_peer(p) in shelf for shelf in shelves) <= limits["KEYS_PER_PROVIDER"]
    providers.expire(now + content.PROVIDER_S)
    assert (len(providers), providers._keys_of) == (0, {})
