"""The choice of relays: near, in different networks, the named ones first; every candidate has its place."""

from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol.ids import PrivateKey
from swarmnode.routing.relays import RelayCandidate, choose, relays_key

PEERS = [PrivateKey.from_seed(n.to_bytes(32, "big")).peer_id for n in range(1, 10)]


def candidate(number, rtt_s, network, named=False):
    return RelayCandidate(peer=PEERS[number], rtt_s=rtt_s, network=network, named=named)


def order(*candidates, held=()):
    return [PEERS.index(chosen.peer) for chosen in choose(candidates, held)]


def test_the_nearest_first_and_the_unmeasured_last():
    assert order(candidate(0, None, "a"), candidate(1, 0.2, "b"), candidate(2, 0.1, "c")) == [2, 1, 0]


def test_a_second_one_of_a_network_comes_after_all_networks():
    near = [candidate(0, 0.01, "a"), candidate(1, 0.02, "a")]
    assert order(*near, candidate(2, 0.3, "b"), candidate(3, None, "c")) == [0, 2, 3, 1]
    assert order(*near, candidate(2, 0.3, "b"), held=["a"]) == [2, 0, 1]


def test_named_ones_come_first_wherever_they_are():
    assert order(candidate(0, 0.01, "a"), candidate(1, 0.5, "a", named=True), candidate(2, None, "a", named=True)) == [
        1,
        2,
        0,
    ]


candidates = st.lists(
    st.builds(
        candidate,
        st.integers(0, 8),
        st.none() | st.floats(0, 1),
        st.sampled_from("abc"),
        st.booleans(),
    ),
    unique_by=lambda one: one.peer,
)


@given(candidates, st.sets(st.sampled_from("abc")))
def test_nobody_is_lost_and_no_network_twice_before_all_were(found, held):
    chosen = choose(found, held)
    assert sorted(chosen, key=lambda one: one.peer) == sorted(found, key=lambda one: one.peer)
    named = sum(one.named for one in found)
    assert all(one.named for one in chosen[:named])
    networks = set(held) | {one.network for one in chosen[:named]}
    fresh = {one.network for one in chosen[named:]} - networks
    following = [one.network for one in chosen[named : named + len(fresh)]]
    assert sorted(following) == sorted(fresh)


def test_swarms_have_relays_of_their_own():
    assert relays_key("main") != relays_key("other")
    assert len(relays_key("main")) == 34
