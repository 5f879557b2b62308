"""The GGUF container: every length in a file is hostile, and a damaged file is named with its cause."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swarmnode.kernels.loading import gguf_file
from swarmnode.kernels.loading.gguf_file import GgufFile
from swarmnode.protocol.errors import CorruptCheckpoint, UnsupportedModel


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    return u64(len(value.encode())) + value.encode()


def header(tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + u32(3) + u64(tensors) + u64(entries)


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """A file with every kind of value, as the gguf package writes it."""
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60_000)
    writer.add_int32("a.i32", -70_000)
    writer.add_uint64("a.u64", 2**40)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "é😀")
    writer.add_array("a.texts", ["x", "", "你"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_tensor("plain", np.arange(6, dtype=np.float32).reshape(2, 3))
    blocks = gguf.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantized", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parse(tmp_path: Path, data: bytes) -> GgufFile:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return GgufFile(path)


def test_reads_what_the_reference_writes(sample):
    file = GgufFile(sample)
    expected = {"a.u8": 200, "a.i8": -3, "a.u16": 60_000, "a.i32": -70_000, "a.u64": 2**40, "a.f32": 0.5}
    expected |= {"a.f64": 0.1, "a.bool": True, "a.text": "é😀", "a.texts": ["x", "", "你"]}
    for key, value in expected.items():
        assert file.metadata[key] == value
    assert file.metadata["a.ints"].tolist() == [1, -2, 3]
    assert file.tensors["plain"].shape == (2, 3)
    assert np.array_equal(file.raw("plain").view(np.float32), np.arange(6))
    assert (file.tensors["quantized"].kind, file.tensors["quantized"].shape) == ("Q8_0", (2, 64))
    assert not file.raw("plain").flags.writeable


def test_every_truncation_is_told(sample, tmp_path):
    data = sample.read_bytes()
    used = max(tensor.offset + tensor.size_bytes for tensor in GgufFile(sample).tensors.values())
    for end in range(0, used, 7):  # what follows is padding
        with pytest.raises(CorruptCheckpoint, match=r"x\.gguf: (truncated|cannot be read|is no GGUF)"):
            parse(tmp_path, data[:end])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2000), byte=st.integers(0, 255))
def test_damaged_bytes_parse_or_are_told(sample, tmp_path, place, byte):
    data = bytearray(sample.read_bytes())
    data[place % len(data)] = byte
    with contextlib.suppress(CorruptCheckpoint, UnsupportedModel):
        parse(tmp_path, bytes(data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read"),
        (b"PK\3\4" + bytes(60), "is no GGUF"),
        (header(tensors=gguf_file.MAX_ENTRIES + 1), "tensors, at most"),
        (header(entries=gguf_file.MAX_ENTRIES + 1), "metadata keys, at most"),
        (header(entries=1) + u64(gguf_file.MAX_STRING + 1), "a string has"),
        (header(entries=1) + u64(2**63), "a string has"),
        (header(entries=1) + text("k") + u32(8) + u64(gguf_file.MAX_STRING + 1), "a string has"),
        (header(entries=1) + text("k") + u32(9) + u32(4) + u64(gguf_file.MAX_ARRAY + 1), "array items"),
        (header(entries=1) + text("k") + u32(9) + u32(8) + u64(gguf_file.MAX_ARRAY), "truncated"),
        (header(entries=1) + text("k") + u32(9) + u32(8) + u64(1) + u64(2**62), "truncated"),
        (header(entries=1) + text("k") + u32(9) + u32(9) + u64(1), "unknown array type 9"),
        (header(entries=1) + text("k") + u32(99), "unknown metadata type 99"),
        (header(entries=1) + u64(1) + b"\xff" + u32(0), "not UTF-8"),
        (header(tensors=1) + text("n" * (gguf_file.MAX_NAME + 1)), "a string has"),
        (header(tensors=1) + text("n") + u32(gguf_file.MAX_DIMENSIONS + 1), "dimensions"),
        (header(tensors=1) + text("n") + u32(1) + u64(2**60) + u32(0) + u64(0), "truncated: n needs"),
        (header(tensors=1) + text("n") + u32(1) + u64(1) + u32(0) + u64(2**63), "truncated: n needs"),
        (header(tensors=1) + text("n") + u32(1) + u64(33) + u32(8) + u64(0), "no multiple of Q8_0"),
        (header(entries=1) + text("general.alignment") + u32(4) + u32(0), "alignment"),
    ],
    ids=range(19),
)
def test_hostile_lengths_are_refused_before_anything_is_allocated(tmp_path, data, words):
    with pytest.raises(CorruptCheckpoint, match=words):
        parse(tmp_path, data)


def test_other_versions_and_types_are_unsupported(tmp_path):
    with pytest.raises(UnsupportedModel, match="version 1"):
        parse(tmp_path, b"GGUF" + u32(1) + bytes(16))
    with pytest.raises(UnsupportedModel, match="unknown tensor type 999"):
        parse(tmp_path, header(tensors=1) + text("n") + u32(1) + u64(1) + u32(999) + u64(0))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        GgufFile(tmp_path / "none.gguf")
