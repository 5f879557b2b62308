"""All targets that keep state, fed sequences."""

from .links import LINKS
from .muxes import MUXES
from .sessions import SESSIONS
from .traces import TRACES

STATEFUL = (*MUXES, *LINKS, *SESSIONS, *TRACES)
