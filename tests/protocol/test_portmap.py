"""NAT-PMP and PCP: packets against others' bytes, and one mapping's life against a router written from the RFCs."""

import ipaddress
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.gateway import Router
from swarmnode.protocol import portmap
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.portmap import AGAIN_S, Answer, Failure, Mapped, Mapping, Protocol, ask_pcp, ask_pmp, read

CLIENT = ipaddress.ip_address("192.168.1.7")
OUTSIDE = ipaddress.ip_address("203.0.113.11")
NONCE = bytes(range(12))

# What a real router sent, as tailscale's tests carry it; its protocol byte, 17 for UDP, is set to 6 for TCP here.
REAL_PCP = bytes(
    [
        *(2, 129, 0, 0, 0, 0, 28, 32, 0, 2, 155, 237, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        *(129, 112, 9, 24, 241, 208, 251, 45, 157, 76, 10, 188, 6, 0, 0, 0, 4, 210, 4, 210),
        *(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 135, 180, 175, 246),
    ]
)


def test_nat_pmp_packets_are_those_of_go_nat_pmp():
    """Recorded between go-nat-pmp and a router."""
    assert bytes(2) == portmap.ASK_OUTSIDE
    assert ask_pmp(123, 456, 1200).hex() == "00020000007b01c8000004b0"
    assert ask_pmp(123, 456, 0).hex() == "00020000007b000000000000"

    def got(raw):
        return read(bytes.fromhex(raw), nonce=NONCE, inner=123)

    assert got("008000000013f24f498c369a") == Answer(
        Protocol.NAT_PMP, 0x13F24F, outside=ipaddress.ip_address("73.140.54.154")
    )
    assert got("0082000000140321007b01c8000004b0") == Answer(Protocol.NAT_PMP, 0x140321, mapped=Mapped(None, 456, 1200))
    assert got("0082000000140496007b000000000000") == Answer(Protocol.NAT_PMP, 0x140496, mapped=Mapped(None, 0, 0))
    assert got("0082001100140496007b000000000000").failure is Failure.OTHER


def test_pcp_packets_are_those_of_a_router():
    found = read(REAL_PCP, nonce=REAL_PCP[24:36], inner=1234)
    assert found == Answer(Protocol.PCP, 0x29BED, mapped=Mapped(ipaddress.ip_address("135.180.175.246"), 1234, 7200))
    assert read(REAL_PCP, nonce=NONCE, inner=1234) is None
    assert read(REAL_PCP, nonce=REAL_PCP[24:36], inner=1235) is None


def test_a_pcp_request_is_laid_out_as_in_the_rfc():
    packet = ask_pcp(CLIENT, NONCE, 4001, 5001, None, 7200)
    assert packet.hex() == (
        "02010000"
        "00001c20"
        "00000000000000000000ffffc0a80107"  # version, MAP, lifetime, our address
        "000102030405060708090a0b"
        "06000000"
        "0fa11389"
        "00000000000000000000ffff00000000"  # nonce, TCP, ports, any IP
    )
    assert ask_pcp(ipaddress.ip_address("2001:db8::7"), NONCE, 1, 1, None, 1)[8:24].hex() == "20010db8" + "0" * 23 + "7"


@given(st.binary(max_size=80))
def test_junk_is_refused_or_read(raw):
    for packet in (raw, b"\x02\x81" + raw, b"\x00\x82" + raw, b"\x00\x80" + raw):
        try:
            read(packet, nonce=NONCE, inner=1)
        except RemoteProtocolError:
            continue


class Pair:
    """A mapping and a router, and time that goes from timer to timer."""

    def __init__(self, router=None, seed=0):
        self.now = 0.0
        self.router = router
        self.mapping = Mapping(4001, CLIENT, rng=random.Random(seed), now=0.0)
        self.sent = []

    def until(self, when):
        while self.mapping.next_timer() <= when:
            self.now = max(self.now, self.mapping.next_timer())
            self.step()
        self.now = when
        return self

    def step(self):
        for packet in self.mapping.packets(self.now):
            self.sent.append((self.now, packet))
            answer = self.router and self.router.answer(packet, str(CLIENT), self.now)
            if answer:
                self.mapping.feed(answer, self.now)

    @property
    def held(self):
        return self.mapping.mapped and (str(self.mapping.mapped.ip), self.mapping.mapped.port)


@pytest.mark.parametrize(
    ("speak", "protocol"),
    [
        (("pcp", "pmp"), Protocol.PCP),
        (("pcp",), Protocol.PCP),
        (("pmp",), Protocol.NAT_PMP),
        (("pmp", "quiet"), Protocol.NAT_PMP),
    ],
)
def test_a_port_is_mapped_and_renewed_and_deleted(speak, protocol):
    pair = Pair(Router(OUTSIDE, speak=speak, lifetime=1000)).until(10)
    assert (pair.held, pair.mapping.protocol) == ((str(OUTSIDE), 4001), protocol)
    first = len(pair.sent)
    pair.until(5000)
    assert pair.held == (str(OUTSIDE), 4001)
    assert list(pair.router.table) == [4001], "renewed in time, by the router's clock"
    renewals = {round(now) for now, _ in pair.sent[first:]}
    assert 8 <= len(renewals) <= 10, "at half the lifetime"
    pair.router.answer(pair.mapping.deletion(), str(CLIENT), pair.now)
    assert pair.router.table == {}
    assert pair.mapping.deletion() is None


def test_another_port_is_taken_when_ours_is_gone():
    router = Router(OUTSIDE)
    router.open("192.168.1.9", 1, 4001, 7200, 0.0)
    assert Pair(router).until(1).held == (str(OUTSIDE), 4002)


@pytest.mark.parametrize(
    ("speak", "code", "failure"),
    [
        (("pcp",), 2, Failure.NOT_AUTHORIZED),
        (("pcp",), 8, Failure.RESOURCES),
        (("pcp",), 99, Failure.OTHER),
        (("pmp",), 2, Failure.NOT_AUTHORIZED),
        (("pmp",), 3, Failure.NETWORK),
    ],
)
def test_a_refusal_is_kept_and_asked_about_less_and_less(speak, code, failure):
    pair = Pair(Router(OUTSIDE, speak=speak, refuse=code)).until(20_000)
    assert (pair.held, pair.mapping.failure) == (None, failure)
    times = sorted({now for now, _ in pair.sent if now > 1})
    assert times[0] == pytest.approx(AGAIN_S, rel=0.11)
    assert len(times) < 18
    pair.router.refuse = 0
    pair.until(pair.now + portmap.AGAIN_CAP_S * 1.2)
    assert pair.held == (str(OUTSIDE), 4001)


def test_silence_costs_few_packets():
    pair = Pair().until(30)
    assert [now for now, _ in pair.sent] == pytest.approx([0, 0.25, 0.75] + [0.75] * 2 + [1.75] * 3 + [3.75] * 3)
    assert pair.mapping.failure is Failure.SILENT


def test_a_restarted_router_is_noticed_by_its_epoch():
    pair = Pair(Router(OUTSIDE, lifetime=1000)).until(400)
    pair.router.restart(400)
    pair.until(501)
    assert list(pair.router.table) == [4001]
    pair.router.restart(600.0)
    # its announcement, as multicast by RFC 6886 3.2.1: the outside address, epoch 0
    pair.mapping.feed(pair.router.answer(portmap.ASK_OUTSIDE, str(CLIENT), 601.0), 601.0)
    assert pair.mapping.next_timer() == 601.0


def test_a_mapping_ends_when_it_cannot_be_renewed():
    pair = Pair(Router(OUTSIDE, lifetime=1000)).until(10)
    pair.router.speak = ()
    pair.until(999)
    assert pair.held is not None
    pair.until(1001)
    assert (pair.held, pair.mapping.failure) == (None, Failure.SILENT)
    pair.router.speak = ("pcp",)
    pair.until(1001 + portmap.AGAIN_CAP_S * 1.2)
    assert pair.held is not None


def test_another_network_asks_anew():
    pair = Pair(Router(OUTSIDE)).until(10)
    pair.mapping.moved(CLIENT, 10.0)
    assert pair.held is not None, "the same address: only renewed"
    pair.mapping.moved(ipaddress.ip_address("192.168.9.9"), 10.0)
    assert pair.held is None
    assert pair.mapping.next_timer() == 10.0


def test_absurd_lifetimes_are_bounded():
    for lifetime, renewed_at in ((1 << 31, portmap.MAX_LIFETIME_S / 2), (1, portmap.MIN_LIFETIME_S / 2)):
        router = Router(OUTSIDE, lifetime=lifetime)
        pair = Pair(router)
        pair.mapping._lifetime_s = lifetime
        pair.step()
        assert pair.mapping.next_timer() == renewed_at
