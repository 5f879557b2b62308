"""A node in a process of its own to be attacked, and the attacks. Used by a test and by tests/bench/hostile.py.

    python -P tests/helpers/besieged.py asyncio|uvloop '{"handshake_grace_s": 0.2}'

prints its address and serves until its stdin ends.
"""

import asyncio
import contextlib
import gc
import json
import sys

from swarmnode.node.allocator import keep_freed_memory
from swarmnode.node.host import Host, HostLimits
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.limits import SYSTEM
from swarmnode.protocol.multiaddr import Multiaddr

ECHO = "/test/echo/1.0.0"
STATUS = "/test/status/1.0.0"
MIB = 1024 * 1024


async def serve(limits):
    keep_freed_memory()
    address = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
    async with Host(PrivateKey.from_seed(bytes(32)), listen=[address], limits=HostLimits(**limits)) as host:

        async def echo(stream):
            while data := await stream.read(65536):
                await stream.write(data)

        async def status(stream):
            gc.collect()
            used = {scope.kind: dict(held) for scope, held in host.limiter._scopes.items() if scope == SYSTEM}
            await stream.write(json.dumps({"used": used, "refused": dict(host.refused)}).encode())

        host.handle(ECHO, echo)
        host.handle(STATUS, status)
        print(host.listen_addrs[0], flush=True)
        await asyncio.to_thread(sys.stdin.read)


def run(work, loop):
    """asyncio.run on the loop of that name."""
    factory = asyncio.SelectorEventLoop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


class Besieged:
    """The child process as its parent sees it."""

    def __init__(self, child, address):
        self.child = child
        self.address = Multiaddr.parse(address)
        self.port = self.address.port

    def memory(self, name="VmRSS"):
        """Bytes of resident memory now, or its peak ("VmHWM")."""
        with open(f"/proc/{self.child.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    async def echo(self, honest):
        """One round trip on a stream of its own."""
        stream = await honest.open_stream(self.address.peer_id, ECHO, addrs=[self.address])
        await stream.write(b"hello")
        assert await stream.read_exactly(5) == b"hello"
        await stream.close()

    async def status(self, honest):
        """What the node's limiter holds, and whom it refused."""
        stream = await honest.open_stream(self.address.peer_id, STATUS, addrs=[self.address])
        text = b""
        while data := await stream.read(65536):
            text += data
        await stream.close()
        return json.loads(text)


@contextlib.asynccontextmanager
async def besieged(loop, **limits):
    """A running child."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        __file__,
        loop,
        json.dumps(limits),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Besieged(child, (await child.stdout.readline()).decode().strip())
    finally:
        child.stdin.close()
        try:
            await asyncio.wait_for(child.wait(), 10)
        except TimeoutError:
            child.kill()
            await child.wait()


class Mute(asyncio.Protocol):
    """A connection that says `words`, one byte at a time when told to, and never reads."""

    def __init__(self, words=b""):
        self.words = words
        self.link = None
        self.lost = False

    def connection_made(self, transport):
        self.link = transport
        transport.pause_reading()

    def connection_lost(self, exc):
        self.lost = True

    def dribble(self):
        """One more byte."""
        if self.words and not self.lost:
            self.link.write(self.words[:1])
            self.words = self.words[1:]


async def mutes(port, count, words=b"", *, sources=("127.0.0.1",)):
    """`count` connections at once, from these addresses in turn; those that are refused at once are there, too."""
    loop = asyncio.get_running_loop()

    async def one(number):
        source = (sources[number % len(sources)], 0)
        with contextlib.suppress(OSError):
            return (await loop.create_connection(lambda: Mute(words), "127.0.0.1", port, local_addr=source))[1]

    made = await asyncio.gather(*(one(number) for number in range(count)))
    return [mute for mute in made if mute is not None]


if __name__ == "__main__":
    run(serve(json.loads(sys.argv[2])), sys.argv[1])
