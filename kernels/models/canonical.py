"""A config as canonical JSON and back: it is hashed into the model's identity, and it comes from strangers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Final

from ...protocol.errors import CorruptCheckpoint
from .bounds import as_mapping
from .components import ExpertsConfig, ForeignConfig, RopeConfig

_PARTS: Final[Mapping[str, type[Any]]] = {kind.__name__: kind for kind in (RopeConfig, ExpertsConfig, ForeignConfig)}
LATER: Final = frozenset(
    [
        "alibi",
        "embed_norm",
        "experts",
        "factors",
        "foreign",
        "gated",
        "logit_scale",
        "norm",
        "residual",
        "residual_scale",
        "rotary_dim",
        "score_softcap",
        "sinks",
        "swiglu_alpha",
        "swiglu_limit",
        "unrotated_blocks",
    ]
)
"""Fields that the first models' configs did not have; every field added from now on belongs here, with a default."""


def typed(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check JSON values against the dataclass: known names only, and the JSON type of each field."""
    names = {item.name for item in fields(cls)}
    if unknown := set(values) - names:
        raise CorruptCheckpoint(f"model config has unknown fields: {', '.join(sorted(map(str, unknown)))[:200]}")
    if missing := {item.name for item in fields(cls) if item.name not in values and item.default is MISSING}:
        raise CorruptCheckpoint(f"model config lacks {', '.join(sorted(missing))}")
    return {
        item.name: _field(item.name, str(item.type), values[item.name]) for item in fields(cls) if item.name in values
    }


def plain(config: Any) -> dict[str, object]:
    """The fields as JSON values, without those of LATER that are at their defaults."""
    found: dict[str, object] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in LATER and value == item.default:
            continue
        found[item.name] = plain(value) if type(value) in _PARTS.values() else value
    return found


def _field(name: str, kind: str, value: Any) -> Any:
    if value is None and kind.endswith("| None"):
        return None
    match kind.removesuffix(" | None"):
        case "str" if isinstance(value, str):
            return value
        case "bool" if isinstance(value, bool):
            return value
        case "int" if isinstance(value, int) and not isinstance(value, bool):
            return value
        case "float" if _is_number(value):
            return float(value)
        case part if part in _PARTS:
            return _PARTS[part](**typed(_PARTS[part], as_mapping(value, name)))
        case "tuple[float, ...]" if isinstance(value, list) and all(_is_number(item) for item in value):
            return tuple(float(item) for item in value)
        case "tuple[bool, ...]" if isinstance(value, list) and all(isinstance(item, bool) for item in value):
            return tuple(value)
        case "tuple[int, ...]" if isinstance(value, list) and all(type(item) is int for item in value):
            return tuple(value)
    raise CorruptCheckpoint(f"model config: {name} is {value!r:.60}, expected {kind}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
