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


FOUR = [Multiaddr.parse(f"/ip4/1.1.1.{n}/tcp/1") for n in range(3)]
SIX = [Multiaddr.parse(f"/ip6/::{n}/tcp/1") for n in range(1, 3)]


async def test_families_take_turns_and_doubles_go():
    assert order([*FOUR, *SIX, FOUR[0]]) == [SIX[0], FOUR[0], SIX[1], FOUR[1], FOUR[2]]
    assert order([*FOUR, *SIX], after=SIX[0]) == [FOUR[0], SIX[0], FOUR[1], SIX[1], FOUR[2]]
    assert len(order(Multiaddr.parse(f"/memory/{n}") for n in range(99))) == MAX_ADDRESSES


NAME = Multiaddr.parse("/dns4/example.org/tcp/1")


def looks_up(delay, *found):
    async def lookup():
        await asyncio.sleep(delay)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return found

    return {NAME: lookup}


async def test_a_slow_name_holds_no_address_up(clock):
    assert await race({A: (0.1, "a")}).run([A], looks_up(9, B)) == "a"
    assert clock.now() == pytest.approx(0.1)


async def test_what_a_name_stands_for_joins_the_race(clock):
    assert await race({A: (9, "a"), B: (0.1, "b")}).run([A], looks_up(0.1, B)) == "b"
    assert clock.now() == pytest.approx(STAGGER_S + 0.1)


async def test_a_name_alone_is_waited_for(clock):
    assert await race({B: (0.1, "b")}).run([], looks_up(3, B)) == "b"
    assert clock.now() == pytest.approx(3.1)


async def test_an_address_that_wins_while_a_name_is_looked_up_ends_it(clock):
    assert await race({A: (1, "a")}).run([A], looks_up(9, B)) == "a"
    assert clock.now() == pytest.approx(1)


async def test_names_take_turns_with_what_is_under_way():
    tried = []

    async def attempt(address):
        tried.append(address)
        await asyncio.sleep(0.3)
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(DialFailed):
        await Race(attempt, lambda _: None).run([SIX[0]], looks_up(0.1, *SIX, *FOUR))
    assert tried == [SIX[0], FOUR[0], SIX[1], FOUR[1], FOUR[2]]


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        ([OSError(-2, "Name or service not known")], "Name or service not known"),
        ([], "stands for no address that can be dialed, or for known ones"),
    ],
)
async def test_names_that_do_not_help_are_causes(found, cause):
    with pytest.raises(DialFailed) as caught:
        await race({A: (0, TimeoutError())}).run([A], looks_up(0.1, *found))
    assert caught.value.causes == ((A, "timed out"), (NAME, cause))


async def test_addresses_that_nobody_dials_say_why():
    webrtc = Multiaddr.parse("/ip4/192.0.2.1/udp/1/webrtc-direct")
    quic = Multiaddr.parse("/ip4/192.0.2.1/udp/1/quic-v1")
    async with hosts("memory", 1) as (one,):
        with pytest.raises(PeerUnreachable, match=r"webrtc-direct: no transport for this kind.*quic-v1: no transport"):
            await one.connect(None, [webrtc, quic])
