"""GGUF models: tensors and configs equal to the Hugging Face checkpoint the file was made from, for every family."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from helpers.gguf_files import random_weights, write_gguf
from helpers.tiny_models import LLAMA3, make_checkpoint
from swarmnode.kernels.loading.checkpoint import open_checkpoint
from swarmnode.kernels.loading.dequantize import CHUNK_VALUES, SUPPORTED, dequantize, split_q8
from swarmnode.kernels.loading.folder import FolderCheckpoint
from swarmnode.kernels.loading.shapes import block_shapes
from swarmnode.protocol.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel

torch.set_num_threads(1)
SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": 16, "head_dim": 32}),
    "mixtral": ("mixtral", EXPERTS),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.25,
            "logits_scaling": 4.0,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "seed_oss": ("seed_oss", {"head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "layer_types": ["sliding_attention"] * 2,
            "rope_parameters": GEMMA3_ROPES,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 24, "head_dim": 16}),
    "phi3-longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0 + 0.5 * pair for pair in range(8)],
            },
        },
    ),
    "falcon-7b": ("falcon", {}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "neox": ("gpt_neox", {}),
    "neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-shared-norm": ("stablelm", {"use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, "seq_length": 512}),
}
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_neox": "gptneox",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny Hugging Face folders, one per family, made once."""
    made = {}

    def folder(name):
        if name not in made:
            model_type, changes = FAMILIES[name]
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), model_type, **{**SMALL, **changes})
        return made[name]

    return folder


def gguf_of(folders, name, path, **options):
    architecture = ARCHITECTURES.get(FAMILIES[name][0], FAMILIES[name][0])
    return write_gguf(path / "tiny.gguf", folders(name), architecture, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_gives_the_tensors_and_config_of_the_folder_it_was_made_from(folders, name, tmp_path):
    ids = [("tokenizer.ggml.bos_token_id", 1), ("tokenizer.ggml.eos_token_id", 2)]
    ours = open_checkpoint(gguf_of(folders, name, tmp_path, extra=ids), cache_dir=tmp_path / "cache")
    theirs = FolderCheckpoint(folders(name), "tiny", tmp_path / "cache")
    left, right = json.loads(ours.config.to_json()), json.loads(theirs.config.to_json())
    assert left.pop("norm_eps") == pytest.approx(right.pop("norm_eps"))
    assert left == right
    for index in range(ours.config.num_blocks):
        stored, expected = ours.block(index, torch.float32), theirs.block(index, torch.float32)
        assert stored.keys() == expected.keys() == block_shapes(ours.config, index).keys()
        for tensor in stored:
            torch.testing.assert_close(stored[tensor], expected[tensor], rtol=0, atol=3e-7)
    for part, tensor in ours.head(torch.float32).items():
        torch.testing.assert_close(tensor, theirs.head(torch.float32)[part], rtol=0, atol=3e-7)
    assert torch.equal(ours.embedding(torch.bfloat16), theirs.embedding(torch.bfloat16))


def test_experts_one_by_one_as_in_the_first_mixtral_files(folders, tmp_path):
    source = gguf_of(folders, "mixtral", tmp_path)
    (tmp_path / "apart").mkdir()
    apart = tmp_path / "apart" / "tiny.gguf"
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(apart, "llama")
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, value.contents(), value.types[0])
    for tensor in reader.tensors:
        head, cube, rest = tensor.name.partition("_exps.")
        planes = np.array(tensor.data) if cube else [np.array(tensor.data)]
        for number, plane in enumerate(planes):
            writer.add_tensor(f"{head}.{number}.{rest}" if cube else tensor.name, np.ascontiguousarray(plane))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, second = (open_checkpoint(path, cache_dir=tmp_path / "cache") for path in (source, apart))
    assert first.config == second.config
    stored, expected = second.block(1, torch.float32), first.block(1, torch.float32)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_cubes_and_fused_matrices(kind, folders, tmp_path):
    """Cutting what was dequantized is dequantizing what was cut."""
    for name in ("mixtral", "phi3", "falcon-40b"):
        (tmp_path / name).mkdir()
        plain = FolderCheckpoint(folders(name), "tiny", tmp_path / "cache").block(0, torch.float32)
        path = gguf_of(folders, name, tmp_path / name, matrix_type=kind)
        rough = open_checkpoint(path, cache_dir=tmp_path / "cache").block(0, torch.float32)
        assert rough.keys() == plain.keys()
        for part in rough:
            assert (rough[part] - plain[part]).norm() <= (0.01 if kind == "Q8_0" else 0.15) * plain[part].norm()


def test_a_run_from_gguf_equals_one_from_the_folder(folders, tmp_path):
    from swarmnode.kernels.engine import load_embedding, load_head, load_span
    from swarmnode.kernels.kvcache import KVPool
    from swarmnode.kernels.span import Piece

    logits = []
    for source in (folders("bloom"), gguf_of(folders, "bloom", tmp_path)):
        checkpoint = open_checkpoint(source, cache_dir=tmp_path / "cache")
        pool = KVPool(1 << 24, checkpoint.config, 0, 2, torch.float32)
        hidden = load_embedding(checkpoint, dtype=torch.float32)(torch.arange(3, 40))
        hidden = load_span(checkpoint, 0, 2, dtype=torch.float32).run(hidden, [Piece(pool.open_lane(), 0, 37)])
        logits.append(load_head(checkpoint, dtype=torch.float32).logits(hidden))
    assert torch.equal(*logits)


def test_opening_again_reads_the_cache_and_gives_the_same_bits(folders, tmp_path):
    path = gguf_of(folders, "llama", tmp_path, matrix_type="Q8_0", table_type="Q8_0")
    first = open_checkpoint(path, cache_dir=tmp_path / "cache")
    blocks = first.block(1, torch.bfloat16)
    again = open_checkpoint(path, cache_dir=tmp_path / "cache")
    assert again.manifest == first.manifest
    for name, tensor in again.block(1, torch.bfloat16).items():
        assert torch.equal(tensor, blocks[name])
        assert tensor.dtype == torch.bfloat16


def test_an_8_bit_head_keeps_its_stored_numbers(folders, tmp_path):
    for name, tied in (("llama", False), ("qwen2", True)):
        (tmp_path / name).mkdir()
        path = gguf_of(folders, name, tmp_path / name, table_type="Q8_0")
        checkpoint = open_checkpoint(path, cache_dir=tmp_path / "cache")
        assert checkpoint.config.tied_head is tied
        assert checkpoint.head_kind == "q8_0"
        values, scales = checkpoint.head_q8()
        assert (values.dtype, scales.dtype) == (torch.int8, torch.float16)
        assert scales.shape == (96, 2)
        floats = (values.view(96, 2, 32).float() * scales.float()[..., None]).view(96, 64)
        assert torch.equal(floats, checkpoint.head(torch.float32)["lm_head.weight"])


def test_a_float_head_has_no_8_bit_form(folders, tmp_path):
    checkpoint = open_checkpoint(gguf_of(folders, "llama", tmp_path), cache_dir=tmp_path / "cache")
    assert checkpoint.head_kind == "float"
    with pytest.raises(UnsupportedModel, match="Q8_0"):
        checkpoint.head_q8()


def test_llama3_frequencies_become_the_four_parameters(folders, tmp_path):
    """transformers and llama.cpp compute the same table; here the way back is checked against it."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 10_000.0}
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=scaling), torch.device("cpu")
    )
    plain = 10_000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = (plain / stretched).numpy().astype(np.float32)
    path = tmp_path / "llama3.gguf"
    _with_tensor(gguf_of(folders, "llama", tmp_path), path, "rope_freqs.weight", factors)
    config = open_checkpoint(path, cache_dir=tmp_path / "cache").config
    assert (config.rope.kind, config.rope.factor) == ("llama3", pytest.approx(8.0))
    assert config.rope.original_positions == 8192
    wrong = tmp_path / "wrong.gguf"
    _with_tensor(gguf_of(folders, "llama", tmp_path), wrong, "rope_freqs.weight", factors[::-1].copy())
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        open_checkpoint(wrong, cache_dir=tmp_path / "cache")


def _with_tensor(source, target, name, values):
    """Copy a GGUF of plain tensors and add one (or replace it)."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name != name:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    if values is not None:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind != "F64"])
def test_dequantized_values_equal_the_reference_arithmetic(kind):
    rng = np.random.default_rng(3)
    quantization = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    rows = CHUNK_VALUES // 512 + 3  # more than one chunk
    raw = rng.integers(0, 100, (rows, 512 // block * size), np.uint8)  # small exponents: no NaN, no infinity
    expected = gguf.dequantize(raw, quantization)
    values = dequantize(raw.reshape(-1), kind, (rows, 512), torch.float32)
    assert np.array_equal(values.numpy(), expected)
    assert torch.equal(dequantize(raw.reshape(-1), kind, (rows, 512), torch.bfloat16), values.bfloat16())


def test_q8_is_split_without_loss():
    weights = random_weights((6, 64)).numpy()
    raw = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    values, scales = split_q8(raw.reshape(-1), (6, 64))
    floats = values.view(6, 2, 32).float() * scales.float()[..., None]
    assert np.array_equal(floats.view(6, 64).numpy(), gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))


def test_unreadable_storage_types_are_named():
    with pytest.raises(UnsupportedModel, match=r"IQ2_XXS is not supported: .*Q4_K"):
        dequantize(np.zeros(66, np.uint8), "IQ2_XXS", (256,), torch.float32)


def test_unknown_architectures_name_the_supported(folders, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", folders("llama"), "rwkv6")
    with pytest.raises(UnsupportedModel, match=r"rwkv6.*llama, mistral, .*gemma3.*bloom"):
        open_checkpoint(path, cache_dir=tmp_path / "cache")


def test_a_missing_tensor_is_named(folders, tmp_path):
    source = gguf_of(folders, "qwen3", tmp_path)
    _with_tensor(source, tmp_path / "less.gguf", "blk.1.attn_k_norm.weight", None)
    checkpoint = open_checkpoint(tmp_path / "less.gguf", cache_dir=tmp_path / "cache")
    checkpoint.block(0, torch.float32)
    with pytest.raises(CorruptCheckpoint, match=r"block 1 lacks blk\.1\.attn_k_norm"):
        checkpoint.block(1, torch.float32)


def test_an_unknown_tensor_is_never_ignored(folders, tmp_path):
    source = gguf_of(folders, "llama", tmp_path)
    _with_tensor(source, tmp_path / "more.gguf", "blk.0.attn_sinks.weight", np.ones(4, np.float32))
    with pytest.raises(UnsupportedModel, match=r"block 0 has blk\.0\.attn_sinks"):
        open_checkpoint(tmp_path / "more.gguf", cache_dir=tmp_path / "cache").block(0, torch.float32)
    _with_tensor(source, tmp_path / "beyond.gguf", "blk.7.attn_q.weight", np.ones((4, 4), np.float32))
    with pytest.raises(UnsupportedModel, match="beyond the model's 2 blocks"):
        open_checkpoint(tmp_path / "beyond.gguf", cache_dir=tmp_path / "cache")


def test_wrong_shapes_are_told(folders, tmp_path):
    source = gguf_of(folders, "llama", tmp_path)
    _with_tensor(source, tmp_path / "shape.gguf", "blk.0.attn_q.weight", np.ones((64, 32), np.float32))
    checkpoint = open_checkpoint(tmp_path / "shape.gguf", cache_dir=tmp_path / "cache")
    with pytest.raises(CorruptCheckpoint, match=r"attn_q.weight has shape \(64, 32\)"):
        checkpoint.block(0, torch.float32)


def test_a_changed_byte_is_noticed_before_it_is_computed_with(folders, tmp_path):
    path = gguf_of(folders, "llama", tmp_path)
    checkpoint = open_checkpoint(path, cache_dir=tmp_path / "cache")
    last = max(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.data_offset)
    with path.open("r+b") as file:  # behind the mapping's back
        file.seek(last.data_offset)
        file.write(b"\x01\x02\x03")
    found = last.name.removeprefix("blk.")
    read = {
        "token_embd.weight": lambda: checkpoint.embedding(torch.float32),
        "output.weight": lambda: checkpoint.head(torch.float32),
        "output_norm.weight": lambda: checkpoint.final_norm(torch.float32),
    }.get(last.name, lambda: checkpoint.block(int(found.partition(".")[0]), torch.float32))
    with pytest.raises(CorruptCheckpoint, match=f"{last.name} has changed since"):
        read()


def test_blocks_outside_the_model_are_refused(folders, tmp_path):
    checkpoint = open_checkpoint(gguf_of(folders, "llama", tmp_path), cache_dir=tmp_path / "cache")
    for index in (-1, 2):
        with pytest.raises(CorruptCheckpoint, match="has 2 blocks"):
            checkpoint.block(index, torch.float32)


def test_a_file_without_vocabulary_says_so(folders, tmp_path):
    checkpoint = open_checkpoint(gguf_of(folders, "llama", tmp_path), cache_dir=tmp_path / "cache")
    assert checkpoint.chat_template is None
    with pytest.raises(UnsupportedModel, match="no vocabulary"):
        _ = checkpoint.tokenizer


def test_a_part_of_a_split_model_says_so(folders, tmp_path):
    path = gguf_of(folders, "llama", tmp_path, extra=[("split.count", 3)])
    with pytest.raises(UnsupportedModel, match="gguf-split --merge"):
        open_checkpoint(path, cache_dir=tmp_path / "cache")


def test_a_source_that_is_no_model_says_what_was_expected(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, words in (
        (tmp_path / "nowhere", "repository id"),
        (tmp_path / "notes.txt", "no model file"),
        (tmp_path / "empty", "no config.json"),
        ("no such model", "gemma3-270m"),
    ):
        with pytest.raises(ModelNotFound, match=words):
            open_checkpoint(source, cache_dir=tmp_path / "cache")


def test_a_repository_offline_says_so(tmp_path):
    with pytest.raises(ModelNotFound, match="neither a local path nor"):
        open_checkpoint("nobody/nothing-at-all", cache_dir=tmp_path / "cache")
