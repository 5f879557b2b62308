"""Who may come in: limits by source and identity exact at their bounds, trusted peers, descriptors."""

import logging
import re
from pathlib import Path

import pytest
from helpers.hosts import key
from swarmnode.node.gate import Gate
from swarmnode.node.limits import (
    CONNECTION_MEMORY,
    DESCRIPTOR_RESERVE,
    MAX_ALLOWED,
    MIN_CONNECTIONS,
    AllowList,
    HostLimits,
    Rules,
)
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.limits import ALLOWED, SYSTEM, TRANSIENT, Limiter, OverLimit, Resource
from swarmnode.protocol.multiaddr import Multiaddr

ROOT = Path(__file__).parents[2]
IN, ALL = Resource.CONNECTIONS_IN, Resource.CONNECTIONS


class Entry:
    """A gate with a clock that tests move."""

    def __init__(self, *allow, **limits):
        self.now = 0.0
        self.limits = HostLimits(**limits)
        self.limiter = Limiter(Rules(self.limits))
        self.gate = Gate(self.limiter, self.limits, AllowList(allow), now=lambda: self.now)

    def admit(self, ip):
        kind = "ip6" if ":" in ip else "ip4"
        return self.gate.admit(Multiaddr.parse(f"/{kind}/{ip}/tcp/9"))

    def refused(self, ip):
        with pytest.raises(OverLimit) as caught:
            self.admit(ip)
        return caught.value.reason

    def proven(self, ip, number):
        ticket = self.admit(ip)
        self.gate.prove(ticket, key(number).peer_id)
        return ticket


def test_addresses_and_subnets_have_exact_limits():
    entry = Entry(connections_per_ip=2, connections_per_subnet=3)
    held = [entry.admit("9.9.9.1"), entry.admit("9.9.9.1")]
    assert entry.refused("9.9.9.1") == "address-connections-in"
    held.append(entry.admit("9.9.9.2"))
    assert entry.refused("9.9.9.3") == "subnet-connections-in"
    entry.admit("9.9.8.1").reservation.release()
    held[0].reservation.release()
    entry.now = 1.0
    held[0] = entry.admit("9.9.9.1")
    assert entry.refused("9.9.9.3") == "subnet-connections-in"
    for ticket in held:
        ticket.reservation.release()
    assert len(entry.limiter) == 0


def test_ipv6_counts_by_56_and_48_bits():
    entry = Entry(connections_per_ip=1, connections_per_subnet=2)
    entry.admit("2001:db8:1:a00::1")
    assert entry.refused("2001:db8:1:aff::2") == "address-connections-in"
    entry.admit("2001:db8:1:b00::1")
    assert entry.refused("2001:db8:1:c00::1") == "subnet-connections-in"
    entry.admit("2001:db8:2::1")


def test_an_ipv4_address_in_ipv6_clothes_is_the_same():
    entry = Entry(connections_per_ip=1)
    entry.admit("9.9.9.1")
    assert entry.refused("::ffff:9.9.9.1") == "address-connections-in"


def test_loopback_is_exempt_unless_told():
    entry = Entry(connections_per_ip=1)
    for _ in range(3):
        entry.admit("127.0.0.1")
        entry.admit("::1")
    entry = Entry(connections_per_ip=1, limit_loopback=True)
    entry.admit("127.0.0.1")
    assert entry.refused("127.0.0.1") == "address-connections-in"
    entry.admit("127.0.0.2")


def test_sources_that_connect_again_and_again_are_slowed():
    entry = Entry(connections_per_ip=2, accepts_per_ip=1.0, connections_per_subnet=3, accepts_per_subnet=2.0)
    for _ in range(2):
        entry.admit("9.9.9.1").reservation.release()
    assert entry.refused("9.9.9.1") == "address-rate"
    for _ in range(1):
        entry.admit("9.9.9.2").reservation.release()
    assert entry.refused("9.9.9.3") == "subnet-rate"
    assert len(entry.limiter) == 0
    entry.now = 1.0
    entry.admit("9.9.9.1").reservation.release()
    assert entry.refused("9.9.9.1") == "address-rate"
    for _ in range(100):
        entry.admit("127.0.0.1").reservation.release()


def test_whoever_broke_the_rules_waits():
    entry = Entry(connections_per_ip=10, accepts_per_ip=1.0)
    entry.admit("9.9.9.1").reservation.release()
    for _ in range(5):
        entry.gate.blame(Multiaddr.parse("/ip4/9.9.9.1/tcp/1"))
    entry.now = 10.9
    assert entry.refused("9.9.9.1") == "address-rate"
    entry.now = 11.0
    entry.admit("9.9.9.1")
    entry.gate.blame(Multiaddr.parse("/ip4/127.0.0.1/tcp/1"))
    entry.admit("127.0.0.1")


def test_handshakes_and_connections_have_exact_limits():
    entry = Entry(connections=3, connections_in=2, handshakes=1)
    waiting = entry.admit("9.9.9.1")
    assert entry.refused("9.9.9.2") == "transient-connections-in"
    entry.gate.prove(waiting, key(1).peer_id)
    entry.proven("9.9.9.2", 2)
    assert entry.refused("9.9.9.3") == "system-connections-in"
    entry.gate.admit_dial(None)
    with pytest.raises(OverLimit, match="3 connections for system"):
        entry.gate.admit_dial(None)
    assert entry.limiter.used(TRANSIENT, IN) == 0


def test_one_identity_has_an_exact_number_of_connections_from_wherever():
    entry = Entry(connections_per_peer=2)
    first = entry.proven("9.9.9.1", 1)
    entry.proven("9.9.8.1", 1)
    third = entry.admit("9.9.7.1")
    with pytest.raises(OverLimit) as caught:
        entry.gate.prove(third, key(1).peer_id)
    assert caught.value.reason == "peer-connections"
    first.reservation.release()
    entry.gate.prove(third, key(1).peer_id)


def test_memory_of_buffers_is_a_limit_too():
    entry = Entry(memory=2 * CONNECTION_MEMORY)
    entry.admit("127.0.0.1")
    entry.admit("127.0.0.1")
    assert entry.refused("127.0.0.1") == "system-memory"


def test_trusted_addresses_have_room_of_their_own():
    entry = Entry("10.0.0.0/8", "2001:db8::/32", connections=1, connections_per_ip=1, allowed_connections=2)
    entry.proven("9.9.9.1", 1)
    assert entry.refused("9.9.8.1") == "system-connections"
    held = [entry.proven("10.1.2.3", 2), entry.proven("2001:db8::1", 3)]
    assert entry.limiter.used(ALLOWED, ALL) == 2
    assert entry.limiter.used(SYSTEM, ALL) == 1
    assert entry.refused("10.1.2.3") == "allowed-connections"
    held[0].reservation.release()
    entry.proven("10.9.9.9", 4)


def test_trusted_addresses_are_not_bound_by_their_number():
    entry = Entry("10.0.0.0/8", connections_per_ip=1)
    for number in range(3):
        entry.proven("10.1.2.3", number)
    assert entry.limiter.used(SYSTEM, ALL) == 1


def test_trusted_peers_get_in_from_anywhere_and_strangers_only_as_far_as_their_handshake():
    friend, stranger = key(1).peer_id, key(2).peer_id
    entry = Entry(str(friend), connections=1, allowed_connections=1, allowed_handshakes=2)
    entry.proven("9.9.9.1", 3)
    waiting = [entry.admit("9.9.9.2"), entry.admit("9.9.9.3")]
    assert entry.refused("9.9.9.4") == "allowed-transient-connections-in"
    with pytest.raises(OverLimit) as caught:
        entry.gate.prove(waiting[0], stranger)
    assert caught.value.reason == "system-connections"
    waiting[0].reservation.release()
    entry.gate.prove(waiting[1], friend)
    assert entry.limiter.used(ALLOWED, ALL) == 1
    again = entry.admit("9.9.9.5")
    with pytest.raises(OverLimit) as caught:
        entry.gate.prove(again, friend)
    assert caught.value.reason == "allowed-connections"


def test_trusted_peers_can_be_dialed_when_all_is_full():
    friend = key(1).peer_id
    entry = Entry(str(friend), connections=1)
    entry.gate.admit_dial(None)
    with pytest.raises(OverLimit):
        entry.gate.admit_dial(key(2).peer_id)
    ticket = entry.gate.admit_dial(friend)
    entry.gate.prove(ticket, friend)
    assert entry.limiter.used(ALLOWED, ALL) == 1


@pytest.mark.parametrize("entry", ["", "example.com", "10.0.0.0/33", "/ip4/1.2.3.4/tcp/1", "12D3KooW"])
def test_what_cannot_be_allowed_is_named(entry):
    with pytest.raises(ConfigError, match=r"cannot be allowed: use a peer id"):
        AllowList([entry])


def test_the_allow_list_is_bounded():
    AllowList(["10.0.0.1"] * MAX_ALLOWED)
    with pytest.raises(ConfigError, match="over"):
        AllowList(["10.0.0.1"] * (MAX_ALLOWED + 1))


def test_limits_fit_the_descriptors_and_say_so(caplog):
    limits = HostLimits()
    needed = limits.connections + limits.allowed_connections + limits.dials + DESCRIPTOR_RESERVE
    assert limits.fitted(needed) is limits
    assert limits.fitted(None) is limits
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        lowered = limits.fitted(256)
    assert lowered.connections + lowered.allowed_connections + lowered.dials <= 256 - DESCRIPTOR_RESERVE
    assert lowered.low_water < lowered.high_water < lowered.connections
    assert lowered.connections_in < lowered.connections
    assert "instead of 1024" in caplog.text
    with pytest.raises(ConfigError, match="ulimit -n"):
        limits.fitted(DESCRIPTOR_RESERVE + MIN_CONNECTIONS - 1)


def test_limits_that_make_no_sense_are_named():
    with pytest.raises(ConfigError, match=r"HostLimits.memory is -1"):
        HostLimits(memory=-1)
    with pytest.raises(ConfigError, match=r"HostLimits.low_water is 800"):
        HostLimits(low_water=800)
    HostLimits(allowed_connections=0, allowed_handshakes=0, grace_s=0, handshake_grace_s=0)


def test_every_reason_is_documented():
    page = (ROOT / "docs/spec/transport.md").read_text()
    documented = set(re.findall(r"`([a-z-]+)`", page.partition("### Reasons")[2].partition("### ")[0]))
    scopes = {f"{kind}-{resource}" for kind, limits in Rules(HostLimits())._table.items() for resource in limits}
    code = "".join((ROOT / "node" / name).read_text() for name in ("wires.py", "handlers.py", "transport/wire.py"))
    cuts = set(re.findall(r'cut_for = (?:self.cut_for or )?"([a-z-]+)"|_refuse\(stream, "([a-z-]+)"', code))
    named = {name for pair in cuts for name in pair if name}
    assert len(named) >= 7
    assert (
        named | scopes | {"address-rate", "subnet-rate", "relay-rate", "tasks-full", "protocol-peer-streams-in"}
        == documented
    )
