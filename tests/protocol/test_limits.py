"""Scopes and reservations, exact at their bounds, against a model that just adds up."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from swarmnode.protocol.errors import LocalProtocolError, Refused
from swarmnode.protocol.limits import SYSTEM, TRANSIENT, Kind, Limiter, OverLimit, Resource, Scope, WindowBudget

CONNECTIONS, MEMORY = Resource.CONNECTIONS, Resource.MEMORY
PEER = Scope(Kind.PEER, "a")
LIMITS = {
    Kind.SYSTEM: {CONNECTIONS: 4, MEMORY: 100},
    Kind.TRANSIENT: {CONNECTIONS: 2},
    Kind.PEER: {CONNECTIONS: 2, MEMORY: 60},
    Kind.SUBNET: {CONNECTIONS: 3},
}


def limiter():
    return Limiter(lambda scope: LIMITS[scope.kind])


def test_a_limit_is_exact_and_room_comes_back():
    scopes = limiter()
    held = [scopes.reserve([SYSTEM], {CONNECTIONS: 1}) for _ in range(4)]
    with pytest.raises(OverLimit, match="limit of 4 connections for system") as caught:
        scopes.reserve([SYSTEM], {CONNECTIONS: 1})
    assert caught.value.reason == "system-connections"
    assert isinstance(caught.value, Refused)
    held[0].release()
    held[0].release()
    scopes.reserve([SYSTEM], {CONNECTIONS: 1})
    with pytest.raises(OverLimit):
        scopes.reserve([SYSTEM], {CONNECTIONS: 1})


def test_a_refusal_takes_nothing_anywhere():
    scopes = limiter()
    for _ in range(2):
        scopes.reserve([PEER], {CONNECTIONS: 1})
    with pytest.raises(OverLimit) as caught:
        scopes.reserve([SYSTEM, PEER], {CONNECTIONS: 1})
    assert caught.value.scope == PEER
    assert scopes.used(SYSTEM, CONNECTIONS) == 0


def test_moving_counts_in_the_new_scopes_only():
    scopes = limiter()
    one = scopes.reserve([SYSTEM, TRANSIENT], {CONNECTIONS: 1})
    one.move([SYSTEM, PEER])
    assert [scopes.used(scope, CONNECTIONS) for scope in (SYSTEM, TRANSIENT, PEER)] == [1, 0, 1]
    scopes.reserve([PEER], {CONNECTIONS: 1})
    two = scopes.reserve([SYSTEM, TRANSIENT], {CONNECTIONS: 1})
    with pytest.raises(OverLimit):
        two.move([SYSTEM, PEER])
    assert two.scopes == (SYSTEM, TRANSIENT)
    assert scopes.used(TRANSIENT, CONNECTIONS) == 1


def test_what_was_drawn_goes_back_with_the_rest():
    scopes = limiter()
    held = scopes.reserve([SYSTEM, PEER], {CONNECTIONS: 1, MEMORY: 10})
    assert held.draw(MEMORY, 50)
    assert not held.draw(MEMORY, 1)  # the peer's 60
    held.give_back(MEMORY, 5)
    assert held.draw(MEMORY, 5)
    held.give_back(MEMORY, 60)
    assert MEMORY not in held.amounts
    with pytest.raises(LocalProtocolError, match="given back"):
        held.give_back(MEMORY, 1)
    held.release()
    held.give_back(MEMORY, 10)  # a window that ends after its connection
    assert not held.draw(MEMORY, 1)
    with pytest.raises(LocalProtocolError, match="released"):
        held.move([PEER])
    assert len(scopes) == 0


def test_windows_draw_on_every_scope_and_their_own_limit():
    scopes = limiter()
    held = scopes.reserve([SYSTEM, PEER], {CONNECTIONS: 1})
    budget = WindowBudget(held, 50)
    assert not budget.draw(51)
    assert budget.draw(50)
    assert not budget.draw(1)
    assert scopes.used(PEER, MEMORY) == budget.used == 50
    budget.give_back(50)
    other = scopes.reserve([PEER], {MEMORY: 20})
    assert not budget.draw(45)
    assert budget.used == 0
    other.release()
    assert budget.draw(45)


class Reservations(RuleBasedStateMachine):
    """Random reserving, moving, drawing, releasing: used = sum over what is held, and never over a limit."""

    SCOPES = (SYSTEM, TRANSIENT, PEER, Scope(Kind.PEER, "b"), Scope(Kind.SUBNET, "1"))
    some = st.lists(st.sampled_from(SCOPES), unique=True, max_size=4)

    def __init__(self):
        super().__init__()
        self.limiter = limiter()
        self.held = []

    def model(self):
        used = Counter()
        for reservation in self.held:
            for scope in reservation.scopes:
                for resource, amount in reservation.amounts.items():
                    used[scope, resource] += amount
        return used

    def fits(self, scopes, amounts):
        used = self.model()
        return all(
            not amount or used[scope, resource] + amount <= LIMITS[scope.kind].get(resource, 10**9)
            for scope in scopes
            for resource, amount in amounts.items()
        )

    @rule(scopes=some, connections=st.integers(0, 2), memory=st.integers(0, 70))
    def reserve(self, scopes, connections, memory):
        amounts = {CONNECTIONS: connections, MEMORY: memory}
        fits = self.fits(scopes, amounts)
        try:
            self.held.append(self.limiter.reserve(scopes, amounts))
            assert fits
        except OverLimit:
            assert not fits

    @precondition(lambda self: self.held)
    @rule(data=st.data(), scopes=some)
    def move(self, data, scopes):
        chosen = data.draw(st.sampled_from(self.held))
        fits = self.fits([scope for scope in scopes if scope not in chosen.scopes], chosen.amounts)
        try:
            chosen.move(scopes)
            assert fits
        except OverLimit:
            assert not fits

    @precondition(lambda self: self.held)
    @rule(data=st.data(), amount=st.integers(0, 50))
    def draw(self, data, amount):
        chosen = data.draw(st.sampled_from(self.held))
        fits = self.fits(chosen.scopes, {MEMORY: amount})
        assert chosen.draw(MEMORY, amount) == fits

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data):
        chosen = data.draw(st.sampled_from(self.held))
        chosen.give_back(MEMORY, data.draw(st.integers(0, chosen.amounts.get(MEMORY, 0))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        chosen = data.draw(st.sampled_from(self.held))
        chosen.release()
        self.held.remove(chosen)

    @invariant()
    def counts_are_the_models(self):
        used = self.model()
        for scope in self.SCOPES:
            for resource in (CONNECTIONS, MEMORY):
                amount = self.limiter.used(scope, resource)
                assert amount == used[scope, resource]
                assert amount <= LIMITS[scope.kind].get(resource, 10**9)

    def teardown(self):
        for reservation in self.held:
            reservation.release()
        assert len(self.limiter) == 0


TestReservations = Reservations.TestCase
TestReservations.settings = settings(max_examples=60, stateful_step_count=30)
