"""Every error a user of swarmnode can meet, in one tree. Each message names the cause and the fix.

    SwarmError
      ConfigError            a setting, flag or argument is wrong (exit code 2)
      ModelNotFound          no such model here or in the swarm
      UnsupportedModel       a model family or tensor type we cannot run
      CorruptCheckpoint      a weights file is truncated or damaged
      NoRoute                no chain of live servers covers the blocks (exit code 3)
      Refused                a peer said no, politely (exit code 4)
        ServerBusy           it is full; try another or later
      PeerUnreachable        no address of a peer answers
      DeadlineExceeded       nothing came back in time (exit code 5)
      ServerFailed           a server died or answered nonsense and could not be replaced
      SessionClosed          the session was ended, by us or by a lease
      ProtocolError          abstract: one of the two below
        LocalProtocolError   our own caller broke the rules of a machine: a bug here
        RemoteProtocolError  the peer's bytes broke the rules: its fault, never ours

The last two follow h11: a peer's bytes can only ever cause RemoteProtocolError.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Base of all our errors. `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(SwarmError):
    """A setting, flag or argument is wrong; the message names it, its value and what is allowed."""

    exit_code = 2


class ModelNotFound(SwarmError):
    """The model is neither on this machine nor served by the swarm."""


class UnsupportedModel(SwarmError):
    """The checkpoint is readable but its family or a tensor type is not one we run."""


class CorruptCheckpoint(SwarmError):
    """A weights or tokenizer file is truncated, damaged, or does not match its manifest."""


class NoRoute(SwarmError):
    """No chain of live, allowed servers covers the blocks asked for; `missing` names the gaps."""

    exit_code = 3

    def __init__(self, message: str, missing: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class Refused(SwarmError):
    """A peer declined a well-formed request; `retry_after_s` is its own estimate, if it gave one."""

    exit_code = 4

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerBusy(Refused):
    """A server has no room for another session right now."""


class PeerUnreachable(SwarmError):
    """No address of a peer could be dialed, or the peer there has another identity."""


class DeadlineExceeded(SwarmError):
    """Nothing came back within the deadline."""

    exit_code = 5


class ServerFailed(SwarmError):
    """A server in the chain failed and no replacement could be found."""


class SessionClosed(SwarmError):
    """The session has ended: closed by its owner, lease run out, or the node is leaving."""


class ProtocolError(SwarmError):
    """A protocol rule was broken. Abstract: raise one of its two children."""


class LocalProtocolError(ProtocolError):
    """Our own code drove a protocol machine wrongly. Always a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The peer's bytes broke the protocol. The connection or stream they came on is done for."""
