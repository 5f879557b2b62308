"""A prompt on one session's stream does not hold up another session's tokens: large messages go as bulk."""

import asyncio
import random

import pytest
from helpers.hosts import hosts
from swarmnode.node.framing import URGENT_BYTES, FrameStream
from swarmnode.node.transport.base import Priority
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol.messages import MODEL_MESSAGES, ManifestReply

pytestmark = pytest.mark.virtual

SINK = "/test/sink/1.0.0"
TOKEN = 8 * 1024
PROMPT = 256 * 1024
RATE = 10e6


class Recorder:
    """A stream that notes with what priority each message went."""

    def __init__(self):
        self.priority = Priority.BULK
        self.sent = []
        self.breaks = False

    def set_priority(self, priority):
        self.priority = priority

    async def write(self, *parts):
        if self.breaks:
            raise ConnectionResetError
        self.sent.append(self.priority)


async def test_large_messages_go_as_bulk_and_small_ones_as_before():
    stream = Recorder()
    frames = FrameStream(stream, MODEL_MESSAGES)
    frames.set_priority(Priority.DECODE)
    for size in (0, 1, URGENT_BYTES, URGENT_BYTES + 1, 1):
        await frames.send(ManifestReply(found=True), bytes(size))
    urgent = Priority.DECODE
    assert stream.sent == [urgent, urgent, urgent, Priority.BULK, urgent]


async def test_a_large_message_that_fails_leaves_the_priority_as_it_was():
    stream = Recorder()
    frames = FrameStream(stream, MODEL_MESSAGES)
    frames.set_priority(Priority.CONTROL)
    stream.breaks = True
    with pytest.raises(ConnectionResetError):
        await frames.send(ManifestReply(found=True), bytes(URGENT_BYTES + 1))
    assert stream.priority is Priority.CONTROL


async def test_a_token_overtakes_another_sessions_prompt(clock):
    arrived = {}

    async def sink(stream):
        frames = FrameStream(stream, MODEL_MESSAGES, 1 << 20)
        while (received := await frames.receive()) is not None:
            arrived.setdefault(len(received[1]), clock.now())

    network = MemoryNetwork(random.Random(0), latency_s=0.01, rate=RATE)
    async with hosts("memory", 2, network=network) as (one, two):
        two.handle(SINK, sink)
        prompts = []
        for _ in range(17):
            frames = FrameStream(await one.open_stream(two.peer_id, SINK), MODEL_MESSAGES)
            frames.set_priority(Priority.DECODE)
            prompts.append(frames)
        token = prompts.pop()
        start = clock.now()
        async with asyncio.TaskGroup() as group:
            for frames in prompts:
                group.create_task(frames.send(ManifestReply(found=True), bytes(PROMPT)))
            await asyncio.sleep(0.001)
            await token.send(ManifestReply(found=True), bytes(TOKEN))
        await asyncio.sleep(1)
        for frames in (*prompts, token):
            await frames.close()
        prompt_s = len(prompts) * PROMPT / RATE
        assert arrived[PROMPT] - start > prompt_s / 2
        # taking turns with sixteen prompts would take it 0.1 s
        assert arrived[TOKEN] - start < 0.04
