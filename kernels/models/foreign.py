"""Configs of families that are not ours: what transformers makes of a config.json, in the few numbers we need.

The settings themselves are kept as they stand in the file, so a model's identity does not change with transformers.
What code or which kernels to run is never taken from a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from ...protocol.errors import UnsupportedModel
from .bounds import MAX_BLOCKS, MAX_HEADS, check_int
from .components import ForeignConfig, RopeConfig
from .config import ModelConfig
from .reader import Reader

if TYPE_CHECKING:
    from ..fallback_skeleton import Skeleton

DROPPED: Final = frozenset(
    [
        *("architectures", "attn_implementation", "auto_map", "dtype", "experts_implementation", "fusion_config"),
        *("kernel_config", "name_or_path", "output_attentions", "output_hidden_states", "return_dict", "torch_dtype"),
        *("torchscript", "transformers_version", "use_cache", "use_kernels"),
    ]
)
"""Keys of config.json that do not describe the architecture; so are those with a leading underscore."""
MAX_SETTINGS: Final = 48 * 1024
"""Of such a config.json: it travels in a manifest, which has room for 64 KiB of config."""
_NO_LIMIT: Final = 32_768
"""Longest context of a model that names none."""


def settings_of(values: Mapping[str, Any]) -> str:
    """Canonical JSON of a config.json. Raises UnsupportedModel."""
    if isinstance(values.get("text_config"), Mapping):
        raise UnsupportedModel(
            f"model family {values.get('model_type')!r} is more than text: give a text-only checkpoint"
        )
    kept = {key: value for key, value in values.items() if key not in DROPPED and not key.startswith("_")}
    settings = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    if len(settings) > MAX_SETTINGS:
        raise UnsupportedModel(
            f"config.json has {len(settings)} characters of settings: at most {MAX_SETTINGS} are allowed"
        )
    return settings


def read_foreign(settings: str, skeleton: Skeleton, block_weights: int) -> ModelConfig:
    """The config of a model that transformers runs. Raises UnsupportedModel, CorruptCheckpoint."""
    config = skeleton.config
    reader = Reader({name: getattr(config, name, None) for name in _NAMES} | {"tie": _tied(skeleton)})
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    check_int("num_attention_heads", heads, 1, MAX_HEADS)
    check_int("num_hidden_layers", reader.integer("num_hidden_layers"), 1, MAX_BLOCKS)
    return ModelConfig(
        family="hf",
        num_blocks=len(skeleton.layers),
        hidden_size=hidden,
        intermediate_size=1,
        vocab_size=reader.integer("vocab_size"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=2,
        norm_eps=0.0,
        max_positions=reader.integer("max_position_embeddings", reader.optional("max_seq_len") or _NO_LIMIT),
        rope=RopeConfig(theta=10_000.0),
        query_scale=1.0,
        tied_head=reader.flag("tie", False),
        foreign=ForeignConfig(settings=settings, block_weights=block_weights),
        bos_token_id=reader.optional("bos_token_id"),
        eos_token_ids=reader.tokens("eos_token_id"),
    )


def with_cache(config: ModelConfig, skeleton: Skeleton) -> ModelConfig:
    """The same with the heads that its layers cache: known on servers only, and not part of the identity."""
    heads, width = skeleton.cached
    return replace(config, num_heads=heads, num_kv_heads=heads, head_dim=width + width % 2)


_NAMES: Final = (
    *("bos_token_id", "eos_token_id", "hidden_size", "max_position_embeddings", "max_seq_len"),
    *("num_attention_heads", "num_hidden_layers", "vocab_size"),
)


def _tied(skeleton: Skeleton) -> bool:
    return bool(getattr(skeleton.config, "tie_word_embeddings", False))
