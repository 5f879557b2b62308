"""A small internet with address translators: every client behind a router of a chosen kind, a relay in the middle.

    client 10.1.0.2 -- router 203.0.113.11 --+
                                             +-- relay 203.0.113.1 and .2
    client 10.2.0.2 -- router 203.0.113.12 --+

The relay has two addresses, so that a client can find out what kind its router is (RFC 5780).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from enum import Enum

from .spaces import Lab, Space, Unavailable, checked

NETWORK = "203.0.113"
RELAY, SECOND = 1, 2
FIRST_ROUTER = 11
MAX_CLIENTS = 32


class Nat(Enum):
    """What stands between a client and the world."""

    OPEN = "open"
    """A router only: the client's own address is a public one."""
    FULL = "full"
    """Full cone: one mapping per port, and anybody may send to it."""
    CONE = "cone"
    """Port-restricted cone: one mapping per port, open to who was sent something. The common home router."""
    SYMMETRIC = "symmetric"
    """Another mapping for each destination, open to that one only."""
    RST = "rst"
    """Port-restricted, and refuses strangers aloud instead of dropping their packets."""


class NatWorld:
    """Clients behind routers of the given kinds, and a relay that all of them reach."""

    def __init__(self, lab: Lab, kinds: Sequence[Nat], *, rate_mbit: float = 0.0) -> None:
        if not 1 <= len(kinds) <= MAX_CLIENTS:
            raise ValueError(f"{len(kinds)} clients: 1 to {MAX_CLIENTS}")
        if not all(map(shutil.which, ("nft", "tc"))):
            raise Unavailable("the commands nft and tc are needed: install nftables and iproute2")
        self.kinds = tuple(kinds)
        self._lab = lab
        self._rate_mbit = rate_mbit
        self._inet = lab.space("inet")
        self._inet.ip("link", "add", "bridge", "type", "bridge")
        self._inet.ip("link", "set", "bridge", "up")
        self.relay = lab.space("relay")
        self._plug(self.relay, RELAY)
        self.relay.ip("address", "add", f"{NETWORK}.{SECOND}/24", "dev", "wan")
        self.relay.addresses.append(f"{NETWORK}.{SECOND}")
        self.routers: list[Space] = []
        self.clients: list[Space] = []
        for number, kind in enumerate(kinds):
            self._add(number, kind)
        self._route_to_open_clients()

    def _add(self, number: int, kind: Nat) -> None:
        router, client = self._lab.space(f"nat{number}"), self._lab.space(f"client{number}")
        self._plug(router, FIRST_ROUTER + number)
        inside = f"10.{number + 1}.0"
        router.ip("link", "add", "lan", "type", "veth", "peer", "name", "eth0", "netns", client.name)
        router.ip("address", "add", f"{inside}.1/24", "dev", "lan")
        router.ip("link", "set", "lan", "up")
        router.sysctl("net.ipv4.ip_forward", 1)
        client.ip("address", "add", f"{inside}.2/24", "dev", "eth0")
        client.ip("link", "set", "eth0", "up")
        client.ip("route", "add", "default", "via", f"{inside}.1")
        client.addresses.append(f"{inside}.2")
        if kind is not Nat.OPEN:
            checked("ip", "netns", "exec", router.name, "nft", "-f", "-", text=rules(kind, client.address))
        self.routers.append(router)
        self.clients.append(client)

    def _plug(self, space: Space, number: int) -> None:
        """Give a namespace a port of the bridge and a public address."""
        port = f"port{number}"
        space.ip("link", "add", "wan", "type", "veth", "peer", "name", port, "netns", self._inet.name)
        self._inet.ip("link", "set", port, "master", "bridge", "up")
        space.ip("address", "add", f"{NETWORK}.{number}/24", "dev", "wan")
        space.ip("link", "set", "wan", "up")
        space.addresses.append(f"{NETWORK}.{number}")
        if self._rate_mbit:
            shape = ("root", "tbf", "rate", f"{self._rate_mbit}mbit", "burst", "64k", "latency", "100ms")
            checked("tc", "-n", space.name, "qdisc", "add", "dev", "wan", *shape)

    def _route_to_open_clients(self) -> None:
        for router, client, kind in zip(self.routers, self.clients, self.kinds, strict=True):
            if kind is Nat.OPEN:
                for other in (self.relay, *self.routers):
                    if other is not router:
                        other.ip("route", "add", f"{client.address}/32", "via", router.address)


def rules(kind: Nat, client: str) -> str:
    """The nftables rules that make a router of this kind."""
    full = kind is Nat.FULL
    return "\n".join(
        [
            "table ip nat {",
            "  chain prerouting { type nat hook prerouting priority dstnat;",
            f"    iifname wan meta l4proto {{ tcp, udp }} dnat to {client};" if full else "",
            "  }",
            "  chain postrouting { type nat hook postrouting priority srcnat;",
            f"    oifname wan masquerade {'fully-random' if kind is Nat.SYMMETRIC else ''};",
            "  }",
            "}",
            "table ip filter {",
            "  chain input { type filter hook input priority filter; policy accept;",
            "" if kind is Nat.RST else "    iifname wan ct state new drop;",
            "  }",
            "  chain forward { type filter hook forward priority filter; policy drop;",
            "    iifname lan accept;",
            "    ct state established,related accept;",
            "    iifname wan ct status dnat accept;" if full else "",
            "  }",
            "}",
            "",
        ]
    )
