"""The view of a model's servers: built from records that may lie, narrowed by filters, never changed."""

from swarmnode.routing.announce import State
from swarmnode.routing.swarm import SwarmView, coverage, gaps
from worlds import CLASS_A, CLASS_B, DIGEST, peer, server, view


def test_only_records_of_this_model_are_seen():
    right, other = server(1, 0, 4, 8), server(2, 0, 4, 8, digest=bytes([1]) * 32)
    liar = server(3, 0, 4, 9)
    swarm = SwarmView.build("toy", DIGEST, 8, [right, other, liar])
    assert [s.peer for s in swarm.servers] == [peer(1)]


def test_the_last_record_of_a_peer_counts_and_servers_are_sorted():
    swarm = view(server(2, 0, 4, 8), server(1, 0, 4, 8), server(2, 4, 8, 8))
    assert [s.peer for s in swarm.servers] == sorted([peer(1), peer(2)])
    assert (swarm.server(peer(2)).start, swarm.server(peer(2)).end) == (4, 8)
    assert swarm.server(peer(3)) is None


def test_a_flood_of_records_is_cut(monkeypatch):
    monkeypatch.setattr("swarmnode.routing.swarm.MAX_SERVERS", 5)
    assert len(view(*(server(n, 0, 4, 8) for n in range(9))).servers) == 5


def test_coverage_and_missing():
    swarm = view(server(1, 0, 4, 8), server(2, 2, 5, 8))
    assert swarm.coverage() == (1, 1, 2, 2, 1, 0, 0, 0)
    assert swarm.missing() == ((5, 8),)
    assert swarm.missing(0, 6) == ((5, 6),)
    assert coverage(3, []) == (0, 0, 0)
    assert gaps((0, 1, 0, 0, 2), 0, 5) == ((0, 1), (2, 4))


def test_filters():
    swarm = view(server(1, 0, 4, 8, state=State.JOINING), server(2, 0, 4, 8, compute_class=CLASS_B), server(3, 0, 4, 8))

    def peers(**conditions):
        return {s.peer for s in swarm.where(**conditions).servers}

    assert peers() == {peer(1), peer(2), peer(3)}
    assert peers(states=(State.ONLINE,)) == {peer(2), peer(3)}
    assert peers(compute_class=CLASS_A) == {peer(1), peer(3)}
    assert peers(allow={peer(1), peer(2)}) == {peer(1), peer(2)}
    assert peers(deny={peer(1)}, allow={peer(1), peer(2)}) == {peer(2)}


def test_fresh_load_replaces_the_announced_figures():
    swarm = view(server(1, 0, 4, 8, kv_free=4096))
    assert swarm.server(peer(1)).kv_free == 4096
    loaded = swarm.with_load(peer(1), queue_s=0.5, kv_free=3)
    assert (loaded.server(peer(1)).kv_free, loaded.server(peer(1)).queue_s) == (3, 0.5)
    assert swarm.server(peer(1)).queue_s == 0.0
