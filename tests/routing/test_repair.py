"""Repair plans only what died, keeps the compute class, and never picks what just failed."""

import itertools
import random

import pytest
from swarmnode.protocol.errors import NoRoute
from swarmnode.routing.coordinates import Coordinate
from swarmnode.routing.cost import CostTerms
from swarmnode.routing.metrics import Metrics
from swarmnode.routing.planner import Hop, PlanRequest, plan
from swarmnode.routing.repair import plan_repair
from worlds import CLASS_A, CLASS_B, peer, planet, server, view

NOW = 50.0


def chain(*hops):
    return [
        Hop(peer=peer(number), start=start, end=end, compute_class=rest[0] if rest else CLASS_A, terms=CostTerms())
        for number, start, end, *rest in hops
    ]


def repair(hops, failed, *announcements, any_class=False, metrics=None, **request):
    found = plan_repair(
        hops,
        {peer(number) for number in failed},
        view(*announcements),
        metrics or Metrics(),
        PlanRequest(**request),
        now=NOW,
        any_class=any_class,
    )
    return [(r.start, r.end, [(h.peer, h.start, h.end) for h in r.hops]) for r in found], found


CHAIN = chain((1, 0, 4), (2, 4, 8), (3, 8, 12))
ALIVE = server(1, 0, 4, 12), server(2, 4, 8, 12), server(3, 8, 12, 12)


def test_nothing_failed_nothing_to_do():
    assert repair(CHAIN, [], *ALIVE)[0] == []
    assert repair(CHAIN, [99], *ALIVE)[0] == []


def test_one_dead_hop_is_replaced_by_its_replica():
    spans, found = repair(CHAIN, [2], *ALIVE, server(7, 4, 8, 12), server(8, 0, 12, 12, decode_s=1.0))
    assert spans == [(4, 8, [(peer(7), 4, 8)])]
    assert not found[0].class_changed
    assert not found[0].banned_used


def test_a_dead_hop_may_need_several_servers():
    spans, _ = repair(CHAIN, [2], *ALIVE, server(7, 3, 6, 12), server(8, 5, 9, 12))
    assert [(start, end) for start, end, _ in spans] == [(4, 8)]
    assert [p for p, _, _ in spans[0][2]] == [peer(7), peer(8)]


def test_neighbouring_dead_hops_are_one_span_and_others_stay_apart():
    spares = server(7, 0, 8, 12), server(8, 8, 12, 12)
    assert repair(CHAIN, [1, 2], *ALIVE, *spares)[0] == [(0, 8, [(peer(7), 0, 8)])]
    spares = server(7, 0, 4, 12), server(8, 8, 12, 12)
    assert repair(CHAIN, [1, 3], *ALIVE, *spares)[0] == [(0, 4, [(peer(7), 0, 4)]), (8, 12, [(peer(8), 8, 12)])]


def test_one_spare_does_not_serve_two_separate_spans():
    """It would be in the chain twice; planning everything anew puts it there once."""
    spans, _ = repair(CHAIN, [1, 3], *ALIVE, server(7, 0, 12, 12))
    assert spans == [(0, 12, [(peer(7), 0, 12)])]


def test_the_same_class_comes_first_even_if_slower():
    fast_other = server(7, 4, 8, 12, compute_class=CLASS_B, decode_s=0.0)
    slow_same = server(8, 4, 8, 12, decode_s=0.5)
    assert repair(CHAIN, [2], *ALIVE, fast_other, slow_same)[0] == [(4, 8, [(peer(8), 4, 8)])]
    assert repair(CHAIN, [2], *ALIVE, fast_other, slow_same, any_class=True)[0] == [(4, 8, [(peer(8), 4, 8)])]


def test_another_class_only_when_asked_for_and_reported():
    other = server(7, 4, 8, 12, compute_class=CLASS_B)
    with pytest.raises(NoRoute, match=r"blocks 4:8 of toy can be used: .*1 of another compute class") as caught:
        repair(CHAIN, [2], *ALIVE, other)
    assert caught.value.missing == ((4, 8),)
    spans, found = repair(CHAIN, [2], *ALIVE, other, any_class=True)
    assert spans == [(4, 8, [(peer(7), 4, 8)])]
    assert found[0].class_changed


def test_a_merged_span_keeps_each_block_in_its_own_class():
    mixed = chain((1, 0, 4), (2, 4, 8, CLASS_B), (3, 8, 12))
    both = server(7, 0, 12, 12), server(8, 0, 12, 12, compute_class=CLASS_B)
    spans, found = repair(mixed, [1, 2], server(3, 8, 12, 12), *both)
    assert spans == [(0, 8, [(peer(7), 0, 4), (peer(8), 4, 8)])]
    assert not found[0].class_changed


def test_failed_never_and_banned_last():
    spare = server(7, 4, 8, 12)
    spans, found = repair(CHAIN, [2], *ALIVE, spare, banned=frozenset({peer(7)}))
    assert spans == [(4, 8, [(peer(7), 4, 8)])]
    assert found[0].banned_used
    good = server(8, 4, 8, 12, decode_s=1.0)
    assert repair(CHAIN, [2], *ALIVE, spare, good, banned=frozenset({peer(7)}))[0] == [(4, 8, [(peer(8), 4, 8)])]
    with pytest.raises(NoRoute, match="2 just failed"):
        repair(CHAIN, [2, 7], *ALIVE, spare)


def test_roles_and_lists_still_hold():
    plain, tail = server(7, 8, 12, 12), server(8, 8, 12, 12, head=True, decode_s=0.01)
    assert repair(CHAIN, [3], *ALIVE, plain, tail, need_head=True)[0] == [(8, 12, [(peer(8), 8, 12)])]
    spans, _ = repair(CHAIN, [2], *ALIVE, server(7, 4, 8, 12), server(8, 4, 8, 12), deny=frozenset({peer(7)}))
    assert spans == [(4, 8, [(peer(8), 4, 8)])]
    with pytest.raises(NoRoute):
        repair(CHAIN, [2], *ALIVE, server(7, 4, 8, 12, kv_free=64), kv_tokens=65)


def test_the_replacement_is_near_its_neighbours_not_near_the_client():
    """Both spares are equally fast; one sits beside the upstream and downstream servers, one beside the client."""
    there, here = Coordinate(x=0.2, error=0.1), Coordinate(error=0.1)
    alive = [server(n, 4 * n - 4, 4 * n, 12, coordinate=there) for n in (1, 2, 3)]
    spares = server(7, 4, 8, 12, coordinate=here), server(8, 4, 8, 12, coordinate=there)
    spans, found = repair(CHAIN, [2], *alive, *spares, metrics=Metrics(coordinate=here))
    assert spans == [(4, 8, [(peer(8), 4, 8)])]
    assert found[0].hops[0].terms.network_s < 0.001


def test_with_no_spare_left_the_live_servers_are_planned_anew():
    spans, _ = repair(chain((1, 0, 6), (2, 6, 12)), [2], server(1, 0, 12, 12), server(2, 6, 12, 12))
    assert spans == [(0, 12, [(peer(1), 0, 12)])]


@pytest.mark.parametrize("seed", range(8))
def test_repair_of_random_swarms_gives_a_whole_chain_again(seed):
    rng = random.Random(seed)
    swarm, metrics = planet(rng, 60, 40, 8, cities=4), Metrics(coordinate=Coordinate(height=0.005))
    try:
        before = plan(PlanRequest(), swarm, metrics, now=NOW)
    except NoRoute:
        pytest.skip("this swarm never covered the model")
    failed = set(rng.sample(before.peers, 2))
    try:
        repairs = plan_repair(before.hops, failed, swarm, metrics, PlanRequest(), now=NOW)
    except NoRoute:
        assert swarm.where(deny=failed).missing()
        return
    runs = [(h.start, h.end, h.peer) for h in before.hops if h.peer not in failed]
    for fix in repairs:
        runs = [run for run in runs if not fix.start <= run[0] < fix.end]
        runs += [(h.start, h.end, h.peer) for h in fix.hops]
    runs.sort()
    assert runs[0][0] == 0
    assert runs[-1][1] == 40
    assert all(a[1] == b[0] for a, b in itertools.pairwise(runs))
    assert len({run[2] for run in runs}) == len(runs)
    assert not failed & {run[2] for run in runs}
