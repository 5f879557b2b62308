"""The experiments: each builds a network, lets something happen to it and says what was seen, as plain numbers.

Tests run them small and assert; report.py runs them large and prints tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from sim import rival
from sim.latency import World
from sim.network import Network
from sim.population import acquaint, entrance, fail_silently, grow, mean_rtt_s, nearest, recall, teach, warm
from sim.villains import Gang
from swarmnode.protocol.ids import PeerId
from swarmnode.routing.coordinates import Coordinate
from swarmnode.routing.keys import models_key
from swarmnode.routing.table import subnet_of
from swarmnode.routing.whereabouts import Whereabouts

PAYLOAD = bytes(200)
"""About what a server announces of itself."""


def world(seed, *, encode=False, **options):
    """A network over the continents of latency.py, without encoding unless told: what experiments run on."""
    return Network(seed, latency=World(Random(seed)), encode=encode, **options)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def quantile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


# Look-ups


@dataclass
class Lookups:
    """What a number of look-ups came to."""

    recalls: list = field(default_factory=list)
    rtts: list = field(default_factory=list)
    """Seconds over the mean round trip."""
    asked: list = field(default_factory=list)

    def note(self, recalled, rtts, asked):
        self.recalls.append(recalled)
        self.rtts.append(rtts)
        self.asked.append(asked)


def still(network):
    """Stop everybody's maintenance: only what is measured runs."""
    for node in network.everybody:
        node.dht.upkeep.due_at = node.armed = 1e12


def lookups(count, dead, *, seed=1, tries=100, rivals=(), handshake=0):
    """Look for random keys among `count` nodes of which a share has just fallen silent, unnoticed.

    Returns {"locate": of the 20 nearest, "read": of the 10 nearest, and for each rival its name}.
    """
    network = world(seed, handshake=handshake)
    nodes = warm(network, count)
    teach(network, nodes)
    still(network)
    tables = rival.fill(network, nodes) if any(options.get("own") for options in rivals) else None
    alive = fail_silently(network, nodes, dead)
    rtt_s = mean_rtt_s(network, alive)
    results = {"locate": Lookups(), "read": Lookups()} | {options["name"]: Lookups() for options in rivals}
    for number in range(tries):
        asker, key = network.rng.choice(alive), Random(f"{seed} {number}").randbytes(32)
        others = [node for node in alive if node is not asker]
        truth = {node.peer.kad_key for node in nearest(others, key)}
        for options in rivals:
            found, took_s, asked = rival.crawl(
                network, asker, key, tables=tables if options.get("own") else None, **options["with"]
            )
            results[options["name"]].note(len(truth & set(found)) / len(truth), took_s / rtt_s, asked)
        for name, width in (("locate", 20), ("read", 10)):
            asker = network.rng.choice(alive)  # a fresh one: nobody profits from what it just learned
            query = (asker.dht.locate if name == "locate" else asker.dht.read)(key, network.now)
            found, took_s = network.ask(asker, query)
            results[name].note(recall(alive, asker, key, found.contacts, width), took_s / rtt_s, found.asked)
    return results


# Churn


@dataclass
class Churn:
    """What readers saw while nodes came and went."""

    reads: int = 0
    complete: int = 0
    """Reads that found every live server."""
    expected: int = 0
    """Live servers looked for, over all reads."""
    missing: int = 0
    seen: int = 0
    ghosts: int = 0
    """Entries seen of servers dead for longer than two minutes."""
    oldest_ghost_s: float = 0.0
    """Longest time after its death that a server was seen."""
    took_s: list = field(default_factory=list)
    questions_per_minute: float = 0.0
    kilobytes_per_hour: float = 0.0


def churn(
    count,
    *,
    seed=0,
    share_per_minute=0.3,
    minutes=10.0,
    keys=1,
    client_share=0.0,
    skew_s=0.0,
    every_s=2.0,
    lifetime=None,
    **options,
):
    """Nodes vanish without a word and others join, all of them servers that announce themselves.

    `lifetime(rng)` draws how long each new node lives; without it random nodes die at the rate asked for, and each
    death is followed by a birth. Every `every_s` a random member of at least ten seconds' age reads a random key.
    """
    network = world(seed, **options)
    rng = Random(f"churn {seed}")
    seen = Churn()
    names = [models_key(f"swarm {number}") for number in range(keys)]
    homes = {}
    """Peer -> (node, key, when its announcement was first held by somebody)."""

    def announce(node):
        if not node.alive:
            return
        key = names[node.number % keys]
        query = node.dht.publish(key, PAYLOAD, 100, network.now, node.wall)
        homes[node.peer] = [node, key, None]
        network.pump(node)
        network.at(network.now + 1, confirm, node, query)

    def confirm(node, query):
        if query not in node.finished:
            network.at(network.now + 1, confirm, node, query)
        elif node.finished[query][1].holders:
            homes[node.peer][2] = network.now
        else:
            announce(node)  # it was alone; its next round would come in 40 s

    def settle(node):
        node.clock_error_s = rng.uniform(-skew_s, skew_s)
        network.at(network.now + 3, announce, node)
        if lifetime is not None:
            network.at(network.now + lifetime(rng), replace, node)

    def replace(victim=None):
        if victim is None:
            victim = rng.choice(network.live)
        if victim.alive:
            network.kill(victim)
            settle(network.add(entrance(network), server_mode=rng.random() >= client_share))

    def read():
        elders = [node for node in network.live if network.now - node.born > 10]
        reader, key = rng.choice(elders), rng.choice(names)
        truth = {node.peer for node, at, since in homes.values() if node.alive and at == key and since is not None}
        query = reader.dht.read(key, network.now)
        network.pump(reader)
        network.at(network.now + 0.1, judge, reader, query, key, truth, network.now)

    def judge(reader, query, key, truth, start):
        if not reader.alive:
            return
        if query not in reader.finished:
            network.at(network.now + 0.1, judge, reader, query, key, truth, start)
            return
        when, result = reader.finished.pop(query)
        found = {entry.subkey for entry in result.entries}
        lost = [peer for peer in truth - found if homes[peer][0].alive]
        seen.reads += 1
        seen.complete += not lost
        seen.expected += len(truth)
        seen.missing += len(lost)
        seen.seen += len(found)
        seen.took_s.append(when - start)
        for peer in found:
            died = homes[peer][0].died
            if died is not None:
                seen.oldest_ghost_s = max(seen.oldest_ghost_s, when - died)
                seen.ghosts += when - died > 120

    nodes = grow(network, count, every_s=0.2, client_share=client_share)
    for node in nodes:
        settle(node)
    network.run(20)
    messages, sent, start = network.messages, network.bytes, network.now
    end = start + 60 * minutes
    if lifetime is None:
        deaths = start
        while deaths < end:
            network.at(deaths, replace)
            deaths += rng.expovariate(share_per_minute * count / 60)
    reads = start
    while reads < end:
        network.at(reads, read)
        reads += every_s
    network.run(60 * minutes + 10)
    seen.questions_per_minute = (network.messages - messages) / 2 / count / minutes
    seen.kilobytes_per_hour = (network.bytes - sent) / count / minutes * 60 / 1000
    return seen


def heavy_tailed(mean_s, shape=0.6):
    """Weibull lifetimes: many short visits, a few long stays, as measured in public networks."""
    from math import gamma

    scale_s = mean_s / gamma(1 + 1 / shape)
    return lambda rng: max(1.0, rng.weibullvariate(scale_s, shape))


# Enemies


@dataclass
class Siege:
    """Reads and announcements among villains."""

    tries: int = 0
    read: int = 0
    """Reads that found the newest true entry."""
    held: int = 0
    """Announcements of which an honest node became a holder."""
    false: int = 0
    """Entries taken for true that were not, or older than the newest."""
    took_s: list = field(default_factory=list)
    asked: list = field(default_factory=list)


def siege(count, share, strategies, *, paths=1, seed=1, tries=60):
    """A share of random nodes lies. Honest ones announce, renew and read."""
    network = world(seed)
    nodes = warm(network, count)
    teach(network, nodes)
    gang = Gang(network)
    villains = network.rng.sample(nodes, int(share * count))
    for number, node in enumerate(villains):
        gang.recruit([node], strategies[number % len(strategies)])
    honest = [node for node in nodes if node not in set(villains)]
    still(network)
    seen = Siege()
    for number in range(tries):
        key = models_key(f"{seed} {number}")
        server, reader = network.rng.sample(honest, 2)
        network.publish(server, key, b"old", paths=paths)
        network.run(1)
        network.publish(server, key, b"new", paths=paths)
        found, took_s = network.read(reader, key, paths=paths)
        seen.tries += 1
        seen.held += any(node.dht.store.live(key, network.now) for node in honest if node is not server)
        seen.read += [entry.payload for entry in found.entries] == [b"new"]
        seen.false += any(entry.payload != b"new" or entry.subkey != server.peer for entry in found.entries)
        seen.took_s.append(took_s)
        seen.asked.append(found.asked)
    return seen


@dataclass
class Eclipse:
    """An attack on one key by ids chosen to lie next to it."""

    read: int = 0
    tries: int = 0
    holders: list = field(default_factory=list)
    """Peers that said they hold the announcement."""
    subnets: list = field(default_factory=list)
    """Different subnets they were met in, as the announcer was told."""
    crowding: list = field(default_factory=list)
    """How much denser the neighbourhood is, as the announcer was told."""
    honest_holders: list = field(default_factory=list)
    """Honest nodes that do hold it."""
    most_per_bucket: int = 0
    most_per_table: int = 0
    """Attackers of one subnet in one bucket, and in one table, of an honest node."""


def eclipse(count, attackers, subnets, *, seed=1, tries=10, paths=1, ground=4000):
    """`attackers` ids ground until they are the nearest of all to a key, spread over so many /24s, that swallow all."""
    network = world(seed)
    nodes = warm(network, count)
    seen = Eclipse()
    for number in range(tries):
        key = models_key(f"target {seed} {number}")
        chosen = _ground(network, key, attackers, subnets, ground, number)
        acquaint(network, [node for node in network.everybody if node.alive])
        gang = Gang(network)
        gang.recruit(chosen, "accomplices")
        still(network)
        server, reader = network.rng.sample(nodes, 2)
        put, _ = network.publish(server, key, paths=paths)
        found, _ = network.read(reader, key, paths=paths)
        seen.tries += 1
        seen.read += [entry.subkey for entry in found.entries] == [server.peer]
        seen.holders.append(put.holders)
        seen.subnets.append(put.subnets)
        seen.crowding.append(round(put.crowding, 1))
        holding = [node for node in nodes if node is not server and node.dht.store.live(key, network.now)]
        seen.honest_holders.append(len(holding))
        _count_caps(seen, nodes, chosen)
        for node in chosen:
            network.kill(node)
    return seen


def _ground(network, key, attackers, subnets, ground, batch):
    """The nearest of `ground` freshly made identities join the network."""
    from sim.network import key_of
    from swarmnode.routing.keys import distance, position

    names = sorted(
        (f"attacker {batch} {number}" for number in range(ground)),
        key=lambda name: distance(key_of(name).peer_id.kad_key, position(key)),
    )[:attackers]
    return [network.add(name=name, subnet=(198, 18 + batch, index % subnets)) for index, name in enumerate(names)]


def _count_caps(seen, nodes, chosen):
    subnet_by_peer = {node.peer: subnet_of(node.addr) for node in chosen}
    for node in nodes:
        per_bucket, per_table = {}, {}
        for contact in node.dht.table:
            subnet = subnet_by_peer.get(contact.peer)
            if subnet is not None:
                bucket = node.dht.table._index(contact.place)
                per_bucket[bucket, subnet] = per_bucket.get((bucket, subnet), 0) + 1
                per_table[subnet] = per_table.get(subnet, 0) + 1
        seen.most_per_bucket = max(seen.most_per_bucket, *per_bucket.values(), 0)
        seen.most_per_table = max(seen.most_per_table, *per_table.values(), 0)


# Partitions


@dataclass
class Partition:
    """A network cut in two and joined again."""

    across_before: float = 0.0
    """Share of reads that found all the servers of both halves."""
    across_during: float = 0.0
    """The same, of the servers of the reader's own half."""
    healed_s: float = 0.0
    """From the end of the cut until ten reads in a row, from random nodes, found everything."""


def partition(count, *, cut_s=300.0, seed=1, servers=10):
    """Half of the nodes cannot reach the other half for a while."""
    network = world(seed)
    nodes = grow(network, count, every_s=0.2)
    key = models_key("parted")
    half = [node for node in nodes if node.number % 2]
    for node in nodes[:servers]:
        network.publish(node, key)
    everybody = {node.peer for node in nodes[:servers]}

    def complete(reader, wanted):
        result, _ = network.read(reader, key)
        return {entry.subkey for entry in result.entries} >= wanted

    seen = Partition()
    seen.across_before = mean(complete(network.rng.choice(nodes), everybody) for _ in range(20))
    network.side = {node.number: 1 for node in half}
    network.run(cut_s)
    own = [{node.peer for node in nodes[:servers] if node.number % 2 == side} for side in (0, 1)]
    readers = [network.rng.choice(nodes) for _ in range(20)]
    seen.across_during = mean(complete(reader, own[reader.number % 2]) for reader in readers)
    network.side = {}
    healed, streak = network.now, 0
    while streak < 10 and network.now < healed + 600:
        network.run(1)
        streak = streak + 1 if complete(network.rng.choice(nodes), everybody) else 0
    seen.healed_s = network.now - healed
    return seen


# Size


@dataclass
class Size:
    """A calm network of one size."""

    nodes: int
    lookup: Lookups
    read_s: list
    entries: int
    lost: int
    """Announcements of live servers that a read did not find."""
    kilobytes_per_hour: float
    """Sent by a node, all in all."""
    questions_per_minute: float
    put_share: float
    """Part of the bytes that are entries put: publications and hand-overs."""
    cached: float
    """Share of uses of a key, one every 3 s, that memory answered at once."""
    held: float
    """Share of the 4 nodes truly nearest to a key, newcomers of ten seconds' age included, that hold an entry."""


def size(count, *, seed=1, minutes=2.0, share_per_minute=0.02, server_share=0.1, tries=200):
    """`count` nodes with 2 % a minute coming and going; one in ten announces itself, ten to a key."""
    network = world(seed)
    nodes = warm(network, count)
    teach(network, nodes, 20)
    rng = Random(f"size {seed}")
    servers = nodes[:: int(1 / server_share)]
    keys = [models_key(f"k{number}") for number in range(max(1, len(servers) // 10))]
    home = {}
    for number, node in enumerate(servers):
        home[node.number] = key = keys[number % len(keys)]
        network.at(network.now + 40 * rng.random(), _announce, network, node, key)
    doomed = nodes[1 :: int(1 / server_share)]
    rng.shuffle(doomed)
    deaths = network.now
    while deaths < network.now + 60 * (minutes + 1) and doomed:
        network.at(deaths, _swap, network, doomed.pop())
        deaths += rng.expovariate(share_per_minute * count / 60)
    network.run(60)
    before = network.messages, network.bytes, network.bytes_by_type["PUT_ENTRIES"]
    network.run(60 * minutes)
    messages, sent, put = (
        after - old
        for after, old in zip(
            (network.messages, network.bytes, network.bytes_by_type["PUT_ENTRIES"]), before, strict=True
        )
    )
    result = Size(
        nodes=count,
        lookup=Lookups(),
        read_s=[],
        entries=0,
        lost=0,
        kilobytes_per_hour=sent / count / minutes * 60 / 1000,
        questions_per_minute=messages / 2 / count / minutes,
        put_share=put / sent,
        cached=0.0,
        held=0.0,
    )
    _look_around(network, result, {node: home[node.number] for node in servers}, tries, rng)
    return result


def _look_around(network, result, home, tries, rng):
    """Put look-ups and reads to random nodes, twenty a second while life goes on, and judge them."""
    alive = [node for node in network.live if network.now - node.born > 10]
    rtt_s = mean_rtt_s(network, alive)
    keys = sorted(set(home.values()))
    asked = []
    for _ in range(tries):
        for key in (rng.randbytes(32), rng.choice(keys)):
            node = rng.choice(alive)
            start = node.dht.read if key in keys else node.dht.locate
            asked.append((node, key, start(key, network.now), network.now))
            network.pump(node)
        network.run(0.05)
    network.run(10)
    result.held = _held(network, home)
    result.cached = _cached(network, keys, rng.sample(alive, 20), rng)
    for node, key, query, started in asked:
        if not node.alive:
            continue
        when, found = node.finished[query]
        if key not in keys:
            recalled = recall(network.live, node, key, found.contacts)
            result.lookup.note(recalled, (when - started) / rtt_s, found.asked)
            continue
        wanted = {server.peer for server, at in home.items() if server.alive and at == key}
        result.read_s.append(when - started)
        result.entries += len(wanted)
        result.lost += len(wanted - {entry.subkey for entry in found.entries})


def _held(network, home):
    elders = [node for node in network.live if network.now - node.born > 10]
    shares = []
    for key in sorted(set(home.values()))[:20]:
        wanted = {server.peer for server, at in home.items() if server.alive and at == key}
        for node in nearest(elders, key, 4):
            has = {leased.entry.subkey for leased in node.dht.store.live(key, network.now)}
            shares.append(len(wanted & has) / max(1, len(wanted)))
    return mean(shares)


def _cached(network, keys, users, rng):
    hits, uses = 0, 20
    wanted = {user: rng.choice(keys) for user in users}
    for _ in range(uses):
        for user, key in wanted.items():
            if user.dht.recent(key, network.now) is not None:
                hits += 1
            else:
                user.dht.read(key, network.now)
                network.pump(user)
        network.run(3)
    return hits / uses / len(users)


def _announce(network, node, key):
    if node.alive:
        node.dht.publish(key, PAYLOAD, 100, network.now, node.wall)
        network.pump(node)


def _swap(network, victim):
    network.kill(victim)
    network.add(entrance(network))


# Coordinates


@dataclass
class Places:
    """How well coordinates predict round trips."""

    median: float
    """Median relative error over random pairs of honest peers, against undisturbed round trips."""
    ninth: float
    """Nine of ten pairs are better."""
    own: float
    """Median of what the peers believe of themselves."""


def _wild(rng, own):
    return Coordinate(x=rng.uniform(-10, 10), y=rng.uniform(-10, 10), height=rng.uniform(0, 10), error=0.0), 0.0


def _steady(rng, own):
    return Coordinate(x=8.0, y=8.0, height=0.0, error=0.0), 0.0


def _beside(rng, own):
    return Coordinate(x=own.x, y=own.y, height=0.0, error=0.0), rng.uniform(0.0, 3.0)


LIES = {"wild": _wild, "steady": _steady, "beside us, answers late": _beside}
"""What a liar claims, and how much it delays its answer."""


def places(count, samples, *, liars=0.0, lie="wild", liars_from=0, seed=1):
    """Everybody measures somebody `samples` times; from the `liars_from`th on a share of the peers lies."""
    rng = Random(seed)
    earth = World(rng)
    earth.place(count - 1)
    peers = [PeerId(b"\x12\x20" + number.to_bytes(32, "big")) for number in range(count)]
    minds = [Whereabouts(Random(f"{seed} {number}")) for number in range(count)]
    held = [Coordinate() for _ in range(count)]
    villains = set(rng.sample(range(count), int(liars * count)))
    honest = [number for number in range(count) if number not in villains]
    for turn in range(samples):
        for own in honest:
            other = rng.randrange(count)
            if other == own or (other in villains and turn < liars_from):
                continue
            rtt_s = earth.delay_s(own, other, rng) + earth.delay_s(other, own, rng)
            claim = held[other]
            if other in villains:
                claim, delay_s = LIES[lie](rng, held[own])
                rtt_s += delay_s
            minds[own].heard(peers[other], claim.as_floats(), rtt_s, 2.0 * turn)
            held[own] = minds[own]._coordinate
    errors = []
    for _ in range(5000):
        one, two = rng.sample(honest, 2)
        errors.append(abs(held[one].rtt_s(held[two]) / earth.rtt_s(one, two) - 1))
    return Places(quantile(errors, 0.5), quantile(errors, 0.9), quantile([held[one].error for one in honest], 0.5))
