"""Changes of network: what is noticed, which connections are cut, and that live ones stay."""

import asyncio
import contextlib

import pytest
from helpers.hosts import hosts, tcp_host
from swarmnode.node.nat import watch
from swarmnode.node.nat.watch import Watch


class Dial:
    """Clocks that a test sets."""

    def __init__(self):
        self.mono = self.wall_s = 1000.0

    def now(self):
        return self.mono

    def wall(self):
        return self.wall_s

    def passes(self, seconds, *, asleep=0.0):
        self.mono += seconds
        self.wall_s += seconds + asleep


@pytest.mark.parametrize(
    ("have", "seconds", "asleep", "why"),
    [
        (("10.0.0.1",), 5, 0, ""),
        (("10.0.0.2",), 5, 0, "address 10.0.0.1 is gone, 10.0.0.2 is new"),
        (("10.0.0.1", "fd00::1"), 5, 0, "address none is gone, fd00::1 is new"),
        (("10.0.0.1",), 5, 600, "slept for 605 s"),
        (("10.0.0.1",), 600, 0, "slept for 600 s"),
        (("10.0.0.1",), 5, -3600, ""),
    ],
)
async def test_what_counts_as_a_change(have, seconds, asleep, why):
    dial, addresses = Dial(), ("10.0.0.1",)
    watching = Watch(None, dial, lambda _: None, addresses=lambda: addresses)
    dial.passes(5)
    assert watching.look() == ""
    addresses = have
    dial.passes(seconds, asleep=asleep)
    found = watching.look()
    assert why in found if why else not found
    dial.passes(5)
    assert watching.look() == "", "each change is told once"


@pytest.mark.virtual
async def test_a_connection_that_is_dead_after_sleep_is_cut_and_a_live_one_stays():
    async with hosts("memory", 3) as (one, live, dead):
        network = one._transports[0].network
        for other in (live, dead):
            await one.connect(other.peer_id)
        await asyncio.sleep(1)
        network.hold(one._transports[0], dead._transports[0])
        began = asyncio.get_running_loop().time()
        await Watch(one, one.clock, lambda _: None, addresses=tuple).cut_dead()
        assert one.is_connected(live.peer_id)
        assert not one.is_connected(dead.peer_id)
        assert asyncio.get_running_loop().time() - began == pytest.approx(watch.PROOF_S)


@pytest.mark.loops
async def test_a_connection_over_an_address_that_is_gone_is_cut_at_once():
    async with tcp_host(1) as one, tcp_host(2) as two:
        await one.connect(two.peer_id, two.listen_addrs)
        watching = Watch(one, one.clock, lambda _: None)
        (wire,) = one.wires
        assert not watching.is_gone(wire)
        gone = asyncio.Event()
        two.on_disconnect(lambda _: gone.set())
        with contextlib.ExitStack() as stack:
            real = type(wire).local_ip
            stack.callback(setattr, type(wire), "local_ip", real)
            type(wire).local_ip = property(lambda _: "203.0.113.99")
            assert watching.is_gone(wire)
            await watching.cut_dead()
        assert not one.is_connected(two.peer_id)
        async with asyncio.timeout(20):
            await gone.wait()
