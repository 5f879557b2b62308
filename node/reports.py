"""What the looking commands say: status, peers, models, route, ping, id. Each is a table, or JSON for programs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Final

from ..protocol.errors import ConfigError
from ..protocol.ids import PeerId, PrivateKey
from ..protocol.multiaddr import Multiaddr
from ..routing.cost import CostTerms
from ..routing.planner import Plan
from ..routing.swarm import SwarmView
from .config import NodeConfig
from .console import Console, milliseconds
from .entrance import client
from .host import Host
from .identity import Identity
from .node import Node
from .observe import Json, ask_all, report, with_rates
from .observed import show_connections, show_relaying
from .runtime import RunningNode, running_nodes

PING_PAUSE_S: Final = 0.2
MAX_ASKED: Final = 16
"""Nodes of this machine that are asked how they are doing."""


async def status(config: NodeConfig, console: Console) -> int:
    """Nodes of this machine, and how well the swarm covers each model."""
    local = running_nodes(config.state_dir, config.swarm)[:MAX_ASKED]
    async with client(config, console) as node:
        models = await node.models()
        views = [(listed, await node.view_of(listed)) for listed in models]
        known = (await node.status()).known_nodes
    told = await ask_all(local, connections=False)
    if console.as_json:
        nodes = [
            _node_json(node) | {"metrics": said and said["metrics"], "relaying": said and said.get("relaying")}
            for node, said in zip(local, told, strict=True)
        ]
        body = {"swarm": config.swarm, "known_nodes": known, "local_nodes": nodes}
        console.json(body | {"models": [_coverage_json(view) for _, view in views]})
        return 0
    for here, said in zip(local, told, strict=True):
        console.data(f"node {here.peer} (process {here.pid}) at {here.addrs[0] if here.addrs else 'no address'}")
        show_relaying((said or {}).get("relaying"), console)
    console.data(f"swarm {config.swarm!r}: {known} nodes known, {len(views)} models served")
    for _, view in views:
        _show_coverage(view, console)
    return 0


def _node_json(node: RunningNode) -> dict[str, object]:
    return {"pid": node.pid, "peer_id": str(node.peer), "addrs": [str(addr) for addr in node.addrs]}


def _coverage_json(view: SwarmView) -> dict[str, object]:
    return {
        "name": view.model,
        "digest": view.digest.hex(),
        "num_blocks": view.num_blocks,
        "coverage": list(view.coverage()),
        "missing": [list(span) for span in view.missing()],
        "servers": [
            {
                "peer_id": str(server.peer),
                "start": server.start,
                "end": server.end,
                "state": server.announcement.state.name.lower(),
                "quant": server.announcement.quant,
                "compute_class": server.announcement.compute_class.hex(),
                "kv_free": server.announcement.kv_free,
                "decode_s": server.announcement.decode_s,
                "prefill_s": server.announcement.prefill_s,
                "embed": server.announcement.embed,
                "head": server.announcement.head,
                "public_name": server.announcement.public_name,
            }
            for server in view.servers
        ],
    }


def _show_coverage(view: SwarmView, console: Console) -> None:
    counts = view.coverage()
    gaps = ", ".join(f"{start}:{end}" for start, end in view.missing())
    state = f"blocks {gaps} missing" if gaps else f"complete, each block {min(counts)} to {max(counts)} times"
    console.data(f"\n{view.model}@{view.digest.hex()[:12]}: {view.num_blocks} blocks, {state}")
    rows = [
        (
            server.peer.short,
            server.announcement.public_name,
            f"{server.start}:{server.end}",
            server.announcement.state.name.lower(),
            server.announcement.quant,
            milliseconds(server.announcement.decode_s),
            str(server.announcement.kv_free),
        )
        for server in sorted(view.servers, key=lambda server: (server.start, server.end, server.peer))
    ]
    console.table(("server", "name", "blocks", "state", "weights", "per block", "kv tokens"), rows)


async def peers(config: NodeConfig, console: Console) -> int:
    """Open connections after joining, with a measured round trip each."""
    async with client(config, console) as node:
        found = list(await node.peers())
        rtts = [await node.ping(str(info.address.with_peer(info.peer))) for info in found]
    if console.as_json:
        rows = zip(found, rtts, strict=True)
        console.json(
            [
                {"peer_id": str(info.peer), "address": str(info.address), "agent": info.agent, "rtt_s": rtt}
                for info, rtt in rows
            ]
        )
        return 0
    console.table(
        ("peer", "address", "round trip", "software"),
        [
            (str(info.peer), str(info.address), milliseconds(rtt), info.agent)
            for info, rtt in zip(found, rtts, strict=True)
        ],
    )
    return 0


async def connections(config: NodeConfig, console: Console, *, own: bool) -> int:
    """Connections of the nodes running on this machine; `own`: of this command itself, once it has joined."""
    local = [] if own else running_nodes(config.state_dir, config.swarm)[:MAX_ASKED]
    if local:
        told = await ask_all(local, connections=True, twice=True)
        for silent in (node for node, said in zip(local, told, strict=True) if said is None):
            console.note(f"the node {silent.peer.short} (process {silent.pid}) does not answer")
    else:
        async with client(config, console) as node:
            told = [await with_rates(partial(_look, node.host))]
    found = [said for said in told if said is not None]
    if console.as_json:
        console.json({"nodes": found})
    for said in () if console.as_json else found:
        show_connections(said, console)
    return 0 if found else 1


async def _look(host: Host) -> Json:
    return report(host, connections=True)


async def models(config: NodeConfig, console: Console) -> int:
    """Models the swarm serves."""
    async with client(config, console) as node:
        listed = await node.models()
    if console.as_json:
        console.json([asdict(model) | {"digest": model.digest.hex()} for model in listed])
        return 0
    console.table(
        ("model", "digest", "family", "blocks", "hidden", "servers"),
        [
            (m.name, m.digest.hex()[:12], m.family, str(m.num_blocks), str(m.hidden_size), str(m.servers))
            for m in listed
        ],
    )
    return 0


async def route(config: NodeConfig, name: str | None, tokens: int, console: Console) -> int:
    """The chain a step would take, and what each hop costs."""
    async with client(config, console) as node:
        model = await node.model(name)
        plan = await model.route(tokens=tokens)
        label = f"{model.name}@{model.digest.hex()[:12]}"
    if console.as_json:
        console.json({"model": label, "tokens": tokens} | _plan_json(plan))
        return 0
    terms = [term for term, _ in plan.back.items()]
    rows = [
        (
            hop.peer.short,
            f"{hop.start}:{hop.end}",
            *(f"{s * 1e3:.2f}" for _, s in hop.terms.items()),
            _ms(hop.terms.total_s),
        )
        for hop in plan.hops
    ]
    rows.append(("back", "", *(f"{s * 1e3:.2f}" for _, s in plan.back.items()), _ms(plan.back.total_s)))
    console.table(("server", "blocks", *(f"{term} ms" for term in terms), "sum ms"), rows)
    console.data(
        f"{label}: {plan.total_s * 1e3:.2f} ms a step predicted; {plan.steps_per_s:.1f} steps/s when stages overlap"
    )
    return 0


def _terms(terms: CostTerms) -> Iterator[str]:
    return (_ms(seconds) for _, seconds in terms.items())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _plan_json(plan: Plan) -> dict[str, object]:
    return {
        "total_s": plan.total_s,
        "steps_per_s": plan.steps_per_s,
        "hops": [
            {
                "peer_id": str(hop.peer),
                "start": hop.start,
                "end": hop.end,
                "compute_class": hop.compute_class.hex(),
                "terms_s": dict(hop.terms.items()),
            }
            for hop in plan.hops
        ],
        "back_s": dict(plan.back.items()),
    }


async def ping(config: NodeConfig, address: str, count: int, console: Console) -> int:
    """Round trips to one node, its identity checked."""
    if Multiaddr.parse(address).peer_id is None:
        console.note("the address has no /p2p/<peer id>: whoever answers there is believed")
    client = replace(config, peers=(), listen=(), dht_server=False, persistent=False, publish_runtime=False)
    times = []
    async with Node(client) as node:
        for number in range(count):
            if number:
                await asyncio.sleep(PING_PAUSE_S)
            times.append(await node.ping(address))
            if not console.as_json:
                console.data(f"{milliseconds(times[-1])}")
    if console.as_json:
        console.json({"address": address, "rtts_s": times, "min_s": min(times)})
    return 0


def identity(config: NodeConfig, console: Console) -> int:
    """The peer id a node of this user has by default; the key file is made if missing."""
    path = Path(config.identity) if config.identity is not None else config.data_dir / "node.key"
    peer = _peer_of(path)
    if console.as_json:
        console.json({"peer_id": str(peer), "path": str(path)})
    else:
        console.data(str(peer))
    return 0


def _peer_of(path: Path) -> PeerId:
    """Read without the lock, which a running node may hold."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        fresh = Identity.at(path)
        fresh.close()
        return fresh.key.peer_id
    except OSError as exc:
        raise ConfigError(f"cannot read identity {path}: {exc.strerror}; name another with --identity") from exc
    return PrivateKey.unmarshal(data).peer_id
