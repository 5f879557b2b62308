"""A node that asks another one for a pong four times a second, and says when it comes: `python moving_node.py ADDR`."""

import asyncio
import json
import sys

from swarmnode import Node, NodeConfig
from swarmnode.protocol.errors import SwarmError
from swarmnode.protocol.multiaddr import Multiaddr

PAUSE_S = 0.25
ANSWER_S = 1.0


def say(**what):
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def main(address):
    peer = Multiaddr.parse(address).peer_id
    async with Node(NodeConfig(peers=[address], listen=["/ip4/0.0.0.0/tcp/0"], port_mapping="off")) as node:
        while True:
            try:
                await node.host.ping(peer, timeout_s=ANSWER_S)
                ended = [one.reason for one in node.host.ended_connections()]
                say(addrs=[str(one.without_peer()) for one in node.addrs], ended=ended)
            except (OSError, SwarmError):
                say(failed=True)
            await asyncio.sleep(PAUSE_S)


asyncio.run(main(sys.argv[1]))
