"""Wire codecs: exact sizes, golden bytes, error bounds, row independence, and what hostile bytes can do."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swarmnode.kernels import codecs
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.tensors import BLOCK, OUTLIERS, Codec, payload_size

torch.set_num_threads(1)
NAN, INF = float("nan"), float("inf")


def activations(seed: int, rows: int, hidden: int) -> torch.Tensor:
    """Rows as real ones look: normal values and a few massive ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, hidden, generator=generator)
    values[:, hidden // 3] *= 90_000
    values[:, hidden // 2] *= 300
    return values


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 640), (3, 64), (5, 96), (2, 4), (4, 71), (0, 64), (2, 4096)])
def test_size_is_exact_and_round_trip_is_decode_of_encode(codec, dtype, rows, hidden):
    values = activations(hidden, rows, hidden).to(dtype)
    wire = codecs.encode(values, codec)
    assert isinstance(wire, bytes)
    assert len(wire) == payload_size(codec, rows, hidden)
    decoded = codecs.decode(wire, codec, rows, hidden, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, codecs.round_trip(values, codec))
    assert codecs.encode(values, codec) == wire


def test_fp32_and_bf16_carry_every_bit():
    values = torch.tensor([[1.5, -0.0, NAN, INF, -INF, 1e-40]])
    assert codecs.encode(values, Codec.FP32) == struct.pack("<6f", 1.5, -0.0, NAN, INF, -INF, 1e-40)
    half = values.bfloat16()
    wire = codecs.encode(half, Codec.BF16)
    assert wire == half.view(torch.int16).numpy().astype("<i2").tobytes()
    assert codecs.encode(codecs.decode(wire, Codec.BF16, 1, 6, torch.bfloat16), Codec.BF16) == wire


def test_int8s_golden_bytes():
    """The layout of docs/spec/tensors.md, by hand: levels, scale, indices, outliers."""
    row = [0.0] * 64
    row[3], row[9], row[5], row[7] = 1000.0, -500.0, 400.0, 300.0
    row[0], row[1], row[2], row[63] = 2.0, -0.5, 0.125, -2.0
    levels = [0] * 64
    levels[0], levels[1], levels[2], levels[63] = 127, -64, 32, -127  # 127 * sqrt(1/4) = 63.5 rounds to even
    golden = struct.pack("<64b", *levels) + struct.pack("<H", 0x4000)
    golden += struct.pack("<4H", 3, 9, 5, 7) + struct.pack("<4f", 1000.0, -500.0, 400.0, 300.0)
    assert codecs.encode(torch.tensor([row]), Codec.INT8S) == golden
    decoded = codecs.decode(golden, Codec.INT8S, 1, 64, torch.float32)[0]
    assert decoded[[3, 9, 5, 7, 0, 63]].tolist() == [1000.0, -500.0, 400.0, 300.0, 2.0, -2.0]
    assert decoded[1].item() == pytest.approx(-2 * 64**2 / 127**2)


def test_int8s_error_is_small_beside_massive_values():
    values = activations(1, 64, 640)
    decoded = codecs.round_trip(values, Codec.INT8S)
    top = values.abs().topk(OUTLIERS, dim=1).indices
    assert torch.equal(decoded.gather(1, top), values.gather(1, top))
    rest = values.clone().scatter_(1, top, 0.0)
    error = (decoded - values).scatter(1, top, 0.0)
    assert (error.norm() / rest.norm()).item() < 0.007
    scale = rest.view(64, -1, BLOCK).abs().amax(2, keepdim=True).expand(-1, -1, BLOCK).reshape(64, -1)
    # half a level: |d(y^2)| = 2 y / (2 * 127), and a little for the bf16 scale
    assert (error.abs() <= scale * ((rest.abs() / scale).sqrt() / 127 + 1e-4) * 1.01).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9), hidden=st.sampled_from([4, 31, 64, 130, 640]))
def test_bits_of_a_row_do_not_depend_on_its_neighbours(seed, rows, hidden):
    values = activations(seed, rows, hidden)
    together = codecs.round_trip(values, Codec.INT8S)
    alone = torch.cat([codecs.round_trip(values[i : i + 1], Codec.INT8S) for i in range(rows)])
    assert torch.equal(together, alone)
    wires = [codecs.encode(values[i : i + 1], Codec.INT8S) for i in range(rows)]
    assert codecs.encode(values, Codec.INT8S) == b"".join(wires)  # so that logs can be cut and joined
    strided = activations(seed, rows, 2 * hidden)[:, ::2]
    assert torch.equal(codecs.round_trip(strided, Codec.INT8S), codecs.round_trip(strided.contiguous(), Codec.INT8S))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([0.0, -0.0, NAN, INF, -INF, 3.4e38, 1e-45]),
        min_size=70,
        max_size=70,
    )
)
def test_any_row_encodes_to_what_a_receiver_accepts(row):
    values = torch.tensor([row], dtype=torch.float32)
    decoded = codecs.decode(codecs.encode(values, Codec.INT8S), Codec.INT8S, 1, 70, torch.float32)
    assert bool(torch.isfinite(decoded).all()) == bool(torch.isfinite(values).all())


def test_ties_take_the_first_index():
    wire = codecs.encode(torch.ones(1, 640), Codec.INT8S)
    assert struct.unpack_from("<4H", wire, 640 + 20) == (0, 1, 2, 3)


def test_zero_rows_stay_zero():
    assert torch.equal(codecs.round_trip(torch.zeros(2, 640), Codec.INT8S), torch.zeros(2, 640))


def test_a_poisoned_row_stays_poisoned_and_alone():
    values = activations(3, 3, 128)
    clean = codecs.round_trip(values, Codec.INT8S)
    values[1, :9] = NAN
    poisoned = codecs.round_trip(values, Codec.INT8S)
    assert int(poisoned[1].isnan().sum()) == OUTLIERS
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_is_the_peers_fault(codec, change):
    wire = codecs.encode(torch.ones(2, 64), codec)
    wrong = wire[:-1] if change < 0 else wire + b"\0"
    with pytest.raises(RemoteProtocolError, match="must be"):
        codecs.decode(wrong, codec, 2, 64, torch.float32)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x8001, 0xFFFF])
def test_hostile_scales_are_refused(bits):
    wire = bytearray(codecs.encode(torch.ones(2, 64), Codec.INT8S))
    struct.pack_into("<H", wire, 90 + 64, bits)  # in the second row
    with pytest.raises(RemoteProtocolError, match="scale"):
        codecs.decode(wire, Codec.INT8S, 2, 64, torch.float32)


def test_hostile_indices_are_refused():
    wire = bytearray(codecs.encode(torch.ones(1, 64), Codec.INT8S))
    struct.pack_into("<H", wire, 64 + 2, 64)
    with pytest.raises(RemoteProtocolError, match="index 64"):
        codecs.decode(memoryview(wire), Codec.INT8S, 1, 64, torch.float32)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=2 * (71 + 4 + 24), max_size=2 * (71 + 4 + 24)))
def test_junk_decodes_or_is_the_peers_fault(junk):
    try:
        decoded = codecs.decode(junk, Codec.INT8S, 2, 71, torch.bfloat16)
    except RemoteProtocolError:
        return
    assert decoded.shape == (2, 71)


def test_bounds_on_the_width():
    with pytest.raises(LocalProtocolError, match="hidden"):
        codecs.encode(torch.ones(1, codecs.MAX_HIDDEN + 1), Codec.INT8S)
    with pytest.raises(LocalProtocolError, match="hidden"):
        codecs.encode(torch.ones(1, 3), Codec.INT8S)
    wide = codecs.MAX_HIDDEN + 64
    with pytest.raises(RemoteProtocolError, match="cannot carry"):
        codecs.decode(bytes(payload_size(Codec.INT8S, 1, wide)), Codec.INT8S, 1, wide, torch.float32)


def test_decoded_tensors_own_their_memory():
    wire = bytearray(codecs.encode(torch.ones(1, 64), Codec.BF16))
    decoded = codecs.decode(wire, Codec.BF16, 1, 64, torch.bfloat16)
    wire[:] = bytes(len(wire))
    assert torch.equal(decoded, torch.ones(1, 64, dtype=torch.bfloat16))


def test_float32_bits_follow_the_reference_loop():
    """The vectorized encoder against the formula, value by value."""
    values = activations(9, 2, 192)
    wire = np.frombuffer(codecs.encode(values, Codec.INT8S), np.int8).reshape(2, -1)[:, :192]
    for row, levels in zip(values.numpy(), wire, strict=True):
        top = np.argsort(-np.abs(row), kind="stable")[:OUTLIERS]
        rest = row.copy()
        rest[top] = 0
        for block in range(3):
            part = rest[block * 64 : block * 64 + 64]
            scale = torch.tensor(np.abs(part).max()).bfloat16().float().numpy()
            for value, level in zip(part, levels[block * 64 :], strict=False):
                expected = np.rint(np.float32(127) * np.sqrt(np.abs(value) / scale))
                assert level == int(np.copysign(min(expected, 127), value))
