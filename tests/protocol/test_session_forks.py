"""Lanes that are forked, cut and dropped while servers die: every row equals the one of the lane's own history."""

from __future__ import annotations

import random

import pytest
from helpers.chain_world import HIDDEN, ROW, SESSION, Blocks, World, embed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from swarmnode.protocol.chain import ChainMachine
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.messages import MAX_LANES, Data, Fork, Open, Truncate, Want
from swarmnode.protocol.session import Forked, SessionMachine
from swarmnode.protocol.session_log import Entry, OutputLog
from swarmnode.protocol.tensors import Codec

THIRDS = [(0, 2), (2, 4), (4, 6)]
LANES = 4
MOST_SERVERS = 40


def peace(world: World) -> None:
    """Nobody dies."""


def row_after(history: list[int]) -> bytes:
    """What the chain must answer to the last token of this text."""
    return Blocks(0, 6).run(0, 0, b"".join(map(embed, history)))[-ROW:]


class Texts:
    """A text in each lane, kept beside the world that computes them."""

    def __init__(self, world: World, killer=peace) -> None:
        self.world = world
        self.killer = killer
        self.texts: list[list[int]] = [[] for _ in range(LANES)]

    def write(self, lanes: dict[int, list[int]]) -> None:
        """Feed all these lanes, then await all their results."""
        for lane, tokens in lanes.items():
            self.world.chain.feed(b"".join(map(embed, tokens)), len(tokens), Want.LAST, lane)
            self.texts[lane] += tokens
        for lane in lanes:
            assert self.world.await_result(self.killer, lane) == row_after(self.texts[lane])

    def fork(self, source: int, target: int) -> None:
        self.world.chain.fork(source, target)
        self.texts[target] = list(self.texts[source])

    def cut(self, lane: int, keep: int) -> None:
        del self.texts[lane][keep:]
        self.world.chain.truncate(keep, lane)

    def disturb(self, rng: random.Random, events: int) -> None:
        """Let some things happen, so that what was asked for is on its way somewhere."""
        for _ in range(rng.randrange(events)):
            self.killer(self.world)
            self.world.wake(b"client")
            if not self.world.step():
                return


def test_a_fork_goes_on_like_its_origin_and_costs_no_rows():
    texts = Texts(World(1, THIRDS, lanes=LANES))
    texts.write({0: [1, 2, 3, 4, 5, 6, 7, 8]})
    for lane in (1, 2, 3):
        texts.fork(0, lane)
    before = texts.world.rows
    texts.write({lane: [20 + lane] for lane in range(LANES)})
    assert texts.world.rows - before == LANES * len(THIRDS)


def test_a_fork_replayed_to_a_replacement_costs_no_rows():
    texts = Texts(World(1, THIRDS, lanes=LANES))
    texts.write({0: [1, 2, 3, 4, 5, 6, 7, 8]})
    for lane in (1, 2, 3):
        texts.fork(0, lane)
    texts.write({lane: [20 + lane] for lane in range(LANES)})
    world = texts.world
    before = world.rows
    dead = world.chain.hops[1]
    del world.servers[dead.peer]
    world.links = {key: queue for key, queue in world.links.items() if dead.peer not in key}
    repair = world.chain.repair([hop if hop is not dead else world.hop(2, 4) for hop in world.chain.hops])
    for hop, open_ in repair.opens:
        world.open(hop, open_)
    for hop, rewire in repair.rewires:
        world.send(b"client", hop.peer, rewire)
    texts.write({0: [30]})
    assert world.rows - before == 8 + LANES + len(THIRDS)


@pytest.mark.parametrize("lose_logs", [False, True])
def test_lanes_survive_any_deaths(lose_logs):
    for seed in range(60):
        play(seed, lose_logs)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
@example(0, False)
def test_lanes_survive_any_deaths_of_any_seed(seed, lose_logs):
    play(seed, lose_logs)


def play(seed: int, lose_logs: bool) -> None:
    """A random story of lanes over random deaths."""
    rng = random.Random(seed)

    def killer(world: World) -> None:
        if world.names > MOST_SERVERS:
            return  # or they would die faster than they can be told what the session is about
        if rng.random() < 0.01:
            world.relay()
        if rng.random() < 0.03:
            count = min(len(world.chain.hops), rng.choice((1, 1, 2)))
            world.kill(rng.sample(list(world.chain.hops), count))

    texts = Texts(World(seed, rng.choice((THIRDS, [(0, 3), (3, 6)], [(0, 6)])), lose_logs, LANES), killer)
    for _ in range(12):
        what, lane = rng.random(), rng.randrange(LANES)
        if what < 0.45 or not texts.texts[lane]:
            chosen = rng.sample(range(LANES), rng.randint(1, LANES))
            texts.write({lane: [rng.randrange(99) for _ in range(rng.randint(1, 3))] for lane in chosen})
        elif what < 0.8:
            source = rng.choice([other for other in range(LANES) if other != lane])
            texts.fork(source, lane)
        else:
            texts.cut(lane, rng.randint(0, len(texts.texts[lane])))
        if rng.random() < 0.5:
            texts.disturb(rng, 30)
    texts.write({lane: [7] for lane in range(LANES)})


def test_beams_that_change_places():
    """Fork and cut at once, before anything of it was sent."""
    texts = Texts(World(3, THIRDS, lanes=LANES))
    texts.write({0: [1, 2, 3]})
    texts.fork(0, 1)
    texts.cut(0, 2)
    texts.fork(1, 2)
    texts.cut(1, 1)
    texts.fork(2, 0)
    texts.cut(2, 0)
    texts.write({lane: [lane + 9] for lane in range(LANES)})


@pytest.fixture
def chain():
    world = World(0, THIRDS, lanes=LANES)
    Texts(world).write({0: [1, 2]})
    return world.chain


def test_a_lane_is_not_forked_while_rows_are_under_way(chain: ChainMachine):
    chain.feed(embed(1), 1, Want.LAST, 0)
    with pytest.raises(LocalProtocolError, match="cannot fork lane 0 while"):
        chain.fork(0, 1)
    with pytest.raises(LocalProtocolError, match="cannot fork into lane 0 while"):
        chain.fork(1, 0)


def test_a_lane_is_not_forked_into_itself(chain: ChainMachine):
    with pytest.raises(LocalProtocolError, match="into itself"):
        chain.fork(0, 0)


def test_a_fork_of_nothing_is_a_drop(chain: ChainMachine):
    chain.fork(1, 0)
    assert chain.position(0) == 0
    assert isinstance(chain.next_outgoing().message, Truncate)


def test_a_dropped_lane_begins_anew(chain: ChainMachine):
    chain.drop(0)
    assert chain.feed(embed(5), 1, Want.LAST, 0) == 0


def server(**changes) -> SessionMachine:
    fields = {"session": SESSION, "digest": b"d" * 32, "start": 0, "end": 2, "codec": int(Codec.FP32), "cuts": ()}
    fields |= {"lanes": 2, "max_length": 8, "epoch": 3, "prev": b"up", "next": b"down"}
    return SessionMachine(Open(**{**fields, **changes}), b"client", HIDDEN)


def fork(**changes) -> Fork:
    return Fork(**{"session": SESSION, "epoch": 4, "lane": 1, "source": 0, "position": 2, **changes})


def feed(machine: SessionMachine, lane: int, position: int, count: int, epoch: int = 3):
    message = Data(session=SESSION, epoch=epoch, lane=lane, position=position, count=count)
    return machine.on_data(b"up", message, bytes(range(ROW * count)))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lane": 2}, "lane 2"),
        ({"source": 5}, "lane 5"),
        ({"source": 1}, "itself"),
        ({"session": b"x" * 16}, "session"),
    ],
)
def test_a_faulty_fork_is_the_peers_fault(changes, fault):
    machine = server()
    feed(machine, 0, 0, 2)
    with pytest.raises(RemoteProtocolError, match=fault):
        machine.on_fork(b"up", fork(**changes))


def test_only_the_previous_hop_forks():
    with pytest.raises(RemoteProtocolError, match="previous hop"):
        server().on_fork(b"client", fork())


def test_an_old_fork_changes_nothing():
    machine = server()
    feed(machine, 0, 0, 2)
    feed(machine, 1, 0, 1, epoch=5)
    assert machine.on_fork(b"up", fork()) is Forked.STALE
    assert machine.received == (2, 1)


def test_a_fork_of_rows_that_are_not_here_asks_for_a_replay():
    """And what comes behind it is no fault of the sender."""
    machine = server()
    feed(machine, 0, 0, 1)
    assert machine.on_fork(b"up", fork()) is Forked.LOST
    assert feed(machine, 1, 2, 1, epoch=4) is None
    assert feed(machine, 1, 0, 1, epoch=5) is not None


def test_rows_still_being_computed_belong_to_both_lanes():
    machine = server()
    job = feed(machine, 0, 0, 3)
    assert machine.on_fork(b"up", fork()) is Forked.DONE
    machine.on_truncate(b"up", Truncate(session=SESSION, epoch=5, lane=0, position=0))
    machine.on_computed(job, bytes(range(3 * ROW)))
    rows = {}
    while outgoing := machine.next_outgoing():
        if isinstance(outgoing.message, Data):
            rows[outgoing.message.lane, outgoing.message.position] = outgoing.payload
    assert rows == {(1, 0): bytes(range(2 * ROW))}


def test_a_fork_of_rows_whose_log_is_gone_asks_for_a_replay():
    machine = server()
    machine.on_computed(feed(machine, 0, 0, 3), bytes(3 * ROW))
    assert isinstance(machine.next_outgoing().message, Data)
    machine.drop_log()
    assert machine.on_fork(b"up", fork()) is Forked.LOST


def test_a_forked_log_shares_the_bytes():
    log = OutputLog()
    log.append(Entry(0, 2, 1, b"abcd"))
    log.append(Entry(2, 2, 1, b"efgh"))
    other = log.fork(3)
    assert other.read(0, 0).payload is log.read(0, 0).payload
    assert (other.end, other.size_bytes) == (3, 6)
    other.append(Entry(3, 1, 1, b"xy"))
    assert (log.end, log.size_bytes) == (4, 8)


def test_every_lane_may_wait_for_another():
    """A chain of forks as long as a session has lanes, replayed to a replacement: one frame each."""
    machine = server(lanes=MAX_LANES)
    machine.on_computed(feed(machine, 0, 0, 2), bytes(2 * ROW))
    for lane in range(1, MAX_LANES):
        assert machine.on_fork(b"up", fork(lane=lane, source=lane - 1)) is Forked.DONE
    sent = []
    while outgoing := machine.next_outgoing():
        sent.append(type(outgoing.message))
    assert sent == [Data] + [Fork] * (MAX_LANES - 1)
