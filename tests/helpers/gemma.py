"""transformers on the Gemma 3 weights our loader dequantizes: the oracle, without its slow GGUF path."""

from __future__ import annotations

import torch


def transformers_gemma(checkpoint, dtype: torch.dtype):
    """Gemma3ForCausalLM with the checkpoint's weights (checked bit-equal to transformers' own GGUF reading)."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = checkpoint.config
    kinds = ["full_attention" if config.window(i) is None else "sliding_attention" for i in range(config.num_blocks)]
    window = next(config.window(i) for i in range(config.num_blocks) if config.window(i) is not None)
    settings = Gemma3TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_blocks,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        query_pre_attn_scalar=round(config.query_scale**-2),
        max_position_embeddings=config.max_positions,
        sliding_window=window,
        layer_types=kinds,
        rms_norm_eps=config.norm_eps,
    )
    with torch.device("meta"):
        model = Gemma3ForCausalLM(settings)
    state = {"model.embed_tokens.weight": checkpoint.embedding(dtype)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.norm.weight"] = checkpoint.final_norm(dtype)["norm.weight"]
    for index in range(config.num_blocks):
        state |= {f"model.layers.{index}.{name}": tensor for name, tensor in checkpoint.block(index, dtype).items()}
    model.load_state_dict(state, strict=True, assign=True)
    return _with_rope(model.eval(), settings)


def _with_rope(model, settings):
    """Non-persistent buffers were made on the meta device: make them again."""
    rotary = type(model.model.rotary_emb)(config=settings)
    model.model.rotary_emb = rotary
    scale = torch.tensor(settings.hidden_size**0.5)
    embedding = model.model.embed_tokens
    embedding.register_buffer("embed_scale", scale, persistent=False)
    return model
