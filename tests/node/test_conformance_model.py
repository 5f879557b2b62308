"""Any sequence of uses of a stream's two ends against a model: two texts, read so far, and who has ended what."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest
from helpers.kinds import KINDS
from helpers.virtual import VirtualLoop
from hypothesis import given, settings
from hypothesis import strategies as st
from swarmnode.node.transport.base import StreamReset
from swarmnode.protocol.errors import LocalProtocolError

sizes = st.sampled_from((0, 1, 2, 100, 1023, 1024, 16_384, 65_507, 65_508, 150_000))
MOSTLY = ("write",) * 5 + ("read", "read_exactly") * 2 + ("cut_short", "close_write")
RARELY = ("close", "reset")
uses = st.tuples(st.sampled_from(MOSTLY * 2 + RARELY), st.integers(0, 1), sizes)


@dataclass
class Direction:
    """What one end sends to the other."""

    sent: bytearray = field(default_factory=bytearray)
    taken: int = 0
    ended: bool = False
    ignored: bool = False
    """The reader closed the stream."""

    @property
    def left(self):
        return len(self.sent) - self.taken


class Model:
    """The stream as it should be; check() uses the real one and compares."""

    def __init__(self, world, ends):
        self.world = world
        self.ends = ends
        self.ways = (Direction(), Direction())  # from end 0, from end 1
        self.reset = False
        self.count = 0

    @property
    def over(self):
        """Both directions have ended: a reset comes too late."""
        return all(way.ended for way in self.ways)

    async def check(self, use, end, size):
        stream, out, into = self.ends[end], self.ways[end], self.ways[1 - end]
        match use:
            case "write":
                await self.write(stream, out, size)
            case "read" | "read_exactly" | "cut_short":
                await self.read(use, stream, into, size)
            case "reset":
                self.reset = self.reset or not self.over
                stream.reset()
            case _:
                await getattr(stream, use)()
                if not self.reset:
                    out.ended = True
                    into.ignored = into.ignored or use == "close"
        await self.world.settle()

    async def write(self, stream, out, size):
        self.count += 1
        data = bytes([self.count % 256]) * size
        if self.reset or out.ended:
            with pytest.raises(StreamReset if self.reset else LocalProtocolError):
                await stream.write(data)
        elif out.left + size < 800_000:  # what blocks is tested elsewhere
            await stream.write(data)
            out.sent += data

    async def read(self, use, stream, into, size):
        wanted = size if use == "read_exactly" else min(size, 1)
        if not size:
            return
        if self.reset:
            with pytest.raises(StreamReset):
                await stream.read_exactly(size)
        elif into.ignored:
            await self.read_after_close(stream, into, size)
        elif use == "cut_short":
            with pytest.raises(TimeoutError) if into.left < size and not into.ended else contextlib.nullcontext():
                async with asyncio.timeout(0.1):
                    self.took(into, await self.exactly(stream, into, size), size)
        elif into.left >= wanted or into.ended:
            read = self.exactly(stream, into, size) if use == "read_exactly" else stream.read(size)
            self.took(into, await read, size)

    async def read_after_close(self, stream, into, size):
        try:
            assert await stream.read(size) == b""
            assert into.ended
        except LocalProtocolError:
            pass

    async def exactly(self, stream, into, size):
        """read_exactly, the end included."""
        if not into.ended or into.left >= size:
            return await stream.read_exactly(size)
        with pytest.raises(asyncio.IncompleteReadError) as caught:
            await stream.read_exactly(size)
        assert len(caught.value.partial) == into.left
        return caught.value.partial

    def took(self, into, data, size):
        assert data == into.sent[into.taken : into.taken + len(data)]
        assert len(data) <= size
        assert data or (into.ended and not into.left)
        into.taken += len(data)


async def play(world, uses):
    near, far = await world.open()
    model = Model(world, (near, far))
    for use, end, size in uses:
        await model.check(use, end, size)
    for stream in (near, far):
        stream.reset()
    world.finish(far)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.virtual], ids=lambda kind: kind.name)
def test_any_use_of_a_stream(kind):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        stack = contextlib.AsyncExitStack()
        world = runner.run(stack.enter_async_context(kind.world()))

        @settings(max_examples=40)
        @given(st.lists(uses, min_size=8, max_size=20))
        def any_use(steps):
            runner.run(play(world, steps))

        any_use()
        runner.run(world.end())
        runner.run(stack.aclose())
