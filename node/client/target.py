"""What a chain is opened for: the session's constants, the plan it needs, and how its results must look."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ...protocol import token_rows
from ...protocol.chain import ChainSpec
from ...protocol.errors import RemoteProtocolError
from ...protocol.messages import Output, Result, Want
from ...routing.planner import PlanRequest
from ...routing.swarm import SwarmView


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a chain runs: the session's constants, the plan it needs, and a way to see who serves the model."""

    spec: ChainSpec
    request: PlanRequest
    view: Callable[[bool], Awaitable[SwarmView]]
    """Called with True to ask the swarm anew."""
    row_bytes: int
    """Payload of a result per row wanted; 0 where results are tokens, which have their own form."""
    max_payload: int
    """Largest frame a hop may rightly send: a result, or rows to pass on."""
    vocab: int
    """Token ids are below this."""

    def fits(self, result: Result, payload: bytes) -> bool:
        """Whether a result has the form it must have."""
        rows = {Want.NOTHING: 0, Want.LAST: 1, Want.ALL: result.count}[Want(result.want)]
        if self.spec.output != Output.TOKEN or rows == 0:
            return len(payload) == rows * self.row_bytes
        if result.want == Want.LAST:
            return not payload and 0 <= result.token < self.vocab
        if len(payload) != rows * token_rows.ROW_BYTES:
            return False
        try:
            token_rows.decode(payload, self.vocab)
        except RemoteProtocolError:
            return False
        return True


def new_session_id() -> bytes:
    """16 random bytes: a session's name, and what a previous hop must know to attach to it."""
    return secrets.token_bytes(16)
