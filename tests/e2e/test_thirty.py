"""Thirty real processes that serve no model: they find each other within seconds, and lose ten without a loss."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from contextlib import AsyncExitStack

import pytest
from helpers.hosts import key, tcp_host
from helpers.processes import Process, environment
from swarmnode.node.clock import Clock
from swarmnode.node.discovery import Discovery
from swarmnode.node.tasks import Supervisor
from swarmnode.protocol import protobuf
from swarmnode.protocol.kad import MAX_MESSAGE_BYTES, Message, MessageType, protocol_of
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.routing.keys import distance, position

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

COUNT = 30
AT_ONCE = 10
"""Started side by side; more on a busy machine, and the first one has no time to open its door."""
KILLED = 10
SWARM = "thirty"
CONVERGED_S = 10.0
"""After the last process said that it is ready; starting thirty interpreters takes two cores several seconds more."""
NEAREST = 19
"""A node has converged when it names all of its nearest, as many as an answer holds beside the node itself."""
FIRST_KEY = 1700
"""Identities whose places lie 15 to 15 in the halves of the key space: a bucket for the other half holds 20."""
PATIENCE_S = 150.0
TRIES = 4
MOST_AGAIN = 5
"""Look-ups of a hundred put once more: on a machine too busy for 30 processes all holders may answer too late."""
KEYS = [position(bytes([number])) for number in range(20)]


@pytest.fixture
def processes(tmp_path):
    """Thirty nodes, all joined through the first."""
    env = environment(tmp_path, tmp_path / "cache")
    files = [tmp_path / f"key{number}" for number in range(COUNT)]
    for number, file in enumerate(files):
        file.write_bytes(key(FIRST_KEY + number).marshal())
        file.chmod(0o600)
    join = ["join", "--serve", "none", "--swarm", SWARM, "--listen", "/ip4/127.0.0.1/tcp/0", "--identity"]
    launched = [Process([*join, str(files[0])], env)]
    try:
        addresses = [launched[0].ready()]
        for start in range(1, COUNT, AT_ONCE):
            some = files[start : start + AT_ONCE]
            launched += [Process([*join, str(file), "--peer", addresses[0]], env) for file in some]
            addresses += [process.ready() for process in launched[start:]]
        yield dict(zip(map(Multiaddr.parse, addresses), launched, strict=True))
    finally:
        for process in launched:
            process.kill()


class Client:
    """A node of this process that asks and is not asked."""

    def __init__(self, stack):
        self._stack = stack
        self._number = 0

    async def join(self, *doors):
        """A new one, that knows nothing but these doors."""
        self._number += 1
        host = await self._stack.enter_async_context(tcp_host(self._number, listen=[]))
        node = Discovery(host, clock=Clock(), rng=random.Random(self._number), swarm_name=SWARM, server_mode=False)
        tasks = await self._stack.enter_async_context(Supervisor("test"))
        tasks.start(node.run(), "discovery")
        await node.bootstrap(doors)
        return node


async def neighbours(host, address):
    """Whom a node names when asked for its own place, itself left out."""
    stream = await host.open_stream(address.peer_id, protocol_of(SWARM), addrs=[address])
    request = Message(type=MessageType.FIND_NODE, key=address.peer_id.raw)
    await stream.write(protobuf.delimited(request.encode()))
    split, found = protobuf.Delimited(MAX_MESSAGE_BYTES), []
    while not found:
        found = list(split.feed(await stream.read(65536)))
    await stream.close()
    return {peer.peer for peer in Message.decode(found[0]).closer_peers} - {address.peer_id}


def unnamed(found):
    """Of {peer: whom it names}: pairs of a peer and one of its true nearest that it does not name."""
    pairs = []
    for peer, names in found.items():
        others = sorted(found.keys() - {peer}, key=lambda other, own=peer: distance(own.kad_key, other.kad_key))
        pairs += [(peer, other) for other in others[:NEAREST] if other not in names]
    return pairs


async def until(host, addresses, right):
    """Ask all for their neighbours until the answers together are right; returns the seconds it took."""
    began = time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = await asyncio.gather(*(neighbours(host, address) for address in addresses))
            if right({address.peer_id: names for address, names in zip(addresses, found, strict=True)}):
                return time.monotonic() - began
            await asyncio.sleep(0.2)


async def test_thirty_processes_find_each_other_and_survive_ten_deaths(processes):
    addresses = list(processes)
    async with AsyncExitStack() as stack, tcp_host(100, listen=[]) as host:
        took_s = await until(host, addresses, lambda found: not unnamed(found))
        print(f"every node names its nearest {took_s:.1f} s after the last one was ready")
        assert took_s < CONVERGED_S
        clients = Client(stack)
        announcer = await clients.join(addresses[0])
        held = await asyncio.gather(*(announcer.publish(place, b"here", ttl_s=300) for place in KEYS))
        assert min(held) >= 8

        killed = set(random.Random(1).sample(addresses, KILLED))
        for address in killed:
            processes[address].kill(signal.SIGKILL)
        survivors = [address for address in addresses if address not in killed]
        began, slowest_s, again = time.monotonic(), 0.0, 0
        for number, address in enumerate(survivors):
            reader = await clients.join(address)  # through any of them everything is found
            for place in KEYS[number % 4 :: 4]:
                asked_at = time.monotonic()
                entries = await reader.lookup(place)
                slowest_s = max(slowest_s, time.monotonic() - asked_at)
                for _ in range(TRIES - 1):
                    if not entries:
                        again += 1
                        entries = await reader.lookup(place, fresh=True)
                assert [entry.payload for entry in entries] == [b"here"]
        slowest_ms = 1000 * slowest_s
        print(
            f"100 lookups through {len(survivors)} survivors: the slowest took {slowest_ms:.0f} ms, {again} put again"
        )
        assert again <= MOST_AGAIN
        dead = {address.peer_id for address in killed}
        await until(host, survivors, lambda found: not any(names & dead for names in found.values()))
        print(f"the dead are named by nobody {time.monotonic() - began:.1f} s after their death")
