"""Rotary embeddings from Hugging Face configs: 4.x `rope_scaling` and `rope_theta`, 5.x `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from .bounds import as_mapping
from .components import ROPE_KINDS, RopeConfig
from .reader import Reader, optional_mapping


def rope_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one rotation of a family: 4.x `rope_scaling` or 5.x `rope_parameters`, flat or by layer type."""
    found = optional_mapping(values.get("rope_scaling") or values.get("rope_parameters"), "rope_parameters")
    for key in ("full_attention", "sliding_attention"):
        if isinstance(found.get(key), Mapping):
            return as_mapping(found[key], key)
    return found


def rotary_share(reader: Reader, default: float = 1.0, key: str = "partial_rotary_factor") -> float:
    """The part of a head that is rotated."""
    share = Reader(rope_values(reader.values)).number("partial_rotary_factor", reader.number(key, default))
    if not 0 < share <= 1:
        raise CorruptCheckpoint(f"config.json: partial_rotary_factor is {share!r}, expected a part of 1")
    return share


def read_rope(
    values: Mapping[str, Any],
    default_theta: float,
    max_positions: int,
    *,
    partial: bool = False,
    original_positions: int | None = None,
) -> RopeConfig:
    """A rotation from its mapping; `partial`: the family knows heads that are rotated in part."""
    reader = Reader(values)
    kind = values.get("rope_type") or values.get("type") or "default"
    if not partial and reader.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("partial rotary embedding is not supported in this family: full rotary is")
    kind = "longrope" if kind == "su" else kind
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported: {', '.join(ROPE_KINDS)} are")
    theta = reader.number("rope_theta", default_theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    original = reader.integer("original_max_position_embeddings", original_positions or max_positions)
    if kind == "longrope":
        return _longrope(reader, theta, original, max_positions)
    if kind == "dynamic":  # transformers measures growth against max_position_embeddings here
        original = max_positions
    factor = reader.number("factor", max_positions / max(original, 1) if kind == "yarn" else 1.0)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_positions=0 if kind == "linear" else original,
        low_freq_factor=reader.number("low_freq_factor", 1.0),
        high_freq_factor=reader.number("high_freq_factor", 4.0),
        beta_fast=reader.number("beta_fast", 32.0) or 32.0,
        beta_slow=reader.number("beta_slow", 1.0) or 1.0,
        truncate=reader.flag("truncate", True),
        attention_factor=_yarn_attention_factor(reader, factor) if kind == "yarn" else 1.0,
    )


def _longrope(reader: Reader, theta: float, original: int, max_positions: int) -> RopeConfig:
    """LongRoPE (arXiv 2402.13753) has one list of factors for short and one for long texts.

    transformers changes from one to the other when a text outgrows the pretrained context, which would turn every
    cached key wrong. A key must have one rotation, so a model made for long texts always uses the long list.
    """
    growth = max_positions / max(original, 1)
    factor = reader.number("factor", growth)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    return RopeConfig(
        theta=theta,
        kind="longrope",
        factor=factor,
        original_positions=original,
        attention_factor=reader.number("attention_factor", attention),
        factors=reader.numbers("long_factor" if growth > 1 else "short_factor"),
    )


def _yarn_attention_factor(reader: Reader, factor: float) -> float:
    """YaRN's temperature on the scores (arXiv 2309.00071 section 3.4), in the spellings checkpoints use."""
    if reader.values.get("attention_factor") is not None:
        return reader.number("attention_factor")

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    mscale, mscale_all = reader.number("mscale", 0.0), reader.number("mscale_all_dim", 0.0)
    return magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
