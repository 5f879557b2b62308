"""What fuzzing found, each as the smallest test that shows it. The inputs themselves are in tests/fuzz/corpus."""

import json
import tracemalloc

import msgpack
import pytest
from swarmnode.protocol import manifest
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.manifest import Manifest
from swarmnode.protocol.messages import Data, Info, Open, Rewire
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.sampling import SamplingParams
from swarmnode.protocol.session import SessionMachine
from swarmnode.protocol.trace import decode
from swarmnode.protocol.yamux import Session
from swarmnode.protocol.yamux_frames import HEADER

ID, NEXT = b"s" * 16, b"n" * 34


def traced_peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reply", [False, True], ids=["window", "data"])
def test_streams_that_came_and_went_leave_nothing_behind_a_stuck_link(reply):
    session = Session(client=False)

    def storm(first, count):
        for stream_id in range(first, first + 2 * count, 2):
            (opened,) = session.receive(HEADER.pack(0, 1, 1, stream_id, 0))
            if reply:  # what our handler answers cannot leave either
                opened.stream.send((b"na",))
            session.receive(HEADER.pack(0, 1, 8, stream_id, 0))

    storm(1, 1000)
    assert traced_peak(lambda: storm(10_001, 1000)) < 64 * 1024  # before: 1.9 MB for each thousand, without end
    assert (len(session), session.has_output) == (0, False)


def a_session(**changes):
    request = Open(session=ID, digest=bytes(32), start=0, end=2, codec=0, cuts=(), lanes=1, max_length=8, epoch=0)
    return SessionMachine(
        Open(**{name: getattr(request, name) for name in Open.__dataclass_fields__} | changes), b"opener", 1
    )


def compute(machine, position):
    job = machine.on_data(b"opener", Data(session=ID, epoch=0, position=position), bytes(4))
    machine.on_computed(job, bytes(4))


@pytest.mark.parametrize(("before", "after"), [(b"", NEXT), (NEXT, b"")], ids=["tail", "inner"])
def test_a_hop_does_not_change_its_part(before, after):
    machine = a_session(next=before)
    compute(machine, 0)
    with pytest.raises(RemoteProtocolError, match="a rewire cannot"):
        machine.on_rewire(Rewire(epoch=1, set_next=True, next=after))
    compute(a_session(next=before), 0)


@pytest.mark.parametrize("code", ["35", "36", "37", "38", "2a"], ids=["dns", "dns4", "dns6", "dnsaddr", "ip6zone"])
def test_a_name_in_an_address_is_not_empty(code):
    with pytest.raises(RemoteProtocolError, match="malformed binary address"):
        Multiaddr.from_bytes(bytes.fromhex(code) + b"\0\x06\x0f\xa1")


@pytest.mark.parametrize("name", ["temperature", "top_p", "seed", "top_k"])
def test_a_number_beyond_all_floats_is_a_config_error(name):
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: 10**5000})


def test_a_time_that_is_no_float_is_no_event():
    for time in (10**400, float("nan"), -1e300):
        with pytest.raises(ConfigError, match="its time is no number"):
            decode(json.dumps({"time": time, "name": "a:b", "data": {}}))


def test_a_flag_is_no_number():
    info = Info(start=0, end=0, kv_free=0, queue_s=1, sessions=0, decode_s=0, prefill_s=0).to_header()
    with pytest.raises(RemoteProtocolError, match=r"Info\.queue_s"):
        Info.from_header(info | {4: True})


def manifest_of(tensors, blocks=1):
    return b"\x86\x00\x01\x01\xa1n\x02\xc4\x02{}\x03" + msgpack.packb([tensors] * blocks) + b"\x04\x90\x05\x90"


@pytest.mark.parametrize("filler", [b"\x90", b"\x80", b"\xa0", b"\x91\x90"], ids=["lists", "maps", "texts", "deep"])
@pytest.mark.parametrize("place", [1, 3, 5])
def test_a_manifest_of_nothing_but_lists_is_refused_before_it_is_built(filler, place):
    count = 60_000
    body = dict.fromkeys((1, 2, 3, 4, 5), b"\x90") | {place: b"\xdd" + count.to_bytes(4, "big") + filler * count}
    data = b"\x86\x00\x01" + b"".join(bytes([key]) + body[key] for key in (1, 2, 3, 4, 5))

    def refused():
        with pytest.raises(RemoteProtocolError, match="manifest"):
            Manifest.decode(data)

    refused()
    assert traced_peak(refused) < 2 * len(data) + 64 * 1024  # before: 72 bytes of memory for each byte


def test_tensors_of_all_blocks_together_are_bounded(monkeypatch):
    monkeypatch.setattr(manifest, "MAX_ALL_TENSORS", 64)
    tensors = [[f"{index:02}", "F32", [1], 4, bytes(32)] for index in range(32)]
    assert len(Manifest.decode(manifest_of(tensors, 2)).blocks) == 2
    with pytest.raises(RemoteProtocolError, match="over 64 tensors"):
        Manifest.decode(manifest_of(tensors, 3))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda data: data + b"\0", "followed by other bytes"),
        (lambda data: data[:-1], "not valid msgpack"),
        (lambda data: b"\x87" + data[1:] + b"\x05\x90", "twice"),
        (lambda data: b"\x85" + data[1:-2], "not a whole one"),
        (lambda data: b"\xdf\xff\xff\xff\xff" + data[1:], "entries"),
    ],
)
def test_a_manifest_is_one_map_with_each_field_once(change, cause):
    sound = manifest_of([["t", "F32", [1], 4, bytes(32)]])
    assert Manifest.decode(sound).name == "n"
    later = b"\x87" + sound[1:] + msgpack.packb("later") + msgpack.packb({"a": [[1], {2: 3}]})
    assert Manifest.decode(later) == Manifest.decode(sound)
    with pytest.raises(RemoteProtocolError, match=cause):
        Manifest.decode(change(sound))
