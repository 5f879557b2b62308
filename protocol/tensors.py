"""Wire form of hidden states: named, versioned, deterministic codecs and their exact sizes. Torch-free.

A codec turns `rows` hidden-state rows of width `hidden` into exactly `payload_size()` bytes, so a receiver can
check a frame against its header before it allocates anything. The arithmetic lives in kernels/codecs.py; the
layouts and why int8s is what it is: docs/spec/tensors.md.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum
from typing import Final

from .errors import ConfigError

BLOCK: Final = 64
"""Values that share one scale in int8s."""
OUTLIERS: Final = 4
"""Largest values of a row that int8s carries exactly."""


class Codec(IntEnum):
    """Codec ids as they stand in frame headers. Never renumber: a changed layout gets a new id."""

    FP32 = 0
    BF16 = 1
    INT8S = 3

    @property
    def label(self) -> str:
        """The name users type: `--wire int8s`."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> Codec:
        """Parse a user's codec name. Raises ConfigError naming the choices."""
        for codec in cls:
            if codec.label == label:
                return codec
        choices = ", ".join(codec.label for codec in cls)
        raise ConfigError(f"unknown wire codec {label!r}: use auto, {choices}")


def payload_size(codec: Codec, rows: int, hidden: int) -> int:
    """Exact bytes of `rows` rows of `hidden` values.

    Rows stand one after another and each is complete in itself, so a log of rows can be cut, joined and replayed
    in other pieces without decoding it. An int8s row is: `hidden` int8 values, one bf16 scale per block of 64,
    4 outlier indices (u16), 4 outlier values (fp32), little endian, in this order.
    """
    match codec:
        case Codec.FP32:
            return rows * hidden * 4
        case Codec.BF16:
            return rows * hidden * 2
        case Codec.INT8S:
            return rows * (hidden + 2 * -(-hidden // BLOCK) + OUTLIERS * (2 + 4))


def codec_at(border: int, codec: Codec, cuts: Collection[int]) -> Codec:
    """What hidden states travel in at a block border: the session's codec at its cuts, lossless anywhere else.

    A repair may split a span where the session has no cut; encoding there would change tokens.
    """
    return codec if border in cuts else Codec.FP32
