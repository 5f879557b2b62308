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
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Final, Self

from ..protocol.errors import ConfigError, NoRoute
from .allocator import keep_freed_memory
from .config import BUILTIN_MODEL, NodeConfig
from .console import Console, milliseconds
from .entrance import entrance
from .generating import Generating
from .node import Node

if TYPE_CHECKING:
    from .client.generate import GenerationStats, Piece
    from .client.model import RemoteModel
    from .server.span import ServedSpan

_PRIVACY: Final = (
    "note: servers of a swarm can read the prompts they work on. Use a private swarm for anything confidential."
)


def run(work: Coroutine[object, object, int]) -> int:
    """Run a command on uvloop where it is installed."""
    keep_freed_memory()
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
    kv: str = "full"
    share_prefixes: str = "all"
    threads: int | None = None
    """Threads to compute with; None: all processors but one, which the rest of the machine keeps."""


def use_threads(count: int | None) -> None:
    """Settle how torch will compute, before it is loaded: this process is ours, so its environment is too.

    Waiting threads sleep instead of spinning: on a busy machine spinning made decoding several times slower. What the
    user's environment says already stays.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors - 1)))


async def join(config: NodeConfig, serving: Serving, console: Console) -> int:
    """Serve until interrupted: the first signal drains and leaves, the second quits at once."""
    use_threads(serving.threads)
    _warn_once(config, console)
    with _Interrupt(console) as interrupt:
        async with Node(config) as node:
            served = None
            if not serving.nothing:
                try:
                    async with interrupt.stops():
                        served = await _serve(node, serving, console)
                except TimeoutError:
                    if interrupt.caught.is_set():
                        return 130
                    raise
            _say_ready(node, served, console)
            await interrupt.caught.wait()
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
        kv=serving.kv,
        share_prefixes=serving.share_prefixes,
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


class _Interrupt:
    """SIGINT and SIGTERM while `with` lasts: the first sets `caught`, the second quits at once with 130."""

    def __init__(self, console: Console) -> None:
        self.caught = asyncio.Event()
        self._console = console
        self._loop = asyncio.get_running_loop()
        self._scope: asyncio.Timeout | None = None

    def __enter__(self) -> Self:
        self._before = [(number, signal.signal(number, self._handle)) for number in (signal.SIGINT, signal.SIGTERM)]
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    @contextlib.asynccontextmanager
    async def stops(self) -> AsyncIterator[None]:
        """A block that the first signal ends with TimeoutError."""
        async with asyncio.timeout(0 if self.caught.is_set() else None) as self._scope:
            try:
                yield
            finally:
                self._scope = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.caught.is_set():
            os._exit(130)
        self._loop.call_soon_threadsafe(self._first)

    def _first(self) -> None:
        self._console.note("leaving the swarm; sessions move to other servers (Ctrl-C again quits at once)")
        self.caught.set()
        if self._scope is not None:
            self._scope.reschedule(self._loop.time())


# generate and chat


async def generate(config: NodeConfig, prompt: str, how: Generating, console: Console) -> int:
    """Print what the model writes after a prompt, as it comes."""
    use_threads(None)
    async with _model_for(config, how.model, console) as model:
        written = await _write(model.generate(prompt, **how.options), console)
        stats = model.last_stats
        if console.as_json:
            console.json(_generation_json(model, written, stats))
        elif how.stats and stats is not None:
            _say_stats(stats, console)
    return 0


@contextlib.asynccontextmanager
async def _model_for(config: NodeConfig, name: str | None, console: Console) -> AsyncIterator[RemoteModel]:
    """A model of the swarm, or, without a swarm, of a node of our own that runs all of it."""
    found = await entrance(config, console)
    config = replace(found.config, dht_server=found.alone)  # alone, it is the one who keeps its own records
    async with Node(config) as node:
        if found.alone:
            where = "on this machine or its network" if config.lan else "on this machine"
            console.note(f"no swarm found (no --peer, no node {where}): running {name or BUILTIN_MODEL} alone")
            serving = Serving(model=name, span=None, nothing=False, quant=None, dtype="bf16", device="cpu")
            await _serve(node, serving, console)
        else:
            _warn_once(found.config, console)
            if not await node.models():  # or its files would be opened to learn which model nobody serves
                join = f"swarmnode join {name or BUILTIN_MODEL}"
                raise NoRoute(f"the swarm {config.swarm!r} serves no model yet: start one with {join}")
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
        **_top_logprobs(written),
        "finish_reason": written[-1].finish_reason if written else None,
        "stats": None if stats is None else _stats_json(stats),
    }


def _top_logprobs(written: list[Piece]) -> dict[str, object]:
    if not any(piece.top_logprobs for piece in written):
        return {}
    return {"top_logprobs": [[list(pair) for pair in piece.top_logprobs] for piece in written]}


def _stats_json(stats: GenerationStats) -> dict[str, object]:
    body = {key: value for key, value in asdict(stats).items() if key != "gaps_s"}
    rates = {"tokens_per_s": stats.tokens_per_s, "tokens_per_traversal": stats.tokens_per_traversal}
    return body | rates | {"stall_s": stats.stall_s}


def _say_stats(stats: GenerationStats, console: Console) -> None:
    console.note(f"route        {' -> '.join(stats.route)}, wire {stats.wire}")
    known = f" ({stats.cached_tokens} known)" if stats.cached_tokens else ""
    console.note(
        f"tokens       {stats.prompt_tokens} in{known}, {stats.new_tokens} out, {stats.tokens_per_s:.1f} tokens/s"
    )
    console.note(f"first token  {milliseconds(stats.first_token_s)}, longest gap {milliseconds(stats.longest_gap_s)}")
    if stats.drafted:
        right = f"{stats.accepted} of {stats.drafted} guesses right"
        console.note(f"speculation  {stats.tokens_per_traversal:.2f} tokens per traversal, {right}")
    if stats.repairs:
        console.note(f"repairs      {stats.repairs}: servers failed and were replaced")


async def chat(config: NodeConfig, how: Generating, system: str | None, console: Console, *, raw: bool = False) -> int:
    """Talk: a line in, an answer out, until end of file. The whole conversation is the prompt; only what is new of it
    is computed.

    With `raw` it is given as it stands, line after line, to a model without a chat template.
    """
    use_threads(None)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    async with _model_for(config, how.model, console) as model, model.conversation() as talk:
        console.note(f"talking to {model.name}; an empty line or Ctrl-D ends")
        while (line := await asyncio.to_thread(_read_line, console)) != "":
            messages.append({"role": "user", "content": line})
            prompt = _as_lines(messages) if raw else model.render_chat(messages)
            pieces = talk.generate(prompt, **how.options)
            written = await _write(pieces, console)
            text = "".join(piece.text for piece in written)
            messages.append({"role": "assistant", "content": text})
            if console.as_json:
                console.json(_generation_json(model, written, model.last_stats))
            elif how.stats and model.last_stats is not None:
                _say_stats(model.last_stats, console)
    return 0


def _as_lines(messages: list[dict[str, str]]) -> str:
    return "".join(message["content"].rstrip("\n") + "\n" for message in messages)


def _read_line(console: Console) -> str:
    """One line from stdin without its end; empty at end of file."""
    if sys.stdin.isatty() and not console.as_json:
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()
