"""Every family's tensor names and fused tensors, cut against the plain meaning of each order."""

import json

import pytest
import torch
from helpers.tiny_models import make_variation
from safetensors.torch import load_file, save_file
from swarmnode.kernels.loading.folder import FolderCheckpoint
from swarmnode.kernels.loading.layouts import layout_of
from swarmnode.kernels.loading.mxfp4 import mxfp4_rows
from swarmnode.kernels.loading.shapes import block_shapes
from swarmnode.kernels.models.config import ModelConfig
from swarmnode.protocol.errors import CorruptCheckpoint, UnsupportedModel

FUSED = ["falcon-40b", "falcon-rw", "bloom", "neox", "phi3", "mixtral", "qwen2_moe-mixed", "gpt_oss"]


def opened(folder):
    return FolderCheckpoint(folder, "tiny", folder / "cache")


@pytest.fixture(scope="module", params=FUSED)
def folder(request, tmp_path_factory):
    return make_variation(tmp_path_factory.mktemp("model"), request.param)


def test_blocks_have_our_names_and_shapes(folder):
    checkpoint = opened(folder)
    for index in range(checkpoint.config.num_blocks):
        block = checkpoint.block(index, torch.bfloat16)
        assert {name: tuple(tensor.shape) for name, tensor in block.items()} == block_shapes(checkpoint.config, index)
        assert {tensor.dtype for tensor in block.values()} == {torch.bfloat16}
        assert len(block) == len(list(block))


def read_all(folder):
    checkpoint = opened(folder)
    for index in range(checkpoint.config.num_blocks):
        checkpoint.block(index, torch.float32)


def test_a_tensor_too_many_or_too_few_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if (".1." in name and name.endswith("proj.weight")) or "dense" in name)
    stranger = name.rpartition(".")[0] + ".stranger"
    for changed, error in (
        ({**tensors, stranger: torch.zeros(2)}, UnsupportedModel),
        ({key: tensor for key, tensor in tensors.items() if key != name}, CorruptCheckpoint),
        ({**tensors, name: torch.zeros(3, 5)}, CorruptCheckpoint),
    ):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(error):
            read_all(folder)
    save_file(tensors, folder / "model.safetensors")


def test_the_manifest_covers_every_tensor(folder):
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = opened(folder)
    manifest = checkpoint.manifest
    named = {entry.name for entries in (*manifest.blocks, manifest.head) for entry in entries}
    assert named == set(load_file(folder / "model.safetensors"))


def test_query_groups_are_cut_by_kv_head():
    config = ModelConfig.from_hf(
        {
            "model_type": "falcon",
            "num_hidden_layers": 1,
            "hidden_size": 12,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "vocab_size": 8,
        }
    )
    stored = layout_of(config).stored(config, 0)["self_attention.query_key_value.weight"]
    rows = torch.arange(20)[:, None].expand(20, 12)  # per KV head: 3 queries, a key, a value of 2 rows each
    cut = {name.split(".")[1]: take(rows)[:, 0].tolist() for name, take in stored.parts.items()}
    assert stored.shape == (20, 12)
    assert cut == {
        "q_proj": [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15],
        "k_proj": [6, 7, 16, 17],
        "v_proj": [8, 9, 18, 19],
    }


def test_experts_of_a_cube_alternate_gate_and_up(tmp_path):
    folder = make_variation(tmp_path, "gpt_oss")
    cube = load_file(folder / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    block = opened(folder).block(1, torch.float32)
    assert torch.equal(block["mlp.experts.2.gate_proj.weight"], cube[2, :, ::2].T)
    assert torch.equal(block["mlp.experts.2.up_proj.weight"], cube[2, :, 1::2].T)


def packed_folder(folder):
    """A GPT-OSS checkpoint whose experts are random MXFP4, and the floats they stand for."""
    make_variation(folder, "gpt_oss")
    tensors = load_file(folder / "model.safetensors")
    rng, floats = torch.Generator().manual_seed(4), {}
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=rng, dtype=torch.uint8)
        scales = torch.randint(120, 130, (experts, outputs, inputs // 32), generator=rng, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return floats


def test_mxfp4_experts_are_what_transformers_makes_of_them(tmp_path):
    floats = packed_folder(tmp_path)
    block = opened(tmp_path).block(0, torch.float32)
    gate_up = floats["model.layers.0.mlp.experts.gate_up_proj"]  # [experts, in, out]
    assert torch.equal(block["mlp.experts.3.gate_proj.weight"], gate_up[3, :, ::2].T)
    assert torch.equal(block["mlp.experts.3.up_proj.weight"], gate_up[3, :, 1::2].T)
    down = floats["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(block["mlp.experts.5.down_proj.weight"], down[5].T)
    assert opened(tmp_path).manifest.blocks


def test_mxfp4_by_hand():
    packed = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    packed[0, 0, 0, 0] = 0x9 << 4 | 0x7  # low half first: 6, then -0.5
    values = mxfp4_rows(0, slice(None), packed, torch.tensor([[[128]]], dtype=torch.uint8))
    assert values[0, :3].tolist() == [12.0, -1.0, 0.0]


def test_other_stored_quantizations_stay_refused(tmp_path):
    make_variation(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(UnsupportedModel, match="quantiz"):
        opened(tmp_path)
