"""The planner finds the best chain there is, against brute force and networkx, and says clearly when there is none."""

import itertools
import random

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarmnode.protocol.errors import ConfigError, NoRoute
from swarmnode.routing.announce import State
from swarmnode.routing.coordinates import Coordinate
from swarmnode.routing.cost import HOP_OVERHEAD_S, Pricing
from swarmnode.routing.metrics import Metrics
from swarmnode.routing.planner import PlanRequest, Policy, plan
from swarmnode.routing.search import Search
from worlds import CLASS_A, CLASS_B, peer, planet, server, view

NOW = 1000.0
MS = 1e-3


def chains(candidates, roles, start, end):
    """Every chain that names no server twice, as lists of (candidate, start, end)."""

    def extend(at, used):
        if at == end:
            yield []
            return
        for index, c in enumerate(candidates):
            if c.place.peer in used or not c.start <= at < c.end or (at == start and not roles[0][index]):
                continue
            for stop in range(at + 1, c.end + 1):
                if stop == end and not roles[1][index]:
                    continue
                for rest in extend(stop, used | {c.place.peer}):
                    yield [(c, at, stop), *rest]

    return list(extend(start, frozenset()))


def latency(chain, links):
    total = chain[0][0].entry.total_s + chain[-1][0].exit.total_s
    for (a, _, _), (b, _, _) in itertools.pairwise(chain):
        total += links.leg(a.place, b.place).total_s
    return total + sum(c.visit_s + (stop - at) * c.block_s for c, at, stop in chain)


def bottleneck(chain):
    times = [chain[0][0].entry.transfer_s, chain[-1][0].exit.transfer_s]
    times += [(stop - at) * c.block_s for c, at, stop in chain]
    if len(chain) > 1:
        times += [c.place.transfer_s for c, _, _ in chain]
    return max(times)


def brute_force(request, swarm, metrics):
    pricing = Pricing(request, swarm, metrics, NOW)
    candidates, _ = pricing.candidates()
    first = [c.start == pricing.start and (not request.need_embed or c.server.announcement.embed) for c in candidates]
    last = [c.end == pricing.end and (not request.need_head or c.server.announcement.head) for c in candidates]
    found = chains(candidates, (first, last), pricing.start, pricing.end)
    if not found:
        return None
    if request.policy is Policy.MIN_LATENCY:
        return min(latency(chain, pricing.links) for chain in found)
    widest = min(map(bottleneck, found))
    return widest, min(latency(c, pricing.links) for c in found if bottleneck(c) <= widest * (1 + 1e-9))


@st.composite
def worlds(draw):
    """A small swarm with its measurements: anything from one LAN to links that break every triangle."""
    blocks = draw(st.integers(1, 6))
    everyone_located = draw(st.sampled_from([True, False, None]))
    announcements = []
    metrics = Metrics(coordinate=draw(st.sampled_from([None, Coordinate(height=5 * MS)])))
    for number in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, blocks - 1))
        end = draw(st.integers(start + 1, blocks))
        placed = draw(st.booleans()) if everyone_located is None else everyone_located
        x, y, height = (draw(st.integers(0, 60)) * MS for _ in range(3))
        announcements.append(
            server(
                number,
                start,
                end,
                blocks,
                decode_s=draw(st.integers(0, 40)) * MS,
                prefill_s=draw(st.integers(0, 400)) * MS,
                compute_class=draw(st.sampled_from([CLASS_A, CLASS_A, CLASS_B])),
                embed=start == 0 and draw(st.booleans()),
                head=end == blocks and draw(st.booleans()),
                coordinate=Coordinate(x=x, y=y, height=height, error=0.2) if placed else None,
            )
        )
        if draw(st.booleans()):
            metrics.observe_rtt(peer(number), draw(st.integers(0, 200)) * MS, NOW)
        if draw(st.booleans()):
            metrics.observe_transfer(peer(number), draw(st.integers(1, 100)) * 1000, 0.01, NOW)
    for _ in range(draw(st.integers(0, 3))):
        pair = peer(draw(st.integers(0, 4))), peer(draw(st.integers(0, 4)))
        if draw(st.booleans()):
            metrics.observe_hop(*pair, draw(st.integers(0, 100)) * MS, NOW)
        else:
            metrics.observe_relayed(*pair, NOW)
    return view(*announcements), metrics


@st.composite
def requests(draw, blocks):
    start = draw(st.integers(0, blocks - 1))
    end = draw(st.integers(start + 1, blocks))
    middle = draw(st.integers(start, end))
    return PlanRequest(
        start=start,
        end=end,
        tokens=draw(st.sampled_from([1, 7, 128, 300])),
        bytes_per_token=draw(st.sampled_from([0, 640, 20_000])),
        need_embed=start == 0 and draw(st.booleans()),
        need_head=end == blocks and draw(st.booleans()),
        classes=draw(
            st.sampled_from([(), ((start, middle, CLASS_A), (middle, end, CLASS_B)), ((0, blocks, CLASS_A),)])
        ),
        policy=draw(st.sampled_from(Policy)),
    )


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_chain_beats_the_plan(data):
    swarm, metrics = data.draw(worlds())
    request = data.draw(requests(swarm.num_blocks))
    best = brute_force(request, swarm, metrics)
    if best is None:
        with pytest.raises(NoRoute):
            plan(request, swarm, metrics, now=NOW)
        return
    found = plan(request, swarm, metrics, now=NOW)
    check_chain(found, request, swarm)
    if request.policy is Policy.MIN_LATENCY:
        assert found.total_s == pytest.approx(best, rel=1e-9)
    else:
        assert 1 / found.steps_per_s == pytest.approx(best[0], rel=1e-9)
        assert found.total_s == pytest.approx(best[1], rel=1e-9)


def check_chain(found, request, swarm):
    """The plan is a chain at all: whole, in order, within spans, nobody twice; and its terms add up."""
    at = request.start
    for hop in found.hops:
        info = swarm.server(hop.peer)
        assert info.start <= hop.start == at < hop.end <= info.end
        at = hop.end
    assert at == request.end
    assert len(set(found.peers)) == len(found.peers)
    assert found.total_s == pytest.approx(sum(h.terms.total_s for h in found.hops) + found.back.total_s)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("servers", "held"), [(60, 6), (60, 12), (30, 20)])
def test_equal_to_networkx_on_larger_swarms(seed, servers, held):
    swarm = planet(random.Random(seed), servers, 40, held, cities=6)
    metrics = Metrics(coordinate=Coordinate(height=5 * MS))
    request = PlanRequest(bytes_per_token=8192)
    try:
        found = plan(request, swarm, metrics, now=NOW)
    except NoRoute:
        assert swarm.missing()
        return
    length = networkx.dijkstra_path_length(networkx_graph(request, swarm, metrics), "in", "out")
    assert found.total_s == pytest.approx(length, rel=1e-9)


def networkx_graph(request, swarm, metrics):
    """The textbook graph: a node per (server, border, has it run a block since it was entered)."""
    pricing = Pricing(request, swarm, metrics, NOW)
    candidates, _ = pricing.candidates()
    graph = networkx.DiGraph()
    for i, p in enumerate(candidates):
        for border in range(p.start, p.end):
            graph.add_edge((i, border, "entered"), (i, border + 1, "ran"), weight=p.block_s)
            graph.add_edge((i, border, "ran"), (i, border, "entered"), weight=0.0)
        for j, q in enumerate(candidates):
            link_s = pricing.links.leg(p.place, q.place).total_s + q.visit_s
            for border in range(max(p.start + 1, q.start), min(p.end, q.end - 1) + 1):
                if i != j:
                    graph.add_edge((i, border, "ran"), (j, border, "entered"), weight=link_s)
        if p.start == pricing.start:
            graph.add_edge("in", (i, p.start, "entered"), weight=p.entry.total_s + p.visit_s)
        if p.end == pricing.end:
            graph.add_edge((i, p.end, "ran"), "out", weight=p.exit.total_s)
    return graph


def test_the_same_swarm_gives_the_same_chain_in_any_order():
    rng = random.Random(5)
    twins = [server(n, 6 * (n % 3), 6 * (n % 3) + 6, 18) for n in range(12)]
    first = plan(PlanRequest(), view(*twins), Metrics(), now=NOW)
    for _ in range(5):
        rng.shuffle(twins)
        assert plan(PlanRequest(), view(*twins), Metrics(), now=NOW) == first


def test_terms_of_a_hand_made_chain():
    """Two servers, 100 ms and 40 ms away, no coordinates: every figure by hand."""
    swarm = view(server(1, 0, 4, 6, decode_s=2 * MS), server(2, 4, 6, 6, decode_s=3 * MS))
    swarm = swarm.with_load(peer(2), queue_s=7 * MS, kv_free=100)
    metrics = Metrics()
    metrics.observe_rtt(peer(1), 100 * MS, NOW)
    metrics.observe_rtt(peer(2), 40 * MS, NOW)
    found = plan(PlanRequest(bytes_per_token=12_404), swarm, metrics, now=NOW)
    one, two = (hop.terms for hop in found.hops)
    assert (one.network_s, two.network_s, found.back.network_s) == pytest.approx((50 * MS, 50 * MS, 20 * MS))
    assert (one.compute_s, two.compute_s) == pytest.approx((8 * MS, 6 * MS))
    assert (one.queue_s, two.queue_s) == pytest.approx((0, 7 * MS))
    assert one.transfer_s == two.transfer_s == found.back.transfer_s == pytest.approx(1 * MS)
    assert one.overhead_s == HOP_OVERHEAD_S
    assert found.total_s == pytest.approx((50 + 8 + 1 + 50 + 6 + 7 + 1 + 20 + 1) * MS + 2 * HOP_OVERHEAD_S)


def test_a_fast_server_is_entered_and_left_mid_span():
    slow, fast = server(1, 0, 10, 10, decode_s=0.1), server(2, 3, 7, 10, decode_s=MS)
    tail = server(3, 5, 10, 10, decode_s=0.05)
    metrics = Metrics()
    for number in (1, 2, 3):
        metrics.observe_rtt(peer(number), MS, NOW)
    found = plan(PlanRequest(), view(slow, fast, tail), metrics, now=NOW)
    assert [(hop.peer, hop.start, hop.end) for hop in found.hops] == [
        (peer(1), 0, 3),
        (peer(2), 3, 7),
        (peer(3), 7, 10),
    ]


def test_a_chain_never_returns_to_a_server():
    """The shortest path would be slow, fast, slow again; a session knows a server once."""
    slow, fast = server(1, 0, 10, 10, decode_s=0.1), server(2, 3, 7, 10, decode_s=MS)
    other = server(3, 0, 10, 10, decode_s=0.3)
    metrics = Metrics()
    for number in (1, 2, 3):
        metrics.observe_rtt(peer(number), MS, NOW)
    found = plan(PlanRequest(), view(slow, fast, other), metrics, now=NOW)
    assert [(hop.peer, hop.start, hop.end) for hop in found.hops] == [(peer(1), 0, 10)]
    found = plan(PlanRequest(), view(slow, fast), metrics, now=NOW)
    assert found.peers == (peer(1),)


def test_relayed_hops_cost_the_way_through_the_client():
    pair = server(1, 0, 1, 2), server(2, 1, 2, 2)
    metrics = Metrics()
    for number in (1, 2):
        metrics.observe_rtt(peer(number), 30 * MS, NOW)
    direct = plan(PlanRequest(), view(*pair), metrics, now=NOW)
    metrics.observe_relayed(peer(1), peer(2), NOW)
    relayed = plan(PlanRequest(), view(*pair), metrics, now=NOW)
    assert direct.hops[1].terms.network_s == pytest.approx(15 * MS)
    assert relayed.hops[1].terms.network_s == pytest.approx(30 * MS)
    metrics.observe_hop(peer(1), peer(2), 2 * MS, NOW)
    assert plan(PlanRequest(), view(*pair), metrics, now=NOW).hops[1].terms.network_s == pytest.approx(2 * MS)


def test_a_server_that_fails_is_dearer_until_forgiven():
    fast, slow = server(1, 0, 2, 2, decode_s=MS), server(2, 0, 2, 2, decode_s=9 * MS)
    metrics = Metrics()
    assert plan(PlanRequest(), view(fast, slow), metrics, now=NOW).peers == (peer(1),)
    metrics.observe_outcome(peer(1), failed=True, now=NOW)
    assert plan(PlanRequest(), view(fast, slow), metrics, now=NOW).peers == (peer(2),)
    assert plan(PlanRequest(), view(fast, slow), metrics, now=NOW + 4 * 3600).peers == (peer(1),)


def test_our_own_server_costs_no_network():
    swarm = view(server(1, 0, 2, 2))
    found = plan(PlanRequest(client=peer(1), bytes_per_token=5000), swarm, Metrics(), now=NOW)
    assert found.hops[0].terms.network_s == found.hops[0].terms.transfer_s == found.back.total_s == 0.0


def test_the_widest_chain_spreads_the_blocks_a_fast_one_would_take():
    """Latency wants one server for all blocks; throughput wants everybody."""
    whole = server(1, 0, 8, 8, prefill_s=0.02)
    halves = server(2, 0, 4, 8, prefill_s=0.03), server(3, 4, 8, 8, prefill_s=0.03)
    metrics = Metrics()
    request = PlanRequest(tokens=128, bytes_per_token=100)
    assert plan(request, view(whole, *halves), metrics, now=NOW).peers == (peer(1),)
    widest = PlanRequest(tokens=128, bytes_per_token=100, policy=Policy.MAX_THROUGHPUT)
    found = plan(widest, view(whole, *halves), metrics, now=NOW)
    assert set(found.peers) == {peer(1), peer(2), peer(3)}
    assert found.steps_per_s == pytest.approx(1 / 0.08)


def message(request, *announcements, metrics=None):
    with pytest.raises(NoRoute) as caught:
        plan(request, view(*announcements), metrics or Metrics(), now=NOW)
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.missing


def test_no_route_names_the_missing_blocks_and_the_fix():
    text, missing = message(PlanRequest(), server(1, 0, 6, 18), server(2, 12, 18, 18))
    assert missing == ((6, 12),)
    assert text == "no server holds blocks 6:12 of toy; start one with: swarmnode join toy --serve 6:12"
    text, missing = message(PlanRequest(), server(1, 2, 6, 18), server(2, 12, 18, 18))
    assert missing == ((0, 2), (6, 12))
    assert "blocks 0:2, 6:12" in text


def test_no_route_names_the_constraint_that_removed_the_servers():
    rest = server(9, 0, 2, 4)
    held = server(1, 2, 4, 4, kv_free=64), server(2, 2, 4, 4), server(3, 2, 4, 4, compute_class=CLASS_B)
    request = PlanRequest(kv_tokens=100, banned=frozenset({peer(2)}), classes=((0, 4, CLASS_A),))
    text, missing = message(request, rest, *held)
    assert missing == ((2, 4),)
    assert "1 banned after failures, 1 of another compute class, 1 short of KV room (a session of 100 tokens)" in text
    text, _ = message(PlanRequest(deny=frozenset({peer(9)})), rest, *held)
    assert "1 excluded by an allow or deny list" in text
    text, _ = message(PlanRequest(allow=frozenset({peer(9)})), rest, *held)
    assert "3 excluded by an allow or deny list" in text
    text, _ = message(PlanRequest(), rest, server(1, 2, 4, 4, state=State.DRAINING))
    assert "1 leaving the swarm" in text
    text, _ = message(PlanRequest(), rest, server(1, 2, 4, 4, state=State.JOINING))
    assert "still loading weights" in text


def test_no_route_for_lack_of_embedding_or_head():
    text, _ = message(PlanRequest(need_embed=True), server(1, 0, 4, 4))
    assert "no server of blocks 0:1 of toy turns token ids into hidden states" in text
    text, _ = message(PlanRequest(need_head=True), server(1, 0, 4, 4))
    assert "no server of blocks 3:4 of toy runs the LM head" in text


def test_only_going_back_would_do():
    """Servers 1 and 2 hold every block between them, but any chain would need server 1 twice."""
    text, _ = message(
        PlanRequest(classes=((0, 2, CLASS_A), (2, 4, CLASS_B), (4, 6, CLASS_A))),
        server(1, 0, 6, 6),
        server(2, 2, 4, 6, compute_class=CLASS_B),
    )
    assert "without using a server twice" in text


@pytest.mark.parametrize(("start", "end"), [(0, 5), (3, 3), (-1, 2), (4, 5)])
def test_a_span_outside_the_model_is_a_config_error(start, end):
    with pytest.raises(ConfigError, match="which has 4 blocks"):
        plan(PlanRequest(start=start, end=end), view(server(1, 0, 4, 4)), Metrics(), now=NOW)


@pytest.mark.parametrize("bound", ["MAX_BRANCHES", "MAX_WORK"])
def test_many_returns_stay_bounded(monkeypatch, bound):
    """Every fast server sits inside slow ones. The proof is cut off, the answer is still a chain."""
    monkeypatch.setattr(f"swarmnode.routing.search.{bound}", 4)
    calls = []
    original = Search._cheapest
    monkeypatch.setattr(Search, "_cheapest", lambda self, windows: calls.append(1) or original(self, windows))
    slow = [server(n, 0, 30, 30, decode_s=0.1 + n * MS) for n in range(2)]
    fast = [server(10 + n, 3 * n + 1, 3 * n + 2, 30, decode_s=MS) for n in range(9)]
    metrics = Metrics()
    for number in (*range(2), *range(10, 19)):
        metrics.observe_rtt(peer(number), 0.1 * MS, NOW)
    found = plan(PlanRequest(end=30), view(*slow, *fast), metrics, now=NOW)
    check_chain(found, PlanRequest(end=30), view(*slow, *fast))
    assert len(calls) < 30


@pytest.mark.parametrize("seed", range(4))
def test_bounds_leave_the_optimum_alone(seed, monkeypatch):
    """Narrowing the candidates first changes the time taken, never the cost found; also between two live servers."""
    rng = random.Random(seed)
    swarm, metrics = planet(rng, 150, 30, 12, cities=5), Metrics(coordinate=Coordinate(height=5 * MS))
    ends = [peer(rng.randrange(150)) for _ in range(2)]
    requests = [
        PlanRequest(start=8, end=16),
        PlanRequest(start=8, end=16, upstream=ends[0], downstream=ends[1], deny=frozenset(ends)),
        PlanRequest(end=10, downstream=ends[1], deny=frozenset(ends)),
        PlanRequest(start=20, upstream=ends[0], tokens=64, bytes_per_token=8192, deny=frozenset(ends)),
    ]
    bounded = [plan(request, swarm, metrics, now=NOW).total_s for request in requests]
    monkeypatch.setattr("swarmnode.routing.planner.WORTHWHILE", 1000)
    assert [plan(request, swarm, metrics, now=NOW).total_s for request in requests] == pytest.approx(bounded, rel=1e-12)
