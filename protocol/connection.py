"""A libp2p connection over any byte link, sans-IO: multistream-select, Noise, muxer negotiation, then yamux.

    phase      reads                     writes
    SECURITY   multistream messages      the dialer's header, "/noise" and Noise message 1 in its first flight
    NOISE      2-byte framed handshake   the rest of the handshake; both identities are proven at its end
    MUXER      multistream inside Noise  only with peers that do not negotiate the muxer inside the handshake
    OPEN       yamux inside Noise        whatever the session's scheduler picks, encrypted just in time

The owner receives into get_buffer(), reports with received(n), and sends what pull() returns for as long as
the link takes it. received() raises RemoteProtocolError when the peer broke a rule; pull() may then still
have a last word.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from . import multistream, noise, yamux
from .errors import LocalProtocolError, RemoteProtocolError
from .ids import PeerId
from .yamux import Budget, Session
from .yamux_frames import GoAway
from .yamux_stream import MuxStream, Part

MUXERS: Final = (yamux.PROTOCOL,)


class Phase(Enum):
    """How far the connection has come; see the module's table."""

    SECURITY = "agreeing on security"
    NOISE = "in the Noise handshake"
    MUXER = "agreeing on a muxer"
    OPEN = "open"


class Connection:
    """One side of a connection.

    `initiator` is a negotiated role: usually, not always, the side that dialed.
    """

    __slots__ = (
        "_handshake",
        "_negotiation",
        "_opener",
        "_out",
        "_reader",
        "_scratch",
        "_sealer",
        "early_muxer",
        "get_buffer",
        "initiator",
        "is_open",
        "phase",
        "session",
    )

    def __init__(
        self,
        static: noise.StaticKey,
        *,
        initiator: bool,
        expected: PeerId | None = None,
        node_budget: Budget | None = None,
        ephemeral: X25519PrivateKey | None = None,
        early_muxer: bool = True,
    ) -> None:
        self.phase = Phase.SECURITY
        self.is_open = False
        """The peer is authenticated and streams can be used: the phase is OPEN."""
        self.initiator = initiator
        self.early_muxer = False
        """The muxer was agreed inside the Noise handshake."""
        self.session = Session(client=initiator, node_budget=node_budget)
        self._reader = noise.FrameReader()
        self.get_buffer = self._reader.get_buffer
        """Where to receive the next bytes; never empty."""
        self._handshake = noise.Handshake(
            static,
            initiator=initiator,
            expected=expected,
            muxers=MUXERS if early_muxer else (),
            ephemeral=ephemeral,
        )
        self._sealer: noise.Sealer | None = None
        self._opener: noise.Opener | None = None
        self._negotiation: multistream.Dialer | multistream.Responder
        self._scratch = memoryview(b"")
        self._out = b""
        if initiator:
            self._negotiation = multistream.Dialer([noise.PROTOCOL])
            # message 1 right behind the proposal: libp2p peers accept it, and it saves a round trip
            self._out = self._negotiation.opening + self._handshake.write()
        else:
            self._negotiation = multistream.Responder(lambda name: name == noise.PROTOCOL)

    @property
    def remote(self) -> PeerId:
        """The authenticated peer. Raises LocalProtocolError before the handshake has proven it."""
        key = self._handshake.remote_key
        if key is None:
            raise LocalProtocolError("the peer is not known before the handshake is over")
        return key.peer_id

    # -- receiving --

    def received(self, size: int) -> list[yamux.Event]:
        """`size` bytes were put into the buffer. Raises RemoteProtocolError."""
        reader, opener = self._reader, self._opener
        reader.commit(size)
        if not self.is_open or opener is None:
            return self._received_early()
        events: list[yamux.Event] = []
        for message in reader.frames():
            events += self.session.receive(opener.open(message))
        return events

    def _received_early(self) -> list[yamux.Event]:
        """received() until the connection is open, and for what came behind the last bytes of the handshake."""
        if self.phase is Phase.SECURITY and not self._agree_on_security():
            return []
        events: list[yamux.Event] = []
        for message in self._reader.frames():
            if self.phase is Phase.NOISE:
                self._handshake_message(bytes(message))
                continue
            plain = self._open(message)
            if self.phase is Phase.MUXER:
                plain = self._agree_on_muxer(plain)
            if self.phase is Phase.OPEN and plain:
                events += self.session.receive(plain)
        return events

    def receive(self, data: bytes) -> list[yamux.Event]:
        """received() for callers that have the bytes already. Raises RemoteProtocolError."""
        events: list[yamux.Event] = []
        view = memoryview(data)
        while view:
            buffer = self.get_buffer()
            size = min(len(buffer), len(view))
            buffer[:size] = view[:size]
            events += self.received(size)
            view = view[size:]
        return events

    def trim(self) -> None:
        """Give back memory that a quiet connection does not need."""
        self._reader.trim()
        if not self.session.has_output:
            self._scratch = memoryview(b"")

    def _agree_on_security(self) -> bool:
        pending = bytes(self._reader.peek())
        self._reader.skip(len(pending))
        self._out += self._negotiation.feed(pending)
        if not self._negotiation.done:
            return False
        if self._negotiation.protocol is None:
            raise RemoteProtocolError(f"the peer does not speak {noise.PROTOCOL}")
        self.phase = Phase.NOISE
        self._reader.skip(-len(self._negotiation.leftover))
        return True

    def _handshake_message(self, message: bytes) -> None:
        self._handshake.read(message)
        if not self._handshake.done:
            self._out += self._handshake.write()
        if self._handshake.done:
            self._sealer, self._opener = self._handshake.ciphers()
            self._choose_muxer()

    def _choose_muxer(self) -> None:
        if self._handshake.muxer() is not None:
            self.early_muxer = True
            self._enter_open()
            return
        self.phase = Phase.MUXER
        if self.initiator:
            dialer = multistream.Dialer(MUXERS)
            self._negotiation = dialer
            self._out += self._seal(dialer.opening)
        else:
            self._negotiation = multistream.Responder(MUXERS.__contains__)

    def _agree_on_muxer(self, plain: bytes) -> bytes:
        reply = self._negotiation.feed(plain)
        if reply:
            self._out += self._seal(reply)
        if not self._negotiation.done:
            return b""
        if self._negotiation.protocol is None:
            raise RemoteProtocolError(f"the peer does not speak {yamux.PROTOCOL}")
        self._enter_open()
        return self._negotiation.leftover

    def _enter_open(self) -> None:
        self.phase = Phase.OPEN
        self.is_open = True

    # -- sending --

    @property
    def has_output(self) -> bool:
        """pull() may produce something."""
        return bool(self._out) or (self.is_open and self.session.has_output)

    def pull(self) -> bytes | bytearray | None:
        """The next bytes for the link: handshake output, or one freshly encrypted Noise message; None:
        nothing."""
        if self._out:
            out, self._out = self._out, b""
            return out
        if not self.is_open or not self.session.has_output:
            return None
        if not self._scratch:
            self._scratch = memoryview(bytearray(noise.MAX_PLAINTEXT))
        size = self.session.fill(self._scratch)
        return self._seal(self._scratch[:size]) if size else None

    def frame_now(self, stream: MuxStream, parts: tuple[Part, ...]) -> bytearray | None:
        """A message as one encrypted frame, at once; None when it has to queue: see Session.frame_now()."""
        plain = self.session.frame_now(stream, parts)
        if plain is None or self._sealer is None:
            return None
        return self._sealer.seal(plain)

    def go_away(self, code: GoAway = GoAway.NORMAL) -> None:
        """Say good-bye with the next pull()."""
        if self.phase is Phase.OPEN:
            self.session.go_away(code)

    def _seal(self, plain: bytes | memoryview) -> bytearray:
        if self._sealer is None:
            raise LocalProtocolError("nothing can be encrypted before the handshake is over")
        return self._sealer.seal(plain)

    def _open(self, message: memoryview) -> bytes:
        if self._opener is None:
            raise LocalProtocolError("nothing can be decrypted before the handshake is over")
        return self._opener.open(message)
