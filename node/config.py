"""All settings of a node, checked once, here. The command line, environment and TOML file fill this in (cli.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import platformdirs

from ..protocol.errors import ConfigError
from ..protocol.invite import SWARM_NAME, Invite, is_invite
from ..protocol.kad import MAIN_SWARM
from ..protocol.multiaddr import Multiaddr
from ..protocol.relay_ledger import RelayLimits
from .limits import AllowList

APP: Final = "swarmnode"
DEFAULT_LISTEN: Final = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
DEFAULT_SWARM: Final = MAIN_SWARM
BUILTIN_MODEL: Final = "gemma3-270m"
"""The model when nothing says which: the demo's weights."""
MAX_NAME: Final = 32
REACHABILITY: Final = ("auto", "check", "public", "private")
PORT_MAPPING: Final = ("auto", "off")
RELAY: Final = ("auto", "on", "off")


def default_data_dir() -> Path:
    """Where keys live: the XDG data directory, or this system's equivalent."""
    return Path(platformdirs.user_data_dir(APP))


def default_cache_dir() -> Path:
    """Where converted weights and fetched manifests live; safe to delete."""
    return Path(platformdirs.user_cache_dir(APP))


def default_state_dir() -> Path:
    """Where running nodes say that they run."""
    return Path(platformdirs.user_state_dir(APP))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Settings of one node. Invalid ones raise ConfigError naming the field, the value and what is allowed."""

    listen: tuple[str, ...] | list[str] = DEFAULT_LISTEN
    """Multiaddrs to listen on; empty: only dial."""
    peers: tuple[str, ...] | list[str] = ()
    """Multiaddrs, with /p2p/<id>, of any live nodes of the swarm; or invites, which name their swarm too."""
    swarm: str = DEFAULT_SWARM
    """Nodes of other swarm names are never seen."""
    identity: Path | str | None = None
    """Key file, made if missing. None: an ephemeral identity, or the default file if `persistent`."""
    persistent: bool = False
    """Use the default key file (the next free profile of it), and remember the swarm's nodes between runs."""
    lan: bool = False
    """Be found on the local network, and look for the swarm there when no other way into it is known."""
    allow: tuple[str, ...] | list[str] = ()
    """Peer ids, IP addresses and networks that are trusted: they get in when the node is full of others."""
    relay: str = "auto"
    """Pass on connections between others: "on", "off", or "auto", if others can dial this node."""
    relays: tuple[str, ...] | list[str] = ()
    """Multiaddrs, with /p2p/<id>, of relays by which this node is to be found, beside those it finds itself."""
    relay_limits: RelayLimits = field(default_factory=RelayLimits)
    """What this node gives as a relay."""
    public_name: str = ""
    """What others see beside the peer id."""
    data_dir: Path = field(default_factory=default_data_dir)
    cache_dir: Path = field(default_factory=default_cache_dir)
    state_dir: Path = field(default_factory=default_state_dir)
    publish_runtime: bool = False
    """Write the runtime file by which other commands on this machine find this node."""
    trace_dir: Path | None = None
    """Trace every connection into files of this folder: headers and lengths, never payload. See docs/operations.md."""
    dht_server: bool = True
    """Answer others' look-ups, while others can reach this node. Short-lived clients should not."""
    reachability: str = "auto"
    """Whether others can dial this node: `auto` finds out, unless it listens for this machine only; `check` finds out
    even then; `public` and `private` believe you. Where not, it takes places at relays and answers no look-ups."""
    port_mapping: str = "auto"
    """Have the router open a port, by PCP, NAT-PMP or UPnP, where reachability is found out: "auto", or "off"."""
    kv_bytes: int | None = None
    """Budget of each served span's KV cache; None: a quarter of the free memory, at most 4 GiB."""
    log_bytes: int = 256 * 1024 * 1024
    """Budget of the logs that let a dead neighbour be replaced."""
    repair_timeout_s: float = 30.0
    """How long a client waits for a replacement before it gives up, keeping what was generated."""

    def __post_init__(self) -> None:
        for name in ("listen", "peers", "allow", "relays"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise ConfigError(f"{name} is the text {values!r}: use a list of texts")
        for name in ("data_dir", "cache_dir", "state_dir", "trace_dir"):
            if isinstance(folder := getattr(self, name), str):  # untyped programs say it in text
                object.__setattr__(self, name, Path(folder))
        AllowList(self.allow)
        for value in self.listen:
            Multiaddr.parse(value)
        for name, allowed in (("reachability", REACHABILITY), ("port_mapping", PORT_MAPPING), ("relay", RELAY)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        self._check_relays()
        self._take_invites()
        for peer in self.peers:
            if Multiaddr.parse(peer).peer_id is None:
                raise ConfigError(f"peer address {peer!r} lacks its peer id: append /p2p/<peer id>")
        if not SWARM_NAME.fullmatch(self.swarm):
            raise ConfigError(f"swarm name {self.swarm!r}: use 1 to 64 letters, digits, '.', '_' or '-'")
        if not self.public_name.isprintable() or len(self.public_name.encode()) > MAX_NAME:
            raise ConfigError(f"public name {self.public_name!r}: use at most {MAX_NAME} printable characters")
        for name in ("kv_bytes", "log_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: use a positive number of bytes")
        if not 0 < self.repair_timeout_s < 86_400:
            raise ConfigError(f"repair_timeout_s is {self.repair_timeout_s}: use 0 to 86400 seconds")

    def _check_relays(self) -> None:
        for text in self.relays:
            address = Multiaddr.parse(text)
            if address.peer_id is None or address.is_relayed:
                raise ConfigError(f"relay {text!r}: give the relay's own address, ending in /p2p/<its peer id>")

    def _take_invites(self) -> None:
        """Put the addresses in the place of invites; a swarm not named otherwise is the invites'."""
        invites = [Invite.parse(text) for text in self.peers if is_invite(text)]
        names = {invite.swarm for invite in invites} | ({self.swarm} - {DEFAULT_SWARM} if invites else set())
        if len(names) > 1:
            raise ConfigError(f"invites and --swarm name several swarms: {', '.join(sorted(names))}: choose one")
        peers = [text for text in self.peers if not is_invite(text)]
        peers += [str(addr) for invite in invites for addr in invite.addrs]
        object.__setattr__(self, "peers", tuple(peers))
        object.__setattr__(self, "swarm", names.pop() if names else self.swarm)

    @property
    def listen_addrs(self) -> tuple[Multiaddr, ...]:
        """`listen`, parsed."""
        return tuple(Multiaddr.parse(text) for text in self.listen)

    @property
    def checks_reachability(self) -> bool:
        """Whether a node with these settings finds out if others can dial it."""
        if self.reachability == "auto":
            return any(not address.is_loopback for address in self.listen_addrs)
        return self.reachability == "check" and bool(self.listen)

    @property
    def relay_addrs(self) -> tuple[Multiaddr, ...]:
        """`relays`, parsed."""
        return tuple(Multiaddr.parse(text) for text in self.relays)

    @property
    def peer_addrs(self) -> tuple[Multiaddr, ...]:
        """`peers`, parsed."""
        return tuple(Multiaddr.parse(text) for text in self.peers)
