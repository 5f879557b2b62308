"""Our half of the test protocols that outside peers speak; see tests/interop/js/node.mjs."""

import asyncio
import hashlib
import random

from helpers.outside import ECHO

__all__ = ["DIGEST", "ECHO", "GOODBYE"]

DIGEST = "/swarmnode/test-digest/1.0.0"
GOODBYE = "/swarmnode/test-goodbye/1.0.0"
HEADER = 5


async def answer_echo(stream):
    """Kind 0 comes back, 1 is swallowed, 2 is acknowledged."""
    while True:
        header = await stream.read_exactly(HEADER)
        payload = await stream.read_exactly(int.from_bytes(header[1:], "big"))
        if header[0] == 0:
            await stream.write(header, payload)
        elif header[0] == 2:
            await stream.write(bytes(HEADER))


async def round_trip(stream, payload):
    """The payload, echoed by the other side."""
    async with asyncio.TaskGroup() as group:
        group.create_task(stream.write(b"\0", len(payload).to_bytes(4, "big"), payload))
        await stream.read_exactly(HEADER)
        return await stream.read_exactly(len(payload))


async def read_all(stream):
    """Everything up to the other side's end of its direction."""
    parts = []
    while data := await stream.read(1 << 16):
        parts.append(data)
    return b"".join(parts)


async def answer_digest(stream):
    """The dialer ends its direction first, and has our answer after that."""
    await stream.write(hashlib.sha256(await read_all(stream)).digest())


async def say_goodbye(stream):
    """We end our direction first, and have what the dialer sends after that; returns how much it was."""
    await stream.write(b"bye")
    await stream.close_write()
    return len(await read_all(stream))


async def check_digest(stream, size):
    """The dialer's side of answer_digest()."""
    payload = random.Random(size).randbytes(size)
    await stream.write(payload)
    await stream.close_write()
    assert await read_all(stream) == hashlib.sha256(payload).digest()


async def check_goodbye(stream, size):
    """The dialer's side of say_goodbye()."""
    assert await read_all(stream) == b"bye"
    await stream.write(bytes(size))
    await stream.close()
