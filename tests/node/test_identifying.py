"""identify between whole hosts: signed records, several messages, partial pushes, peers that send nonsense."""

import asyncio

import pytest
from helpers.hosts import hosts, key
from helpers.virtual import EPOCH
from swarmnode.node import basics
from swarmnode.protocol import identify, protobuf
from swarmnode.protocol.envelope import PeerRecord
from swarmnode.protocol.identify import Identify
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.multiaddr import Multiaddr

pytestmark = pytest.mark.virtual

ELSEWHERE = Multiaddr.parse("/ip4/192.0.2.7/tcp/4001")
PUBLIC = Multiaddr.parse("/ip4/198.51.100.9/tcp/4001")


async def settle():
    """Long enough for identify and pushes to be over."""
    await asyncio.sleep(5)


async def push(host, peer, *messages):
    """Send a push of these messages, and wait until it has been looked at."""
    stream = await host.open_stream(peer, identify.PUSH_PROTOCOL)
    for message in messages:
        await stream.write(*(message.messages() if isinstance(message, Identify) else [message]))
    await stream.close()
    await settle()


def record(number, seq, *addrs):
    """A signed record of test host `number`."""
    return PeerRecord(peer=key(number).peer_id, seq=seq, addrs=addrs).seal(key(number))


async def connected(one, two):
    await one.connect(two.peer_id)
    await settle()


async def test_both_have_each_others_signed_addresses():
    async with hosts("memory", 2) as (one, two):
        await connected(one, two)
        for near, far in ((one, two), (two, one)):
            info = near.book.get(far.peer_id)
            assert info.certified == tuple(address.without_peer() for address in far.listen_addrs)
            assert info.record_seq == pytest.approx(EPOCH * 1000, abs=60_000)


async def test_a_new_address_is_signed_anew_and_pushed():
    async with hosts("memory", 2) as (one, two):
        await connected(one, two)
        old = one.book.get(two.peer_id)
        seq = old.record_seq
        first, second = old.addrs[0], await two.listen(Multiaddr.parse("/memory/0"))
        await settle()
        info = one.book.get(two.peer_id)
        assert set(info.certified) == {first, second}
        assert info.record_seq > seq


async def test_the_sequence_grows_though_the_clock_is_set_back():
    async with hosts("memory", 2) as (one, two):
        await connected(one, two)
        seq = one.book.get(two.peer_id).record_seq
        two.clock.wall = lambda: EPOCH - 1e6
        await two.listen(Multiaddr.parse("/memory/0"))
        await settle()
        assert one.book.get(two.peer_id).record_seq == seq + 1


async def test_a_node_that_listens_nowhere_has_no_record():
    async with hosts("memory", 2, listen=[]) as (one, two):
        two_addr = await two.listen(Multiaddr.parse("/memory/0"))
        await one.connect(two.peer_id, [two_addr])
        await settle()
        assert one.book.get(two.peer_id).certified == (two_addr,)
        info = two.book.get(one.peer_id)
        assert (info.record_seq, info.agent) == (None, "swarmnode")


async def test_records_that_are_none_leave_the_rest_of_the_message():
    async with hosts("memory", 2) as (one, two):
        await connected(one, two)
        before = two.book.get(one.peer_id).addrs
        stranger = record(9, 1 << 62, ELSEWHERE)
        broken = record(1, 1 << 62, ELSEWHERE)[:-1] + b"\0"
        for number, sealed in enumerate((stranger, broken, b"junk")):
            await push(one, two.peer_id, Identify(agent_version=f"v{number}", signed_record=sealed))
            info = two.book.get(one.peer_id)
            assert (info.agent, info.addrs) == (f"v{number}", before)
        assert two.book.get(key(9).peer_id).addrs == ()


async def test_an_older_record_counts_for_nothing_but_the_peers_own_word_does():
    async with hosts("memory", 2) as (one, two):
        await connected(one, two)
        await push(one, two.peer_id, Identify(signed_record=record(1, 1 << 62, ELSEWHERE)))
        assert two.book.get(one.peer_id).certified == (ELSEWHERE,)
        await push(one, two.peer_id, Identify(listen_addrs=(PUBLIC,), signed_record=record(1, 5, PUBLIC)))
        info = two.book.get(one.peer_id)
        assert info.certified == (ELSEWHERE,)
        assert info.addrs[:2] == (ELSEWHERE, PUBLIC)


async def test_a_partial_push_changes_what_it_names():
    async with hosts("memory", 2) as (one, two):
        await connected(one, two)
        before = two.book.get(one.peer_id)
        protocols, agent, addrs = before.protocols, before.agent, before.addrs
        await push(one, two.peer_id, Identify(protocols=("/only",)))
        info = two.book.get(one.peer_id)
        assert (info.protocols, info.agent, info.addrs) == ({"/only"}, agent, addrs)
        await push(one, two.peer_id, Identify(agent_version="new"))
        info = two.book.get(one.peer_id)
        assert (info.protocols, info.agent, info.addrs) == ({"/only"}, "new", addrs)
        assert protocols != {"/only"}


async def test_pushes_in_several_messages_add_up():
    async with hosts("memory", 2) as (one, two):
        await connected(one, two)
        await push(one, two.peer_id, Identify(protocols=("/a",)), Identify(protocols=("/b",), agent_version="x"))
        info = two.book.get(one.peer_id)
        assert (info.protocols, info.agent) == ({"/a", "/b"}, "x")


async def test_a_stream_without_end_counts_after_a_while():
    async with hosts("memory", 2) as (one, two):
        await connected(one, two)
        stream = await one.open_stream(two.peer_id, identify.PUSH_PROTOCOL)
        await stream.write(*Identify(agent_version="slow").messages())
        await asyncio.sleep(basics.IDENTIFY_TIMEOUT_S - 1)
        assert two.book.get(one.peer_id).agent == "swarmnode"
        await asyncio.sleep(2)
        assert two.book.get(one.peer_id).agent == "slow"
        stream.reset()


@pytest.mark.parametrize("junk", [b"", b"\xff\xff\x7f", b"\x02\x0a\xff", protobuf.delimited(bytes(8193))[:8000]])
async def test_a_push_of_nonsense_is_the_end_of_its_stream_only(junk):
    async with hosts("memory", 2) as (one, two):
        await connected(one, two)
        await push(one, two.peer_id, junk)
        assert two.book.get(one.peer_id).agent == "swarmnode"
        assert await one.ping(two.peer_id) >= 0


async def test_thousands_of_protocols_travel_in_several_messages():
    async def nothing(stream):
        pass

    async with hosts("memory", 2) as (one, two):
        names = [f"/{number}/{'x' * 150}" for number in range(100)]
        for name in names:
            two.handle(name, nothing)
        await connected(one, two)
        assert set(names) <= one.book.get(two.peer_id).protocols


async def test_slow_keys_are_verified_now_and_then_only(monkeypatch):
    """A host has no RSA identity, so the check itself is asked."""
    async with hosts("memory", 1) as (one,):
        asked = one._basics._may_verify
        slow = PeerId(b"\x12\x20" + bytes(32))
        assert [asked(slow), asked(slow)] == [True, False]
        assert [asked(key(2).peer_id), asked(key(2).peer_id)] == [True, True]
        await asyncio.sleep(basics.RECORD_SPACING_S)
        assert [asked(slow), asked(slow)] == [True, False]


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/127.0.0.1/tcp/50000",
        "/ip6/::1/tcp/50000",
        "/ip4/0.0.0.0/tcp/50000",
        f"/ip4/192.0.2.7/tcp/4001/p2p/{key(3).peer_id}/p2p-circuit",
        "/ip4/192.0.2.7/udp/4001/quic-v1",
        "/dns4/a.example/tcp/1",
    ],
)
async def test_an_observed_address_that_means_us_to_nobody_is_left_out(address):
    observed = Multiaddr.parse(address)
    async with hosts("memory", 2) as (one, two):

        async def answer(stream):
            await stream.write(*Identify(observed_addr=observed).messages())

        two.handle(identify.PROTOCOL, answer)
        await connected(one, two)
        assert one.observed_addrs == ()
        observed = ELSEWHERE
        await one.disconnect(two.peer_id)
        await connected(one, two)
        assert one.observed_addrs == (ELSEWHERE,)


async def test_advertised_addresses_are_announced_and_taken_back():
    async with hosts("memory", 2) as (one, two):
        await two.connect(one.peer_id)
        mapped, relayed = (
            Multiaddr.parse("/ip4/198.51.100.7/tcp/4001"),
            Multiaddr.parse(f"/p2p/{two.peer_id}/p2p-circuit"),
        )
        one.advertise("relay", [relayed])
        one.advertise("router", [mapped])
        own = one.listen_addrs[1].without_peer()
        assert [addr.without_peer() for addr in one.listen_addrs] == [mapped, own, relayed]
        await asyncio.sleep(1)
        assert set(two.book.get(one.peer_id).certified) == {mapped, own, relayed}
        one.advertise("router", [])
        await asyncio.sleep(1)
        assert set(two.book.get(one.peer_id).certified) == {own, relayed}
