"""The server's side of an inference session, as a sans-IO machine.

Data flow along the chain: the previous hop sends rows of hidden states, this hop computes them and sends its output to
the next one. The machine decides what to compute, what to drop, and what goes out; it neither computes nor sends.

Every lane (a batch row) has its own position and **epoch**. The client raises the epoch whenever it rewinds: truncates,
repairs or replays. What a hop does with rows [p, p + n) of epoch e, when it has received `received` rows of epoch E:

    e < E                     stale, drop
    e == E, p <= received     drop the rows already received, compute the rest
    e >  E, p <= received     adopt e; forget rows from p on; compute
    p > received              a gap: protocol error

Because results are bit-identical within a compute class, recomputing a cached row changes nothing: that is what makes
a replay to one hop, and the rewind it causes in the next, safe. Three rules keep a repair from losing rows:

  * A rewire raises only the epoch of what goes *out*. Rows still coming in under the old epoch stay valid.
  * A computed row is dropped only if its lane was rewound below it since, never because the epoch moved on.
  * Sending is reading the output log from a cursor; a rewire moves the cursor. Rows that were under way when a hop
    died are in the log, so they go to its replacement without the client sending them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from .errors import RemoteProtocolError
from .messages import MAX_POSITION, Data, Fork, Kind, Open, Progress, Result, Rewire, Truncate, Want
from .sender import Copy, Cut, Sender, SendingLane
from .session_log import Entry
from .tensors import Codec, codec_at, payload_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Rows to compute. The answer goes to `on_computed` with the job itself."""

    lane: int
    position: int
    """First row; the lane's KV cache must be cut to this length before the rows are run."""
    count: int
    number: int
    """Counts the session's jobs."""
    payload_kind: int
    want: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A frame for the next hop."""

    message: Data | Truncate | Fork
    payload: bytes = b""


class Forked(Enum):
    """What became of a Fork."""

    STALE = 0
    """It was from before a rewind: nothing."""
    DONE = 1
    """The KV caches must be forked as well, behind the jobs given out so far."""
    LOST = 2
    """Rows it needs are gone: the client must replay from the tokens."""


@dataclass(slots=True)
class _Lane(SendingLane):
    received: int = 0
    computed: int = 0
    pending: dict[int, int] = field(default_factory=dict)
    """Jobs under way: number -> position up to which their rows are still wanted."""
    floor: int = MAX_POSITION
    """Lowest rewind since the next hop was set: from there on it needs the rows again, whatever it says it has."""
    lost: bool = False
    """Rows were given up that the client has been asked for: what follows them is no gap."""
    ceiling_epoch: int = 0
    """Rows of a lower epoch than this are valid below `ceiling` only: a truncation is on its way behind them."""
    ceiling: int = MAX_POSITION


class SessionMachine:
    """One session at one server. Feed it parsed messages; it returns jobs and frames. Not thread-safe."""

    def __init__(self, open_: Open, opener: bytes, hidden: int) -> None:
        self.id = open_.session
        self.start, self.end = open_.start, open_.end
        self.codec = Codec(open_.codec)
        self.max_length = open_.max_length
        self.embed = open_.embed
        self.opener = opener
        self.prev = open_.prev or opener
        self.next = open_.next
        self.relay = open_.relay
        """Rows for the next hop go over the opener."""
        self.next_addresses = open_.next_addresses
        self.epoch = open_.epoch
        self._row_bytes = payload_size(codec_at(self.start, self.codec, open_.cuts), 1, hidden)
        self._lanes = [_Lane(epoch=open_.epoch) for _ in range(open_.lanes)]
        self._sender = Sender(self._lanes)
        self._shared: dict[int, set[int]] = {}
        """Jobs under way whose rows are also those of lanes that were forked: number -> these lanes."""
        self.next_known = not open_.resume
        """We know which rows the next hop has; until then nothing is sent to it."""
        self._jobs = 0
        for lane, acked in zip(self._lanes, open_.acked, strict=False):
            lane.acked = acked

    @property
    def is_tail(self) -> bool:
        """Results go to the client, not to a next hop."""
        return not self.next and not self.relay

    @property
    def log_bytes(self) -> int:
        """Bytes the output logs of all lanes hold."""
        return sum(lane.log.size_bytes for lane in self._lanes)

    def on_data(self, source: bytes, data: Data, payload: bytes) -> Job | None:
        """Rows from the previous hop. Returns what to compute; None for stale rows and duplicates.

        Raises RemoteProtocolError for a wrong sender, size, lane or position.
        """
        lane = self._lane(source, data.session, data.lane)
        self._check_payload(data, payload)
        start, end = self._admit(lane, data)
        if start >= end:
            return None
        lane.received = end
        row = len(payload) // data.count
        return Job(
            lane=data.lane,
            position=start,
            count=end - start,
            number=self._number(lane, end),
            payload_kind=data.payload_kind,
            want=data.want,
            payload=payload[(start - data.position) * row : (end - data.position) * row],
        )

    def _admit(self, lane: _Lane, data: Data) -> tuple[int, int]:
        """The table in the module's docstring. Returns the rows [start, end) to compute, if any."""
        end = data.position + data.count
        if end > self.max_length:
            raise RemoteProtocolError(f"row {end} is past the session's length of {self.max_length}")
        if data.epoch < lane.ceiling_epoch:
            end = min(end, lane.ceiling)
        if data.epoch < lane.epoch or end <= data.position:
            return end, end
        if data.position > lane.received:
            if lane.lost:
                return end, end
            raise RemoteProtocolError(
                f"rows from {data.position} do not follow row {lane.received} of lane {data.lane}"
            )
        if data.epoch > lane.epoch:
            self._rewind(data.lane, data.position, data.epoch)
        lane.lost = False
        if data.want != Want.NOTHING:
            # A truncation may have come as a replay, without a word of its own: what the client had is wanted again.
            lane.acked = min(lane.acked, lane.received)
        return lane.received, end

    def on_truncate(self, source: bytes, truncate: Truncate) -> int | None:
        """Forget rows from `position` on. Returns the new length for the KV cache; None when stale."""
        lane = self._lane(source, truncate.session, truncate.lane)
        if truncate.epoch < lane.epoch:
            return None
        self._truncate(truncate.lane, truncate.position, truncate.epoch)
        return lane.received

    def _truncate(self, index: int, position: int, epoch: int) -> None:
        lane = self._lanes[index]
        position = min(position, lane.received)
        self._rewind(index, position, epoch)
        lane.acked = min(lane.acked, position)
        lane.truncate_to = position

    def _rewind(self, index: int, position: int, epoch: int) -> None:
        lane = self._lanes[index]
        lane.epoch = epoch
        lane.pending = {number: min(end, position) for number, end in lane.pending.items()}
        lane.received = position
        lane.computed = min(lane.computed, position)
        lane.floor = min(lane.floor, position)
        lane.log.cut(position)
        self._sender.rewound(index, position)

    def on_fork(self, source: bytes, fork: Fork) -> Forked:
        """Lane `fork.lane` becomes the first rows of another one, those still being computed too.

        Raises RemoteProtocolError for a wrong sender or lane.
        """
        target, origin = (self._lane(source, fork.session, index) for index in (fork.lane, fork.source))
        if target is origin:
            raise RemoteProtocolError(f"lane {fork.lane} cannot be forked into itself")
        if fork.epoch < max(target.epoch, target.ceiling_epoch):
            return Forked.STALE
        if target.received or fork.epoch > target.epoch:  # else it is replayed to us: the next hop may have it already
            self._rewind(fork.lane, 0, fork.epoch)
        target.truncate_to, target.acked = None, 0
        as_rows = not self.is_tail and self.next_known and origin.cursor > fork.position
        target.lost = origin.received < fork.position or (as_rows and origin.log.start > 0)
        if target.lost:
            return Forked.LOST
        self._adopt(target, origin, fork)
        return Forked.DONE

    def _adopt(self, target: _Lane, origin: _Lane, fork: Fork) -> None:
        target.received = target.acked = fork.position
        target.computed = min(origin.computed, fork.position)
        for number, end in origin.pending.items():
            target.pending[number] = min(end, fork.position)
            self._shared.setdefault(number, set()).add(fork.lane)
        target.log = origin.log.fork(fork.position)
        self._sender.forked(fork.source, fork.lane, fork.position, max(fork.epoch, self.epoch))

    def on_computed(self, job: Job, output: bytes) -> Result | None:
        """A job is done. At the tail: the Result to send, with `output` as payload. Else the rows go out by the log."""
        for index in self._shared.pop(job.number, set()) - {job.lane}:
            self._computed(self._lanes[index], job, output)
        lane = self._lanes[job.lane]
        done = self._computed(lane, job, output)
        if done is None or not self.is_tail:
            return None
        return Result(epoch=lane.epoch, lane=job.lane, position=job.position, count=done.count, want=done.want)

    def _computed(self, lane: _Lane, job: Job, output: bytes) -> Entry | None:
        """What a lane still wants of a job that is done."""
        count = lane.pending.pop(job.number) - job.position
        if count <= 0:
            return None
        want = job.want if count == job.count else int(Want.NOTHING)
        entry = Entry(job.position, count, want, output[: len(output) // job.count * count])
        lane.computed = entry.end
        if not self.is_tail:
            lane.log.append(entry)
        return entry

    def on_failed(self, job: Job) -> None:
        """A job could not be done: its rows, and those after them, count as never received."""
        for index in {job.lane} | self._shared.pop(job.number, set()):
            lane = self._lanes[index]
            lane.pending.pop(job.number)
            if job.position < lane.received:
                self._rewind(index, job.position, lane.epoch)
                lane.lost = True

    def is_wanted(self, job: Job) -> bool:
        """Whether any of the job's rows still are: a rewind may have made it pointless while it waited."""
        lanes = {job.lane} | self._shared.get(job.number, set())
        return any(self._lanes[lane].pending[job.number] > job.position for lane in lanes)

    def _number(self, lane: _Lane, end: int) -> int:
        self._jobs += 1
        lane.pending[self._jobs] = end
        return self._jobs

    def on_rewire(self, rewire: Rewire) -> bool:
        """A neighbour was replaced. An empty next hop gets the log again; one in the session says where to go on.

        Returns False if rows it needs were dropped: the client must replay from the tokens. Raises RemoteProtocolError
        for a rewire that makes a tail an inner hop or the reverse: a tail keeps no log that could be sent on.
        """
        if rewire.epoch <= self.epoch:
            return True
        if rewire.set_next and self.is_tail == bool(rewire.next or rewire.relay):
            raise RemoteProtocolError(
                "a rewire cannot give a tail a next hop, or take the next hop of an inner one away"
            )
        self.epoch = rewire.epoch
        for lane, acked in zip(self._lanes, rewire.acked, strict=False):
            # The control stream may be slower than the data: a truncation made after this rewire may be here already.
            lane.acked = acked if rewire.epoch >= lane.epoch else min(acked, lane.acked)
        if rewire.set_prev:
            self.prev = rewire.prev or self.opener
        self._catch_up_on_truncations(rewire)
        if rewire.set_next:
            self.next, self.next_addresses, self.relay = rewire.next, rewire.next_addresses, rewire.relay
            self.next_known = not rewire.resume
            for lane in self._lanes:
                lane.floor = MAX_POSITION
            self._set_cursors([0] * len(self._lanes))
        return not self.next_known or self._log_reaches_back

    def _catch_up_on_truncations(self, rewire: Rewire) -> None:
        """A truncation may still be on its way to this hop, or have died with the old previous one.

        Either way no row beyond it may leave under the rewire's epoch, for that epoch says: after the truncation.
        """
        cuts = zip(self._lanes, rewire.cut_epochs, rewire.cuts, strict=False)
        for index, (lane, epoch, position) in enumerate(cuts):
            if epoch <= lane.epoch:
                continue
            if rewire.set_prev:
                self._truncate(index, position, epoch)
            else:
                lane.ceiling_epoch, lane.ceiling = epoch, position
                self._rewind(index, min(position, lane.received), lane.epoch)

    def on_attached(self, received: Sequence[int]) -> bool:
        """The next hop says which rows it has. Returns False if rows it lacks were dropped here: see on_rewire."""
        if self.next_known:
            return True
        self.next_known = True
        self._set_cursors(received)
        return self._log_reaches_back

    @property
    def received(self) -> tuple[int, ...]:
        """Rows of each lane this hop has: what it answers to a new previous hop."""
        return tuple(lane.received for lane in self._lanes)

    @property
    def _log_reaches_back(self) -> bool:
        return all(lane.cursor >= lane.log.start for lane in self._lanes)

    def next_outgoing(self) -> Outgoing | None:
        """The next frame for the next hop, taken out; None when there is nothing to send now."""
        if self.is_tail or not self.next_known:
            return None
        step = self._sender.next()
        if step is None:
            return None
        epoch = max(self._lanes[step.lane].epoch, self.epoch)
        match step:
            case Cut(lane, position):
                return Outgoing(Truncate(session=self.id, epoch=epoch, lane=lane, position=position))
            case Copy(lane, source, position, forked):
                fork = Fork(session=self.id, epoch=forked or epoch, lane=lane, source=source, position=position)
                return Outgoing(fork)
        entry = step.entry
        data = Data(
            session=self.id,
            epoch=epoch,
            lane=step.lane,
            position=entry.position,
            count=entry.count,
            want=entry.want,
        )
        return Outgoing(data, entry.payload)

    @property
    def reached(self) -> int:
        """The latest epoch heard of. A replay in a later one is still on its way."""
        return max(self.epoch, *(lane.epoch for lane in self._lanes))

    def drop_log(self) -> None:
        """The log budget is spent and this session was idle longest: give up all rows already sent."""
        for lane in self._lanes:
            lane.log.drop_before(lane.cursor)

    def progress(self, nonce: int) -> Progress:
        """How far each lane is, for a client that wants to know which hop is stuck."""
        return Progress(
            nonce=nonce,
            received=self.received,
            computed=tuple(lane.computed for lane in self._lanes),
            sent=tuple(lane.cursor for lane in self._lanes),
            epoch=self.epoch,
        )

    def _lane(self, source: bytes, session: bytes, index: int) -> _Lane:
        if source != self.prev:
            raise RemoteProtocolError("data came from a peer that is not this session's previous hop")
        if session != self.id:
            raise RemoteProtocolError("data frame names another session than its stream")
        if index >= len(self._lanes):
            raise RemoteProtocolError(f"lane {index} of a session that has {len(self._lanes)}")
        return self._lanes[index]

    def _check_payload(self, data: Data, payload: bytes) -> None:
        if data.payload_kind == Kind.TOKENS and not self.embed:
            raise RemoteProtocolError("token ids sent to a hop that does not embed")
        if data.payload_kind == Kind.HIDDEN and self.embed:
            raise RemoteProtocolError("hidden states sent to a hop that embeds token ids")
        row = 4 if data.payload_kind == Kind.TOKENS else self._row_bytes
        if len(payload) != data.count * row:
            raise RemoteProtocolError(f"{data.count} rows need {data.count * row} bytes, got {len(payload)}")

    def _set_cursors(self, positions: Sequence[int]) -> None:
        self._sender.restart(
            [min(position, lane.floor) for lane, position in zip(self._lanes, positions, strict=False)]
        )
