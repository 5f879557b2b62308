"""All targets that keep state, fed sequences."""

from .links import LINKS
from .muxes import MUXES
from .sessions import SESSIONS

STATEFUL = (*MUXES, *LINKS, *SESSIONS)
