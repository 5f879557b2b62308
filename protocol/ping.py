"""ping: 32 random bytes come back, until the dialer has enough and ends its direction. libp2p specs, ping."""

from __future__ import annotations

from typing import Final

PROTOCOL: Final = "/ipfs/ping/1.0.0"
SIZE: Final = 32
MAX_INBOUND: Final = 2
"""Ping streams a peer may have open to us at once."""
