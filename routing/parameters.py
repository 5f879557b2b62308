"""Parameters of the DHT."""

from __future__ import annotations

from dataclasses import dataclass

from .lookup import ALPHA
from .table import K


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtConfig:
    """Parameters of the DHT; the defaults are what docs/spec/kad.md promises."""

    k: int = K
    """Bucket size, and peers named in an answer."""
    alpha: int = ALPHA
    """Questions of one lookup in flight on the way."""
    paths: int = 1
    """Disjoint paths of a read or publication that does not say how many."""
    per_subnet: int = 1
    """Peers of one /24 that count towards `width` and `replicas` while there are others."""
    replicas: int = 8
    """Peers an entry is put to."""
    width: int = 10
    """Nearest peers that must have answered before an entry is put or a read is complete."""
    republish_s: float = 40.0
    """How often our own entries are signed and put anew."""
    refresh_s: float = 60.0
    """How often the table looks for new peers while it changes."""
    calm_refresh_s: float = 480.0
    """And how seldom when nobody comes or goes."""
    maintenance_s: float = 2.0
    """How often hand-over, liveness and the cache are looked at."""
    silence_s: float = 90.0
    """A contact silent for this long is asked whether it still lives; one known for longer than twice that, later."""
    pings: int = 4
    """Contacts asked per maintenance round."""
