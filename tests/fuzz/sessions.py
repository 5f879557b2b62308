"""The machines of an inference session as targets: a server and a client, fed frames of a hostile neighbour."""

import zlib
from random import Random

from swarmnode.protocol.chain import ChainMachine, ChainSpec, Hop
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.frames import PREFIX, pack, unpack_header, unpack_prefix
from swarmnode.protocol.messages import (
    TO_CLIENT,
    TO_SERVER,
    Attached,
    Close,
    Data,
    Fork,
    HopFailed,
    LogGone,
    NeedReplay,
    Open,
    Probe,
    Result,
    Rewire,
    Truncate,
    Want,
)
from swarmnode.protocol.session import Forked, SessionMachine
from swarmnode.protocol.tensors import Codec, codec_at, payload_size

from . import seeds
from .mutate import mutate, mutate_parts
from .targets import KIB, Target

HIDDEN = 8
MAX_PAYLOAD = 8 * KIB
ID = b"s" * 16
OPENER, NEXT = b"p" * 34, b"n" * 34
MAX_JOBS = 8
"""Jobs under way at once; a server reads no more from its neighbour before (node/server/session.py)."""
LENGTH = 64


def messages_of(data, catalogue):
    """Frames as a stream reader takes them off."""
    at = 0
    while at < len(data):
        if len(data) - at < PREFIX.size:
            return
        header, payload = unpack_prefix(data[at : at + PREFIX.size], MAX_PAYLOAD)
        at += PREFIX.size
        if len(data) - at < header + payload:
            return
        body = data[at : at + header]
        at += header + payload
        yield catalogue.parse(unpack_header(body)), data[at - payload : at]


def frames_of(data):
    """Frames in a sequence, by their prefixes alone."""
    at = count = 0
    while at + PREFIX.size <= len(data):
        header, payload = PREFIX.unpack_from(data, at)
        at += PREFIX.size + header + payload
        count += 1
    return max(count, 1)


def parts_of(data):
    """The frames of a sequence, each header length, header and payload."""
    at, parts = 0, []
    while at + PREFIX.size <= len(data):
        header, payload = PREFIX.unpack_from(data, at)
        end = at + PREFIX.size + header + payload
        parts.append(header.to_bytes(4, "big") + data[at + PREFIX.size : end])
        at = end
    return parts


def damage(data, rng, other):
    """Half of the time within frames whose prefixes stay true."""
    if rng.random() < 0.5:
        return mutate(data, rng, other)
    out = b""
    for part in mutate_parts(parts_of(data), rng, parts_of(other)):
        header = min(int.from_bytes(part[:4], "big"), max(len(part) - 4, 0))
        out += PREFIX.pack(header, max(len(part) - 4 - header, 0)) + part[4:]
    return out


def frame(message, payload=b""):
    return pack(message.to_header(), len(payload)) + payload


# -- the server's machine --


def server_seed(rng):
    """An Open and what may follow, most of it in order."""
    codec = rng.choice((0, 1, 3))
    lanes, embed = rng.choice((1, 1, 3)), rng.random() < 0.2
    open_ = Open(
        session=ID,
        digest=bytes(32),
        start=2,
        end=4,
        codec=codec,
        cuts=rng.choice(((), (2,), (2, 4))),
        lanes=lanes,
        max_length=LENGTH,
        epoch=rng.randint(0, 2),
        prev=rng.choice((b"", OPENER)),
        next=rng.choice((b"", NEXT)),
        resume=rng.random() < 0.2,
        embed=embed,
        relay=rng.random() < 0.1,
        acked=rng.choice(((), (0,) * lanes, (5,) * lanes)),
    )
    row = 4 if embed else payload_size(codec_at(2, Codec(codec), open_.cuts), 1, HIDDEN)
    out, positions, epoch = [frame(open_)], [0] * lanes, open_.epoch
    for _ in range(rng.choice((1, 3, 8, 20))):
        lane = rng.randrange(lanes)
        epoch += rng.choice((0, 0, 0, 1))
        message, payload = _server_message(rng, lane, positions, epoch, row, embed)
        out.append(frame(message, payload))
    return b"".join(out)


def _server_message(rng, lane, positions, epoch, row, embed):
    match rng.randrange(10):
        case 0:
            positions[lane] = min(positions[lane], rng.randint(0, LENGTH))
            return Truncate(session=ID, epoch=epoch, lane=lane, position=positions[lane]), b""
        case 1:
            return _rewire(rng, epoch, len(positions)), b""
        case 2:
            return rng.choice(
                (Probe(nonce=seeds.number(rng, 32)), Attached(received=(3,) * len(positions)), Close())
            ), b""
        case 3:
            return seeds.a_message(rng), b""
        case 4:
            source, position = rng.randrange(len(positions)), max(1, rng.choice(positions))
            positions[lane] = position
            return Fork(session=ID, epoch=epoch, lane=lane, source=source, position=position), b""
    count = rng.choice((1, 1, 4, 8))
    at = positions[lane] if rng.random() < 0.9 else rng.randint(0, LENGTH)
    positions[lane] = min(at + count, LENGTH - 1)
    data = Data(
        session=ID, epoch=epoch, lane=lane, position=at, count=count, payload_kind=int(embed), want=rng.randrange(3)
    )
    return data, bytes(row * count)


def _rewire(rng, epoch, lanes):
    return Rewire(
        epoch=epoch + 1,
        set_prev=rng.random() < 0.2,
        set_next=rng.random() < 0.5,
        next=rng.choice((b"", NEXT)),
        acked=(rng.randint(0, 9),) * lanes,
        resume=rng.random() < 0.4,
        cut_epochs=(rng.randint(0, 3),) * rng.choice((0, lanes)),
        cuts=(rng.randint(0, LENGTH),) * rng.choice((0, lanes)),
    )


class Server:
    """The machine as a server drives it: jobs are done in order, frames leave when there are any."""

    def __init__(self, request, seed):
        self.machine = SessionMachine(request, OPENER, HIDDEN)
        self.lanes = request.lanes
        self.rng = Random(seed)
        self.jobs = []

    def take(self, message, payload):
        machine = self.machine
        match message:
            case Data():
                job = machine.on_data(machine.prev, message, payload)
                if job is not None:
                    assert 0 < job.count <= message.count
                    assert len(job.payload) % job.count == 0
                    assert job.position + job.count <= machine.max_length
                    self.jobs.append(job)
            case Truncate():
                length = machine.on_truncate(machine.prev, message)
                assert length is None or length <= message.position
            case Fork():
                if machine.on_fork(machine.prev, message) is Forked.DONE:
                    assert machine.received[message.lane] == message.position <= machine.received[message.source]
            case Rewire():
                machine.on_rewire(message)
            case Attached():
                machine.on_attached(message.received)
            case Probe():
                assert machine.progress(message.nonce).to_header()
        self.work()
        self.check()

    def work(self):
        while self.jobs and (len(self.jobs) >= MAX_JOBS or self.rng.random() < 0.6):
            job = self.jobs.pop(0)
            wanted = self.machine.is_wanted(job)
            if self.rng.random() < 0.1:
                self.machine.on_failed(job)
                continue
            result = self.machine.on_computed(job, bytes(8 * job.count))
            assert result is None or (wanted and result.position + result.count <= self.machine.max_length)
        while self.rng.random() < 0.9 and (outgoing := self.machine.next_outgoing()) is not None:
            assert frame(outgoing.message, outgoing.payload)
            if isinstance(outgoing.message, Data):
                assert len(outgoing.payload) == 8 * outgoing.message.count
        if self.rng.random() < 0.02:
            self.machine.drop_log()

    def check(self):
        progress = self.machine.progress(0)
        for received, computed in zip(progress.received, progress.computed, strict=True):
            assert 0 <= computed <= received <= self.machine.max_length
        assert 0 <= self.machine.log_bytes <= 8 * LENGTH * self.lanes * 4


CODECS = frozenset(map(int, Codec))


def server_run(data):
    server = None
    for message, payload in messages_of(data, TO_SERVER_AND_UP):
        if server is not None:
            server.take(message, payload)
        elif isinstance(message, Open) and message.codec in CODECS and message.max_length <= 1024:
            server = Server(message, zlib.crc32(data))
        else:
            raise RemoteProtocolError("node/server/sessions.py refuses it")


class _Both:
    """A server reads its previous hop's frames and the one frame its next hop sends."""

    @staticmethod
    def parse(header):
        return Attached.from_header(header) if header.get(0) == Attached.kind else TO_SERVER.parse(header)


TO_SERVER_AND_UP = _Both


# -- the client's machine --


def client_seed(rng):
    """Results, most of them of the next rows of a lane, and news of hops."""
    out, acked = [], [0, 0]
    for _ in range(rng.choice((1, 4, 10, 30))):
        lane, epoch = rng.randrange(2), rng.choice((0, 1, 2, 6, 40, 40))
        position = acked[lane] if rng.random() < 0.95 else rng.randint(0, LENGTH)
        match rng.randrange(12):
            case 0:
                message = HopFailed(peer=NEXT, epoch=epoch, reason="gone")
            case 1:
                message = LogGone(epoch=epoch)
            case 2:
                message = NeedReplay(epoch=epoch, lane=lane, position=position)
            case 3 if rng.random() < 0.3:
                message = seeds.a_message(rng)
            case _:
                message = Result(epoch=epoch, lane=lane, position=position, token=5)
                acked[lane] = position + 1
        out.append(frame(message))
    return b"".join(out)


class Client:
    """The machine as a client drives it, with repairs and replays when servers say so."""

    def __init__(self, seed):
        self.rng = Random(seed)
        spec = ChainSpec(
            session=ID,
            digest=bytes(32),
            start=0,
            end=6,
            codec=Codec.BF16,
            cuts=(2, 4),
            lanes=2,
            max_length=LENGTH,
            embed=True,
        )
        self.machine = ChainMachine(spec, [self.hop(start) for start in (0, 2, 4)])
        self.epoch = 0

    def hop(self, start):
        return Hop(peer=self.rng.randbytes(8), start=start, end=start + 2)

    def act(self):
        machine, rng = self.machine, self.rng
        lane = rng.randrange(2)
        if machine.position(lane) + 4 <= LENGTH:
            count = rng.randint(1, 4)
            machine.feed(bytes(4 * count), count, Want.LAST, lane)
        while rng.random() < 0.8 and (outgoing := machine.next_outgoing()) is not None:
            assert frame(outgoing.message, outgoing.payload)
        if machine.acked(lane) == machine.position(lane) and rng.random() < 0.3:
            machine.truncate(rng.randint(0, machine.position(lane)), lane)

    def take(self, message):
        machine = self.machine
        match message:
            case Result():
                before = [machine.acked(lane) for lane in (0, 1)]
                news = machine.on_result(message)
                assert news == (before != [machine.acked(lane) for lane in (0, 1)])
            case HopFailed() if self.rng.random() < 0.5:
                hops = list(machine.hops)
                failed = self.rng.randrange(3)
                hops[failed] = self.hop(hops[failed].start)
                repair = machine.repair(hops)
                assert [request.to_header() for _, request in (*repair.opens, *repair.rewires)]
            case HopFailed():
                sender = self.rng.randrange(2)
                machine.relay(machine.hops[sender], machine.hops[sender + 1])
            case LogGone() | NeedReplay():
                machine.replay()
        self.act()
        self.check()

    def check(self):
        machine = self.machine
        assert machine.epoch >= self.epoch
        self.epoch = machine.epoch
        for lane in (0, 1):
            assert 0 <= machine.acked(lane) <= machine.position(lane) <= LENGTH


def client_run(data):
    client = Client(zlib.crc32(data))
    client.act()
    for message, _ in messages_of(data, TO_CLIENT):
        client.take(message)


SESSIONS = (
    Target("session", server_seed, server_run, frames=frames_of, weight=4, mutate=damage),
    Target("chain", client_seed, client_run, frames=frames_of, weight=3, mutate=damage),
)
