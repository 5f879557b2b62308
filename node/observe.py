"""What a node tells about its own transport, as JSON, and how another command of the same user asks for it.

The asking command makes a host of its own, dials the running node, and shows the key of its runtime file. Every text
in a report has been made printable and short; docs/operations.md lists the fields.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from ..protocol.errors import RemoteProtocolError, SwarmError
from ..protocol.ids import PeerId, PrivateKey
from ..protocol.report import MAX_REPORT, REPORT_MESSAGES, REPORT_PROTOCOL, GetReport, Report
from .framing import FrameStream
from .host import ConnectionInfo, Host
from .journal import DialFailure, EndedConnection
from .metrics import ConnectionMetrics, HostMetrics
from .runtime import RunningNode
from .transport.base import Priority, Stream

MAX_ASKING: Final = 4
"""Report streams that one peer may have open."""
ASK_S: Final = 5.0
"""Deadline of one question, and how long a stranger may hold a report stream."""
RATE_PAUSE_S: Final = 0.5
"""Time between the two looks that current rates are computed from."""

Json = dict[str, Any]


# What a node says.


def report(host: Host, *, connections: bool, to: PeerId | None = None) -> Json:
    """A host's transport as JSON. The connection of `to`, who only asks, is left out."""
    now = host.clock.now()
    body: Json = {"peer_id": str(host.peer_id), "time": now, "metrics": metrics_json(host.metrics())}
    if connections:
        body["connections"] = [connection_json(info) for info in host.connections() if info.peer != to]
        body["ended"] = [ended_json(ended, now) for ended in host.ended_connections()]
        body["dial_failures"] = [dial_json(failure, now) for failure in host.dial_failures()]
    return body


def metrics_json(metrics: HostMetrics) -> Json:
    """A host's counters."""
    body = asdict(metrics) | {"dials_failed": dict(metrics.dials_failed), "refused": dict(metrics.refused)}
    return body | {"total": _connection_metrics(metrics.total)}


def _connection_metrics(metrics: ConnectionMetrics) -> Json:
    classes = {group.name: {k: v for k, v in asdict(group).items() if k != "name"} for group in metrics.classes}
    return asdict(metrics) | {"classes": classes}


def connection_json(info: ConnectionInfo) -> Json:
    """One open connection."""
    return {
        "peer_id": str(info.peer),
        "address": str(info.address),
        "relayed": info.relayed,
        "bulk": info.bulk,
        "direction": _direction(info.outbound),
        "age_s": info.age_s,
        "opened_at": info.opened_at,
        "rtt_s": info.rtt_s,
        "rtt_min_s": info.rtt_min_s,
        "rtt_last_s": info.rtt_last_s,
        "handshake_s": info.handshake_s,
        "early_muxer": info.early_muxer,
        "streams": info.streams,
        "protocols": dict(info.protocols),
        "bytes_in": info.bytes_in,
        "bytes_out": info.bytes_out,
        "agent": info.agent,
        "protected_by": list(info.protected_by),
        "metrics": _connection_metrics(info.metrics),
    }


def ended_json(ended: EndedConnection, now: float) -> Json:
    """One connection that is gone."""
    return {
        "peer_id": None if ended.peer is None else str(ended.peer),
        "address": str(ended.address),
        "direction": _direction(ended.outbound),
        "ago_s": now - ended.ended_at,
        "lasted_s": ended.ended_at - ended.began_at,
        "reason": ended.reason,
        "phase": ended.phase,
        "rule": ended.rule,
        "bytes_in": ended.bytes_in,
        "bytes_out": ended.bytes_out,
        "events": [{"time": event.time, "name": event.name, "data": dict(event.data)} for event in ended.events],
    }


def dial_json(failure: DialFailure, now: float) -> Json:
    """One address that did not answer."""
    return {
        "address": str(failure.address),
        "ago_s": now - failure.at,
        "cause": failure.cause,
        "reason": failure.reason,
    }


def _direction(outbound: bool) -> str:
    return "out" if outbound else "in"


class Reporter:
    """Answers the report protocol for whoever knows the key; anybody else's stream is reset and counted."""

    def __init__(self, host: Host, key: bytes, more: Callable[[], Json] = dict) -> None:
        self._host = host
        self._key = key
        self._more = more
        """What the node says beside its transport."""
        host.handle(REPORT_PROTOCOL, self._answer, max_streams_per_peer=MAX_ASKING)

    async def _answer(self, stream: Stream) -> None:
        stream.set_priority(Priority.CONTROL)
        frames = FrameStream(stream, REPORT_MESSAGES)
        try:
            async with asyncio.timeout(ASK_S):
                question = await frames.receive()
                if question is None:
                    return
                asked = question[0]
                if not isinstance(asked, GetReport) or not hmac.compare_digest(asked.key, self._key):
                    self._host.refused["report-key"] += 1
                    frames.reset()
                    return
                body = report(self._host, connections=asked.connections, to=stream.remote) | self._more()
                await frames.send(Report(), json.dumps(body).encode())
        except TimeoutError:
            frames.reset()


# How to ask.


async def ask(node: RunningNode, *, connections: bool, twice: bool = False) -> Json:
    """A running node's report; `twice`, with current rates in it. Raises SwarmError or OSError."""
    async with Host(PrivateKey.generate()) as host:
        addrs = sorted(node.addrs, key=lambda addr: not addr.is_loopback)
        await host.connect(node.peer, addrs, timeout_s=ASK_S)

        async def look() -> Json:
            return await _question(host, node, connections)

        return await with_rates(look) if twice else await look()


async def _question(host: Host, node: RunningNode, connections: bool) -> Json:
    stream = await host.open_stream(node.peer, REPORT_PROTOCOL, timeout_s=ASK_S)
    frames = FrameStream(stream, REPORT_MESSAGES, max_payload=MAX_REPORT)
    try:
        async with asyncio.timeout(ASK_S):
            await frames.send(GetReport(key=node.report_key, connections=connections))
            answer = await frames.receive()
    finally:
        frames.reset()
    if answer is None or not isinstance(answer[0], Report):
        raise RemoteProtocolError("the node ended the report stream without a report")
    return _parse(answer[1])


def _parse(payload: bytes) -> Json:
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise RemoteProtocolError("the node's report is not a JSON object: is it another version?")
    return body


async def ask_all(nodes: Sequence[RunningNode], *, connections: bool, twice: bool = False) -> list[Json | None]:
    """Every node's report, all at once; None for one that does not answer."""

    async def one(node: RunningNode) -> Json | None:
        try:
            return await ask(node, connections=connections, twice=twice)
        except (OSError, SwarmError, TimeoutError):
            return None

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(node)) for node in nodes]
    return [task.result() for task in tasks]


async def with_rates(look: Callable[[], Awaitable[Json]]) -> Json:
    """The second of two looks, each connection with what it carried between them in bytes a second."""
    before = await look()
    await asyncio.sleep(RATE_PAUSE_S)
    after = await look()
    passed = after["time"] - before["time"]
    known = {_key(row): row for row in before.get("connections", ())}
    for row in after.get("connections", ()):
        old = known.get(_key(row))
        for name in ("in", "out"):
            size = f"bytes_{name}"
            row[f"rate_{name}"] = (row[size] - old[size]) / passed if old is not None and passed > 0 else 0.0
    return after


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["peer_id"], row["address"], row["opened_at"]
