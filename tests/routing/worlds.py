"""Made-up swarms for the routing tests: servers with chosen spans and speeds, in cities or scattered at random."""

import hashlib
import random

from swarmnode.protocol.ids import PeerId
from swarmnode.routing.announce import Announcement, State
from swarmnode.routing.coordinates import Coordinate
from swarmnode.routing.swarm import SwarmView

DIGEST = bytes(32)
CLASS_A, CLASS_B = b"class--A", b"class--B"


def peer(number):
    return PeerId(b"\x12\x20" + hashlib.sha256(str(number).encode()).digest())


def server(number, start, end, blocks, **changes):
    fields = {
        "model": "toy",
        "digest": DIGEST,
        "peer": peer(number),
        "addrs": (),
        "start": start,
        "end": end,
        "num_blocks": blocks,
        "state": State.ONLINE,
        "compute_class": CLASS_A,
        "prefill_s": 0.02,
        "decode_s": 0.002,
        "kv_free": 4096,
    }
    return Announcement(**(fields | changes))


def view(*announcements):
    return SwarmView.build("toy", DIGEST, announcements[0].num_blocks, announcements)


def planet(rng: random.Random, servers: int, blocks: int, held: int, cities: int = 20) -> SwarmView:
    """A swarm as one meets it: servers in cities, access links of 1 to 20 ms, speeds over a factor of 5."""
    places = [(rng.uniform(-0.1, 0.1), rng.uniform(-0.05, 0.05)) for _ in range(cities)]
    announcements = []
    for number in range(servers):
        x, y = rng.choice(places)
        start = rng.randrange(blocks - held + 1)
        decode_s = rng.uniform(0.001, 0.005)
        announcements.append(
            server(
                number,
                start,
                start + held,
                blocks,
                decode_s=decode_s,
                prefill_s=20 * decode_s,
                coordinate=Coordinate(
                    x=x + rng.gauss(0, 0.002), y=y + rng.gauss(0, 0.002), height=rng.uniform(0.001, 0.02), error=0.1
                ),
            )
        )
    return view(*announcements)
