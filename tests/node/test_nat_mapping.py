"""The port mapper of a host against a router on loopback; UPnP behind it against a stand-in for miniupnpc."""

import asyncio
import contextlib
import ipaddress
import random

import pytest
from helpers.hosts import tcp_host
from lab.gateway import Router, Udp
from swarmnode.node.nat import mapping, upnp
from swarmnode.node.nat.gateway import Gateway, default_router, find_gateway
from swarmnode.node.nat.mapping import PortMapper, PortState
from swarmnode.protocol.errors import Refused
from swarmnode.protocol.multiaddr import Multiaddr

LOOPBACK = ipaddress.IPv4Address("127.0.0.1")
OUTSIDE = "203.0.113.11"
PATIENCE_S = 20


class World:
    """A host, its mapper, and what the mapper has said."""

    def __init__(self, host, mapper, said):
        self.host, self.mapper, self.said = host, mapper, said
        self.port = host.bound_addrs[0].port

    async def until(self, look):
        async with asyncio.timeout(PATIENCE_S):
            while True:
                state = await self.said.get()
                if look(state):
                    return state


@contextlib.asynccontextmanager
async def world(monkeypatch, router, own=LOOPBACK, **options):
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: Udp(lambda data, client: router.answer(data, client, loop.time())), local_addr=("127.0.0.1", 0)
    )
    monkeypatch.setattr(mapping, "PORT", transport.get_extra_info("sockname")[1])
    said = asyncio.Queue()
    async with tcp_host(1) as host:
        # what it listens on counts as more than loopback here
        monkeypatch.setattr(Multiaddr, "is_loopback", property(lambda _: False))
        mapper = PortMapper(
            host,
            clock=host.clock,
            rng=random.Random(0),
            changed=said.put_nowait,
            gateway=lambda: Gateway(LOOPBACK, own),
            **{"upnp": False, **options},
        )
        task = loop.create_task(mapper.run())
        try:
            yield World(host, mapper, said)
        finally:
            task.cancel()
            await asyncio.wait((task,))
            await mapper.aclose()
            await asyncio.sleep(0.05)
            transport.close()
            await asyncio.sleep(0)


@pytest.mark.loops
@pytest.mark.parametrize(("speak", "via"), [(("pcp", "pmp"), "PCP"), (("pmp",), "NAT-PMP")])
async def test_a_port_is_open_while_the_node_runs(monkeypatch, speak, via):
    router = Router(OUTSIDE, speak=speak)
    async with world(monkeypatch, router) as here:
        state = await here.until(lambda state: state.outside)
        assert state == PortState(
            gateway="127.0.0.1", via=via, outside=Multiaddr.parse(f"/ip4/{OUTSIDE}/tcp/{here.port}")
        )
        assert list(router.table) == [here.port]
    assert router.table == {}


async def test_an_expired_mapping_is_asked_for_again(monkeypatch):
    router = Router(OUTSIDE, lifetime=2)
    async with world(monkeypatch, router) as here:
        await here.until(lambda state: state.outside)
        router.speak = ()
        gone = await here.until(lambda state: not state.outside)
        assert gone.failure.startswith("PCP and NAT-PMP: no answer")
        router.speak = ("pcp",)
        here.mapper.renew()
        await here.until(lambda state: state.outside)


async def test_a_refusal_is_told(monkeypatch):
    async with world(monkeypatch, Router(OUTSIDE, refuse=2)) as here:
        state = await here.until(lambda state: state.failure)
        assert state.failure == "PCP and NAT-PMP: not authorized; UPnP: miniupnpc is not installed"


async def test_a_public_machine_asks_nobody(monkeypatch):
    router = Router(OUTSIDE)
    async with world(monkeypatch, router, own=ipaddress.IPv4Address("203.0.113.5")) as here:
        await asyncio.sleep(0.05)
        assert here.mapper.state == PortState()
    assert router.asked == []


class Device:
    """miniupnpc.UPnP as far as we use it; it raises bare Exceptions, too."""

    lanaddr = "127.0.0.1"

    def __init__(self, outside=OUTSIDE, permanent=False, taken=(), refuse=""):
        self.outside, self.permanent, self.taken, self.refuse = outside, permanent, set(taken), refuse
        self.table = {}

    def discover(self):
        return 1

    def selectigd(self):
        return "http://127.0.0.1/d.xml"

    def externalipaddress(self):
        return self.outside

    def addportmapping(self, outer, protocol, host, inner, what, remote, lifetime):
        assert (protocol, host, remote) == ("TCP", "127.0.0.1", "")
        if self.refuse:
            raise Exception(self.refuse)
        if outer in self.taken:
            raise Exception("ConflictInMappingEntry")
        if lifetime and self.permanent:
            raise Exception("OnlyPermanentLeasesSupported")
        self.table[outer] = inner, lifetime

    def deleteportmapping(self, outer, protocol):
        if outer not in self.table:
            raise Exception("NoSuchEntryInArray")
        del self.table[outer]


@contextlib.contextmanager
def installed(monkeypatch, device):
    class Module:
        UPnP = staticmethod(lambda *, multicastif, discoverdelay: device)

    monkeypatch.setattr(upnp.importlib, "import_module", lambda _: Module)
    monkeypatch.setattr(mapping, "available", lambda: True)
    yield


async def test_upnp_comes_second_and_is_taken_back(monkeypatch):
    device = Device()
    with installed(monkeypatch, device):
        async with world(monkeypatch, Router(OUTSIDE, refuse=2), upnp=True) as here:
            state = await here.until(lambda state: state.outside)
            assert (state.via, state.outside) == ("UPnP", Multiaddr.parse(f"/ip4/{OUTSIDE}/tcp/{here.port}"))
            assert device.table == {here.port: (here.port, upnp.LEASE_S)}
        assert device.table == {}


@pytest.mark.parametrize(
    ("device", "found"),
    [
        (Device(permanent=True), {4001: (4001, 0)}),
        (Device(taken=[4001, 4002]), {4003: (4001, upnp.LEASE_S)}),
    ],
)
async def test_upnp_routers_that_are_particular(monkeypatch, device, found):
    with installed(monkeypatch, device):
        lease = await upnp.Upnp().open("127.0.0.1", 4001)
    assert ({lease.port}, device.table) == (set(found), found)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Device(outside=""), "no outside address"),
        (Device(refuse="NotAuthorized"), "NotAuthorized"),
        (Device(taken=range(4001, 4001 + upnp.OTHER_PORTS)), "are taken"),
    ],
)
async def test_upnp_refusals_are_one_line(monkeypatch, device, reason):
    with installed(monkeypatch, device), pytest.raises(Refused, match=reason):
        await upnp.Upnp().open("127.0.0.1", 4001)


ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\tFE00000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t50\t00000000\t0\t0\t0
"""


def test_the_router_is_that_of_the_best_default_route(tmp_path):
    assert str(default_router(ROUTES)) == "10.0.0.254"
    assert default_router(ROUTES.splitlines()[0]) is None
    found = find_gateway(tmp_path / "missing")
    assert found is None or str(found.ip).endswith(".1")
