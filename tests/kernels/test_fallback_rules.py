"""What the fallback reads, refuses, promises and says."""

import json
import sys

import pytest
import torch
from helpers.foreign_models import make_foreign
from helpers.tiny_models import BASE, load_oracle, make_checkpoint
from safetensors.torch import load_file, save_file
from swarmnode.kernels.engine import default_quant, load_embedding, load_head, load_span
from swarmnode.kernels.fallback_skeleton import Skeleton
from swarmnode.kernels.kvcache import KVPool
from swarmnode.kernels.loading.checkpoint import open_checkpoint
from swarmnode.kernels.loading.foreign import ForeignFolder
from swarmnode.kernels.measure import compute_class
from swarmnode.kernels.models.config import ModelConfig
from swarmnode.kernels.models.foreign import settings_of
from swarmnode.kernels.span import Piece
from swarmnode.protocol.errors import ConfigError, CorruptCheckpoint, LocalProtocolError, ServerBusy, UnsupportedModel

POSITIONS = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return make_foreign(tmp_path_factory.mktemp("model"), "gpt2", max_position_embeddings=POSITIONS)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy to spoil."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def opened(folder):
    return open_checkpoint(folder, cache_dir=folder / "cache")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_only_the_span_is_read(folder, monkeypatch):
    read = []
    stored = ForeignFolder.stored

    def spy(self, names):
        found = stored(self, names)
        read.extend(found)
        return found

    checkpoint = opened(folder)
    monkeypatch.setattr(ForeignFolder, "stored", spy)
    load_span(checkpoint, 1, 2, dtype=torch.float32)
    assert {name for name in read if ".h." in name or name.startswith("h.")} == set(checkpoint.block_names(1))
    assert not [name for name in read if "wte" in name or "lm_head" in name]


def test_the_manifest_is_the_model_and_not_its_runtime(folder, copy):
    plain = opened(folder)
    known = ModelConfig.from_json(plain.manifest.config)
    assert (known.family, known.num_blocks, known.hidden_size, known.vocab_size) == ("hf", 3, 64, 160)
    assert json.loads(known.foreign.settings)["model_type"] == "gpt2"
    assert len(plain.manifest.blocks) == 3
    assert sum(len(block) for block in plain.manifest.blocks) + len(plain.manifest.head) == len(plain._shard_of)
    change_config(copy, torch_dtype="float16", transformers_version="4.0", use_cache=False)
    assert opened(copy).manifest.digest == plain.manifest.digest
    change_config(copy, layer_norm_epsilon=1e-3)
    assert opened(copy).manifest.digest != plain.manifest.digest


def test_code_beside_a_checkpoint_is_never_run(copy):
    (copy / "modeling_own.py").write_text("raise SystemExit('remote code was run')")
    change_config(copy, auto_map={"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Own"})
    load_span(opened(copy), 0, 1, dtype=torch.float32)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_a_config_names_no_kernels_to_fetch(key):
    assert "hub" not in settings_of({"model_type": "opt", key: "hub/kernels"})


def test_the_cache_keeps_its_books(folder):
    checkpoint = opened(folder)
    span = load_span(checkpoint, 0, 3, dtype=torch.float32)
    page = 2 * 4 * 64 * 16 * 4
    pool = KVPool(6 * page, checkpoint.config, 0, 3, torch.float32)
    first, second = pool.open_lane(max_length=64), pool.open_lane(max_length=20)
    with pytest.raises(ServerBusy):
        pool.open_lane(max_length=1)
    rows = torch.randn(30, 64)
    span.run(rows, [Piece(first, 0, 30)])
    assert (pool.used_bytes, pool.promised_bytes) == (3 * page, 3 * page)
    first.free()
    assert (pool.used_bytes, pool.promised_bytes) == (0, 3 * page)
    pool.open_lane(max_length=64).free()
    second.free()
    assert pool.free_bytes == pool.budget_bytes


def test_a_fork_goes_its_own_way(folder):
    checkpoint = opened(folder)
    span, pool = (
        load_span(checkpoint, 0, 3, dtype=torch.float32),
        KVPool(1 << 24, checkpoint.config, 0, 3, torch.float32),
    )
    rows, lane = torch.randn(20, 64), pool.open_lane()
    span.run(rows[:10], [Piece(lane, 0, 10)])
    fork = lane.fork()
    span.run(rows[10:11], [Piece(fork, 10, 1)])
    apart = span.run(rows[10:], [Piece(lane, 10, 10)])
    alone = pool.open_lane()
    span.run(rows[:10], [Piece(alone, 0, 10)])
    assert torch.equal(apart, span.run(rows[10:], [Piece(alone, 10, 10)]))


def test_learned_positions_end(folder):
    checkpoint = opened(folder)
    span, pool = (
        load_span(checkpoint, 0, 1, dtype=torch.float32),
        KVPool(1 << 24, checkpoint.config, 0, 1, torch.float32),
    )
    assert checkpoint.config.max_positions == POSITIONS
    span.run(torch.zeros(POSITIONS, 64), [Piece(pool.open_lane(), 0, POSITIONS)])
    with pytest.raises(LocalProtocolError, match="past the model's 128"):
        span.run(torch.zeros(POSITIONS + 1, 64), [Piece(pool.open_lane(), 0, POSITIONS + 1)])


def test_it_is_a_class_of_its_own_and_not_quantized(folder):
    checkpoint = opened(folder)
    assert load_span(checkpoint, 0, 1, dtype=torch.float32).quant == "hf"
    assert compute_class("hf", torch.float32) not in (b"", compute_class("none", torch.float32))
    assert default_quant(checkpoint.config, 3, 0) == "none"
    with pytest.raises(ConfigError, match="--quant int8 is not supported"):
        load_span(checkpoint, 0, 1, dtype=torch.float32, quant="int8")


def test_progress_block_by_block(folder):
    seen = []
    load_span(opened(folder), 1, 3, dtype=torch.float32, progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]


def test_placement_knows_the_size_of_a_block(folder):
    config = opened(folder).config
    assert config.block_parameters() == 12 * 64 * 64 + 13 * 64
    span = load_span(opened(folder), 0, 2, dtype=torch.float32)
    assert span.size_bytes == 2 * 4 * config.block_parameters()


def test_a_variation_of_a_family_of_ours(tmp_path):
    """StableLM 2 12B has norms on heads, which our StableLM has not."""
    changes = {"qk_layernorm": True, "use_parallel_residual": True, "num_key_value_heads": 2}
    checkpoint = opened(make_checkpoint(tmp_path, "stablelm", **changes))
    assert checkpoint.config.family == "hf"
    ids = torch.arange(3, 40)
    pool = KVPool(1 << 24, checkpoint.config, 0, 3, torch.float32)
    hidden = load_embedding(checkpoint, dtype=torch.float32)(ids)
    hidden = load_span(checkpoint, 0, 3, dtype=torch.float32).run(hidden, [Piece(pool.open_lane(), 0, 37)])
    with torch.no_grad():
        expected = load_oracle(tmp_path)(ids[None]).logits[0]
    assert (load_head(checkpoint, dtype=torch.float32).logits(hidden) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("model_type", "changes", "cause"),
    [
        ("jamba", {}, "has layers of kind linear_attention"),
        ("mamba", {}, "has layers of kind linear_attention"),
        ("openai-gpt", {}, "keeps no keys and values"),
        ("rwkv", {}, "cannot be run by transformers' own"),
        ("qwen3_next", {}, "has layers of kind linear_attention, which keep no keys"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "has layers of kind conv"),
        ("bart", {}, "has an encoder and a decoder"),
        ("t5", {}, "has an encoder and a decoder"),
        ("bert", {}, "attends in both directions"),
        ("git", {}, "is more than a language model"),
        ("vit", {}, "generates no text"),
        ("llama4_text", {}, "hands more than hidden states"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attends in both directions"),
        ("biogpt", {}, "cannot be run by transformers' own decoder layers"),
        ("nosuch", {}, "does not know 'nosuch' either"),
    ],
)
def test_what_is_no_plain_decoder_is_refused(model_type, changes, cause):
    with pytest.raises(UnsupportedModel, match=cause):
        Skeleton(json.dumps({"model_type": model_type, **BASE, **changes}))


def test_a_family_that_nobody_knows(copy):
    change_config(copy, model_type="nosuch")
    with pytest.raises(UnsupportedModel, match=r"'nosuch' is not supported: .*bloom.*; transformers .* does not know"):
        opened(copy)


def test_a_model_with_more_than_text():
    with pytest.raises(UnsupportedModel, match="is more than text"):
        settings_of({"model_type": "llava", "text_config": {}})


def test_a_config_too_long_for_a_manifest():
    with pytest.raises(UnsupportedModel, match="at most 49152"):
        settings_of({"model_type": "opt", "label": "x" * 49152})


def test_one_thread_at_a_time_runs_a_head(folder, monkeypatch):
    """A client's generations score on threads of their own; where layers are stopped is known for one pass only."""
    head = load_head(opened(folder), dtype=torch.float32)
    positions, taken = head._skeleton.base.wpe, []
    forward = positions.forward

    def entered(*args):
        taken.append(head._skeleton._running.acquire(blocking=False))
        return forward(*args)

    monkeypatch.setattr(positions, "forward", entered)
    head.logits(torch.randn(2, 64))
    head.logits(torch.randn(2, 64))
    assert taken == [False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_narrower_caches(dtype, folder):
    checkpoint = opened(folder)
    span, rows = load_span(checkpoint, 0, 3, dtype=torch.float32), torch.randn(40, 64)
    found = []
    for kept in (torch.float32, dtype):
        lane = KVPool(1 << 24, checkpoint.config, 0, 3, kept).open_lane()
        found.append(torch.cat([span.run(rows[:30], [Piece(lane, 0, 30)]), span.run(rows[30:], [Piece(lane, 30, 10)])]))
    assert 0 < (found[1] - found[0]).norm() < 0.02 * found[0].norm()


def test_without_the_extra_the_command_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"'gpt2' is not supported.*pip install 'swarmnode-p2p\[hf\]'"):
        opened(folder)


def test_other_quantizations_are_refused(copy):
    change_config(copy, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModel, match="its own quantization"):
        opened(copy)


def test_a_missing_block(copy):
    change_tensors(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".h.2." in name])
    with pytest.raises(CorruptCheckpoint, match="no tensors of block 2"):
        opened(copy)


def test_a_block_too_many(copy):
    change_config(copy, n_layer=2)
    with pytest.raises(CorruptCheckpoint, match="beyond the 2 blocks"):
        opened(copy)


@pytest.mark.parametrize(
    ("change", "error", "cause"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), CorruptCheckpoint, r"lacks .*h\.1\.mlp\.c_fc\.bias"),
        (lambda t: t.update({"transformer.h.1.extra": torch.zeros(1)}), UnsupportedModel, r"has .*extra"),
        (lambda t: t.update({"transformer.h.1.mlp.c_fc.bias": torch.zeros(3)}), CorruptCheckpoint, "contradict"),
        (lambda t: t.pop("transformer.wpe.weight"), CorruptCheckpoint, "lacks .*wpe"),
        (lambda t: t.update({"transformer.h.1.ln_1.bias": torch.zeros(64).int()}), UnsupportedModel, "stored as I32"),
    ],
)
def test_a_damaged_checkpoint(copy, change, error, cause):
    change_tensors(copy, change)
    with pytest.raises(error, match=cause):
        load_span(opened(copy), 1, 2, dtype=torch.float32)
