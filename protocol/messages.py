"""Messages of an inference session, `/swarmnode/session/1.0.0`, and of the small protocols beside it.

One stream from the opener to each server of the chain carries control (and the data of hops that touch the opener);
one stream from each server to the next carries data. Spec: docs/spec/session.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from .wire import Catalogue, Message, blob, flag, integer, integers, number, text, texts

SESSION_PROTOCOL: Final = "/swarmnode/session/1.0.0"
MODEL_PROTOCOL: Final = "/swarmnode/model/1.0.0"
INFO_PROTOCOL: Final = "/swarmnode/info/1.0.0"

MAX_BLOCKS: Final = 10_000
MAX_POSITION: Final = 1 << 24
MAX_EPOCH: Final = 1 << 40
MAX_LANES: Final = 256
MAX_ROWS: Final = 1024
"""Rows one frame may carry: prompts are prefilled in chunks of at most this."""
_ID: Final = 16
_PEER: Final = 64
_ADDRESSES: Final = 8


class Kind(IntEnum):
    """What a data frame's payload is."""

    HIDDEN = 0
    """Hidden states in the session's codec."""
    TOKENS = 1
    """Token ids, u32 little endian: only into a hop that embeds."""


class Want(IntEnum):
    """What the tail returns for a frame's rows."""

    NOTHING = 0
    LAST = 1
    ALL = 2


class Output(IntEnum):
    """What the tail of a chain returns."""

    HIDDEN = 0
    """Hidden states in the session's codec; the client has the head."""
    LOGITS = 1
    """float32 logits, little endian."""
    TOKEN = 2
    """Sampled tokens: the tail has head and sampler. One token travels in the header, those of several rows in the
    payload (protocol/token_rows.py)."""


class RefusalCode(IntEnum):
    """Why a server declined, for the opener to act on."""

    BUSY = 1
    NO_MODEL = 2
    NO_SPAN = 3
    WRONG_CLASS = 4
    DRAINING = 5
    BAD_REQUEST = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Message, kind=1):
    """Opener to server: hold a session over blocks [start, end) of a model."""

    session: bytes = blob(1, low=_ID, high=_ID)
    digest: bytes = blob(2, low=32, high=32)
    """The model's manifest digest."""
    start: int = integer(3, high=MAX_BLOCKS)
    end: int = integer(4, high=MAX_BLOCKS)
    codec: int = integer(5, high=255)
    cuts: tuple[int, ...] = integers(6, high=MAX_BLOCKS, most=256)
    """Block borders where hidden states pass through the codec, whoever serves the blocks around them."""
    lanes: int = integer(7, low=1, high=MAX_LANES)
    max_length: int = integer(8, low=1, high=MAX_POSITION)
    """Positions a lane may reach."""
    epoch: int = integer(9, high=MAX_EPOCH)
    prev: bytes = blob(10, high=_PEER, default=b"")
    """Peer id of the previous hop; empty: the opener itself."""
    next: bytes = blob(11, high=_PEER, default=b"")
    """Peer id of the next hop; empty: results go to the opener."""
    next_addresses: tuple[str, ...] = texts(12, high=256, most=_ADDRESSES, default=())
    acked: tuple[int, ...] = integers(13, high=MAX_POSITION, most=MAX_LANES, default=())
    """Per lane, positions whose results the opener already has (empty: none)."""
    resume: bool = flag(14, default=False)
    """The next hop is in the session already: wait for its Attached and go on from what it has."""
    embed: bool = flag(15, default=False)
    """Data arrive as token ids; embed them here."""
    output: int = integer(16, high=2, default=int(Output.HIDDEN))
    compute_class: bytes = blob(17, high=8, default=b"")
    """Refuse unless this is the server's compute class; empty: any."""
    sampling: bytes = blob(18, high=1024, default=b"")
    """Sampling parameters (protocol/sampling.py), for a tail that samples."""
    relay: bool = flag(19, default=False)
    """Rows for the next hop go to the opener, who passes them on: the two hops cannot reach each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Message, kind=2):
    """Server to opener: the session is held."""

    compute_class: bytes = blob(1, high=8)
    log_bytes: int = integer(2, high=1 << 50)
    """Byte budget of the server's upstream logs, all sessions together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Message, kind=3):
    """Server to opener: no, and why. The stream ends after it."""

    code: int = integer(1, high=255)
    reason: str = text(2, high=500)
    retry_after_s: float = number(3, low=0, high=3600, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach(Message, kind=4):
    """First frame of a data stream: the sender is the previous hop of this session."""

    session: bytes = blob(1, low=_ID, high=_ID)
    start: int = integer(2, high=MAX_BLOCKS)
    """The receiver's first block: one peer may serve two spans of a chain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached(Message, kind=17):
    """Answer to Attach, the only frame that goes up a data stream: rows of each lane that need not be sent."""

    received: tuple[int, ...] = integers(1, high=MAX_POSITION, most=MAX_LANES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data(Message, kind=5):
    """Rows [position, position + count) of one lane. The payload is their hidden states or token ids."""

    session: bytes = blob(1, low=_ID, high=_ID)
    epoch: int = integer(2, high=MAX_EPOCH)
    lane: int = integer(3, high=MAX_LANES - 1, default=0)
    position: int = integer(4, high=MAX_POSITION)
    count: int = integer(5, low=1, high=MAX_ROWS, default=1)
    payload_kind: int = integer(6, high=1, default=int(Kind.HIDDEN))
    want: int = integer(7, high=2, default=int(Want.LAST))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Message, kind=6):
    """Tail to opener: rows up to position + count went through the chain; the payload holds what was wanted of them."""

    epoch: int = integer(1, high=MAX_EPOCH)
    lane: int = integer(2, high=MAX_LANES - 1, default=0)
    position: int = integer(3, high=MAX_POSITION)
    count: int = integer(4, low=1, high=MAX_ROWS, default=1)
    want: int = integer(5, high=2, default=int(Want.LAST))
    token: int = integer(6, low=-1, high=1 << 31, default=-1)
    logprob: float = number(7, low=-1e30, high=0, default=0)
    compute_s: float = number(8, low=0, high=3600, default=0)
    """Time the tail computed on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncate(Message, kind=7):
    """In-band, down the chain: forget this lane's positions from `position` on. From 0 on: the lane is dropped."""

    session: bytes = blob(1, low=_ID, high=_ID)
    epoch: int = integer(2, high=MAX_EPOCH)
    lane: int = integer(3, high=MAX_LANES - 1, default=0)
    position: int = integer(4, high=MAX_POSITION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork(Message, kind=18):
    """In-band, down the chain: lane `lane` is from now on what the first rows of lane `source` are."""

    session: bytes = blob(1, low=_ID, high=_ID)
    epoch: int = integer(2, high=MAX_EPOCH)
    lane: int = integer(3, high=MAX_LANES - 1, default=0)
    source: int = integer(4, high=MAX_LANES - 1, default=0)
    position: int = integer(5, low=1, high=MAX_POSITION)
    """How many of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewire(Message, kind=8):
    """Opener to server: a neighbour has changed. Fields left out stay as they are."""

    epoch: int = integer(1, high=MAX_EPOCH)
    set_prev: bool = flag(2, default=False)
    prev: bytes = blob(3, high=_PEER, default=b"")
    set_next: bool = flag(4, default=False)
    next: bytes = blob(5, high=_PEER, default=b"")
    next_addresses: tuple[str, ...] = texts(6, high=256, most=_ADDRESSES, default=())
    acked: tuple[int, ...] = integers(7, high=MAX_POSITION, most=MAX_LANES, default=())
    """Per lane, positions whose results the opener has: replayed rows before them may be joined."""
    resume: bool = flag(8, default=False)
    """The new next hop is in the session already: wait for its Attached and go on from what it has. Otherwise it is
    empty: replay the log to it from the start, at once."""
    cut_epochs: tuple[int, ...] = integers(9, high=MAX_EPOCH, most=MAX_LANES, default=())
    """Per lane, the epoch of the last truncation, which may have died with the old previous hop."""
    cuts: tuple[int, ...] = integers(10, high=MAX_POSITION, most=MAX_LANES, default=())
    """Per lane, the length it was truncated to."""
    relay: bool = flag(11, default=False)
    """With set_next: rows for the next hop go to the opener, as in Open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopFailed(Message, kind=9):
    """Server to opener: my stream to the next hop broke."""

    peer: bytes = blob(1, high=_PEER)
    epoch: int = integer(2, high=MAX_EPOCH)
    reason: str = text(3, high=500)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogGone(Message, kind=10):
    """Server to opener: my log of this session was evicted; replay from the tokens."""

    epoch: int = integer(1, high=MAX_EPOCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedReplay(Message, kind=11):
    """Server to opener: a windowed layer no longer holds what this truncation needs; replay from `position`."""

    epoch: int = integer(1, high=MAX_EPOCH)
    lane: int = integer(2, high=MAX_LANES - 1, default=0)
    position: int = integer(3, high=MAX_POSITION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Message, kind=12):
    """Opener to server: are you there, and how far are you?"""

    nonce: int = integer(1, high=1 << 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Message, kind=13):
    """Answer to Probe: per lane, rows received, computed, and handed to the next hop."""

    nonce: int = integer(1, high=1 << 32)
    received: tuple[int, ...] = integers(2, high=MAX_POSITION, most=MAX_LANES)
    computed: tuple[int, ...] = integers(3, high=MAX_POSITION, most=MAX_LANES)
    sent: tuple[int, ...] = integers(4, high=MAX_POSITION, most=MAX_LANES)
    epoch: int = integer(5, high=MAX_EPOCH, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Message, kind=14):
    """Server to opener: the session is over, and why. The stream ends after it."""

    reason: str = text(1, high=500)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(Message, kind=15):
    """Server to opener: I am leaving; move this session elsewhere. I serve on until `grace_s` is over."""

    grace_s: float = number(1, low=0, high=3600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Message, kind=19):
    """Server to opener, now and then: what the last rows took here, for planning. It can speak for itself only."""

    rows: int = integer(1, low=1, high=MAX_ROWS)
    queue_s: float = number(2, low=0, high=3600)
    """They waited for others' rows."""
    compute_s: float = number(3, low=0, high=3600)
    """The pass they were part of."""
    hop_s: float = number(4, low=0, high=3600, default=0)
    """One way to the next hop, as measured here; 0: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close(Message, kind=16):
    """Opener to server: free everything of this session."""


TO_SERVER: Final = Catalogue(Open, Attach, Data, Truncate, Fork, Rewire, Probe, Close)
TO_PREVIOUS: Final = Catalogue(Attached, Refused)
TO_CLIENT: Final = Catalogue(
    Opened, Refused, Data, Truncate, Fork, Result, HopFailed, LogGone, NeedReplay, Progress, Report, Failed, Draining
)


# The model protocol: a peer hands out the manifest of a model it serves, config and tokenizer within, by digest.


@dataclass(frozen=True, slots=True, kw_only=True)
class GetManifest(Message, kind=32):
    """Ask for a model's manifest."""

    digest: bytes = blob(1, low=32, high=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestReply(Message, kind=33):
    """The manifest is the payload, which the receiver checks against the digest; or the peer has none."""

    found: bool = flag(1)


MODEL_MESSAGES: Final = Catalogue(GetManifest, ManifestReply)


# The info protocol: what goes stale at once is asked, not announced.


@dataclass(frozen=True, slots=True, kw_only=True)
class GetInfo(Message, kind=48):
    """Ask a server how it is doing on one model."""

    digest: bytes = blob(1, low=32, high=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Info(Message, kind=49):
    """A server's live state. An empty span means it does not serve the model."""

    start: int = integer(1, high=MAX_BLOCKS)
    end: int = integer(2, high=MAX_BLOCKS)
    kv_free: int = integer(3, high=1 << 50)
    """Tokens of KV room left."""
    queue_s: float = number(4, low=0, high=3600)
    """Compute already waiting."""
    sessions: int = integer(5, high=1 << 20)
    decode_s: float = number(6, low=0, high=3600)
    prefill_s: float = number(7, low=0, high=3600)
    draining: bool = flag(8, default=False)


INFO_MESSAGES: Final = Catalogue(GetInfo, Info)
