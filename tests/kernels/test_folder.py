"""Hugging Face folders: shards, only the tensors asked for, damaged and incomplete downloads, other layouts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from swarmnode.kernels.loading import safetensors as module
from swarmnode.kernels.loading.checkpoint import open_checkpoint
from swarmnode.kernels.loading.files import INDEX
from swarmnode.kernels.loading.folder import FolderCheckpoint
from swarmnode.kernels.loading.safetensors import SafetensorsFile, serialize
from swarmnode.kernels.loading.shapes import block_shapes
from swarmnode.kernels.models.config import ModelConfig
from swarmnode.protocol.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from swarmnode.protocol.manifest import Manifest

torch.set_num_threads(1)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "eos_token_id": 2,
}


def tensors_of(config: dict, prefix: str = "model.") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parsed = ModelConfig.from_hf(config)
    shapes = {f"{prefix}embed_tokens.weight": (32, 16), f"{prefix}norm.weight": (16,), "lm_head.weight": (32, 16)}
    for index in range(parsed.num_blocks):
        shapes |= {f"{prefix}layers.{index}.{name}": shape for name, shape in block_shapes(parsed).items()}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict = CONFIG, shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    weight_map = {name: names[place % shards] for place, name in enumerate(tensors)}
    for shard in names:
        save_file({name: tensors[name] for name, file in weight_map.items() if file == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "tiny", tensors_of(CONFIG))


def opened(folder: Path) -> FolderCheckpoint:
    return FolderCheckpoint(folder, "tiny", folder.parent / "cache")


@pytest.mark.parametrize("shards", [1, 3])
def test_blocks_and_tables_are_read(tmp_path, shards):
    tensors = tensors_of(CONFIG)
    checkpoint = opened(write_folder(tmp_path / "m", tensors, shards=shards))
    block = checkpoint.block(2, torch.bfloat16)
    assert {f"model.layers.2.{name}" for name in block} == {name for name in tensors if ".layers.2." in name}
    for name, tensor in block.items():
        assert torch.equal(tensor, tensors[f"model.layers.2.{name}"])
    wide = checkpoint.block(0, torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in wide.values())
    assert torch.equal(checkpoint.embedding(torch.bfloat16), tensors["model.embed_tokens.weight"])
    assert torch.equal(checkpoint.head(torch.bfloat16)["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(checkpoint.head(torch.bfloat16)["norm.weight"], tensors["model.norm.weight"])


def test_only_the_shards_of_the_span_are_opened(tmp_path):
    tensors = tensors_of(CONFIG)
    names = sorted(tensors, key=lambda name: ".layers.1." in name)  # block 1 last
    folder = write_folder(tmp_path / "m", {name: tensors[name] for name in names}, shards=1)
    first = {name: tensors[name] for name in names if ".layers.1." not in name}
    second = {name: tensors[name] for name in names if ".layers.1." in name}
    (folder / "model.safetensors").unlink()
    save_file(second, folder / "b.safetensors")
    weight_map = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = opened(folder)
    checkpoint.block(1, torch.bfloat16)  # a.safetensors does not even exist
    with pytest.raises(CorruptCheckpoint, match=r"a\.safetensors: cannot be read"):
        checkpoint.block(0, torch.bfloat16)
    with pytest.raises(CorruptCheckpoint, match=r"a\.safetensors: is missing"):
        _ = checkpoint.manifest


def test_stored_dtype_is_served_from_the_mapping(folder):
    checkpoint = opened(folder)
    one, two = checkpoint.block(0, torch.bfloat16), checkpoint.block(0, torch.bfloat16)
    assert one["mlp.up_proj.weight"].data_ptr() == two["mlp.up_proj.weight"].data_ptr()


def test_a_vision_checkpoint_gives_its_text_model(tmp_path):
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors_of(CONFIG).items()}
    tensors["vision_tower.encoder.layers.0.input_layernorm.weight"] = torch.ones(4)
    checkpoint = opened(write_folder(tmp_path / "m", tensors))
    block = checkpoint.block(1, torch.bfloat16)
    expected = tensors["language_model.model.layers.1.input_layernorm.weight"]
    assert torch.equal(block["input_layernorm.weight"], expected)
    assert checkpoint.head(torch.bfloat16)["lm_head.weight"].shape == (32, 16)


def test_tied_heads_share_the_embedding(tmp_path):
    tensors = tensors_of(CONFIG)
    del tensors["lm_head.weight"]
    checkpoint = opened(write_folder(tmp_path / "m", tensors, {**CONFIG, "tie_word_embeddings": True}))
    head = checkpoint.head(torch.bfloat16)["lm_head.weight"]
    assert head.data_ptr() == checkpoint.embedding(torch.bfloat16).data_ptr()
    assert checkpoint.head_kind == "float"
    with pytest.raises(UnsupportedModel, match="Q8_0"):
        checkpoint.head_q8()


def test_the_manifest_hashes_stored_bytes_and_texts(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    checkpoint = opened(folder)
    manifest = checkpoint.manifest
    assert manifest == opened(folder).manifest == Manifest.decode(manifest.encode(), manifest.digest)
    assert [len(block) for block in manifest.blocks] == [9, 9, 9]
    assert [entry.name for entry in manifest.head] == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    stored = SafetensorsFile(folder / "model.safetensors")
    raw = {entry.name: stored.raw(entry.name) for entry in manifest.blocks[1]}
    assert manifest.mismatches(manifest.blocks[1], raw) == []
    assert manifest.file("tokenizer.json") == checkpoint.tokenizer == b"{}"
    assert manifest.file("chat_template.jinja") == b"{{ x }}"
    assert ModelConfig.from_json(manifest.config) == checkpoint.config


def test_another_weight_is_another_model(folder):
    before = opened(folder).manifest
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone() + 1
    save_file(tensors, folder / "model.safetensors")
    after = opened(folder).manifest
    assert before.digest != after.digest
    assert before.block_leaf(0) == after.block_leaf(0)
    assert before.block_leaf(1) != after.block_leaf(1)


def test_generation_config_knows_more_end_tokens(folder):
    assert opened(folder).config.eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert opened(folder).config.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{{ a }}", "{{ a }}"), ([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], "d")],
)
def test_chat_templates_of_several_generations(folder, template, expected):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert opened(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("file")
    assert opened(folder).chat_template == "file"


def test_a_folder_without_tokenizer_says_so(folder):
    assert opened(folder).chat_template is None
    with pytest.raises(UnsupportedModel, match=r"no tokenizer\.json"):
        _ = opened(folder).tokenizer


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"drop": "model.layers.2.mlp.up_proj.weight"}, CorruptCheckpoint, r"block 2 lacks mlp\.up_proj"),
        ({"add": "model.layers.2.self_attn.q_norm.weight"}, UnsupportedModel, r"block 2 has self_attn\.q_norm"),
        ({"add": "model.layers.9.mlp.up_proj.weight"}, CorruptCheckpoint, "has a block 9"),
        ({"shape": "model.layers.2.mlp.up_proj.weight"}, CorruptCheckpoint, r"up_proj.*shape \(3,\)"),
        ({"int": "model.layers.2.mlp.up_proj.weight"}, UnsupportedModel, "stored as I32"),
    ],
)
def test_what_does_not_fit_the_config_is_told(tmp_path, change, error, words):
    tensors = tensors_of(CONFIG)
    match change:
        case {"drop": name}:
            del tensors[name]
        case {"add": name} | {"shape": name}:
            tensors[name] = torch.ones(3)
        case {"int": name}:
            tensors[name] = tensors[name].to(torch.int32)
    folder = write_folder(tmp_path / "m", tensors)
    with pytest.raises(error, match=words):
        opened(folder).block(2, torch.bfloat16)


def test_known_leftovers_are_ignored(tmp_path):
    tensors = tensors_of(CONFIG) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    opened(write_folder(tmp_path / "m", tensors)).block(0, torch.bfloat16)


def test_blocks_outside_the_model_are_refused(folder):
    for index in (-1, 3):
        with pytest.raises(CorruptCheckpoint, match="has 3 blocks"):
            opened(folder).block(index, torch.bfloat16)


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({"config.json": "{"}, CorruptCheckpoint, "not JSON"),
        ({"config.json": "[]"}, CorruptCheckpoint, "not a JSON map"),
        ({"config.json": '{"model_type": "rwkv"}'}, UnsupportedModel, r"rwkv.*gemma3.*llama"),
        ({"config.json": json.dumps({**CONFIG, "quantization_config": {"bits": 4}})}, UnsupportedModel, "quantiz"),
        ({"model.safetensors": None}, ModelNotFound, r"no model\.safetensors"),
        ({"model.safetensors": None, "pytorch_model.bin": "x"}, ModelNotFound, "pickled"),
        ({INDEX: "{}"}, CorruptCheckpoint, "no weight_map"),
        ({INDEX: '{"weight_map": {"a": "../../etc/passwd"}}'}, CorruptCheckpoint, "not in the folder"),
        ({INDEX: '{"weight_map": {"a": "b.safetensors"}}'}, CorruptCheckpoint, "block 0 is missing"),
    ],
)
def test_damaged_folders_are_told(folder, files, error, words):
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
    with pytest.raises(error, match=words):
        open_checkpoint(folder, cache_dir=folder.parent / "cache")


def test_every_truncation_of_a_shard_is_told(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for end in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: (truncated|cannot be read)"):
            SafetensorsFile(path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"nonsense", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b"[]", "not a map"),
        (b'{"__metadata__": []}', "__metadata__"),
        (json.dumps({"x": 5}).encode(), "malformed"),
        (json.dumps({"x": {**ENTRY, "shape": [-1]}}).encode(), "malformed"),
        (json.dumps({"x": {**ENTRY, "shape": [1] * 9}}).encode(), "malformed"),
        (json.dumps({"x": {**ENTRY, "dtype": 1}}).encode(), "malformed"),
        (json.dumps({"x": {**ENTRY, "data_offsets": [0]}}).encode(), "malformed"),
        (json.dumps({"x": {**ENTRY, "data_offsets": [0, 2**70]}}).encode(), "malformed"),
        (json.dumps({"x": {**ENTRY, "data_offsets": [8, 0]}}).encode(), "does not fill"),
        (json.dumps({"x": {**ENTRY, "shape": [3]}}).encode(), "does not fill"),
        (json.dumps({"x": {**ENTRY, "data_offsets": [4, 12]}}).encode(), "truncated"),
    ],
    ids=range(13),
)
def test_hostile_headers_are_refused(tmp_path, header, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CorruptCheckpoint, match=words):
        SafetensorsFile(path)


def test_the_header_is_bounded(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((module.MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(module.MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(CorruptCheckpoint, match="at most"):
        SafetensorsFile(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 4000), byte=st.integers(0, 255))
def test_damaged_bytes_parse_or_are_told(tmp_path, place, byte):
    path = tmp_path / "x.safetensors"
    data = bytearray(b"".join(serialize({"a": torch.ones(4), "b": torch.ones(2, 3).bfloat16()}, {"k": "v"})))
    data[place % len(data)] = byte
    path.write_bytes(data)
    with contextlib.suppress(CorruptCheckpoint, UnsupportedModel):
        file = SafetensorsFile(path)
        for name in file.tensors:
            file.tensor(name)


def test_our_files_are_read_by_the_reference_and_theirs_by_us(tmp_path):
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "c": torch.zeros(0, 4),
        "d": torch.arange(-3, 3, dtype=torch.int8),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(serialize(tensors, {"note": "é"})))
    theirs = load_file(path)
    file = SafetensorsFile(path)
    assert file.metadata == {"note": "é"}
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(file.tensor(name), tensor)


def test_unaligned_tensors_are_read(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * ((7 - len(header) - 8) % 8)  # ends at an odd place
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + torch.tensor([1.0, 2.0]).numpy().tobytes())
    assert SafetensorsFile(path).tensor("x").tolist() == [1.0, 2.0]
