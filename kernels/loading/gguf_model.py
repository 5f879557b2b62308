"""What a GGUF file says about its model, in Hugging Face's terms: config, tensor names and numeric conventions.

Three conventions of llama.cpp's converters are undone here, so that one engine serves both formats: `llama` files
hold query and key rows in interleaved rotary order, Gemma's norm weights are stored plus one, and Llama 3's stretched
rotary frequencies are a tensor instead of four parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from ..models.config import ModelConfig
from .gguf_families import ARCHITECTURES, Architecture, Key
from .gguf_file import GgufFile, Value

EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
OUTPUT_NORM: Final = "output_norm"
"""A stem: it may have a bias."""
ROPE_FREQUENCIES: Final = "rope_freqs.weight"
LONG_FACTORS: Final = "rope_factors_long.weight"
SHORT_FACTORS: Final = "rope_factors_short.weight"

_LLAMA3_LOW: Final = 1.0
_LLAMA3_HIGH: Final = 4.0
_LLAMA3_ORIGINAL: Final = 8192


def model_config(file: GgufFile) -> ModelConfig:
    """The file's model config. Raises UnsupportedModel, CorruptCheckpoint."""
    return ModelConfig.from_hf(hf_config(file))


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The file's metadata as the config.json its model had."""
    metadata = file.metadata
    name = str(metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: GGUF architecture {name!r} is not supported: {', '.join(ARCHITECTURES)} are"
        )
    if isinstance(shards := metadata.get("split.count", 1), int) and shards > 1:
        raise UnsupportedModel(f"{file.path}: is one of {shards} parts: join them with llama-gguf-split --merge")

    def key(what: str) -> Value | None:
        return metadata.get(f"{name}.{what}")

    config = _common(file, ARCHITECTURES[name].model_type, key)
    config |= ARCHITECTURES[name].more(key, config, file.tensors)
    _add_rope_scaling(config, file, name)
    return config


def architecture_of(file: GgufFile) -> Architecture:
    """What a file's architecture means, once hf_config has accepted it."""
    return ARCHITECTURES[str(file.metadata["general.architecture"])]


def _common(file: GgufFile, model_type: str, key: Key) -> dict[str, Any]:
    metadata = file.metadata
    if EMBEDDING not in file.tensors or len(file.tensors[EMBEDDING].shape) != 2:
        raise CorruptCheckpoint(f"{file.path}: has no matrix {EMBEDDING}: it is no text model, or a damaged one")
    heads = key("attention.head_count")
    return {
        "model_type": model_type,
        "num_hidden_layers": key("block_count"),
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _same_everywhere(file, key("attention.head_count_kv"), heads),
        "head_dim": key("attention.key_length"),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base"),
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "tie_word_embeddings": OUTPUT not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }


def _same_everywhere(file: GgufFile, value: Value | None, default: Value | None) -> Value | None:
    """A number that some files give block by block."""
    if value is None:
        return default
    if isinstance(value, np.ndarray):
        if len(set(value.tolist())) != 1:
            raise UnsupportedModel(f"{file.path}: blocks with different numbers of heads are not supported")
        return int(value[0])
    return value


def _end_tokens(metadata: Mapping[str, Value]) -> list[Value] | None:
    """End of text, and end of turn where the file knows one."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = dict.fromkeys(metadata[key] for key in keys if isinstance(metadata.get(key), int))
    return list(ids) or None


def _add_rope_scaling(config: dict[str, Any], file: GgufFile, architecture: str) -> None:
    prefix = f"{architecture}.rope.scaling."
    kind = file.metadata.get(prefix + "type")
    if kind is None and prefix + "factor" in file.metadata:
        kind = "linear"
    if kind not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": kind,
            "factor": file.metadata.get(prefix + "factor", 1.0),
            "original_max_position_embeddings": file.metadata.get(prefix + "original_context_length"),
        }
    if LONG_FACTORS in file.tensors and SHORT_FACTORS in file.tensors:
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "long_factor": _floats(file, LONG_FACTORS),
            "short_factor": _floats(file, SHORT_FACTORS),
            "attention_factor": file.metadata.get(prefix + "attn_factor"),
        }
    if ROPE_FREQUENCIES in file.tensors:
        config["rope_scaling"] = _llama3_scaling(file, config)


def _llama3_scaling(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Recover Llama 3's four parameters from its table of frequency divisors, and check that they explain it."""
    unknown = UnsupportedModel(f"{file.path}: {ROPE_FREQUENCIES} is not the rotary scaling of Llama 3.1")
    if file.tensors[ROPE_FREQUENCIES].kind != "F32":
        raise unknown
    stored = np.frombuffer(file.raw(ROPE_FREQUENCIES), "<f4").astype(np.float64)
    theta = float(config["rope_theta"] or 10_000.0)
    factor = float(stored.max(initial=1.0))
    wavelengths = 2 * np.pi * theta ** (np.arange(len(stored)) / max(len(stored), 1))
    smooth = (_LLAMA3_ORIGINAL / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected[wavelengths < _LLAMA3_ORIGINAL / _LLAMA3_HIGH] = 1
    expected[wavelengths > _LLAMA3_ORIGINAL / _LLAMA3_LOW] = factor
    if not np.allclose(stored, expected, rtol=1e-3):
        raise unknown
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
    }


def to_hf(tensor: torch.Tensor, name: str, file: GgufFile, config: ModelConfig) -> torch.Tensor:
    """Undo llama.cpp's numeric conventions on a tensor named as in a Hugging Face checkpoint."""
    architecture = architecture_of(file)
    if architecture.norms_plus_one and name.endswith("norm.weight"):
        return tensor - 1
    if architecture.paired:
        if name.startswith("self_attn.q_proj."):
            return _half_rotary(tensor, config.num_heads)
        if name.startswith("self_attn.k_proj."):
            return _half_rotary(tensor, config.num_kv_heads)
    return tensor


def _floats(file: GgufFile, name: str) -> list[float]:
    if file.tensors[name].kind != "F32":
        raise UnsupportedModel(f"{file.path}: {name} is stored as {file.tensors[name].kind}: F32 is supported")
    return [float(value) for value in np.frombuffer(file.raw(name), "<f4")]


def _half_rotary(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from pairs side by side to all first halves, then all second halves."""
    paired = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return paired.transpose(1, 2).reshape(tensor.shape)
