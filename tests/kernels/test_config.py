"""Configs of several dialects end in one resolved form; strangers' configs are bounded."""

import json
import math
from dataclasses import replace

import pytest
from swarmnode.kernels.models.bounds import MAX_BLOCKS, MAX_EOS, MAX_EXPERTS, MAX_JSON_BYTES
from swarmnode.kernels.models.canonical import LATER
from swarmnode.kernels.models.config import ExpertsConfig, ForeignConfig, ModelConfig
from swarmnode.kernels.probe import probe_configs
from swarmnode.protocol.errors import CorruptCheckpoint, UnsupportedModel

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 100,
    "num_attention_heads": 4,
}
GROUPED = {**LLAMA, "num_key_value_heads": 4}
GEMMA3 = {
    **LLAMA,
    "model_type": "gemma3_text",
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 16,
}


def test_llama_defaults_are_filled_in():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.family, config.num_kv_heads, config.head_dim) == ("llama", 4, 16)
    assert config.query_scale == 0.25
    assert config.rope.theta == 10_000
    assert config.window(0) is None


def test_gemma3_pattern_ropes_and_tied_head():
    config = ModelConfig.from_hf({**GEMMA3, "num_hidden_layers": 7})
    assert [config.window(block) for block in range(7)] == [16] * 5 + [None, 16]
    assert config.rope_of(5).theta == 1_000_000
    assert config.rope_of(6).theta == 10_000
    assert (config.tied_head, config.norm_offset, config.embed_scale) == (True, 1.0, 8.0)
    assert config.eos_token_ids == (1,)


def test_gemma3_with_vision_reads_its_text_part():
    config = ModelConfig.from_hf(
        {
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34},
        }
    )
    assert (config.hidden_size, config.vocab_size, config.eos_token_ids) == (2560, 262_208, (1, 106))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_generations_of_rope_keys(key):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = {"rope_theta": 500_000.0}
    extra = {key: scaling, **theta} if key == "rope_scaling" else {key: {**scaling, **theta}}
    rope = ModelConfig.from_hf({**LLAMA, **extra}).rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_positions) == ("llama3", 500_000.0, 8.0, 8192)


def test_yarn_attention_factor_is_resolved():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    rope = ModelConfig.from_hf({**LLAMA, "rope_scaling": yarn}).rope
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    given = ModelConfig.from_hf({**LLAMA, "rope_scaling": {**yarn, "attention_factor": 1.5}}).rope
    assert given.attention_factor == 1.5


def test_windows_of_the_llama_variations():
    mistral = ModelConfig.from_hf({**GROUPED, "model_type": "mistral", "sliding_window": 8})
    assert mistral.sliding_blocks == (True, True)
    assert ModelConfig.from_hf({**GROUPED, "model_type": "mistral", "sliding_window": None}).sliding_window is None
    qwen = {**GROUPED, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}
    assert ModelConfig.from_hf(qwen).sliding_window is None
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True}).sliding_blocks == (False, True)


def test_biases_and_norms_of_the_qwens():
    qwen2 = ModelConfig.from_hf({**GROUPED, "model_type": "qwen2"})
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = ModelConfig.from_hf({**GROUPED, "model_type": "qwen3"})
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


@pytest.mark.parametrize("source", [LLAMA, GEMMA3, {**GROUPED, "model_type": "mistral", "sliding_window": 8}])
def test_json_round_trip_is_canonical(source):
    config = ModelConfig.from_hf(source)
    data = config.to_json()
    assert ModelConfig.from_json(data) == config
    assert ModelConfig.from_json(data).to_json() == data


def test_unknown_family_names_the_supported_ones():
    with pytest.raises(UnsupportedModel, match=r"'gpt2'.*gemma3.*llama.*mistral"):
        ModelConfig.from_hf({**LLAMA, "model_type": "gpt2"})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_hidden_layers": MAX_BLOCKS + 1}, CorruptCheckpoint),
        ({"num_hidden_layers": "two"}, CorruptCheckpoint),
        ({"hidden_size": None}, CorruptCheckpoint),
        ({"num_attention_heads": 0}, CorruptCheckpoint),
        ({"num_key_value_heads": 3}, CorruptCheckpoint),
        ({"head_dim": 7}, CorruptCheckpoint),
        ({"eos_token_id": list(range(MAX_EOS + 1))}, CorruptCheckpoint),
        ({"rms_norm_eps": math.nan}, CorruptCheckpoint),
        ({"hidden_act": "relu2"}, UnsupportedModel),
        ({"rope_scaling": {"rope_type": "proportional"}}, UnsupportedModel),
        ({"rope_scaling": {"rope_type": "longrope"}}, CorruptCheckpoint),
        ({"rope_scaling": [1]}, CorruptCheckpoint),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, UnsupportedModel),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 3, "sliding_window": 8,
          "use_sliding_window": True}, CorruptCheckpoint),
    ],
)  # fmt: skip
def test_damaged_configs_are_refused(change, error):
    with pytest.raises(error):
        ModelConfig.from_hf({**LLAMA, **change})


def test_json_from_strangers_is_checked():
    good = json.loads(ModelConfig.from_hf(GEMMA3).to_json())
    for change in (
        {"num_blocks": 10**9},
        {"vocab_size": True},
        {"rope": 3},
        {"sliding_blocks": [1]},
        {"extra": 1},
    ):
        with pytest.raises(CorruptCheckpoint):
            ModelConfig.from_json(json.dumps({**good, **change}).encode())
    with pytest.raises(CorruptCheckpoint, match="lacks"):
        ModelConfig.from_json(b"{}")
    for junk in (b"", b"[]", b"\xff", b"[" * 60_000, b" " * (MAX_JSON_BYTES + 1)):
        with pytest.raises(CorruptCheckpoint):
            ModelConfig.from_json(junk)


@pytest.mark.parametrize(
    "model_type",
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen2_moe",
     "qwen3_moe", "gpt_oss", "falcon", "bloom", "gpt_neox", "stablelm", "starcoder2"],
)  # fmt: skip
def test_absent_keys_mean_what_they_mean_to_transformers(model_type):
    from transformers import AutoConfig

    sizes = {"hidden_size": 256, "num_attention_heads": 32, "vocab_size": 60_000}
    given = {**sizes, "num_hidden_layers": 3, "intermediate_size": 96}
    if model_type == "bloom":
        given = {**sizes, "n_layer": 3, "n_head": 32, "num_attention_heads": 32}
    full = AutoConfig.for_model(model_type, **given).to_dict()
    assert ModelConfig.from_hf({"model_type": model_type, **given}) == ModelConfig.from_hf(full)


def test_forms_of_the_falcons():
    falcon = {**LLAMA, "model_type": "falcon", "num_attention_heads": 4}
    seven = ModelConfig.from_hf(falcon)
    assert (seven.residual, seven.num_kv_heads, seven.gated, seven.norm) == ("shared", 1, False, "layer")
    forty = ModelConfig.from_hf({**falcon, "new_decoder_architecture": True, "num_kv_heads": 2})
    assert (forty.residual, forty.num_kv_heads, forty.rotated) == ("parallel", 2, 16)
    rw = ModelConfig.from_hf({**falcon, "alibi": True, "multi_query": False, "parallel_attn": False})
    assert (rw.residual, rw.num_kv_heads, rw.rotated, rw.alibi) == ("sequential", 4, 0, "falcon")
    with pytest.raises(UnsupportedModel, match="new decoder architecture"):
        ModelConfig.from_hf({**falcon, "new_decoder_architecture": True, "parallel_attn": False})


def test_longrope_takes_the_factors_of_the_models_context():
    scaling = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    phi = {**LLAMA, "model_type": "phi3", "rope_scaling": scaling, "original_max_position_embeddings": 4096}
    long = ModelConfig.from_hf({**phi, "max_position_embeddings": 131_072}).rope
    assert (long.kind, long.factors) == ("longrope", (4.0,) * 8)
    assert long.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert ModelConfig.from_hf({**phi, "max_position_embeddings": 4096}).rope.factors == (1.0,) * 8
    with pytest.raises(CorruptCheckpoint, match="8 rope factors for 12"):
        ModelConfig.from_hf({**phi, "partial_rotary_factor": 0.75})


def test_experts_are_bounded_and_dense_blocks_known():
    moe = {**GROUPED, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2,
           "num_key_value_heads": 4, "num_hidden_layers": 4, "mlp_only_layers": [3]}  # fmt: skip
    config = ModelConfig.from_hf(moe)
    assert [config.experts_of(block) is None for block in range(4)] == [True, False, True, True]
    assert config.block_parameters() == 4 * 64 * 64 + 64 * (3 * 8 * 768 + 8)
    assert ModelConfig.from_json(config.to_json()) == config
    for change in ({"num_experts": MAX_EXPERTS + 1}, {"decoder_sparse_step": 0}, {"moe_intermediate_size": -1}):
        with pytest.raises(CorruptCheckpoint):
            ModelConfig.from_hf({**moe, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"residual": "parallel", "post_norms": True},
        {"norm": "layer", "norm_offset": 1.0},
        {"norm": "group"},
        {"alibi": "relative"},
        {"rotary_dim": 3},
        {"rotary_dim": 64},
        {"score_softcap": 0.0},
        {"gated": False, "experts": ExpertsConfig(count=2, active=1, intermediate_size=8)},
    ],
)
def test_forms_that_no_block_has_are_refused(change):
    with pytest.raises((CorruptCheckpoint, UnsupportedModel)):
        replace(ModelConfig.from_hf(LLAMA), **change)


def test_a_config_written_by_the_first_version_is_read_and_keeps_its_bytes():
    """The bytes are part of a model's identity: another version must neither refuse nor change them."""
    written = (
        b'{"activation":"gelu_tanh","bos_token_id":2,"embed_scale":25.25,"eos_token_ids":[1],"family":"gemma3",'
        b'"final_softcap":null,"head_dim":256,"hidden_size":640,"intermediate_size":2048,"local_rope":{"attention_factor":1.0,'
        b'"beta_fast":32.0,"beta_slow":1.0,"factor":1.0,"high_freq_factor":4.0,"kind":"default","low_freq_factor":1.0,'
        b'"original_positions":0,"theta":10000.0,"truncate":true},"max_positions":32768,"mlp_bias":false,"norm_eps":1e-06,'
        b'"norm_offset":0.0,"num_blocks":2,"num_heads":4,"num_kv_heads":1,"output_bias":false,"post_norms":true,"qk_norm":true,'
        b'"qkv_bias":false,"query_scale":0.0625,"rope":{"attention_factor":1.0,"beta_fast":32.0,"beta_slow":1.0,"factor":1.0,'
        b'"high_freq_factor":4.0,"kind":"default","low_freq_factor":1.0,"original_positions":0,"theta":1000000.0,'
        b'"truncate":true},"sliding_blocks":[true,false],"sliding_window":512,"tied_head":true,"vocab_size":262144}'
    )
    config = ModelConfig.from_json(written)
    assert config.to_json() == written
    assert (config.norm, config.experts, config.gated) == ("rms", None, True)


def test_what_a_later_version_added_is_written_only_where_it_applies():
    config = ModelConfig.from_hf(LLAMA)
    assert not set(json.loads(config.to_json())) & LATER
    assert json.loads(replace(config, norm="layer").to_json())["norm"] == "layer"
    assert ModelConfig.from_json(replace(config, norm="layer").to_json()).norm == "layer"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "residuals after the norm"),
        ({"model_type": "stablelm", "num_key_value_heads": 4, "qk_layernorm": True}, "layer norms on heads"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_variants_that_we_would_compute_wrongly_are_named(change, words):
    with pytest.raises(UnsupportedModel, match=words):
        ModelConfig.from_hf({**LLAMA, **change})


def test_smollm3_knows_no_positions_in_every_fourth_block():
    config = ModelConfig.from_hf({**LLAMA, "model_type": "smollm3", "num_hidden_layers": 36})
    assert config.unrotated_blocks == tuple(range(3, 36, 4))
    assert ModelConfig.from_json(config.to_json()) == config
    assert probe_configs(config)  # made of single blocks
    with pytest.raises(CorruptCheckpoint, match="lists 3 of 2 blocks"):
        ModelConfig.from_hf({**LLAMA, "model_type": "smollm3", "no_rope_layers": [1, 0, 1]})
    with pytest.raises(CorruptCheckpoint, match="unrotated blocks: at most 1024"):
        replace(config, unrotated_blocks=(0,) * (MAX_BLOCKS + 1))


def test_granite_has_four_scales():
    scales = {"attention_multiplier": 0.1, "embedding_multiplier": 12, "residual_multiplier": 0.2, "logits_scaling": 8}
    config = ModelConfig.from_hf({**LLAMA, "model_type": "granite", **scales})
    assert (config.query_scale, config.embed_scale, config.residual_scale, config.logit_scale) == (0.1, 12, 0.2, 0.125)
    with pytest.raises(CorruptCheckpoint, match="logits_scaling"):
        ModelConfig.from_hf({**LLAMA, "model_type": "granite", "logits_scaling": 0})


def test_only_a_foreign_model_has_foreign_settings():
    config = ModelConfig.from_hf(LLAMA)
    foreign = ForeignConfig(settings="{}", block_weights=5)
    known = replace(config, family="hf", foreign=foreign)
    assert ModelConfig.from_json(known.to_json()) == known
    assert known.block_parameters() == 5
    for wrong in ({"family": "hf"}, {"foreign": foreign}):
        with pytest.raises(CorruptCheckpoint, match="has the settings of transformers"):
            replace(config, **wrong)
    with pytest.raises(CorruptCheckpoint, match="block_weights"):
        ForeignConfig(settings="{}", block_weights=0)
