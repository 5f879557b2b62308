"""The client's side of an inference session, as a sans-IO machine: the chain of hops, what to send, how to repair it.

The client is the hop before the first one. Its log of what it fed (token ids, or hidden states it embedded itself) is
the same OutputLog a server keeps, so feeding and replaying are the same act: read the log from a cursor.

A repair replaces dead hops by fresh ones and touches nobody else but their neighbours:

  fresh hop             Open; it goes on from what the hop after it says it has
  survivor before it    Rewire: new next hop; it replays its log to it (the client does, if the first hop is fresh)
  survivor after it     Rewire: new previous hop, and truncations that may have died with the old one

Two hops that cannot reach each other, though the client reaches both, are relayed: the sender's rows go to the client
over its control stream, and from there to the receiver over its own.

All of it under a new epoch, after which the client just goes on waiting for the result it was waiting for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .errors import LocalProtocolError, RemoteProtocolError
from .messages import Data, Fork, Kind, Open, Output, Result, Rewire, Truncate, Want
from .sender import Copy, Cut, Sender, SendingLane
from .session import Outgoing
from .session_log import Entry
from .tensors import Codec


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One server's part in a chain. Compared by identity: a hop opened again is another hop."""

    peer: bytes
    start: int
    end: int
    addresses: tuple[str, ...] = ()
    compute_class: bytes = b""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSpec:
    """What is fixed for a session's life, whoever serves it."""

    session: bytes
    digest: bytes
    start: int
    end: int
    codec: Codec
    cuts: tuple[int, ...]
    lanes: int = 1
    max_length: int
    embed: bool = False
    """The first hop embeds token ids."""
    output: Output = Output.HIDDEN
    sampling: bytes = b""


@dataclass(frozen=True, slots=True)
class Repair:
    """What to do, in this order: all opens, then the rewires, last hop first (so that no replay runs ahead)."""

    opens: tuple[tuple[Hop, Open], ...]
    rewires: tuple[tuple[Hop, Rewire], ...]


@dataclass(slots=True)
class _Lane(SendingLane):
    """`epoch`: results of a lower one are from before a truncation."""

    cut: int = 0
    """Length of the last truncation, made in `epoch`; 0 for a fork, which replaces everything."""
    forked: bool = False
    """That was a fork."""
    settled: bool = True
    """A result has come since: every hop has seen it."""
    replay_epoch: int = 0
    """Not 0: a replay from the tokens began in this epoch and no result of it has come yet."""


class ChainMachine:
    """The client's state of one session. Not thread-safe; knows no time and no network."""

    def __init__(self, spec: ChainSpec, hops: Sequence[Hop]) -> None:
        self.spec = spec
        self.epoch = 0
        self.hops = _contiguous(spec, hops)
        self.relayed: set[tuple[Hop, Hop]] = set()
        """Neighbours between which the client passes rows on."""
        self._lanes = [_Lane() for _ in range(spec.lanes)]
        self._sender = Sender(self._lanes)
        self._replayed = 0
        """Epoch of the last replay from the tokens."""

    def position(self, lane: int = 0) -> int:
        """Rows of this lane fed so far."""
        return self._lanes[lane].log.end

    def acked(self, lane: int = 0) -> int:
        """Rows of this lane whose results have come back."""
        return self._lanes[lane].acked

    @property
    def idle(self) -> bool:
        """Every row fed has its result."""
        return all(lane.acked == lane.log.end for lane in self._lanes)

    def opens(self) -> tuple[tuple[Hop, Open], ...]:
        """The Open of each hop, for the first time."""
        return tuple((hop, self._open(index, set(self.hops))) for index, hop in enumerate(self.hops))

    def feed(self, payload: bytes, count: int, want: Want, lane: int = 0) -> int:
        """Queue rows behind the lane's last one; returns their position. Raises LocalProtocolError past max_length."""
        position = self._lanes[lane].log.end
        if position + count > self.spec.max_length:
            raise LocalProtocolError(f"{position + count} tokens do not fit the session's {self.spec.max_length}")
        self._lanes[lane].log.append(Entry(position, count, int(want), payload))
        return position

    def truncate(self, position: int, lane: int = 0) -> None:
        """Forget rows from `position` on, here and all along the chain. Only while no row is under way."""
        state = self._idle_lane(lane, "truncate")
        if not 0 <= position <= state.log.end:
            raise LocalProtocolError(f"cannot truncate to {position}: the lane has {state.log.end} rows")
        forked = state.forked and not state.settled and position > 0
        self._began_anew(state, 0 if forked else position, forked=forked)
        state.log.cut(position)
        state.acked = position
        self._sender.rewound(lane, position)
        if not forked:
            state.truncate_to = position
            return
        state.cursor = 0
        if state.origin is not None:  # not every hop may have seen the fork yet: replace it by a shorter one
            self._sender.forked(state.origin[0], lane, position, self.epoch)
        else:
            state.truncate_to = 0

    def drop(self, lane: int) -> None:
        """Forget all of a lane: the servers free its memory. It can be fed from position 0, or forked into, again."""
        self.truncate(0, lane)

    def fork(self, source: int, target: int) -> None:
        """Make lane `target` what lane `source` is, here and all along the chain. Only while both are at rest.

        What `target` held is forgotten. The servers share what the two have in common.
        """
        origin, state = self._idle_lane(source, "fork"), self._idle_lane(target, "fork into")
        length = origin.log.end
        if source == target:
            raise LocalProtocolError(f"lane {source} cannot be forked into itself")
        if not length:
            self.truncate(0, target)
            return
        self._sender.rewound(target, 0)
        self._began_anew(state, 0, forked=True)
        state.log, state.acked, state.replay_epoch = origin.log.fork(length), length, origin.replay_epoch
        self._sender.forked(source, target, length, self.epoch)

    def _idle_lane(self, lane: int, what: str) -> _Lane:
        state = self._lanes[lane]
        if state.acked != state.log.end:
            raise LocalProtocolError(f"cannot {what} lane {lane} while rows are under way")
        return state

    def _began_anew(self, lane: _Lane, position: int, *, forked: bool) -> None:
        self.epoch += 1
        lane.epoch, lane.cut, lane.forked, lane.settled = self.epoch, position, forked, False

    def next_outgoing(self) -> Outgoing | None:
        """The next frame for the first hop, taken out; None when there is nothing to send now."""
        step, session = self._sender.next(), self.spec.session
        match step:
            case Cut(lane, position):
                return Outgoing(Truncate(session=session, epoch=self.epoch, lane=lane, position=position))
            case Copy(lane, source, position, forked):
                epoch = forked or self.epoch
                fork = Fork(session=session, epoch=epoch, lane=lane, source=source, position=position)
                return Outgoing(fork)
            case None:
                return None
        return Outgoing(self._data(step.lane, step.entry), step.entry.payload)

    def on_result(self, result: Result) -> bool:
        """Rows came through. True if the result is news; False for a repeat or one from before a truncation.

        Raises RemoteProtocolError for rows that were never fed.
        """
        if result.lane >= len(self._lanes):
            raise RemoteProtocolError(f"result for lane {result.lane} of {len(self._lanes)}")
        lane = self._lanes[result.lane]
        end = result.position + result.count
        if result.epoch < lane.epoch or end <= lane.acked:
            return False
        # Not the cursor: a repair may have moved it back while results of rows sent before were still on their way.
        if end > lane.log.end or result.position > lane.acked:
            raise RemoteProtocolError(f"result for rows {result.position}..{end}; {lane.acked}..{lane.log.end} are due")
        lane.acked, lane.settled = end, True
        if result.epoch >= lane.replay_epoch:
            lane.replay_epoch = 0
        return True

    def repair(self, hops: Sequence[Hop], session: bytes | None = None) -> Repair:
        """Go over to `hops`, keeping those already in the chain. Raises LocalProtocolError if they do not join up.

        A chain of only fresh hops may name servers of the old one again; then it needs a new `session` id.
        """
        if session is not None:
            self.spec = replace(self.spec, session=session)
        before, self.hops = self.hops, _contiguous(self.spec, hops)
        self.epoch += 1
        fresh = {hop for hop in self.hops if hop not in before}
        self.relayed &= set(pairwise(self.hops))
        if self.hops[0] in fresh:
            self._replay_from_client()
        opens = [(hop, self._open(index, fresh)) for index, hop in enumerate(self.hops) if hop in fresh]
        rewires = [
            (hop, rewire)
            for index, hop in enumerate(self.hops)
            if hop not in fresh and (rewire := self._rewire(index, before, fresh)) is not None
        ]
        self._replay_again()
        return Repair(tuple(opens), tuple(reversed(rewires)))

    def relay(self, sender: Hop, receiver: Hop) -> Repair:
        """Pass on the rows between two neighbours from now on. Raises LocalProtocolError if they are none."""
        index = self.hops.index(sender) if sender in self.hops else -1
        if not 0 <= index < len(self.hops) - 1 or self.hops[index + 1] is not receiver:
            raise LocalProtocolError("only neighbours in the chain can be relayed")
        self.relayed.add((sender, receiver))
        self.epoch += 1
        rewires = (
            (receiver, self._neighbour(index + 1, set_prev=True, set_next=False, resume=False)),
            (sender, self._neighbour(index, set_prev=False, set_next=True, resume=False)),
        )
        self._replay_again()
        return Repair((), rewires)

    def relay_target(self, sender: Hop) -> Hop | None:
        """The hop to pass this one's rows on to; None if the two have parted since."""
        index = self.hops.index(sender) if sender in self.hops else len(self.hops)
        following = self.hops[index + 1] if index + 1 < len(self.hops) else None
        return following if following is not None and (sender, following) in self.relayed else None

    def replay(self, epoch: int | None = None) -> None:
        """A server lacks rows, as it said in this epoch: feed everything again from the tokens, under a new one.

        The epoch makes every hop on the way rewind and recompute; the one that lacked its log gets it back. Nothing
        happens if a later replay is on its way to it already.
        """
        if epoch is not None and epoch < self._replayed:
            return
        self.epoch += 1
        self._replayed = self.epoch
        for lane in self._lanes:
            lane.replay_epoch = self.epoch
        self._replay_from_client()

    def _replay_again(self) -> None:
        """A replay under way may have died with a hop, or would come under an epoch that rewires have used since."""
        if any(lane.replay_epoch for lane in self._lanes):
            self.replay()

    def _replay_from_client(self) -> None:
        for lane in self._lanes:
            lane.truncate_to = None
        self._sender.restart([0] * len(self._lanes))

    def _resume(self, index: int, fresh: set[Hop]) -> bool:
        """The hop after this one was in the session before and knows which rows it has."""
        return index + 1 < len(self.hops) and self.hops[index + 1] not in fresh

    def _rewire(self, index: int, before: Sequence[Hop], fresh: set[Hop]) -> Rewire | None:
        old = before.index(self.hops[index])
        old_next = before[old + 1] if old + 1 < len(before) else None
        old_prev = before[old - 1] if old else None
        new_next = self.hops[index + 1] if index + 1 < len(self.hops) else None
        new_prev = self.hops[index - 1] if index else None
        if new_next is old_next and new_prev is old_prev:
            return None
        return self._neighbour(
            index,
            set_prev=new_prev is not old_prev,
            set_next=new_next is not old_next,
            resume=self._resume(index, fresh),
        )

    def _neighbour(self, index: int, *, set_prev: bool, set_next: bool, resume: bool) -> Rewire:
        """Tell a hop its neighbours, and what it must know beside to go on with them."""
        following, relay = self._next(index)
        return Rewire(
            epoch=self.epoch,
            set_prev=set_prev,
            prev=self._prev(index),
            set_next=set_next,
            next=following.peer if following else b"",
            next_addresses=following.addresses if following else (),
            acked=self._acked(),
            resume=resume,
            cut_epochs=tuple(lane.epoch for lane in self._lanes),
            cuts=tuple(lane.cut for lane in self._lanes),
            relay=relay,
        )

    def _prev(self, index: int) -> bytes:
        """Who sends to a hop: the one before it, or the client (empty)."""
        if index == 0 or (self.hops[index - 1], self.hops[index]) in self.relayed:
            return b""
        return self.hops[index - 1].peer

    def _next(self, index: int) -> tuple[Hop | None, bool]:
        """Whom a hop sends to (None: the client), and whether the client is to pass that on."""
        if index + 1 == len(self.hops):
            return None, False
        following = self.hops[index + 1]
        return (None, True) if (self.hops[index], following) in self.relayed else (following, False)

    def _open(self, index: int, fresh: set[Hop]) -> Open:
        hop, last = self.hops[index], index + 1 == len(self.hops)
        following, relay = self._next(index)
        return Open(
            session=self.spec.session,
            digest=self.spec.digest,
            start=hop.start,
            end=hop.end,
            codec=int(self.spec.codec),
            cuts=self.spec.cuts,
            lanes=self.spec.lanes,
            max_length=self.spec.max_length,
            epoch=self.epoch,
            prev=self._prev(index),
            next=following.peer if following else b"",
            next_addresses=following.addresses if following else (),
            relay=relay,
            acked=self._acked() if self.epoch else (),
            resume=self._resume(index, fresh),
            embed=self.spec.embed and index == 0,
            output=int(self.spec.output) if last else int(Output.HIDDEN),
            compute_class=hop.compute_class,
            sampling=self.spec.sampling if last else b"",
        )

    def _acked(self) -> tuple[int, ...]:
        return tuple(lane.acked for lane in self._lanes)

    def _data(self, index: int, entry: Entry) -> Data:
        return Data(
            session=self.spec.session,
            epoch=self.epoch,
            lane=index,
            position=entry.position,
            count=entry.count,
            payload_kind=int(Kind.TOKENS if self.spec.embed else Kind.HIDDEN),
            want=entry.want,
        )


def _contiguous(spec: ChainSpec, hops: Sequence[Hop]) -> tuple[Hop, ...]:
    """Check that the hops cover the session's blocks one after another."""
    border = spec.start
    for hop in hops:
        if hop.start != border or hop.end <= hop.start:
            raise LocalProtocolError(f"hop {hop.start}:{hop.end} does not follow block {border}")
        border = hop.end
    if border != spec.end or not hops:
        raise LocalProtocolError(f"chain ends at block {border}, not {spec.end}")
    return tuple(hops)
