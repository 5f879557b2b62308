"""Whole handshakes with peers of every key type, in both roles: what we prove to them is Ed25519, as always."""

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from swarmnode.protocol.connection import Connection
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.ids import KeyType, PrivateKey, PublicKey
from swarmnode.protocol.noise import StaticKey

OUR_KEY = PrivateKey.from_seed(bytes(32))
SIGNED = b"noise-libp2p-static-key:"


def foreign(kind):
    """(public key, way to sign) of an identity of that kind."""
    if kind == "RSA":
        key = rsa.generate_private_key(65537, 2048)
        return spki(KeyType.RSA, key), lambda data: key.sign(data, padding.PKCS1v15(), hashes.SHA256())
    curve = {"secp256k1": ec.SECP256K1(), "P-256": ec.SECP256R1(), "P-521": ec.SECP521R1()}[kind]
    private = ec.generate_private_key(curve)
    if kind == "secp256k1":
        form = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
        public = PublicKey(KeyType.SECP256K1, private.public_key().public_bytes(*form))
    else:
        public = spki(KeyType.ECDSA, private)
    return public, lambda data: private.sign(data, ec.ECDSA(hashes.SHA256()))


def spki(key_type, key):
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return PublicKey(key_type, key.public_key().public_bytes(*form))


def static(public, sign):
    """The Noise key of such an identity."""
    private = X25519PrivateKey.generate()
    return StaticKey(private, public, sign(SIGNED + private.public_key().public_bytes_raw()))


def carry(sender, receiver):
    """Bring everything one side has to say to the other; whether there was anything."""
    moved = False
    while sender.has_output and (frame := sender.pull()) is not None:
        data, moved = memoryview(frame), True
        while data:
            room = receiver.get_buffer()
            size = min(len(room), len(data))
            room[:size] = data[:size]
            receiver.received(size)
            data = data[size:]
    return moved


def shake_hands(one, two):
    while carry(one, two) or carry(two, one):
        if one.is_open and two.is_open:
            return


@pytest.mark.parametrize("kind", ["RSA", "secp256k1", "P-256", "P-521"])
@pytest.mark.parametrize("we_dial", [True, False])
def test_peers_of_every_key_type(kind, we_dial):
    public, sign = foreign(kind)
    ours = Connection(StaticKey.create(OUR_KEY), initiator=we_dial, expected=public.peer_id)
    theirs = Connection(static(public, sign), initiator=not we_dial, expected=OUR_KEY.peer_id)
    shake_hands(ours, theirs)
    assert (ours.remote, theirs.remote) == (public.peer_id, OUR_KEY.peer_id)


@pytest.mark.parametrize("kind", ["RSA", "secp256k1", "P-256"])
def test_a_signature_of_another_key_of_that_type(kind):
    public, _ = foreign(kind)
    _, sign = foreign(kind)
    ours = Connection(StaticKey.create(OUR_KEY), initiator=True)
    theirs = Connection(static(public, sign), initiator=False)
    with pytest.raises(RemoteProtocolError, match="does not match its Noise key"):
        shake_hands(ours, theirs)
    assert not ours.is_open
