"""multistream-select 1.0: the two ends agree on a protocol by name. Spec: docs/spec/multistream.md.

Sans-IO, one object per negotiation. The dialer sends header and first proposal in one go, so agreement
costs no round trip of its own when the data that follows is sent along ("pipelined").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from . import protobuf
from .errors import LocalProtocolError, RemoteProtocolError

HEADER: Final = "/multistream/1.0.0"
NOT_AVAILABLE: Final = "na"
MAX_MESSAGE: Final = 1024
"""Longest message accepted; protocol names have under 100 characters."""
MAX_PROPOSALS: Final = 32
"""Protocols a dialer may try on one stream before the listener hangs up."""


def message(text: str) -> bytes:
    """One message: uvarint length, text, newline."""
    return protobuf.delimited(text.encode() + b"\n")


class _Negotiation(ABC):
    """What both ends share: splitting the input, the header that comes first, the outcome."""

    def __init__(self) -> None:
        self._splitter = protobuf.Delimited(MAX_MESSAGE)
        self._greeted = False
        self.protocol: str | None = None
        """The protocol agreed on, once there is one."""
        self._done = False

    @property
    def done(self) -> bool:
        """Nothing more is to be negotiated: success, or failure when `protocol` is None."""
        return self._done

    @property
    def leftover(self) -> bytes:
        """Bytes that came after the negotiation and belong to the protocol."""
        return self._splitter.pending

    def feed(self, data: bytes | memoryview) -> bytes:
        """Take the peer's bytes, return what to send back. Raises RemoteProtocolError."""
        if self.done:
            raise LocalProtocolError("the negotiation is over: these bytes belong to the protocol")
        return b"".join(self._replies(data))

    def _replies(self, data: bytes | memoryview) -> Iterator[bytes]:
        for line in self._splitter.feed(data):
            yield self._take(_text(line))
            if self.done:
                return

    def _take(self, text: str) -> bytes:
        if self._greeted:
            return self._answer(text)
        if text != HEADER:
            raise RemoteProtocolError(f"expected {HEADER}, got {text[:64]!r}")
        self._greeted = True
        return b""

    @abstractmethod
    def _answer(self, text: str) -> bytes:
        """What to say to the first line after the header."""


def _text(line: bytes) -> str:
    if line[-1:] != b"\n":
        raise RemoteProtocolError("multistream message does not end in a newline")
    return protobuf.text(line[:-1])


class Dialer(_Negotiation):
    """Proposes protocols in order.

    Send `opening` first; `done` without `protocol` means none was accepted.
    """

    def __init__(self, protocols: Sequence[str]) -> None:
        super().__init__()
        self._proposals = list(protocols)
        self.opening = message(HEADER) + message(self._proposals[0])
        """Header and first proposal."""

    def _answer(self, text: str) -> bytes:
        if text == self._proposals[0]:
            self.protocol = text
            self._done = True
        elif text == NOT_AVAILABLE:
            del self._proposals[0]
            if self._proposals:
                return message(self._proposals[0])
            self._done = True
        else:
            raise RemoteProtocolError(f"proposed {self._proposals[0]}, the peer answered {text[:64]!r}")
        return b""


class Responder(_Negotiation):
    """Accepts the first proposal that `supports` says yes to."""

    def __init__(self, supports: Callable[[str], bool]) -> None:
        super().__init__()
        self._supports = supports
        self._proposals = 0

    def _take(self, text: str) -> bytes:
        greeting = b"" if self._greeted else message(HEADER)
        return greeting + super()._take(text)

    def _answer(self, text: str) -> bytes:
        if self._supports(text):
            self.protocol = text
            self._done = True
            return message(text)
        self._proposals += 1
        if self._proposals >= MAX_PROPOSALS:
            raise RemoteProtocolError(f"the peer proposed {MAX_PROPOSALS} protocols we do not speak")
        return message(NOT_AVAILABLE)
