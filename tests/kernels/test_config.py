"""Configs of several dialects end in one resolved form; strangers' configs are bounded."""

import json
import math

import pytest
from swarmnode.kernels.models.config import MAX_BLOCKS, MAX_EOS, MAX_JSON_BYTES, ModelConfig
from swarmnode.protocol.errors import CorruptCheckpoint, UnsupportedModel

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 100,
    "num_attention_heads": 4,
}
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
    mistral = ModelConfig.from_hf({**LLAMA, "model_type": "mistral", "sliding_window": 8})
    assert mistral.sliding_blocks == (True, True)
    assert ModelConfig.from_hf({**LLAMA, "model_type": "mistral", "sliding_window": None}).sliding_window is None
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}
    assert ModelConfig.from_hf(qwen).sliding_window is None
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True}).sliding_blocks == (False, True)


def test_biases_and_norms_of_the_qwens():
    qwen2 = ModelConfig.from_hf({**LLAMA, "model_type": "qwen2"})
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = ModelConfig.from_hf({**LLAMA, "model_type": "qwen3"})
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)


@pytest.mark.parametrize("source", [LLAMA, GEMMA3, {**LLAMA, "model_type": "mistral", "sliding_window": 8}])
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
