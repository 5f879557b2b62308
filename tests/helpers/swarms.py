"""Whole swarms of tiny models in one process: servers and clients are Nodes that meet over loopback TCP.

A test says which spans are served; everything else (folders, identities, the model with its tokenizer) is made here.
The tokenizer is bytes: token 3 + b is byte b, so every text and every string of bytes has ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import torch
from helpers.tiny_models import make_variation
from swarmnode.node.client.generate import Piece
from swarmnode.node.client.model import RemoteModel
from swarmnode.node.config import NodeConfig
from swarmnode.node.node import Node

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
VOCAB = 3 + 256 + 5
"""Padding, begin, end, the bytes, and some ids that decode to nothing."""
SETTLE_S = 10.0


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def byte_tokenizer() -> str:
    """A tokenizer.json whose tokens are the 256 bytes."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {text: number for number, text in enumerate(special)}
    vocabulary |= {text: len(special) + byte for byte, text in byte_characters().items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": number, "content": text, **added} for number, text in enumerate(special)],
            "pre_tokenizer": level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }
    )


def make_model(folder: Path, variation: str = "llama", **changes) -> Path:
    """A tiny checkpoint with the tokenizer of bytes; no end token unless `eos_token_id` is given."""
    changes = {"vocab_size": VOCAB, "eos_token_id": None, "bos_token_id": None, **changes}
    make_variation(folder, variation, **changes)
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    return folder


class TinySwarm:
    """Nodes of one test. `async with`; `servers` are those still running, in order of their start."""

    def __init__(self, home: Path, model: Path, *, dtype: str = "fp32", **settings) -> None:
        self.model_path = str(model)
        self.servers: list[Node] = []
        self._home = home
        self._dtype = dtype
        self._settings = settings
        self._stack = contextlib.AsyncExitStack()
        self._made = 0
        self._anchors: list[Node] = []

    async def __aenter__(self) -> TinySwarm:
        torch.set_num_threads(1)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def entrance(self) -> list[str]:
        """What to give as `peers`."""
        return [str(node.addrs[0]) for node in (*self._anchors, *self.servers[:2])]

    async def anchor(self) -> None:
        """Add a node that only takes part in the DHT, for others to join through."""
        self._anchors.append(await self.node())

    async def node(self, **settings) -> Node:
        """A running node with folders of its own."""
        self._made += 1
        home = self._home / f"node{self._made}"
        folders = {f"{name}_dir": home / name for name in ("data", "state", "cache")}
        values = {"peers": self.entrance, "listen": [LOOPBACK], **folders, **self._settings, **settings}
        return await self._stack.enter_async_context(Node(NodeConfig(**values)))

    async def serve(self, start: int, end: int, *, model: str | None = None, quant: str = "none", **settings) -> Node:
        """A new server of these blocks."""
        node = await self.node(**settings)
        await node.serve(model or self.model_path, span=(start, end), quant=quant, dtype=self._dtype)
        self.servers.append(node)
        return node

    async def serve_all(self, *spans: tuple[int, int]) -> list[Node]:
        """A new server for each span."""
        return [await self.serve(*span) for span in spans]

    async def kill(self, node: Node) -> None:
        """End a node without a word to anybody, as far as one process can."""
        if node in self.servers:
            self.servers.remove(node)
        await node.aclose()

    async def client(self, **settings) -> Node:
        """A node that only dials and asks."""
        return await self.node(listen=[], dht_server=False, **settings)

    async def model(self, *, local_ends: bool = True, **settings) -> RemoteModel:
        """The model as a new client sees it: with its files, or without any."""
        client = await self.client(**settings)
        name = self.model_path if local_ends else None
        return await client.model(name, local_ends=local_ends, dtype=self._dtype)

    def serving(self, block: int) -> Node:
        """The server where the only session under way runs this block."""
        found = [node for node in self.servers if any(start <= block < end for start, end in spans_in_use(node))]
        assert len(found) == 1, f"{len(found)} servers run block {block}"
        return found[0]

    async def settled(self) -> None:
        """Wait until no server holds a session or a byte of KV cache; fails when that takes too long."""
        await eventually(lambda: all(is_free(node) for node in self.servers), "sessions or KV memory left at a server")


class Hold:
    """Keeps a server's jobs from its compute thread, after the first `passing` ones, until `release`."""

    def __init__(self, node: Node, passing: int = 0) -> None:
        self.node = node
        self._worker = node._server.spans[0].worker
        self._submit = self._worker.submit
        self._passing = passing
        self._held: list[tuple] = []
        self._reached = asyncio.Event()
        self._worker.submit = self._take

    def _take(self, seat, job, done) -> None:
        if self._passing > 0:
            self._passing -= 1
            self._submit(seat, job, done)
            return
        self._held.append((seat, job, done))
        self._reached.set()

    async def reached(self) -> Hold:
        """Wait for the first job that is kept."""
        async with asyncio.timeout(SETTLE_S):
            await self._reached.wait()
        return self

    def release(self) -> None:
        """Let everything through."""
        self._worker.submit = self._submit
        for seat, job, done in self._held:
            if not seat.closed:
                self._submit(seat, job, done)


async def first_reached(holds: Sequence[Hold]) -> Hold:
    """The first of several that has to keep a job."""
    waiting = [asyncio.create_task(hold.reached()) for hold in holds]
    done, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return done.pop().result()


def spans_in_use(node: Node) -> list[tuple[int, int]]:
    """The blocks each session at a server runs."""
    role = node._server
    return [] if role is None else [(s.machine.start, s.machine.end) for s in role.sessions._sessions.values()]


def is_free(node: Node) -> bool:
    """Whether a server holds nothing for anybody."""
    role = node._server
    if role is None:
        return True
    pools = [span.worker.pool for span in role.spans]
    return len(role.sessions) == 0 and all(pool.used_bytes == 0 and pool.lanes == 0 for pool in pools)


async def eventually(condition: Callable[[], bool], problem: str) -> None:
    """Let the loop run until `condition` holds, for as long as SETTLE_S."""
    try:
        async with asyncio.timeout(SETTLE_S):
            while not condition():  # noqa: ASYNC110 - what is waited for spans several nodes and threads
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(problem) from None


async def collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    """All pieces."""
    return [piece async for piece in pieces]


def ids_of(pieces: Sequence[Piece]) -> list[int]:
    """Their token ids."""
    return [piece.token_id for piece in pieces]


def text_of(pieces: Sequence[Piece]) -> str:
    """Their text."""
    return "".join(piece.text for piece in pieces)
