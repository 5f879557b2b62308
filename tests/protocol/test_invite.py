"""Invites: what goes in comes out, what is mistyped is noticed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import protobuf
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.ids import PrivateKey, base58_encode
from swarmnode.protocol.invite import MAX_ADDRS, MAX_PEERS, MAX_TEXT, PREFIX, Invite, _checksum, is_invite
from swarmnode.protocol.multiaddr import Multiaddr

PEERS = [PrivateKey.from_seed(bytes([n]) * 32).peer_id for n in range(6)]
ADDR = Multiaddr.parse("/ip4/192.0.2.7/tcp/4001")
GOLDEN = "sn1bapo5cs8tvU6Qj4nKmFYjfmX5ZL93unepFSXj6kqTV7Dfx8js9i8VBcNiVhTST2tvq8TjPSAzk2jDUhy2p9E"


def sealed(fields):
    body = protobuf.encode(fields)
    return PREFIX + base58_encode(body + _checksum(body))


@given(
    st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 65535)), min_size=1, max_size=8, unique=True),
)
def test_round_trip(swarm, places):
    addrs = [Multiaddr.parse(f"/ip6/2001:db8::{peer}/tcp/{port}").with_peer(PEERS[peer]) for peer, port in places]
    made = Invite.of(swarm, addrs)
    assert made.swarm == swarm
    assert set(made.addrs) <= set(addrs)
    assert Invite.parse(str(made)) == made
    assert str(made).isalnum()  # one double-click selects it


def test_the_bounds():
    many = [Multiaddr.parse(f"/ip4/192.0.2.7/tcp/{1 + n}").with_peer(peer) for peer in PEERS for n in range(9)]
    made = Invite.of("main", many)
    assert len(made.addrs) == MAX_PEERS * MAX_ADDRS
    assert len({addr.peer_id for addr in made.addrs}) == MAX_PEERS
    assert len(str(made)) <= MAX_TEXT
    greedy = [(2, protobuf.encode([(1, peer.raw), *[(2, ADDR.to_bytes())] * 9])) for peer in PEERS]
    assert len(Invite.parse(sealed([(1, "main"), *greedy])).addrs) == MAX_PEERS * MAX_ADDRS


def test_every_mistyped_letter_is_noticed():
    text = str(Invite.of("main", [ADDR.with_peer(PEERS[0])]))
    for at in range(len(PREFIX), len(text)):
        wrong = text[:at] + ("2" if text[at] != "2" else "3") + text[at + 1 :]
        with pytest.raises(ConfigError, match="copy it again"):
            Invite.parse(wrong)
    with pytest.raises(ConfigError, match="copy it again"):
        Invite.parse(text[:-1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (str(ADDR), "is not an invite"),
        (PREFIX + "1" * MAX_TEXT, "is not an invite"),
        (PREFIX, "copy it again"),
        (PREFIX + "0OIl", "not a base58 character"),
        (sealed([(1, "main")]), "it has no addresses"),
        (sealed([(1, "no spaces"), (2, protobuf.encode([(1, PEERS[0].raw), (2, ADDR.to_bytes())]))]), "proper name"),
        (sealed([(1, "main"), (2, protobuf.encode([(1, b"nobody"), (2, ADDR.to_bytes())]))]), "not a peer id"),
        (sealed([(1, "main"), (2, protobuf.encode([(1, PEERS[0].raw), (2, b"\xff")]))]), "cannot be used: truncated"),
        (sealed([(1, 7)]), "cannot be used"),
    ],
)
def test_nonsense_is_named(text, words):
    with pytest.raises(ConfigError, match=words):
        Invite.parse(text)


def test_an_invite_needs_somebody():
    with pytest.raises(ConfigError, match="is the node listening"):
        Invite.of("main", [ADDR])


def test_what_is_meant_as_an_invite():
    assert is_invite("sn1abc")
    assert not is_invite("/dns4/sn1.example/tcp/1")


def test_the_format_stays():
    """A word somebody kept must work with every later version."""
    made = Invite.of("main", [ADDR.with_peer(PEERS[0])])
    assert str(made) == GOLDEN
    assert Invite.parse(GOLDEN) == made
