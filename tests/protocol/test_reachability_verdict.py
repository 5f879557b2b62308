"""The verdict: what it takes, what turns it over, liars, who is asked, and that nothing grows."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import verdict
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.verdict import Assessor, Judge, Outcome, Question, Reach, Server, Source, turned

A, B, C = (Multiaddr.parse(f"/ip4/203.0.113.{number}/tcp/4001") for number in (1, 2, 3))


def server(number, network=None, through=False):
    return Server(PeerId(b"\x12\x20" + number.to_bytes(32, "big")), number if network is None else network, through)


def heard(*votes):
    judge = Judge()
    for at, (network, reached) in enumerate(votes):
        judge.heard(network, reached, float(at))
    return judge.verdict(float(len(votes)))


@pytest.mark.parametrize(
    ("votes", "reach"),
    [
        ([], Reach.UNKNOWN),
        ([("a", True)], Reach.PUBLIC),
        ([("a", False)], Reach.UNKNOWN),
        ([("a", False), ("a", False)], Reach.PRIVATE),
        ([("a", False), ("b", False)], Reach.PRIVATE),
        ([("a", True), ("b", False)], Reach.PUBLIC),
        ([("a", True), ("b", False), ("b", False)], Reach.PUBLIC),
        ([("a", True), ("b", False), ("b", False), ("c", False)], Reach.PRIVATE),
        ([("a", True), ("a", False)], Reach.PUBLIC),
        ([("a", True), ("a", False), ("a", False)], Reach.PRIVATE),
        ([("a", False), ("a", False), ("b", True)], Reach.PRIVATE),
        ([("a", False), ("a", False), ("b", True), ("b", True)], Reach.PUBLIC),
        ([("a", False), ("a", False), ("a", True)], Reach.PUBLIC),
    ],
)
def test_what_it_takes(votes, reach):
    assert heard(*votes).reach is reach


def test_one_liar_does_not_take_a_proven_address_away():
    votes = [("honest", True), ("honest", True), *[("liar", False)] * 50]
    assert heard(*votes).reach is Reach.PUBLIC


def test_confidence_grows_with_networks_and_is_full_with_three():
    one = heard(("a", True))
    two = heard(("a", True), ("a", True))
    six = heard(*[(network, True) for network in "abc"] * 2)
    assert 0 < one.confidence < two.confidence < six.confidence == 1.0
    assert heard(("a", False), ("b", False)).confidence == pytest.approx(2 / 6)


def test_votes_are_forgotten():
    judge = Judge()
    judge.heard("a", True, 0.0)
    assert judge.verdict(verdict.VOTE_S - 1).reach is Reach.PUBLIC
    assert judge.verdict(verdict.VOTE_S).reach is Reach.UNKNOWN


def test_networks_are_bounded():
    judge = Judge()
    for number in range(verdict.MAX_VOTERS + 5):
        judge.heard(number, True, 0.0)
    assert judge.verdict(0.0).yes == verdict.MAX_VOTERS
    assert (judge.weight_of(0), judge.weight_of(5)) == (0, 1)


@given(st.sampled_from(list(Reach)), st.integers(0, 40), st.integers(0, 40))
def test_a_verdict_rests(reach, yes, no):
    """The same votes never turn it twice: no flapping without news."""
    first = turned(reach, yes, no)
    assert turned(first, yes, no) is first


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=60))
def test_a_single_vote_never_makes_private(votes):
    judge, before = Judge(), Reach.UNKNOWN
    for network, reached in votes:
        judge.heard(network, reached, 0.0)
        found = judge.verdict(0.0)
        if found.reach is Reach.PRIVATE and before is not Reach.PRIVATE:
            assert found.no >= max(2, found.yes + 1)
        before = found.reach


# Whom to ask.


def assessor():
    made = Assessor(random.Random(0))
    made.offer({A: Source.LISTEN})
    return made


def run(made, servers, truth, until, now=0.0):
    """Answer questions truthfully; returns what was asked and when."""
    asked = []
    while (now := made.next_timer(servers, now)) <= until:
        question = made.next_question(servers, now)
        assert question is not None, "the timer promised something"
        asked.append((now, question.server.network, question.address))
        made.heard(question, truth(question), now)
    return asked


def test_different_networks_are_asked_first():
    made = assessor()
    servers = [server(1), server(2, network=1), server(3), server(4, through=True)]
    asked = run(made, servers, lambda _: Outcome.REACHED, 40)
    assert [network for _, network, _ in asked[:3]] in ([1, 3, 4], [3, 1, 4])
    assert made.node(40).reach is Reach.PUBLIC


def test_the_likeliest_addresses_come_first():
    made = Assessor(random.Random(0))
    made.offer({A: Source.GUESSED, B: Source.MAPPED, C: Source.OBSERVED})
    servers = [server(number) for number in range(9)]
    asked = run(made, servers, lambda _: Outcome.FAILED, 0)
    assert [address for _, _, address in asked] == [B, C, A]


def test_questions_become_rare_but_never_end():
    made = assessor()
    asked = run(made, [server(1), server(2)], lambda _: Outcome.REACHED, 5000)
    times = [now for now, _, _ in asked]
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps[0] < 20
    assert gaps[-1] == verdict.RECHECK_S
    assert len(asked) < 20


def test_one_server_decides_when_it_is_all_there_is():
    made = assessor()
    run(made, [server(1)], lambda _: Outcome.FAILED, 60)
    found = made.node(60)
    assert (found.reach, found.confidence) == (Reach.PRIVATE, pytest.approx(1 / 3))


def test_a_refusal_concerns_one_address_only():
    made = Assessor(random.Random(0))
    made.offer({A: Source.LISTEN, B: Source.GUESSED})
    truth = {A: Outcome.REFUSED, B: Outcome.REACHED}
    asked = run(made, [server(1)], lambda question: truth[question.address], 60)
    assert {address for _, _, address in asked} == {A, B}
    assert [address for _, _, address in asked].count(A) == 1
    assert made.reachable(60) == (B,)


@pytest.mark.parametrize(("outcome", "pause"), [(Outcome.BUSY, verdict.BUSY_S), (Outcome.NOTHING, verdict.UNWILLING_S)])
def test_who_does_not_answer_is_left_alone(outcome, pause):
    made = assessor()
    asked = run(made, [server(1)], lambda _: outcome, pause)
    assert [now for now, _, _ in asked] == [0.0, pause]
    assert made.node(pause).reach is Reach.UNKNOWN


def test_private_waits_for_the_other_candidates():
    made = Assessor(random.Random(0))
    made.offer({A: Source.MAPPED, B: Source.GUESSED})
    for number in (1, 2):
        made.heard(Question(server(number), B), Outcome.FAILED, 0.0)
    assert made.node(0.0).reach is Reach.UNKNOWN
    run(made, [server(1)], lambda _: Outcome.REFUSED if _.address == A else Outcome.FAILED, 2 * verdict.UNWILLING_S)
    assert made.node(2 * verdict.UNWILLING_S).reach is Reach.PRIVATE


def test_an_address_that_is_gone_takes_its_votes_along():
    made = assessor()
    made.heard(Question(server(1), A), Outcome.REACHED, 0.0)
    made.offer({B: Source.LISTEN})
    assert made.reachable(0.0) == ()
    made.heard(Question(server(1), A), Outcome.REACHED, 0.0)
    made.offer({A: Source.LISTEN})
    assert made.node(0.0).reach is Reach.UNKNOWN


def test_a_change_of_network_asks_again_at_once():
    made = assessor()
    servers = [server(1)]
    run(made, servers, lambda _: Outcome.FAILED, 3000)
    assert made.next_question(servers, 3001.0) is None
    made.recheck(3001.0)
    assert made.next_question(servers, 3001.0) is not None


def test_an_opened_port_is_found_again():
    made = assessor()
    servers = [server(number) for number in range(4)]
    run(made, servers, lambda _: Outcome.FAILED, 1000)
    assert made.node(1000).reach is Reach.PRIVATE
    run(made, servers, lambda _: Outcome.REACHED, 4000, now=1000)
    assert made.node(4000).reach is Reach.PUBLIC


def test_candidates_refusals_and_peers_are_bounded():
    made = Assessor(random.Random(0))
    made.offer({Multiaddr.parse(f"/ip4/203.0.113.{n}/tcp/1"): Source.GUESSED for n in range(1, 100)})
    assert len(made.candidates) == verdict.MAX_CANDIDATES
    first = next(iter(made.candidates))
    for number in range(verdict.MAX_REFUSALS + 3):
        made.heard(Question(server(number), first), Outcome.REFUSED, 0.0)
    assert len(made._candidates[first].refused) == verdict.MAX_REFUSALS
    for number in range(verdict.MAX_ASKED + 3):
        made.heard(Question(server(number), first), Outcome.NOTHING, 0.0)
    assert len(made._not_before) == verdict.MAX_ASKED


def test_a_new_candidate_does_not_unsettle_a_private_node():
    made = assessor()
    for number in (1, 2):
        made.heard(Question(server(number), A), Outcome.FAILED, 0.0)
    assert made.node(0.0).reach is Reach.PRIVATE
    made.offer({A: Source.LISTEN, B: Source.GUESSED})
    assert made.node(0.0).reach is Reach.PRIVATE
    made.heard(Question(server(1), B), Outcome.REACHED, 0.0)
    assert made.node(0.0).reach is Reach.PUBLIC
    made.offer({C: Source.LISTEN})
    assert made.node(0.0).reach is Reach.UNKNOWN


def test_after_a_change_of_network_answers_under_way_count_nothing_and_old_votes_less():
    made = assessor()
    servers = [server(number) for number in range(3)]
    run(made, servers, lambda _: Outcome.REACHED, 100)
    late = made.next_question(servers, 1000.0)
    assert made.verdicts(1000.0)[A].yes == 6
    made.recheck(1000.0)
    assert made.verdicts(1000.0)[A].yes == 3
    made.heard(late, Outcome.FAILED, 1001.0)
    assert made.verdicts(1001.0)[A].no == 0


def test_whom_we_dialed_first_does_not_outvote_others():
    """A router that lets in whoever was sent something: three were, two were not."""
    judge = Judge()
    for network in "abc" * 2:
        judge.heard(network, True, 0.0, through=True)
    assert judge.verdict(0.0).reach is Reach.PUBLIC, "for want of anybody else"
    for network in "de":
        judge.heard(network, False, 1.0)
    assert judge.verdict(1.0) == verdict.Verdict(Reach.PRIVATE, pytest.approx(2 / 6), 0, 2)
    for network in "de":
        judge.heard(network, True, 2.0)
    assert judge.verdict(2.0).reach is Reach.PUBLIC
