"""The session machines, as a whole chain (helpers/chain_world.py) and one by one."""

from __future__ import annotations

import random

import pytest
from helpers.chain_world import HIDDEN, ROW, SESSION, World, embed, next_token, reference
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.messages import Data, Kind, Open, Rewire, Truncate, Want
from swarmnode.protocol.session import SessionMachine
from swarmnode.protocol.session_log import Entry, LogBudget, OutputLog


def test_undisturbed_chain_equals_the_blocks():
    prompt = [1, 2, 3, 4, 5, 6, 7]
    assert World(0, [(0, 2), (2, 4), (4, 6)]).generate(prompt, 8, lambda world: None) == reference(prompt, 8)


@pytest.mark.parametrize("lose_logs", [False, True])
@pytest.mark.parametrize(
    "spans", [[(0, 6)], [(0, 3), (3, 6)], [(0, 2), (2, 4), (4, 6)], [(0, 1), (1, 2), (2, 5), (5, 6)]]
)
def test_tokens_survive_any_deaths(spans, lose_logs):
    """Several deaths a run, also during replays, also two at once; with and without the servers' logs."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    expected = reference(prompt, 6)
    for seed in range(25):
        killing = random.Random(seed)

        def killer(world: World, killing: random.Random = killing) -> None:
            if killing.random() < 0.02:
                world.relay()
            if killing.random() < 0.06:
                count = min(len(world.chain.hops), killing.choice((1, 1, 2)))
                world.kill(killing.sample(list(world.chain.hops), count))

        assert World(seed, spans, lose_logs).generate(prompt, 6, killer) == expected, f"seed {seed}"


def test_truncate_then_feed_again_gives_the_same_tokens():
    world = World(7, [(0, 2), (2, 4), (4, 6)])
    prompt = [1, 2, 3, 4, 5]
    first = world.generate(prompt, 4, lambda w: None)
    world.await_result(lambda w: None)
    world.chain.truncate(len(prompt))
    for token in first[:-1]:
        world.chain.feed(embed(token), 1, Want.LAST)
        again = next_token(world.await_result(lambda w: None))
    assert again == first[-1]


def test_truncations_survive_deaths():
    """A truncation may die with the hop that was to pass it on; stale rows must not come back with its replacement."""
    prompt = [2, 7, 1, 8]
    expected = reference(prompt, 7)
    for seed in range(25):
        killing = random.Random(seed)

        def killer(world: World, killing: random.Random = killing) -> None:
            if killing.random() < 0.02:
                world.relay()
            if killing.random() < 0.06:
                world.kill([killing.choice(world.chain.hops)])

        world = World(seed, [(0, 2), (2, 4), (4, 6)])
        world.generate(prompt, 3, killer)
        world.await_result(killer)
        for keep in (2, 0, 1):
            world.chain.truncate(len(prompt) + keep)
            tokens = expected[: keep + 1]
            while len(tokens) < 7:
                world.chain.feed(embed(tokens[-1] if len(tokens) > keep else 0), 1, Want.LAST)
                tokens.append(next_token(world.await_result(killer)))
            assert tokens == expected, f"seed {seed} after truncation to {keep}"


def test_truncate_while_rows_are_under_way_is_our_bug():
    world = World(0, [(0, 6)])
    world.chain.feed(embed(1), 1, Want.LAST)
    with pytest.raises(LocalProtocolError, match="under way"):
        world.chain.truncate(0)


def machine(**changes) -> SessionMachine:
    fields = {"session": SESSION, "digest": b"d" * 32, "start": 0, "end": 2, "codec": 0, "cuts": (), "lanes": 2}
    fields |= {"max_length": 8, "epoch": 3, "prev": b"up"}
    return SessionMachine(Open(**{**fields, **changes}), b"client", HIDDEN)


def data(**changes) -> tuple[Data, bytes]:
    fields = {"session": SESSION, "epoch": 3, "lane": 0, "position": 0, "count": 1}
    message = Data(**{**fields, **changes})
    return message, bytes(ROW * message.count)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"position": 1}, "do not follow"),
        ({"position": 7, "count": 2, "epoch": 4}, "past the session's length"),
        ({"lane": 2}, "lane 2"),
        ({"session": b"x" * 16}, "another session"),
        ({"payload_kind": int(Kind.TOKENS)}, "does not embed"),
    ],
)
def test_faulty_rows_are_the_peers_fault(changes, fault):
    with pytest.raises(RemoteProtocolError, match=fault):
        machine().on_data(b"up", *data(**changes))


def test_rows_from_anyone_but_the_previous_hop_are_refused():
    with pytest.raises(RemoteProtocolError, match="previous hop"):
        machine().on_data(b"client", *data())


def test_wrong_payload_size_is_refused():
    message, payload = data()
    with pytest.raises(RemoteProtocolError, match="bytes"):
        machine().on_data(b"up", message, payload + b"x")


def test_stale_and_duplicate_rows_are_dropped_silently():
    m = machine()
    assert m.on_data(b"up", *data()) is not None
    assert m.on_data(b"up", *data()) is None
    assert m.on_data(b"up", *data(epoch=2)) is None
    assert m.on_data(b"up", *data(epoch=4)) is not None


def test_lanes_rewind_alone():
    m = machine()
    for lane in (0, 1):
        m.on_data(b"up", *data(lane=lane))
    m.on_truncate(b"up", Truncate(session=SESSION, epoch=4, lane=0, position=0))
    assert m.progress(0).received == (0, 1)


def test_an_old_rewire_changes_nothing():
    m = machine(next=b"down")
    m.on_rewire(Rewire(epoch=5, set_next=True, next=b"new"))
    m.on_rewire(Rewire(epoch=4, set_next=True, next=b"old"))
    assert m.next == b"new"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.data())
def test_log_reads_back_what_was_written(counts, draw):
    log, rows = OutputLog(), []
    for count in counts:
        payload = b"".join(bytes([len(rows) + i, 7]) for i in range(count))
        log.append(Entry(len(rows), count, 1, payload))
        rows += [payload[2 * i : 2 * i + 2] for i in range(count)]
    cut = draw.draw(st.integers(0, len(rows)))
    log.cut(cut)
    start, acked = draw.draw(st.integers(0, cut)), draw.draw(st.integers(0, cut))
    position, got = start, []
    while entry := log.read(position, acked):
        assert entry.position == position
        got += [entry.payload[2 * i : 2 * i + 2] for i in range(entry.count)]
        position = entry.end
    assert got == rows[start:cut]
    assert log.size_bytes == 2 * cut


def test_log_budget_evicts_the_longest_idle_and_never_the_asker():
    budget = LogBudget(100)
    assert budget.charge("a", 60) == []
    assert budget.charge("b", 30) == []
    assert budget.charge("a", 65) == []
    assert budget.charge("c", 50) == ["b", "a"]
    assert budget.charge("c", 500) == []
    assert budget.used_bytes == 500
