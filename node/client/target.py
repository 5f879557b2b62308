"""What a chain is opened for: the session's constants, the plan it needs, and how its results must look."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from ...protocol import token_rows
from ...protocol.chain import ChainSpec
from ...protocol.errors import RemoteProtocolError
from ...protocol.messages import Output, Result, Want
from ...protocol.tensors import BLOCK, OUTLIERS, Codec, codec_at
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
            return len(payload) == rows * self.row_bytes and self._are_numbers(payload, rows)
        if result.want == Want.LAST:
            return not payload and 0 <= result.token < self.vocab
        if len(payload) != rows * token_rows.ROW_BYTES:
            return False
        try:
            token_rows.decode(payload, self.vocab)
        except RemoteProtocolError:
            return False
        return True

    def _are_numbers(self, payload: bytes, rows: int) -> bool:
        """A tail that sends NaN has failed, and must be replaced like one that sends nothing."""
        if not rows:
            return True
        if self.spec.output == Output.LOGITS:
            return not bool(np.isnan(np.frombuffer(payload, np.float32)).any())
        match codec_at(self.spec.end, self.spec.codec, self.spec.cuts):
            case Codec.FP32:
                return _finite_fp32(np.frombuffer(payload, np.uint32))
            case Codec.BF16:
                return _finite_bf16(np.frombuffer(payload, np.uint16))
            case Codec.INT8S:  # values, bf16 scales, indices of outliers, these as fp32
                tail = np.frombuffer(payload, np.uint8).reshape(rows, -1)[:, -OUTLIERS * 4 :]
                return _finite_fp32(np.ascontiguousarray(tail).view(np.uint32)) and _finite_bf16(
                    np.ascontiguousarray(self._scales(payload, rows)).view(np.uint16)
                )

    def _scales(self, payload: bytes, rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        table = np.frombuffer(payload, np.uint8).reshape(rows, -1)
        rest = table.shape[1] - OUTLIERS * 6
        least = rest - 2 * -(-rest // BLOCK)
        hidden = next(n for n in range(least, rest) if n + 2 * -(-n // BLOCK) == rest)
        return table[:, hidden:rest]


def _finite_fp32(bits: np.ndarray[tuple[int, ...], np.dtype[np.uint32]]) -> bool:
    return not bool(((bits & 0x7F800000) == 0x7F800000).any())


def _finite_bf16(bits: np.ndarray[tuple[int, ...], np.dtype[np.uint16]]) -> bool:
    return not bool(((bits & 0x7F80) == 0x7F80).any())


def new_session_id() -> bytes:
    """16 random bytes: a session's name, and what a previous hop must know to attach to it."""
    return secrets.token_bytes(16)
