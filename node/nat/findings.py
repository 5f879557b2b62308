"""What the facts about a network mean, and what its owner can do. Pure: facts in, findings out.

Each finding names its subject, what was seen, and for what is not as it should be the cause and the remedy.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Final

from ...protocol.multiaddr import Multiaddr
from ...protocol.reachability import is_public, is_public_ip
from ...protocol.verdict import Reach, Source, Verdict
from .mapping import PortState

SLOW_S: Final = 0.25
"""A median round trip from which on text comes noticeably slower."""
SKEW_S: Final = 30.0
"""A clock that is further off is worth a word; records are refused from 90 s on."""
USUAL_MTU: Final = 1500
LEAST_MTU: Final = 1280
"""What every path of IPv6 must carry."""


NOTHING: Final = Verdict(Reach.UNKNOWN, 0.0, 0, 0)
NO_PORT: Final = PortState()


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Works, could be better."""
    BAD = "bad"


class Kind(StrEnum):
    """What stands between this machine and the others, as two of them see it."""

    OPEN = "open"
    """Nothing that translates addresses."""
    CONE = "cone"
    """A router that shows one port for all destinations."""
    SYMMETRIC = "symmetric"
    """A router that shows another port for each destination."""
    TRANSLATED = "translated"
    """A router; only one peer has told what it sees."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Seen:
    """What one peer says where a connection from our listening port comes from."""

    by: Multiaddr
    address: Multiaddr


@dataclass(frozen=True, slots=True)
class Peer:
    """One connection."""

    peer: str
    address: Multiaddr
    relayed: bool
    rtt_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that was found out."""

    trouble: str = ""
    """Why no swarm was joined; empty: one was."""
    listening: tuple[Multiaddr, ...] = ()
    seen: tuple[Seen, ...] = ()
    verdict: Verdict = NOTHING
    addresses: tuple[tuple[Multiaddr, Source, Verdict], ...] = ()
    port: PortState = NO_PORT
    testers: int = 0
    """Peers in other networks that dial on request."""
    peers: tuple[Peer, ...] = ()
    relays: tuple[str, ...] = ()
    """Our addresses through relays."""
    skew_s: float | None = None
    """How far our clock is ahead of the others'."""
    mtu: int | None = None
    """The least that a path to a peer carries in one packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the page."""

    subject: str
    level: Level
    what: str
    cause: str = ""
    fix: str = ""


def kind_of(seen: Sequence[Seen], listening: Sequence[Multiaddr]) -> Kind:
    """What kind of network this is, for IPv4; for IPv6 only where there is nothing else."""
    four = [one for one in seen if one.address.ip is None or one.address.ip.version == 4] or list(seen)
    if not four:
        return Kind.UNKNOWN
    if any(one.address in listening for one in four):
        return Kind.OPEN
    if len({one.by for one in four}) < 2:
        return Kind.TRANSLATED
    return Kind.CONE if len({one.address for one in four}) == 1 else Kind.SYMMETRIC


def findings(facts: Facts) -> list[Finding]:
    """The page, in order."""
    kind = kind_of(facts.seen, facts.listening)
    checks = (_swarm(facts), _network(facts, kind), _reach(facts, kind), _port(facts), _ipv6(facts), _relay(facts))
    return [finding for check in (*checks, _round_trips(facts), _clock(facts), _mtu(facts)) for finding in check]


def _swarm(facts: Facts) -> Iterator[Finding]:
    if facts.trouble:
        yield Finding(
            subject="swarm",
            level=Level.BAD,
            what="not joined",
            cause=facts.trouble,
            fix="check the address, that the node runs, and that outgoing TCP is allowed here; "
            "the rest of this page is what can be told without a peer",
        )
    else:
        yield Finding(subject="swarm", level=Level.OK, what=f"joined; connected with {len(facts.peers)} peers")


def _network(facts: Facts, kind: Kind) -> Iterator[Finding]:
    outside = ", ".join(sorted({str(one.address.ip) for one in facts.seen if one.address.ip is not None}))
    match kind:
        case Kind.OPEN:
            yield Finding(
                subject="network", level=Level.OK, what=f"open: peers see this machine's own address {outside}"
            )
        case Kind.CONE:
            yield Finding(
                subject="network",
                level=Level.OK,
                what=f"behind a router that shows one port for all (cone), at {outside}: fit for direct paths",
            )
        case Kind.SYMMETRIC:
            yield Finding(
                subject="network",
                level=Level.NOTE,
                what=f"behind a router that shows another port to each peer (symmetric), at {outside}",
                cause="nobody can foresee the port, so a direct connection is possible only to and from peers that "
                "can be reached; others go through relays",
                fix="open a port (see below), use IPv6, or switch off 'strict' or 'symmetric' NAT in the router",
            )
        case Kind.TRANSLATED:
            yield Finding(
                subject="network",
                level=Level.OK,
                what=f"behind a router, at {outside}; one peer only has told what it sees",
            )
        case Kind.UNKNOWN:
            yield Finding(
                subject="network", level=Level.NOTE, what="not known", cause="no peer outside has told where it sees us"
            )


def _reach(facts: Facts, kind: Kind) -> Iterator[Finding]:
    verdict = facts.verdict
    sure = f"confidence {verdict.confidence:.0%}"
    public = [str(address) for address, _, one in facts.addresses if one.reach is Reach.PUBLIC]
    if verdict.reach is Reach.PUBLIC:
        yield Finding(subject="reachable", level=Level.OK, what=f"yes, at {', '.join(public)} ({sure})")
    elif verdict.reach is Reach.PRIVATE:
        yield _closed(facts, kind, sure)
    else:
        cause = "no connected peer in another network dials on request"
        if facts.testers:
            cause = f"{facts.testers} peers dial on request, but gave no clear answer in time"
        yield Finding(
            subject="reachable",
            level=Level.NOTE,
            what="not known",
            cause=cause,
            fix="name a public node of the swarm with --peer, or try again later",
        )


def _closed(facts: Facts, kind: Kind, sure: str) -> Finding:
    listening = next((a for a in facts.listening if a.ip is not None and not a.is_loopback), None)
    port = listening.port if listening is not None else None
    if any(is_public(address) for address in facts.listening if address.ip is not None) or kind is Kind.OPEN:
        return Finding(
            subject="reachable",
            level=Level.BAD,
            what=f"no ({sure})",
            cause=f"the address is a public one, but nobody gets through to TCP port {port}: a firewall",
            fix=f"let TCP port {port} in, on this machine (such as: ufw allow {port}/tcp) and at the provider",
        )
    inside = listening.ip if listening is not None else "this machine"
    return Finding(
        subject="reachable",
        level=Level.BAD,
        what=f"no ({sure})",
        cause=f"the router lets nobody in to TCP port {port}, and opened no port when asked",
        fix=f"switch on UPnP, NAT-PMP or PCP in the router, or forward a TCP port to {inside} by hand and start with "
        "--listen /ip4/0.0.0.0/tcp/<that port>; without, others reach this node through relays",
    )


def _port(facts: Facts) -> Iterator[Finding]:
    port = facts.port
    if port.outside is not None and port.outside.ip is not None and not is_public_ip(port.outside.ip):
        carrier = port.outside.ip in ipaddress.ip_network("100.64.0.0/10")
        yield Finding(
            subject="port mapping",
            level=Level.BAD,
            what=f"{port.via}: {port.outside}, which is a private address",
            cause="the provider shares addresses among customers" if carrier else "there is another router behind it",
            fix="ask the provider for a public IPv4 address, or for IPv6"
            if carrier
            else "set one of the two routers to bridge mode, or open the port in both",
        )
    elif port.outside is not None:
        yield Finding(subject="port mapping", level=Level.OK, what=f"{port.via}: {port.outside}")
    elif port.failure:
        yield Finding(
            subject="port mapping",
            level=Level.NOTE,
            what=f"none from the router {port.gateway}",
            cause=port.failure,
            fix="switch on UPnP, NAT-PMP or PCP in the router's settings",
        )
    elif not port.gateway:
        yield Finding(subject="port mapping", level=Level.OK, what="not needed: no router, or a public address")
    else:
        yield Finding(subject="port mapping", level=Level.NOTE, what=f"the router {port.gateway} has not answered yet")


def _ipv6(facts: Facts) -> Iterator[Finding]:
    own = [a for a in facts.listening if a.ip is not None and a.ip.version == 6 and is_public(a)]
    closed = [a for a, _, one in facts.addresses if a in own and one.reach is Reach.PRIVATE]
    if not own:
        yield Finding(
            subject="ipv6",
            level=Level.NOTE,
            what="none",
            cause="this machine has no public IPv6 address, or the node does not listen on one",
            fix="IPv6 needs no port mapping: switch it on in the router if the provider has it",
        )
    elif closed:
        yield Finding(
            subject="ipv6",
            level=Level.NOTE,
            what=f"{closed[0].ip}, but nobody gets in",
            cause="a firewall, usually the router's",
            fix=f"let TCP port {closed[0].port} in to this address in the router's IPv6 firewall",
        )
    else:
        yield Finding(subject="ipv6", level=Level.OK, what=", ".join(str(address.ip) for address in own))


def _relay(facts: Facts) -> Iterator[Finding]:
    if facts.relays:
        yield Finding(subject="relay", level=Level.OK, what=f"others reach this node through {', '.join(facts.relays)}")
    elif facts.verdict.reach is Reach.PRIVATE:
        yield Finding(
            subject="relay",
            level=Level.BAD,
            what="none, and nobody can dial this node",
            cause="no relay among the known nodes took it",
            fix="name one with --relay, or run a node on a public machine: it is a relay by default",
        )
    else:
        yield Finding(subject="relay", level=Level.OK, what="none needed")


def _round_trips(facts: Facts) -> Iterator[Finding]:
    known = sorted(peer.rtt_s for peer in facts.peers if peer.rtt_s is not None)
    if not known:
        return
    what = f"{known[0] * 1e3:.0f} to {known[-1] * 1e3:.0f} ms, median {median(known) * 1e3:.0f} ms, {len(known)} peers"
    if median(known) < SLOW_S:
        yield Finding(subject="round trips", level=Level.OK, what=what)
    else:
        yield Finding(
            subject="round trips",
            level=Level.NOTE,
            what=what,
            cause="the peers are far away, or the line is busy",
            fix="text takes a round trip per server and token: prefer servers near by (swarmnode route shows them)",
        )


def _clock(facts: Facts) -> Iterator[Finding]:
    if facts.skew_s is None:
        return
    if abs(facts.skew_s) <= SKEW_S:
        yield Finding(subject="clock", level=Level.OK, what="agrees with the others' within half a minute")
    else:
        way = "ahead of" if facts.skew_s > 0 else "behind"
        yield Finding(
            subject="clock",
            level=Level.BAD,
            what=f"about {abs(facts.skew_s):.0f} s {way} the others'",
            cause="this machine's date is wrong; records of others look expired or not valid yet",
            fix="let the system set its clock (such as: timedatectl set-ntp true)",
        )


def _mtu(facts: Facts) -> Iterator[Finding]:
    if facts.mtu is None:
        return
    if facts.mtu >= USUAL_MTU:
        yield Finding(subject="mtu", level=Level.OK, what=f"{facts.mtu} bytes")
    elif facts.mtu >= LEAST_MTU:
        yield Finding(subject="mtu", level=Level.OK, what=f"{facts.mtu} bytes: a tunnel or DSL on the way; harmless")
    else:
        yield Finding(
            subject="mtu",
            level=Level.NOTE,
            what=f"{facts.mtu} bytes",
            cause="a tunnel on the way carries less than every line should",
            fix="raise the tunnel's MTU to 1280 or more",
        )
