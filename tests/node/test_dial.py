"""The dial race under a virtual clock."""

import asyncio

import pytest
from helpers.hosts import hosts
from swarmnode.node.dial import MAX_ADDRESSES, STAGGER_S, DialFailed, Race, order
from swarmnode.protocol.errors import PeerUnreachable, RemoteProtocolError
from swarmnode.protocol.multiaddr import Multiaddr

pytestmark = pytest.mark.virtual

A, B, C = (Multiaddr.parse(f"/memory/{number}") for number in (1, 2, 3))


def race(outcomes, disposed=None):
    """outcomes: address -> (seconds, result or exception)."""

    async def attempt(address):
        delay, result = outcomes[address]
        await asyncio.sleep(delay)
        if isinstance(result, Exception):
            raise result
        return result

    return Race(attempt, (disposed if disposed is not None else []).append)


async def test_the_first_good_address_wins_alone(clock):
    assert await race({A: (0.1, "a"), B: (0, "b")}).run([A, B]) == "a"
    assert clock.now() == pytest.approx(0.1)


async def test_a_slow_address_is_overtaken_after_its_head_start(clock):
    assert await race({A: (9, "a"), B: (0.1, "b")}).run([A, B]) == "b"
    assert clock.now() == pytest.approx(STAGGER_S + 0.1)


async def test_a_failure_starts_the_next_at_once(clock):
    refused = ConnectionRefusedError(111, "Connection refused")
    assert await race({A: (0.01, refused), B: (0.1, "b")}).run([A, B]) == "b"
    assert clock.now() == pytest.approx(0.11)


async def test_the_second_to_finish_is_disposed_of():
    disposed = []
    outcomes = {A: (STAGGER_S + 0.1, "a"), B: (0.1, "b")}
    assert await race(outcomes, disposed).run([A, B]) in "ab"
    assert len(disposed) <= 1


async def test_all_fail_with_their_causes():
    outcomes = {
        A: (0, ConnectionRefusedError(111, "Connection refused")),
        B: (0, TimeoutError()),
        C: (0, RemoteProtocolError("nonsense")),
    }
    with pytest.raises(DialFailed) as caught:
        await race(outcomes).run([A, B, C])
    assert caught.value.causes == ((A, "connection refused"), (B, "timed out"), (C, "nonsense"))


async def test_cancelling_cancels_every_attempt():
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await race({A: (9, "a"), B: (9, "b")}).run([A, B])


async def test_families_take_turns_and_doubles_go():
    four = [Multiaddr.parse(f"/ip4/1.1.1.{n}/tcp/1") for n in range(3)]
    six = [Multiaddr.parse(f"/ip6/::{n}/tcp/1") for n in range(1, 3)]
    assert order([*four, *six, four[0]]) == [four[0], six[0], four[1], six[1], four[2]]
    assert len(order(Multiaddr.parse(f"/memory/{n}") for n in range(99))) == MAX_ADDRESSES


async def test_addresses_that_nobody_dials_say_why():
    dnsaddr = Multiaddr.parse("/dnsaddr/bootstrap.example")
    quic = Multiaddr.parse("/ip4/192.0.2.1/udp/1/quic-v1")
    async with hosts("memory", 1) as (one,):
        with pytest.raises(PeerUnreachable, match=r"dnsaddr.*TXT records.*quic-v1: no transport for this kind"):
            await one.connect(None, [dnsaddr, quic])
