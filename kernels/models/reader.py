"""Typed access to a config.json: absent and null mean the default, a wrong type is damage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from .bounds import as_mapping
from .config import ACTIVATIONS


class Reader:
    """A config mapping."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected a whole number")
        return value

    def first_integer(self, *keys: str) -> int:
        """The first of several spellings that is there."""
        return self.integer(next((key for key in keys if self.values.get(key) is not None), keys[0]))

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected a number")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.values.get(key)
        if not isinstance(value, list | tuple):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r:.60}, expected a list of numbers")
        return tuple(Reader({key: item}).number(key) for item in value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)

    def optional(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key)

    def softcap(self, key: str, default: float | None = None) -> float | None:
        """A positive number; null turns it off, absence means the default."""
        if key not in self.values:
            return default
        return None if self.values[key] is None else positive(key, self.number(key))

    def activation(self, *keys: str, default: str) -> str:
        name = next((self.values[key] for key in keys if self.values.get(key)), default)
        if name not in ACTIVATIONS:
            raise UnsupportedModel(f"activation {name!r} is not supported: {', '.join(ACTIVATIONS)} are")
        return ACTIVATIONS[name]

    def tokens(self, key: str, default: int | None = None) -> tuple[int, ...]:
        value = self.values.get(key, default)
        if value is None:
            return ()
        values = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in values):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected token ids")
        return tuple(values)

    def layer_types(self, count: int) -> tuple[bool, ...] | None:
        """True where a block is sliding; None where the config does not list its blocks."""
        value = self.values.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != count:
            raise CorruptCheckpoint(f"config.json: layer_types must list {count} blocks")
        for kind in value:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedModel(f"layer type {kind!r} is not supported: full_attention, sliding_attention are")
        return tuple(kind == "sliding_attention" for kind in value)


def optional_mapping(value: Any, name: str) -> Mapping[str, Any]:
    return {} if value is None else as_mapping(value, name)


def positive(name: str, value: float) -> float:
    if not value > 0:
        raise CorruptCheckpoint(f"config.json: {name} is {value!r}, expected a positive number")
    return value
