"""What a chain teaches the planner: true in the end, and a liar's own affair."""

import itertools

import pytest
from helpers.internet import Internet
from helpers.swarms import make_model
from swarmnode.node.client.lessons import QUICKEST_S, SLOWEST_S, note_report
from swarmnode.protocol.chain import ChainMachine, ChainSpec, Hop
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.messages import Report
from swarmnode.protocol.tensors import Codec
from swarmnode.routing.metrics import Metrics
from test_whole_sessions import serve, write

PEERS = [bytes([0, 36, 8, 1, 18, 32]) + bytes([n]) * 32 for n in range(3)]


@pytest.fixture
def machine():
    spec = ChainSpec(session=bytes(16), digest=bytes(32), start=0, end=6, codec=Codec.FP32, cuts=(), max_length=9)
    return ChainMachine(spec, [Hop(peer=peer, start=2 * n, end=2 * n + 2) for n, peer in enumerate(PEERS)])


def report(**changes) -> Report:
    return Report(**{"rows": 1, "queue_s": 0.0, "compute_s": 0.004, "hop_s": 0.05, **changes})


def test_a_report_teaches_the_steps_and_the_hop(machine):
    metrics = Metrics()
    note_report(metrics, machine, machine.hops[0], report(), 1.0)
    first, second = PeerId(PEERS[0]), PeerId(PEERS[1])
    assert metrics.peer(first).decode.value == 0.002
    assert metrics.special_hops(1.0) == {(first, second): 0.05}
    assert metrics.peer(second) is None


def test_the_tail_has_no_hop_and_a_relayed_one_none_of_its_own(machine):
    metrics = Metrics()
    note_report(metrics, machine, machine.hops[2], report(), 1.0)
    machine.relay(machine.hops[0], machine.hops[1])
    note_report(metrics, machine, machine.hops[0], report(), 1.0)
    assert metrics.special_hops(1.0) == {}


def test_wild_claims_are_cut(machine):
    metrics = Metrics()
    note_report(metrics, machine, machine.hops[0], report(compute_s=0.0, hop_s=3600.0), 1.0)
    assert metrics.peer(PeerId(PEERS[0])).decode.value == QUICKEST_S
    assert list(metrics.special_hops(1.0).values()) == [SLOWEST_S]
    note_report(metrics, machine, machine.hops[1], report(compute_s=3600.0), 1.0)
    assert metrics.peer(PeerId(PEERS[1])).decode.value == SLOWEST_S


def test_who_was_replaced_teaches_nothing(machine):
    old, metrics = machine.hops[1], Metrics()
    machine.repair([machine.hops[0], Hop(peer=b"new", start=2, end=4), machine.hops[2]])
    note_report(metrics, machine, old, report(), 1.0)
    assert metrics.peer(PeerId(PEERS[1])) is None


@pytest.mark.virtual
async def test_hops_are_learned_as_they_are(tmp_path, clock):
    """Servers that never met before: after one text the client knows the way between them within a tenth."""
    checkpoint = str(make_model(tmp_path / "model", "llama"))
    async with Internet(5, tmp_path) as internet:
        servers, client = await serve(internet, checkpoint, (0, 1), (1, 2), (2, 3))
        model = await client.model(dtype="fp32", local_ends=False)
        await write(model, clock)
        await write(model, clock)
        learned = client._client._router.metrics.special_hops(clock.now())
        for one, other in itertools.pairwise(servers):
            assert learned[one.peer_id, other.peer_id] == pytest.approx(internet.rtt_s(one, other) / 2, rel=0.1)
        for server in servers:
            assert client._client._router.metrics.peer(server.peer_id).decode is not None
