"""Peers that break the rules on purpose: an honest handshake if wanted, then any bytes they like."""

import asyncio

from helpers.hosts import key
from swarmnode.protocol.connection import Connection
from swarmnode.protocol.multistream import Dialer
from swarmnode.protocol.noise import MAX_PLAINTEXT, StaticKey
from swarmnode.protocol.yamux_frames import HEADER, Flag, FrameType

PING = HEADER.pack(0, FrameType.PING, Flag.SYN, 0, 7)


def data(stream: int, payload: bytes, flags: int = 0, *, length: int | None = None) -> bytes:
    """A DATA frame; `length` is what its header claims."""
    size = len(payload) if length is None else length
    return HEADER.pack(0, FrameType.DATA, flags, stream, size) + payload


def window(stream: int, delta: int = 0, flags: int = 0) -> bytes:
    """A WINDOW frame."""
    return HEADER.pack(0, FrameType.WINDOW, flags, stream, delta)


def opening(stream: int, protocol: str) -> bytes:
    """A stream's SYN with a protocol's negotiation, all at once."""
    return data(stream, Dialer([protocol]).opening, Flag.SYN)


class Attacker(asyncio.BufferedProtocol):
    """A link to a host. `speaks=False` sends nothing by itself, not even the handshake."""

    def __init__(self, number: int, *, speaks: bool = True) -> None:
        self.connection = Connection(StaticKey.create(key(number)), initiator=True)
        self.events = []
        self.link: asyncio.Transport | None = None
        self.linked = asyncio.get_running_loop().create_future()
        self.open = asyncio.get_running_loop().create_future()
        self.lost = asyncio.get_running_loop().create_future()
        self._speaks = speaks

    def connection_made(self, transport):
        self.link = transport
        self.linked.set_result(None)
        if self._speaks:
            self._pump()

    def get_buffer(self, sizehint):
        return self.connection.get_buffer()

    def buffer_updated(self, nbytes):
        self.events += self.connection.received(nbytes)
        self._pump()
        if self.connection.is_open and not self.open.done():
            self.open.set_result(None)

    def connection_lost(self, exc):
        for future in (self.open, self.lost):
            if not future.done():
                future.set_result(None)

    @property
    def is_cut(self) -> bool:
        """The host ended the link."""
        return self.lost.done()

    def send(self, frames: bytes) -> None:
        """Encrypt and send any yamux bytes at all."""
        for start in range(0, len(frames), MAX_PLAINTEXT):
            if not self.lost.done():
                self.link.write(bytes(self.connection._seal(frames[start : start + MAX_PLAINTEXT])))

    def _pump(self):
        while (frame := self.connection.pull()) is not None:
            self.link.write(bytes(frame))


async def attack(world, host, number: int, **options) -> Attacker:
    """An attacker over an in-memory network; past its handshake, if it speaks."""
    made = []

    def factory(_):
        made.append(Attacker(number, **options))
        return made[0]

    await world.transport().dial(host.listen_addrs[0].without_peer(), factory)
    await (made[0].open if options.get("speaks", True) else made[0].linked)
    return made[0]


async def attack_tcp(port: int, number: int, *, source: str = "127.0.0.1", **options) -> Attacker:
    """An attacker over loopback TCP, from any address of 127.0.0.0/8."""
    _, attacker = await asyncio.get_running_loop().create_connection(
        lambda: Attacker(number, **options), "127.0.0.1", port, local_addr=(source, 0)
    )
    if options.get("speaks", True):
        await attacker.open
    return attacker
