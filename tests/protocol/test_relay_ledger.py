"""A relay's books: every limit at its bound, and a random history against a plain recount."""

import random
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.limits import SYSTEM, Kind, OverLimit, Resource, Scope
from swarmnode.protocol.relay_ledger import DAY_S, REQUESTS_BURST, Ledger, NoReservation, RelayLimits, Rushed

PEERS = [PrivateKey.from_seed(n.to_bytes(32, "big")).peer_id for n in range(1, 41)]
TARGET = PEERS[0]
HOUR = 3600


def where(address):
    """The scopes of 10.0.<subnet>.<host>, given as the two numbers."""
    subnet, host = address
    return (Scope(Kind.ADDRESS, f"10.0.{subnet}.{host}/32"), Scope(Kind.SUBNET, f"10.0.{subnet}.0/24"))


def with_place(**limits):
    """Books in which TARGET has a place."""
    ledger = Ledger(RelayLimits(**limits))
    ledger.reserve(TARGET, (), 0.0)
    return ledger


def fill(take, most, reason):
    """`take(n)` must succeed `most` times and not once more; its refusal has this name."""
    for number in range(most):
        take(number)
    with pytest.raises(OverLimit) as caught:
        take(most)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("limits", "address", "reason"),
    [
        ({"reservations": 5}, lambda n: (n, n), "system-reservations"),
        ({"reservations_per_ip": 5}, lambda n: (1, 1), "address-reservations"),
        ({"reservations_per_subnet": 5}, lambda n: (1, n), "subnet-reservations"),
    ],
)
def test_reservations_to_the_last_one(limits, address, reason):
    ledger = Ledger(RelayLimits(**limits))
    fill(lambda n: ledger.reserve(PEERS[n], where(address(n)), 0.0), 5, reason)
    assert (ledger.reservations, ledger.refused) == (5, {reason: 1})
    ledger.reserve(PEERS[3], where(address(3)), 1.0)  # who has a place may renew it in a full house
    assert ledger.release(PEERS[0])
    assert not ledger.release(PEERS[0])
    ledger.reserve(PEERS[9], where(address(0)), 1.0)
    assert ledger.reservations == 5


@pytest.mark.parametrize(
    ("limits", "source", "address", "reason"),
    [
        ({"circuits": 5, "circuits_per_peer": 9}, lambda n: PEERS[n + 1], lambda n: (n, n), "system-circuits"),
        ({"circuits_per_peer": 5}, lambda n: PEERS[n + 1], lambda n: (n, n), "peer-circuits"),  # TARGET's
        ({"circuits_per_ip": 5}, lambda n: PEERS[n + 1], lambda n: (1, 1), "address-circuits"),
        ({"circuits_per_subnet": 5}, lambda n: PEERS[n + 1], lambda n: (1, n), "subnet-circuits"),
    ],
)
def test_circuits_to_the_last_one(limits, source, address, reason):
    ledger = with_place(**limits)
    fill(lambda n: ledger.connect(source(n), TARGET, where(address(n)), 0.0), 5, reason)
    first = ledger.circuits[0]
    ledger.disconnect(first)
    ledger.disconnect(first)
    ledger.connect(source(7), TARGET, where(address(0)), 0.0)
    assert (len(ledger.circuits), ledger.refused) == (5, {reason: 1})


def test_one_source_has_so_many_circuits_whoever_the_targets_are():
    ledger = Ledger(RelayLimits(circuits_per_peer=5))
    for peer in PEERS[:6]:
        ledger.reserve(peer, (), 0.0)
    fill(lambda n: ledger.connect(PEERS[20], PEERS[n], (), 0.0), 5, "peer-circuits")


def test_a_place_ends_at_its_time_unless_renewed():
    ledger = Ledger(RelayLimits(reservation_s=HOUR))
    assert ledger.reserve(TARGET, (), 10.0) == 10 + HOUR
    assert ledger.reserve(TARGET, (), 100.0) == 100 + HOUR
    assert ledger.has(TARGET, 99 + HOUR)
    assert not ledger.has(TARGET, 100 + HOUR)
    with pytest.raises(NoReservation):
        ledger.connect(PEERS[1], TARGET, (), 100 + HOUR)
    assert ledger.expire(100 + HOUR) == [TARGET]
    assert (ledger.reservations, ledger.refused) == (0, {"no-reservation": 1})


def test_a_peer_that_moves_takes_its_place_along():
    ledger = Ledger(RelayLimits(reservations_per_ip=1))
    ledger.reserve(PEERS[1], where((1, 1)), 0.0)
    ledger.reserve(PEERS[1], where((2, 2)), 0.0)
    ledger.reserve(PEERS[2], where((1, 1)), 0.0)
    with pytest.raises(OverLimit):
        ledger.reserve(PEERS[2], where((2, 2)), 0.0)
    assert ledger.has(PEERS[2], 1.0)  # and keeps the one it had


@pytest.mark.parametrize("direction", [0, 1])
def test_bytes_of_a_circuit_to_the_last_one(direction):
    circuit = with_place(circuit_bytes=1000).connect(PEERS[1], TARGET, (), 0.0)
    assert circuit.allow(direction, 999, 0.0) == 999
    assert circuit.allow(1 - direction, 600, 0.0) == 600  # each direction has its own
    assert circuit.allow(direction, 2, 0.0) == 1
    assert circuit.allow(direction, 1, 0.0) == 0
    assert circuit.carried[direction] == 1000


def test_bytes_of_a_day_to_the_last_one():
    ledger = with_place(day_bytes=1000, reservation_s=9 * HOUR * 24)
    one, two = (ledger.connect(PEERS[n], TARGET, (), 0.0) for n in (1, 2))
    assert (one.allow(0, 400, 1.0), two.allow(1, 700, 2.0), one.allow(0, 1, 3.0)) == (400, 600, 0)
    with pytest.raises(OverLimit) as caught:
        ledger.connect(PEERS[3], TARGET, (), DAY_S - 1)
    assert caught.value.reason == "system-day-bytes"
    assert two.allow(0, 5000, DAY_S) == 1000
    assert ledger.bytes == 2000


def test_zero_means_any_amount():
    ledger = with_place(circuit_bytes=0, day_bytes=0)
    assert ledger.connect(PEERS[1], TARGET, (), 0.0).allow(0, 1 << 60, 0.0) == 1 << 60


def test_who_asks_too_often():
    ledger = with_place(requests_per_peer=2.0)
    for _ in range(REQUESTS_BURST - 1):
        ledger.reserve(TARGET, (), 0.0)
    with pytest.raises(Rushed):
        ledger.reserve(TARGET, (), 0.0)
    with pytest.raises(Rushed):
        ledger.connect(TARGET, TARGET, (), 0.0)
    ledger.reserve(TARGET, (), 0.5)
    assert ledger.refused == {"peer-rate": 2}


@pytest.mark.parametrize(
    ("name", "value"), [("circuits", 0), ("circuit_bytes", -1), ("reservation_s", 0), ("requests_per_peer", 0)]
)
def test_limits_are_checked(name, value):
    with pytest.raises(ConfigError, match=f"RelayLimits.{name} is {value}"):
        RelayLimits(**{name: value})


class Books(RuleBasedStateMachine):
    """Any history: never over a limit, never a refusal with room left, nothing left at the end."""

    LIMITS = RelayLimits(
        **{"reservations": 6, "reservations_per_ip": 2, "reservations_per_subnet": 4, "reservation_s": 100},
        **{"circuits": 9, "circuits_per_peer": 4, "circuits_per_ip": 3, "circuits_per_subnet": 6},
        **{"circuit_bytes": 500, "day_bytes": 3000, "requests_per_peer": 1e9},
    )
    peers = st.sampled_from(PEERS[:10])
    addresses = st.tuples(st.integers(1, 3), st.integers(1, 3))

    def __init__(self):
        super().__init__()
        self.ledger = Ledger(self.LIMITS)
        self.now = 0.0
        self.places = {}
        self.circuits = {}
        self.passed = 0
        self.rng = random.Random(0)

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds):
        self.now += seconds
        self.places = {peer: place for peer, place in self.places.items() if place[1] > self.now}

    def room(self, held, scopes, limits):
        counts = Counter(scope for one in held for scope in one)
        return all(counts[scope] < limits[scope.kind] for scope in scopes)

    @rule(peer=peers, address=addresses)
    def reserve(self, peer, address):
        scopes = (SYSTEM, *where(address))
        others = [place[0] for other, place in self.places.items() if other != peer]
        limits = {Kind.SYSTEM: 6, Kind.ADDRESS: 2, Kind.SUBNET: 4}
        try:
            ends = self.ledger.reserve(peer, where(address), self.now)
        except OverLimit:
            assert not self.room(others, scopes, limits)
        else:
            assert self.room(others, scopes, limits)
            self.places[peer] = (scopes, ends)

    @rule(peer=peers)
    def leave(self, peer):
        self.ledger.expire(self.now)
        assert self.ledger.release(peer) is (self.places.pop(peer, None) is not None)

    @rule(source=peers, whom=peers, address=addresses)
    def connect(self, source, whom, address):
        scopes = {SYSTEM, *where(address), Scope(Kind.PEER, source), Scope(Kind.PEER, whom)}
        limits = {Kind.SYSTEM: 9, Kind.PEER: 4, Kind.ADDRESS: 3, Kind.SUBNET: 6}
        room = self.room(self.circuits.values(), scopes, limits) and self.passed < 3000
        try:
            circuit = self.ledger.connect(source, whom, where(address), self.now)
        except NoReservation:
            assert whom not in self.places
        except OverLimit:
            assert whom in self.places
            assert not room
        else:
            assert room
            self.circuits[circuit] = scopes

    @rule(direction=st.integers(0, 1), size=st.integers(0, 400))
    def carry(self, direction, size):
        if self.circuits and self.now < DAY_S:
            circuit = self.rng.choice(list(self.circuits))
            expected = min(size, 500 - circuit.carried[direction], 3000 - self.passed)
            assert circuit.allow(direction, size, self.now) == expected
            self.passed += expected

    @rule()
    def disconnect(self):
        if self.circuits:
            circuit = self.rng.choice(list(self.circuits))
            del self.circuits[circuit]
            self.ledger.disconnect(circuit)

    @invariant()
    def the_same_books(self):
        assert set(self.ledger.circuits) == set(self.circuits)
        assert all(self.ledger.has(peer, self.now) == (peer in self.places) for peer in PEERS[:10])

    def teardown(self):
        for circuit in self.circuits:
            self.ledger.disconnect(circuit)
        for peer in PEERS[:10]:
            self.ledger.release(peer)
        assert len(self.ledger._limiter) == 0
        assert self.ledger._limiter.used(SYSTEM, Resource.CIRCUITS) == 0


TestBooks = Books.TestCase
