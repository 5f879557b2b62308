"""Names against a name server on loopback: /dnsaddr to a connection, depth, truncation, silence."""

import asyncio
import contextlib
import struct

import pytest
from helpers.hosts import tcp_host
from swarmnode.node.transport import names
from swarmnode.protocol import dns
from swarmnode.protocol.errors import PeerUnreachable
from swarmnode.protocol.multiaddr import Multiaddr


class NameServer(asyncio.DatagramProtocol):
    """Answers TXT questions from a table; `tcp` says everything there only, None answers nothing."""

    def __init__(self, table):
        self.table = table
        self.tcp = False
        self.asked = []

    def connection_made(self, transport):
        self._transport = transport

    def datagram_received(self, data, addr):
        answer = self.answer(data, truncated=self.tcp)
        if answer is not None:
            self._transport.sendto(b"\xff\xff" + answer[2:], addr)  # a guess of somebody, to be passed over
            self._transport.sendto(answer, addr)

    def answer(self, data, truncated=False):
        end = data.index(b"\0", 12) + 1
        name = ".".join(_labels(data[12:end]))
        self.asked.append(name)
        if self.table is None:
            return None
        texts = self.table.get(name)
        flags = 0x8180 | (0x0200 if truncated else 0) | (0 if texts is not None else 3)
        records = [] if truncated else [f"dnsaddr={text}".encode() for text in texts or ()]
        body = b"".join(struct.pack("!HHHIHB", 0xC00C, 16, 1, 60, len(one) + 1, len(one)) + one for one in records)
        head = data[:2] + struct.pack("!5H", flags, 1, len(records), 0, 0)
        return head + data[12 : end + 4] + body

    async def by_tcp(self, reader, writer):
        size = int.from_bytes(await reader.readexactly(2), "big")
        answer = self.answer(await reader.readexactly(size))
        writer.write(len(answer).to_bytes(2, "big") + answer)
        await writer.drain()
        writer.close()


def _labels(raw):
    while raw[0]:
        yield raw[1 : 1 + raw[0]].decode()
        raw = raw[1 + raw[0] :]


@contextlib.asynccontextmanager
async def name_server(table):
    loop = asyncio.get_running_loop()
    serving = NameServer(table)
    server = await asyncio.start_server(serving.by_tcp, "127.0.0.1", 0)
    where = server.sockets[0].getsockname()
    transport, _ = await loop.create_datagram_endpoint(lambda: serving, local_addr=where)
    try:
        yield serving, [where]
    finally:
        transport.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)


ONE, TWO = (Multiaddr.parse(f"/ip4/192.0.2.{number}/tcp/1") for number in (1, 2))
DOOR = Multiaddr.parse("/dnsaddr/example.org")


@pytest.mark.loops
async def test_a_dnsaddr_leads_to_a_connection(monkeypatch):
    async with tcp_host(1) as one, tcp_host(2) as two:
        table = {"_dnsaddr.example.org": [str(two.listen_addrs[0]), str(one.listen_addrs[0])]}
        async with name_server(table) as (_, servers):
            monkeypatch.setattr(names, "name_servers", lambda: servers)
            assert await one.connect(two.peer_id, [DOOR.with_peer(two.peer_id)]) == two.peer_id
            assert one.addrs(two.peer_id)[0] == two.bound_addrs[0]
            with pytest.raises(PeerUnreachable, match=r"dnsaddr/nothing\.org: stands for no address"):
                await one.connect(None, [Multiaddr.parse("/dnsaddr/nothing.org")])


@pytest.mark.parametrize("tcp", [False, True])
async def test_dnsaddrs_lead_to_others(tcp):
    table = {"_dnsaddr.example.org": [str(ONE), "/dnsaddr/b.org"], "_dnsaddr.b.org": [str(TWO), "/dnsaddr/gone.org"]}
    async with name_server(table) as (serving, servers):
        serving.tcp = tcp
        assert await names.resolve_dnsaddr(DOOR, servers) == [ONE, TWO]
        assert set(serving.asked) == {f"_dnsaddr.{name}.org" for name in ("example", "b", "gone")}


async def test_circles_and_floods_end():
    names_of = [f"/dnsaddr/n{number}.org" for number in range(100)]
    table = {"_dnsaddr.example.org": [str(DOOR), *names_of]}
    table |= {f"_dnsaddr.n{number}.org": [str(ONE), *names_of] for number in range(100)}
    async with name_server(table) as (serving, servers):
        assert await names.resolve_dnsaddr(DOOR, servers) == [ONE]
        assert len(serving.asked) == names.MAX_LOOKUPS
    table = {"_dnsaddr.example.org": [f"/ip4/192.0.2.1/tcp/{number}" for number in range(1, 30)]}
    async with name_server(table) as (_, servers):
        assert len(await names.resolve_dnsaddr(DOOR, servers)) == names.MAX_FOUND


async def test_the_next_server_is_asked_when_one_is_silent(monkeypatch):
    monkeypatch.setattr(names, "TRY_S", 0.05)
    async with name_server(None) as (_, silent), name_server({"_dnsaddr.example.org": [str(ONE)]}) as (_, good):
        assert await names.resolve_dnsaddr(DOOR, [*silent, *good]) == [ONE]
        with pytest.raises(OSError, match="no answer"):
            await names.resolve_dnsaddr(DOOR, silent)
    with pytest.raises(OSError, match="no name server"):
        await names.resolve_dnsaddr(DOOR, [])


def test_the_systems_name_servers_are_read(tmp_path):
    settings = tmp_path / "resolv.conf"
    settings.write_text("# x\nsearch home\nnameserver 192.0.2.53\nnameserver fd00::53\nnameserver 1\nnameserver 2\n")
    assert names.name_servers(settings) == [("192.0.2.53", dns.PORT), ("fd00::53", dns.PORT), ("1", dns.PORT)]
    assert names.name_servers(tmp_path / "missing") == []
