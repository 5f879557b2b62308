"""How large the numbers of a model may be: a config may come from a stranger, and bounds come before allocation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel

# Far above any model of these families, far below what hurts a host.
MAX_BLOCKS: Final = 1_024
MAX_HIDDEN: Final = 65_536
MAX_INTERMEDIATE: Final = 524_288
MAX_VOCAB: Final = 2_097_152
MAX_HEADS: Final = 1_024
MAX_HEAD_DIM: Final = 1_024
MAX_EXPERTS: Final = 1_024
MAX_POSITIONS: Final = 33_554_432
MAX_EOS: Final = 64
MAX_JSON_BYTES: Final = 64 * 1024
MAX_BLOCK_WEIGHTS: Final = 1 << 40


def as_mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CorruptCheckpoint(f"{name} is not a mapping")
    return value


def check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CorruptCheckpoint(f"model config: {name} is {value!r}, expected {low} to {high}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UnsupportedModel(f"{name} {value!r} is not supported: {', '.join(choices)} are")


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise CorruptCheckpoint(f"model config: {name} is {value!r}, expected {low:g} to {high:g}")
