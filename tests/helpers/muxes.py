"""Two yamux sessions, or two whole connections, joined by a fake link."""

from swarmnode.protocol.connection import Connection
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.noise import MAX_PLAINTEXT, StaticKey
from swarmnode.protocol.yamux import Opened, Session

ALICE = PrivateKey.from_seed(bytes(31) + b"\1")
BOB = PrivateKey.from_seed(bytes(31) + b"\2")


class SessionPair:
    """A client and a server session; exchange() carries everything both ways and collects events."""

    def __init__(self):
        self.client = Session(client=True)
        self.server = Session(client=False)
        self.events = {self.client: [], self.server: []}

    def output(self, session) -> bytes:
        out = memoryview(bytearray(MAX_PLAINTEXT))
        size = session.fill(out)
        session.drained.clear()
        return bytes(out[:size])

    def exchange(self, rounds=10_000):
        for _ in range(rounds):
            moved = False
            for source, target in ((self.client, self.server), (self.server, self.client)):
                if data := self.output(source):
                    self.events[target] += target.receive(data)
                    moved = True
            if not moved:
                return

    def open(self):
        """A stream from the client, and the server's end of it."""
        mine = self.client.open()
        self.exchange()
        return mine, self.opened(self.server)[-1]

    def opened(self, session):
        return [event.stream for event in self.events[session] if isinstance(event, Opened)]


class ConnectionPair:
    """A dialing and a listening connection; exchange() carries everything, cut into `split` pieces."""

    def __init__(self, *, early=(True, True), expected=BOB.peer_id, split=None):
        self.dialer = Connection(StaticKey.create(ALICE), initiator=True, expected=expected, early_muxer=early[0])
        self.listener = Connection(StaticKey.create(BOB), initiator=False, early_muxer=early[1])
        self.split = split or (lambda data: [data])
        self.events = {self.dialer: [], self.listener: []}
        self.flights = []

    def exchange(self):
        moved = True
        while moved:
            moved = False
            for source, target in ((self.dialer, self.listener), (self.listener, self.dialer)):
                flight = b""
                while out := source.pull():
                    flight += bytes(out)
                source.session.drained.clear()
                if flight:
                    moved = True
                    self.flights.append(flight)
                for piece in self.split(flight):
                    self.events[target] += target.receive(piece)
