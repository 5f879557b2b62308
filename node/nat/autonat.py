"""AutoNAT over a host's streams: asking peers to dial us, dialing those who ask. Spec: docs/spec/autonat.md.

What is said and what may be dialed is protocol/reachability.py; here are streams, deadlines, and how often.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from random import Random
from typing import Final

from ...protocol import autonat_v1, protobuf
from ...protocol.errors import RemoteProtocolError, SwarmError
from ...protocol.ids import PeerId
from ...protocol.multiaddr import Multiaddr
from ...protocol.pace import Buckets
from ...protocol.reachability import (
    DIAL_BACK,
    DIAL_BACK_OK,
    DIAL_REQUEST,
    MAX_DIAL_BACK,
    MAX_DIAL_DATA,
    MIN_DIAL_DATA,
    NONCE_BITS,
    Client,
    DialRequest,
    DialStatus,
    ResponseStatus,
    Server,
    choose,
    decode_dial_back,
    encode_dial_back,
    place,
    respond,
    vicinity,
)
from ...protocol.verdict import Outcome
from ..host import Host
from ..transport.base import Priority, Stream
from ..transport.wire import Wire

logger = logging.getLogger(__name__)

DIAL_S: Final = 6.0
"""Deadline of a dial back, and of handing over the nonce: three packets of a TCP handshake may get lost."""
REQUEST_S: Final = 15.0
"""Deadline of a request with its dial data."""
ASK_S: Final = 30.0
"""Deadline of one question of ours."""
MAX_SERVED_PER_PEER: Final = 2
MAX_SERVED: Final = 16
"""Requests answered at once."""
PEER_RATE, PEER_BURST = 1 / 5, 4
"""Requests a second of one peer, and at once; go-libp2p has 12 a minute."""
NETWORK_RATE, NETWORK_BURST = 1 / 2, 12
"""The same of one network."""
TOTAL_RATE, TOTAL_BURST = 2.0, 60
"""Of everybody."""
DATA_RATE, DATA_BURST = 1 / 5, 12
"""Of everybody, those that cost dial data."""
MAX_WAIT_S: Final = 3.0
"""A dial to another IP than the asker's waits up to so long: many askers cannot make us all dial one victim at once."""
_CHUNK: Final = 16 * 1024


class Allowance:
    """How often whom requests are served."""

    def __init__(self) -> None:
        self._peers = Buckets(rate=PEER_RATE, burst=PEER_BURST)
        self._networks = Buckets(rate=NETWORK_RATE, burst=NETWORK_BURST)
        self._total = Buckets(rate=TOTAL_RATE, burst=TOTAL_BURST)
        self._data = Buckets(rate=DATA_RATE, burst=DATA_BURST)

    def take(self, peer: PeerId, seen: Multiaddr, now: float) -> bool:
        """Whether this request is served; if so, it counts."""
        return (
            self._peers.take(peer, now)
            and self._networks.take(vicinity(seen), now)
            and self._total.take("requests", now)
        )

    def take_data(self, now: float) -> bool:
        """The same of one that costs dial data."""
        return self._data.take("data", now)


class Answering:
    """The server: dials whoever asks, at an address that may be dialed."""

    def __init__(self, host: Host, rng: Random) -> None:
        self._host = host
        self._rng = rng
        self._allowance = Allowance()
        self._serving = 0

    def register(self) -> None:
        """Answer both versions from now on."""
        self._host.handle(DIAL_REQUEST, self._serve, max_streams_per_peer=MAX_SERVED_PER_PEER)
        self._host.handle(autonat_v1.PROTOCOL, self._serve_v1, max_streams_per_peer=MAX_SERVED_PER_PEER)

    def unregister(self) -> None:
        """Answer no more."""
        for protocol in (DIAL_REQUEST, autonat_v1.PROTOCOL):
            self._host.unhandle(protocol)

    def _admitted(self, stream: Stream) -> Multiaddr | None:
        """Where the asker is, if it is served."""
        seen = self._host.address_of(stream)
        if seen is None or seen.is_relayed or self._serving >= MAX_SERVED:
            return None
        return seen if self._allowance.take(stream.remote, seen, self._host.clock.now()) else None

    def _may_dial(self, address: Multiaddr) -> bool:
        """Not ourselves or our own router, and not over an IP version that we lack."""
        host = self._host
        own = (*host.listen_addrs, *host.observed_addrs)
        if address.ip is None:
            return True
        if address.ip.version == 6 and not any(a.ip and a.ip.version == 6 and not a.ip.is_private for a in own):
            return False
        return all(place(address) != place(other) for other in own if not other.is_relayed)

    async def _serve(self, stream: Stream) -> None:
        stream.set_priority(Priority.CONTROL)
        seen = self._admitted(stream)
        if seen is None:
            await stream.write(respond(ResponseStatus.REQUEST_REJECTED))
            return
        self._serving += 1
        try:
            await stream.write(await self._result(stream, seen))
        finally:
            self._serving -= 1

    async def _result(self, stream: Stream, seen: Multiaddr) -> bytes:
        """The response to one request. Raises RemoteProtocolError, TimeoutError."""
        server = Server()
        async with asyncio.timeout(REQUEST_S):
            request = await _request(stream, server)
            choice = choose(request.addrs, seen, self._may_dial)
            if choice is None:
                return respond(ResponseStatus.DIAL_REFUSED)
            if choice.costs:
                if not self._allowance.take_data(self._host.clock.now()):
                    return respond(ResponseStatus.REQUEST_REJECTED)
                await stream.write(server.bill(choice.index, self._rng.randint(MIN_DIAL_DATA, MAX_DIAL_DATA)))
                while not server.paid:
                    server.feed(await _some(stream))
        if choice.costs:
            await asyncio.sleep(self._rng.uniform(0, MAX_WAIT_S))
        status = await self._dial_back(stream.remote, choice.address, request.nonce)
        return respond(ResponseStatus.OK, choice.index, status)

    async def _dial_back(self, peer: PeerId, address: Multiaddr, nonce: int) -> DialStatus:
        wire = await self._dial(peer, address)
        if wire is None:
            return DialStatus.DIAL_ERROR
        try:
            async with asyncio.timeout(DIAL_S):
                stream = await self._host.open_on(wire, DIAL_BACK)
                await stream.write(protobuf.delimited(encode_dial_back(nonce)))
                await stream.read(1)  # our end stays open: js-libp2p cannot answer on a stream that we have ended
        except (OSError, SwarmError) as exc:
            logger.debug("dialed %s at %s, but could not hand over the nonce: %s", peer.short, address, exc)
            return DialStatus.DIAL_BACK_ERROR
        finally:
            await wire.aclose()
        return DialStatus.OK

    async def _dial(self, peer: PeerId, address: Multiaddr) -> Wire | None:
        try:
            async with asyncio.timeout(DIAL_S):
                return await self._host.dial_anew(peer, address)
        except (OSError, SwarmError) as exc:
            logger.debug("%s cannot be reached at %s: %s", peer.short, address, exc)
            return None

    async def _serve_v1(self, stream: Stream) -> None:
        stream.set_priority(Priority.CONTROL)
        seen = self._admitted(stream)
        self._serving += 1
        try:
            answer = await self._result_v1(stream, seen)
        finally:
            self._serving -= 1
        await stream.write(protobuf.delimited(answer.encode()))

    async def _result_v1(self, stream: Stream, seen: Multiaddr | None) -> autonat_v1.Answer:
        async with asyncio.timeout(REQUEST_S):
            request = autonat_v1.Dial.decode(await _one_message(stream, autonat_v1.MAX_MESSAGE))
        if seen is None:
            return autonat_v1.Answer(autonat_v1.Status.DIAL_REFUSED, "too many dials")
        addrs, refusal = autonat_v1.wanted(request, stream.remote, seen)
        if refusal is not None:
            return refusal
        began = self._host.clock.now()
        for address in filter(self._may_dial, addrs):
            if (wire := await self._dial(stream.remote, address)) is not None:
                await wire.aclose()
                return autonat_v1.Answer(autonat_v1.Status.OK, addr=address)
            if self._host.clock.now() - began > DIAL_S:
                break
        return autonat_v1.Answer(autonat_v1.Status.DIAL_ERROR, "dial failed")


class Asking:
    """The client: one question at a time to each peer, proven by the nonce that comes back."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._came: dict[int, bool] = {}

    def register(self) -> None:
        """Take dial backs from now on."""
        self._host.handle(DIAL_BACK, self._take, max_streams_per_peer=MAX_SERVED_PER_PEER)

    def unregister(self) -> None:
        """Take no more."""
        self._host.unhandle(DIAL_BACK)

    async def _take(self, stream: Stream) -> None:
        stream.set_priority(Priority.CONTROL)
        async with asyncio.timeout(DIAL_S):
            nonce = decode_dial_back(await _one_message(stream, MAX_DIAL_BACK))
            came_by = self._host.address_of(stream)
            if nonce not in self._came or came_by is None or came_by.is_relayed:
                raise RemoteProtocolError("a dial back that nobody waits for")
            self._came[nonce] = True
            await stream.write(protobuf.delimited(DIAL_BACK_OK))

    async def ask(self, peer: PeerId, address: Multiaddr) -> Outcome:
        """Have a peer dial an address of ours."""
        nonce = 0
        while not nonce or nonce in self._came:
            nonce = secrets.randbits(NONCE_BITS)
        self._came[nonce] = False
        client = Client((address,), nonce)
        try:
            async with asyncio.timeout(ASK_S):
                await self._exchange(peer, client)
        except (OSError, SwarmError) as exc:  # TimeoutError is an OSError
            logger.debug("no AutoNAT answer from %s: %s", peer.short, exc or type(exc).__name__)
        finally:
            came = self._came.pop(nonce)
        return _outcome(client, came)

    async def _exchange(self, peer: PeerId, client: Client) -> None:
        stream = await self._host.open_stream(peer, DIAL_REQUEST)
        stream.set_priority(Priority.CONTROL)
        try:
            await stream.write(client.opening)
            while client.response is None:
                for piece in client.feed(await _some(stream)):
                    await stream.write(piece)
            await stream.close()
        except BaseException:
            stream.reset()
            raise


def _outcome(client: Client, came: bool) -> Outcome:
    response = client.response
    if came:
        return Outcome.REACHED
    if response is None:
        return Outcome.NOTHING
    if response.status is ResponseStatus.DIAL_REFUSED:
        return Outcome.REFUSED
    if response.status is ResponseStatus.REQUEST_REJECTED:
        return Outcome.BUSY
    failed = response.status is ResponseStatus.OK and response.dial is DialStatus.DIAL_ERROR
    return Outcome.FAILED if failed else Outcome.NOTHING


async def _request(stream: Stream, server: Server) -> DialRequest:
    while server.request is None:
        server.feed(await _some(stream))
    return server.request


async def _one_message(stream: Stream, largest: int) -> bytes:
    split = protobuf.Delimited(largest)
    while True:
        for message in split.feed(await _some(stream)):
            return message


async def _some(stream: Stream) -> bytes:
    """What comes next. Raises RemoteProtocolError at the end."""
    data = await stream.read(_CHUNK)
    if not data:
        raise RemoteProtocolError("the stream ended too early")
    return data
