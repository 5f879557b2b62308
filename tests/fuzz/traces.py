"""Traces of connections as a target: JSON lines that may come with a stranger's bug report."""

import json

from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.recorder import RecordingSession
from swarmnode.protocol.replay import replay
from swarmnode.protocol.trace import TraceEvent, encode, header

from . import muxes
from .mutate import mutate
from .targets import MIB, Target

VALUES = (
    0,
    1,
    -1,
    2**31,
    2**32,
    2**64,
    10**400,
    0.5,
    1e308,
    float("nan"),
    True,
    None,
    "",
    "x",
    "00",
    [],
    [[]],
    {},
    [1, 2, 3, 4],
)
LONGEST = 12_000
"""Characters of a trace that is a seed."""


def seed(rng):
    """The life of a session, recorded while a hostile peer speaks to it."""
    client = rng.random() < 0.5
    lines = [header(title="fuzz", client=client, wall=0.0, time=0.0)]
    driver = muxes.Driver(client=client, stuck=False, seed=rng.getrandbits(32))
    driver.session = RecordingSession(
        client=client,
        node_budget=driver.budget,
        emit=lambda name, data: lines.append(encode(TraceEvent(0.0, name, data))),
    )
    try:
        driver.receive(muxes.frames(rng, odd=not client)[:LONGEST])
    except RemoteProtocolError:
        pass
    text = "\n".join(lines)[:LONGEST]
    return text[: text.rindex("\n")].encode() if len(text) == LONGEST else text.encode()


def damage(data, rng, other):
    """Mostly one value of one line, so that the line stays JSON."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        body = json.loads(lines[at])
    except (ValueError, RecursionError):
        return mutate(data, rng, other)
    if rng.random() < 0.3 or not isinstance(body, dict) or not body:
        return mutate(data, rng, other)
    inside = body
    while True:
        key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        if not isinstance(inside[key], dict | list) or not inside[key] or rng.random() < 0.2:
            break
        inside = inside[key]
    inside[key] = rng.choice(VALUES)
    lines[at] = json.dumps(body).encode()
    return b"\n".join(lines)


def run(data):
    found = replay(data.decode("utf-8", "replace").split("\n"))
    assert found.records <= data.count(b"\n") + 1
    assert found.departure is None or str(found.departure).isprintable()


TRACES = (Target("trace", seed, run, errors=(ConfigError,), base=32 * MIB, weight=0.5, mutate=damage),)
