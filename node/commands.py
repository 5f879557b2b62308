"""What join, generate and chat do, between the command line (cli.py) and the Node's public methods.

Each verb is one coroutine over a NodeConfig and a Console; nothing here parses arguments or knows click. The verbs that
only look are in reports.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Final

from ..protocol.errors import ConfigError
from ..protocol.sampling import SamplingParams
from .config import NodeConfig
from .console import Console, milliseconds
from .entrance import entrance
from .node import BUILTIN_MODEL, Node

if TYPE_CHECKING:
    from .client.generate import GenerationStats, Piece
    from .client.model import RemoteModel
    from .server.span import ServedSpan

_PRIVACY: Final = (
    "note: servers of a swarm can read the prompts they work on. Use a private swarm for anything confidential."
)


def run(work: Coroutine[object, object, int]) -> int:
    """Run a command on uvloop where it is installed."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


def _warn_once(config: NodeConfig, console: Console) -> None:
    """Say once per user that peers can read prompts, when the swarm reaches beyond this machine."""
    if all(addr.is_loopback for addr in (*config.peer_addrs, *config.listen_addrs)):
        return
    marker = config.state_dir / "told-about-privacy"
    if marker.exists():
        return
    console.note(_PRIVACY)
    with contextlib.suppress(OSError):  # a read-only home only means that it is said again
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


# join


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What to serve."""

    model: str | None
    span: tuple[int, int] | None
    """None: choose."""
    nothing: bool
    """Take part in the DHT only."""
    quant: str | None
    dtype: str
    device: str


async def join(config: NodeConfig, serving: Serving, console: Console) -> int:
    """Serve until interrupted: the first signal drains and leaves, the second quits at once."""
    _warn_once(config, console)
    stop = asyncio.Event()
    with _signals(stop, console):
        async with Node(config) as node:
            served = None
            if not serving.nothing:
                served = await _unless_stopped(_serve(node, serving, console), stop)
                if served is None:
                    return 130
            _say_ready(node, served, console)
            await stop.wait()
            await node.drain()
    return 0


async def _serve(node: Node, serving: Serving, console: Console) -> ServedSpan:
    model = serving.model or await _only_model(node)
    console.note(f"loading {model}")

    def loading(done: int, total: int) -> None:
        console.progress(f"loading {model}:", done, total, "blocks")

    def opening(what: str, done: int, total: int) -> None:
        console.progress(f"{what}:", done, total, "bytes")

    return await node.serve(
        model,
        span=serving.span,
        quant=serving.quant,
        dtype=serving.dtype,
        device=serving.device,
        progress=loading,
        opening=opening,
    )


async def _only_model(node: Node) -> str:
    """What the swarm serves, if that is one model; the built-in one in an empty swarm."""
    listed = await node.models()
    if len(listed) > 1:
        names = ", ".join(sorted(model.name for model in listed))
        raise ConfigError(f"the swarm serves several models: say which, swarmnode join MODEL, of {names}")
    return listed[0].name if listed else BUILTIN_MODEL


async def _unless_stopped(work: Coroutine[object, object, ServedSpan], stop: asyncio.Event) -> ServedSpan | None:
    """The result of `work`, or None when a signal came first."""
    async with asyncio.TaskGroup() as group:
        waiter = group.create_task(stop.wait())
        worker = group.create_task(work)
        await asyncio.wait((waiter, worker), return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if not worker.done():
            worker.cancel()
            return None
    return worker.result()


def _say_ready(node: Node, served: ServedSpan | None, console: Console) -> None:
    addrs = sorted(node.addrs, key=lambda addr: (addr.is_loopback, addr.value("ip4") is None))
    ready = str(addrs[0]) if addrs else ""
    if console.as_json:
        body: dict[str, object] = {"ready": ready, "peer_id": str(node.peer_id), "addrs": [str(a) for a in addrs]}
        if served is not None:
            body |= {"model": served.model.name, "digest": served.model.digest.hex()}
            body |= {"start": served.start, "end": served.end, "quant": served.quant}
        console.json(body)
    else:
        console.data(f"READY {ready}")
    what = "nothing, as a node of the DHT" if served is None else f"blocks {served.start}:{served.end}"
    name = "" if served is None else f" of {served.model.label}, weights {served.quant}"
    console.note(f"serving {what}{name}; Ctrl-C leaves")


@contextlib.contextmanager
def _signals(stop: asyncio.Event, console: Console) -> Iterator[None]:
    """First SIGINT or SIGTERM: set `stop`. Second: quit at once with 130."""
    loop = asyncio.get_running_loop()

    def caught() -> None:
        if stop.is_set():
            os._exit(130)
        console.note("leaving the swarm; sessions move to other servers (Ctrl-C again quits at once)")
        stop.set()

    def from_handler(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(caught)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, from_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# generate and chat


@dataclass(frozen=True, slots=True, kw_only=True)
class Generating:
    """How to generate."""

    model: str | None
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    wire: str
    stats: bool


async def generate(config: NodeConfig, prompt: str, how: Generating, console: Console) -> int:
    """Print what the model writes after a prompt, as it comes."""
    async with _model_for(config, how.model, console) as model:
        pieces = model.generate(
            prompt, max_new_tokens=how.max_new_tokens, sampling=how.sampling, stop=how.stop, wire=how.wire
        )
        written = await _write(pieces, console)
        stats = model.last_stats
        if console.as_json:
            console.json(_generation_json(model, written, stats))
        elif how.stats and stats is not None:
            _say_stats(stats, console)
    return 0


@contextlib.asynccontextmanager
async def _model_for(config: NodeConfig, name: str | None, console: Console) -> AsyncIterator[RemoteModel]:
    """A model of the swarm, or, without a swarm, of a node of our own that runs all of it."""
    found = entrance(config, console)
    async with Node(found.config) as node:
        if found.alone:
            console.note(f"no swarm found (no --peer, no node on this machine): running {name or BUILTIN_MODEL} alone")
            serving = Serving(model=name, span=None, nothing=False, quant=None, dtype="bf16", device="cpu")
            await _serve(node, serving, console)
        else:
            _warn_once(found.config, console)
        yield await node.model(name)


async def _write(pieces: AsyncIterator[Piece], console: Console) -> list[Piece]:
    """Stream pieces to stdout and keep them; the line is ended even if the generation fails midway."""
    written: list[Piece] = []
    try:
        async for piece in pieces:
            written.append(piece)
            if not console.as_json:
                console.data(piece.text, end="")
    finally:
        if not console.as_json and written:
            console.data("")
    return written


def _generation_json(model: RemoteModel, written: list[Piece], stats: GenerationStats | None) -> dict[str, object]:
    return {
        "model": model.name,
        "digest": model.digest.hex(),
        "text": "".join(piece.text for piece in written),
        "token_ids": [piece.token_id for piece in written],
        "logprobs": [piece.logprob for piece in written],
        "finish_reason": written[-1].finish_reason if written else None,
        "stats": None if stats is None else _stats_json(stats),
    }


def _stats_json(stats: GenerationStats) -> dict[str, object]:
    body = {key: value for key, value in asdict(stats).items() if key != "gaps_s"}
    return body | {"tokens_per_s": stats.tokens_per_s, "stall_s": stats.stall_s}


def _say_stats(stats: GenerationStats, console: Console) -> None:
    console.note(f"route        {' -> '.join(stats.route)}, wire {stats.wire}")
    console.note(f"tokens       {stats.prompt_tokens} in, {stats.new_tokens} out, {stats.tokens_per_s:.1f} tokens/s")
    console.note(f"first token  {milliseconds(stats.first_token_s)}, longest gap {milliseconds(stats.longest_gap_s)}")
    if stats.repairs:
        console.note(f"repairs      {stats.repairs}: servers failed and were replaced")


async def chat(config: NodeConfig, how: Generating, system: str | None, console: Console) -> int:
    """Talk: a line in, an answer out, until end of file. The whole conversation is the prompt."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    async with _model_for(config, how.model, console) as model:
        console.note(f"talking to {model.name}; an empty line or Ctrl-D ends")
        while (line := await asyncio.to_thread(_read_line, console)) != "":
            messages.append({"role": "user", "content": line})
            pieces = model.generate(
                model.render_chat(messages),
                max_new_tokens=how.max_new_tokens,
                sampling=how.sampling,
                stop=how.stop,
                wire=how.wire,
            )
            written = await _write(pieces, console)
            text = "".join(piece.text for piece in written)
            messages.append({"role": "assistant", "content": text})
            if console.as_json:
                console.json(_generation_json(model, written, model.last_stats))
            elif how.stats and model.last_stats is not None:
                _say_stats(model.last_stats, console)
    return 0


def _read_line(console: Console) -> str:
    """One line from stdin without its end; empty at end of file."""
    if sys.stdin.isatty() and not console.as_json:
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()
