"""Configs of the families with layer norms: Falcon, BLOOM, GPT-NeoX, StableLM, StarCoder 2."""

from __future__ import annotations

from typing import Any

from ...protocol.errors import UnsupportedModel
from .bounds import MAX_BLOCKS, MAX_HEADS, check_int
from .config import ModelConfig, RopeConfig
from .reader import Reader
from .ropes import read_rope, rope_values, rotary_share

_UNROTATED = RopeConfig(theta=10_000.0)


def read_falcon(reader: Reader) -> ModelConfig:
    """Falcon: multi-query or grouped heads, ALiBi in the RW models, attention beside the MLP in the others."""
    grouped, parallel = reader.flag("new_decoder_architecture", False), reader.flag("parallel_attn", True)
    if grouped and not parallel:
        raise UnsupportedModel("Falcon's new decoder architecture without parallel attention is not supported")
    heads, alibi = reader.first_integer("num_attention_heads", "n_head"), reader.flag("alibi", False)
    hidden, bias = reader.first_integer("hidden_size", "n_embed"), reader.flag("bias", False)
    if grouped:
        kv_heads = reader.integer("num_kv_heads", reader.integer("n_head_kv", heads))
        residual = "parallel" if reader.integer("num_ln_in_parallel_attn", 2) == 2 else "shared"
    else:
        kv_heads = 1 if reader.flag("multi_query", True) else heads
        residual = "shared" if parallel else "sequential"
    max_positions = reader.integer("max_position_embeddings", 2048)
    return _layer_normed(
        reader,
        "falcon",
        num_blocks=reader.first_integer("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        intermediate_size=reader.integer("ffn_hidden_size", 4 * hidden),
        num_heads=heads,
        num_kv_heads=kv_heads,
        max_positions=max_positions,
        rope=_UNROTATED if alibi else _rope(reader, max_positions),
        rotary_dim=0 if alibi else None,
        alibi="falcon" if alibi else "none",
        residual=residual,
        activation=reader.activation("activation", default="gelu"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied_head=reader.flag("tie_word_embeddings", True),
    )


def read_bloom(reader: Reader) -> ModelConfig:
    """BLOOM: ALiBi, a norm after the embedding, biases everywhere."""
    if reader.flag("apply_residual_connection_post_layernorm", False):
        raise UnsupportedModel("BLOOM with residuals after the norm is not supported: no published model has them")
    hidden = reader.first_integer("hidden_size", "n_embed")
    return _layer_normed(
        reader,
        "bloom",
        num_blocks=reader.first_integer("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_heads=reader.first_integer("num_attention_heads", "n_head"),
        max_positions=reader.integer("seq_length", 2048),
        rope=_UNROTATED,
        rotary_dim=0,
        alibi="bloom",
        embed_norm=True,
        activation="gelu_tanh",
        tied_head=reader.flag("tie_word_embeddings", True),
    )


def read_neox(reader: Reader) -> ModelConfig:
    """GPT-NeoX and Pythia: rotation of a part of each head, attention beside the MLP, biases."""
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    check_int("num_attention_heads", heads, 1, MAX_HEADS)
    max_positions = reader.integer("max_position_embeddings", 2048)
    bias = reader.flag("attention_bias", True)
    return _layer_normed(
        reader,
        "gpt_neox",
        num_blocks=reader.integer("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 24_576),
        num_heads=heads,
        norm_eps=reader.number("layer_norm_eps", 1e-5),
        max_positions=max_positions,
        rope=_rope(reader, max_positions, reader.number("rotary_emb_base", 10_000.0)),
        rotary_dim=int(hidden // heads * rotary_share(reader, 0.25, "rotary_pct")),
        residual="parallel" if reader.flag("use_parallel_residual", True) else "sequential",
        activation=reader.activation("hidden_act", default="gelu"),
        qkv_bias=bias,
        output_bias=bias,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def read_stablelm(reader: Reader) -> ModelConfig:
    """StableLM: Llama with layer norms, and heads rotated in part."""
    if reader.flag("qk_layernorm", False):
        raise UnsupportedModel("StableLM with layer norms on heads (StableLM 2 12B) is not supported")
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    check_int("num_attention_heads", heads, 1, MAX_HEADS)
    max_positions = reader.integer("max_position_embeddings", 4096)
    return _layer_normed(
        reader,
        "stablelm",
        num_blocks=reader.integer("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 6912),
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", heads),
        norm_eps=reader.number("layer_norm_eps", 1e-5),
        max_positions=max_positions,
        rope=_rope(reader, max_positions),
        rotary_dim=int(hidden // heads * rotary_share(reader, 0.25)),
        residual="shared" if reader.flag("use_parallel_residual", False) else "sequential",
        gated=True,
        activation=reader.activation("hidden_act", default="silu"),
        qkv_bias=reader.flag("use_qkv_bias", False),
        output_bias=False,
        mlp_bias=False,
        tied_head=reader.flag("tie_word_embeddings", False),
    )


def read_starcoder2(reader: Reader) -> ModelConfig:
    """StarCoder 2: layer norms, a plain MLP, grouped heads, a sliding window everywhere or nowhere."""
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    blocks, window = reader.integer("num_hidden_layers"), reader.optional("sliding_window")
    check_int("num_hidden_layers", blocks, 1, MAX_BLOCKS)
    max_positions, bias = reader.integer("max_position_embeddings", 4096), reader.flag("use_bias", True)
    return _layer_normed(
        reader,
        "starcoder2",
        num_blocks=blocks,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 12_288),
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", heads),
        norm_eps=reader.number("norm_epsilon", 1e-5),
        max_positions=max_positions,
        rope=read_rope(rope_values(reader.values), reader.number("rope_theta", 10_000.0), max_positions),
        sliding_window=window,
        sliding_blocks=() if window is None else (True,) * blocks,
        activation=reader.activation("hidden_act", default="gelu_pytorch_tanh"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied_head=reader.flag("tie_word_embeddings", True),
    )


def _rope(reader: Reader, max_positions: int, theta: float = 10_000.0) -> RopeConfig:
    theta = reader.number("rope_theta", theta)
    return read_rope(rope_values(reader.values), theta, max_positions, partial=True)


def _layer_normed(reader: Reader, family: str, **more: Any) -> ModelConfig:
    heads = more["num_heads"]
    check_int("num_attention_heads", heads, 1, MAX_HEADS)
    head_dim = more["hidden_size"] // heads
    values = {
        "family": family,
        "vocab_size": reader.integer("vocab_size"),
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "norm": "layer",
        "norm_eps": reader.number("layer_norm_epsilon", 1e-5),
        "query_scale": max(head_dim, 1) ** -0.5,
        "gated": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "bos_token_id": reader.optional("bos_token_id"),
        "eos_token_ids": reader.tokens("eos_token_id"),
    } | more
    return ModelConfig(**values)
