"""What facts about a network mean: the kind of router, each finding with cause and remedy, levels and exit codes."""

import json
from dataclasses import replace

import pytest
from swarmnode.node.nat.findings import NOTHING, Facts, Kind, Level, Peer, Seen, findings, kind_of
from swarmnode.node.nat.mapping import PortState
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.verdict import Reach, Source, Verdict


def addr(text):
    return Multiaddr.parse(text)


INSIDE, OUTSIDE = addr("/ip4/192.168.1.7/tcp/4001"), addr("/ip4/203.0.113.11/tcp/4001")
ONE, TWO = addr("/ip4/203.0.113.1/tcp/4001"), addr("/ip4/198.51.100.1/tcp/4001")
YES, NO = Verdict(Reach.PUBLIC, 0.5, 3, 0), Verdict(Reach.PRIVATE, 0.5, 0, 3)
HOME = Facts(
    listening=(INSIDE,),
    seen=(Seen(ONE, OUTSIDE), Seen(TWO, OUTSIDE)),
    verdict=YES,
    addresses=((OUTSIDE, Source.MAPPED, YES),),
    port=PortState(gateway="192.168.1.1", via="PCP", outside=OUTSIDE),
    testers=2,
    peers=(Peer("12D3", ONE, False, 0.03), Peer("12D4", TWO, False, 0.05)),
    skew_s=3.0,
    mtu=1500,
)
CLOSED = replace(
    HOME, verdict=NO, addresses=((OUTSIDE, Source.GUESSED, NO),), port=PortState(gateway="192.168.1.1", failure="x")
)


def of(facts, subject):
    (found,) = [finding for finding in findings(facts) if finding.subject == subject]
    return found


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        ((), Kind.UNKNOWN),
        ((Seen(ONE, OUTSIDE),), Kind.TRANSLATED),
        ((Seen(ONE, OUTSIDE), Seen(ONE, OUTSIDE)), Kind.TRANSLATED),
        ((Seen(ONE, OUTSIDE), Seen(TWO, OUTSIDE)), Kind.CONE),
        ((Seen(ONE, OUTSIDE), Seen(TWO, addr("/ip4/203.0.113.11/tcp/4002"))), Kind.SYMMETRIC),
        ((Seen(ONE, INSIDE),), Kind.OPEN),
        ((Seen(ONE, addr("/ip6/2600::1/tcp/1")), Seen(TWO, addr("/ip6/2600::1/tcp/1"))), Kind.CONE),
        ((Seen(ONE, addr("/ip6/2600::1/tcp/1")), Seen(TWO, OUTSIDE)), Kind.TRANSLATED),
    ],
)
def test_the_kind_of_network(seen, kind):
    assert kind_of(seen, (INSIDE,)) is kind


def test_a_good_home_has_nothing_bad():
    page = findings(HOME)
    assert [finding.subject for finding in page if finding.level is Level.BAD] == []
    assert of(HOME, "reachable").what == f"yes, at {OUTSIDE} (confidence 50%)"
    assert of(HOME, "port mapping").what == f"PCP: {OUTSIDE}"


CASES = {
    "no swarm": (replace(HOME, trouble="no answer"), "swarm", Level.BAD, "no answer"),
    "symmetric": (
        replace(HOME, seen=(Seen(ONE, OUTSIDE), Seen(TWO, addr("/ip4/203.0.113.11/tcp/9")))),
        "network",
        Level.NOTE,
        "nobody can foresee the port",
    ),
    "closed router": (CLOSED, "reachable", Level.BAD, "the router lets nobody in to TCP port 4001"),
    "firewall": (replace(CLOSED, listening=(OUTSIDE,)), "reachable", Level.BAD, "a firewall"),
    "firewall seen from outside": (replace(CLOSED, seen=(Seen(ONE, INSIDE),)), "reachable", Level.BAD, "a firewall"),
    "nobody to ask": (replace(HOME, verdict=NOTHING, testers=0), "reachable", Level.NOTE, "no connected peer"),
    "no clear answer": (replace(HOME, verdict=NOTHING), "reachable", Level.NOTE, "2 peers dial on request"),
    "carrier": (
        replace(HOME, port=PortState(gateway="1.1.1.1", via="PCP", outside=addr("/ip4/100.64.9.9/tcp/1"))),
        "port mapping",
        Level.BAD,
        "shares addresses among customers",
    ),
    "two routers": (
        replace(HOME, port=PortState(gateway="1.1.1.1", via="UPnP", outside=addr("/ip4/192.168.0.9/tcp/1"))),
        "port mapping",
        Level.BAD,
        "another router",
    ),
    "refused": (CLOSED, "port mapping", Level.NOTE, "x"),
    "closed ipv6": (
        replace(
            CLOSED,
            listening=(INSIDE, addr("/ip6/2600::7/tcp/4001")),
            addresses=((addr("/ip6/2600::7/tcp/4001"), Source.LISTEN, NO),),
        ),
        "ipv6",
        Level.NOTE,
        "a firewall, usually the router's",
    ),
    "no ipv6": (HOME, "ipv6", Level.NOTE, "no public IPv6 address"),
    "no relay": (CLOSED, "relay", Level.BAD, "no relay among the known nodes"),
    "far away": (
        replace(HOME, peers=(Peer("12D3", ONE, False, 0.4),)),
        "round trips",
        Level.NOTE,
        "far away",
    ),
    "clock ahead": (replace(HOME, skew_s=100.0), "clock", Level.BAD, "date is wrong"),
    "clock behind": (replace(HOME, skew_s=-100.0), "clock", Level.BAD, "date is wrong"),
    "narrow": (replace(HOME, mtu=900), "mtu", Level.NOTE, "a tunnel"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_has_a_cause_and_a_remedy(name):
    facts, subject, level, cause = CASES[name]
    found = of(facts, subject)
    assert found.level is level
    assert cause in found.cause
    assert found.fix


def test_every_page_says_something_about_every_subject():
    subjects = ["swarm", "network", "reachable", "port mapping", "ipv6", "relay"]
    for facts in (Facts(), HOME, CLOSED, *(case[0] for case in CASES.values())):
        page = findings(facts)
        assert [finding.subject for finding in page][: len(subjects)] == subjects
        assert (
            all(finding.cause for finding in page if finding.level is not Level.OK or finding.fix) or facts == Facts()
        )


def test_a_relayed_node_is_told_its_way_in():
    relayed = replace(CLOSED, relays=("/ip4/203.0.113.1/tcp/4001/p2p/X/p2p-circuit",))
    assert of(relayed, "relay").level is Level.OK
    assert "p2p-circuit" in of(relayed, "relay").what


def test_the_report_is_json():
    from swarmnode.node.nat import doctor

    body = json.loads(json.dumps(doctor._json(CLOSED, findings(CLOSED))))
    assert (body["ok"], body["network"], body["reach"]) == (False, "cone", "private")
    assert {finding["level"] for finding in body["findings"]} <= {"ok", "note", "bad"}
