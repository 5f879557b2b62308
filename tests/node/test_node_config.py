"""NodeConfig says what is wrong with a setting before anything starts."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from swarmnode.node.config import DEFAULT_LISTEN, MAX_NAME, NodeConfig
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.relay_ledger import RelayLimits

RELAY = PrivateKey.from_seed(bytes(32)).peer_id
PEER = f"/ip4/127.0.0.1/tcp/4001/p2p/{PrivateKey.from_seed(bytes(32)).peer_id}"


def test_defaults_and_parsed_addresses():
    config = NodeConfig()
    assert tuple(str(addr) for addr in config.listen_addrs) == DEFAULT_LISTEN
    assert (config.swarm, config.peer_addrs, config.persistent) == ("main", (), False)
    assert [str(addr) for addr in NodeConfig(peers=[PEER]).peer_addrs] == [PEER]
    with pytest.raises(FrozenInstanceError):
        config.swarm = "other"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"listen": "/ip4/127.0.0.1/tcp/0"}, "use a list"),
        ({"listen": ["127.0.0.1:80"]}, "127.0.0.1:80"),
        ({"listen": ["/ip4/999.0.0.1/tcp/0"]}, "999"),
        ({"peers": ["/ip4/127.0.0.1/tcp/4001"]}, "append /p2p/"),
        ({"peers": [PEER + "x"]}, "p2p"),
        ({"allow": "10.0.0.1"}, "use a list"),
        ({"allow": ["10.0.0.1", "a friend"]}, "'a friend' cannot be allowed"),
        ({"swarm": ""}, "swarm name"),
        ({"swarm": "a b"}, "swarm name"),
        ({"swarm": "a" * 65}, "swarm name"),
        ({"public_name": "x" * (MAX_NAME + 1)}, "public name"),
        ({"public_name": "ä" * MAX_NAME}, "public name"),
        ({"public_name": "two\nlines"}, "public name"),
        ({"kv_bytes": 0}, "kv_bytes"),
        ({"log_bytes": -1}, "log_bytes"),
        ({"repair_timeout_s": 0}, "repair_timeout_s"),
        ({"repair_timeout_s": float("nan")}, "repair_timeout_s"),
        ({"repair_timeout_s": float("inf")}, "repair_timeout_s"),
    ],
)
def test_a_wrong_setting_is_named(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        NodeConfig(**settings)


def test_folders_may_be_given_as_text():
    assert NodeConfig(state_dir="state", cache_dir="cache").state_dir == Path("state")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"relay": "yes"}, "relay is 'yes': use one of auto, on, off"),
        ({"relays": ["/ip4/1.2.3.4/tcp/1"]}, "give the relay's own address"),
        ({"relays": [f"/ip4/1.2.3.4/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/{RELAY}"]}, "give the relay's own address"),
        ({"relays": "/ip4/1.2.3.4/tcp/1"}, "use a list"),
    ],
)
def test_relay_settings_are_checked(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        NodeConfig(**settings)


def test_relay_limits_from_text():
    limits = RelayLimits.parse(["circuit-bytes=0", "bytes_per_s = 1000"])
    assert (limits.circuit_bytes, limits.bytes_per_s, limits.circuits) == (0, 1000, RelayLimits().circuits)
    for text in ("circuits", "circuits=-1", "circuit=1", "circuits=1.5", "=1", "circuits=" + 21 * "1"):
        with pytest.raises(ConfigError, match="use NAME=NUMBER"):
            RelayLimits.parse([text])
    with pytest.raises(ConfigError, match="circuits is 0"):
        RelayLimits.parse(["circuits=0"])
