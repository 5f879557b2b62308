"""From a checkpoint to something that computes: spans, embedding and head, quantized block by block while loading.

Only one block's tensors are in memory unquantized at a time, and what they took is given back before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Protocol

import torch

from ..protocol.errors import ConfigError, CorruptCheckpoint
from .blocks import Block
from .head import Embedding, FloatTable, Head, Q8Table
from .linear import Linear, held_dtype, make_linear, multiplies_bf16
from .memory import give_back_memory, loading_memory
from .models.config import ModelConfig
from .parts import MakeLinear, make_norm
from .span import Span
from .weight import Weight

Progress = Callable[[int, int], None]
"""Called with (blocks loaded, blocks in all) after every block."""

QUANTS: Final = ("none", "int8", "nf4", "llm-int8")
"""Ways to hold the weights of blocks."""
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Compute dtypes by the names users type."""
INT8_PARAMETERS: Final = 3_000_000_000
"""Below this many parameters 4 bits cost too much quality (NF4 on Gemma 3 270M: +25 % perplexity, int8 +0.4 %)."""


class Source(Protocol):
    """What the engine asks of a checkpoint (loading.checkpoint.Checkpoint has more)."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def head_kind(self) -> str: ...
    def block(self, index: int, dtype: torch.dtype) -> Mapping[str, torch.Tensor]: ...
    def embedding(self, dtype: torch.dtype) -> torch.Tensor: ...
    def head(self, dtype: torch.dtype) -> Mapping[str, torch.Tensor]: ...
    def embedding_norm(self, dtype: torch.dtype) -> Mapping[str, torch.Tensor]: ...
    def final_norm(self, dtype: torch.dtype) -> Mapping[str, torch.Tensor]: ...
    def head_q8(self) -> tuple[torch.Tensor, torch.Tensor]: ...


def default_quant(config: ModelConfig, blocks: int, free_bytes: int) -> str:
    """How to hold `blocks` blocks where nothing was asked for: bf16 if it fits, else int8 or, for big models, nf4.

    Where bf16 is not multiplied natively, bitsandbytes unpacks a whole 4-bit matrix for every product (18 times slower
    than int8): there nf4 is only for what does not fit otherwise.
    """
    if config.foreign is not None or span_bytes(config, blocks, torch.bfloat16, "none") <= free_bytes:
        return "none"
    if config.parameters() < INT8_PARAMETERS:
        return "int8"
    slow = not multiplies_bf16() and span_bytes(config, blocks, torch.bfloat16, "int8") <= free_bytes
    return "int8" if slow else "nf4"


def span_bytes(config: ModelConfig, blocks: int, dtype: torch.dtype, quant: str) -> int:
    """Estimated memory of so many blocks' weights on this CPU: what placement asks before it loads."""
    bits = {"none": held_dtype(dtype).itemsize * 8.0, "int8": 8.1, "nf4": 4.5, "llm-int8": 8.1}[_known(quant)]
    return int(blocks * config.block_parameters() * bits / 8)


def load_span(
    checkpoint: Source,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    quant: str = "none",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Span:
    """Load blocks [start, end). Raises ConfigError, CorruptCheckpoint, UnsupportedModel."""
    config, device = checkpoint.config, torch.device(device)
    if not 0 <= start < end <= config.num_blocks:
        raise ConfigError(f"the model has {config.num_blocks} blocks: use a span within 0:{config.num_blocks}, or auto")
    if config.foreign is not None:
        from .fallback import load_fallback_span

        return load_fallback_span(checkpoint, start, end, dtype=dtype, quant=quant, device=device, progress=progress)
    make = _maker(quant, dtype, device)
    # Quantizing starts from the stored values, not from a bf16 rounding of them.
    read_dtype = dtype if quant == "none" else torch.float32
    blocks: list[Block] = []
    with torch.inference_mode(), loading_memory():
        for index in range(start, end):
            blocks.append(Block(config, index, checkpoint.block(index, read_dtype), make, device))
            give_back_memory()
            if progress is not None:
                progress(index - start + 1, end - start)
    return Span(config, start, blocks, dtype=dtype, quant=quant, device=device)


def load_embedding(checkpoint: Source, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Embedding:
    """The embedding matrix, in 8 bits where the checkpoint stores it together with the head as Q8_0."""
    config, device = checkpoint.config, torch.device(device)
    if config.foreign is not None:
        from .fallback import load_fallback_embedding

        return load_fallback_embedding(checkpoint, dtype=dtype, device=device)
    if config.tied_head and checkpoint.head_kind == "q8_0":
        values, scales = checkpoint.head_q8()
        _check_shape("embedding", values, config)
        return Embedding(Q8Table(values.to(device), scales.to(device)), config.embed_scale, dtype, device)
    weight = checkpoint.embedding(dtype)
    _check_shape("embedding", weight, config)
    norm = make_norm(config, checkpoint.embedding_norm(torch.float32), "norm", device) if config.embed_norm else None
    return Embedding(FloatTable(weight.to(device)), config.embed_scale, dtype, device, norm)


def load_head(checkpoint: Source, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Head:
    """Final norm and LM head; 8 bits where the checkpoint stores 8 and compute is not fp32."""
    config, device = checkpoint.config, torch.device(device)
    if config.foreign is not None:
        from .fallback import load_fallback_head

        return load_fallback_head(checkpoint, dtype=dtype, device=device)
    with torch.inference_mode(), loading_memory():
        norm = make_norm(config, checkpoint.final_norm(torch.float32), "norm", device)
        linear = _head_linear(checkpoint, dtype, device)
        return Head(norm, linear, config.hidden_size, config.final_softcap, config.logit_scale)


def _head_linear(checkpoint: Source, dtype: torch.dtype, device: torch.device) -> Linear:
    if checkpoint.head_kind == "q8_0" and dtype is not torch.float32:
        from .quant.int8 import make_int8_from_q8

        values, scales = checkpoint.head_q8()
        _check_shape("head", values, checkpoint.config)
        return make_int8_from_q8(values, scales, device)
    weight = checkpoint.head(dtype)["lm_head.weight"]
    _check_shape("head", weight, checkpoint.config)
    return make_linear(Weight.of(weight), None, dtype, device)


def _check_shape(name: str, weight: torch.Tensor, config: ModelConfig) -> None:
    if tuple(weight.shape) != (config.vocab_size, config.hidden_size):
        raise CorruptCheckpoint(
            f"the {name} has shape {tuple(weight.shape)}, its config says {(config.vocab_size, config.hidden_size)}"
        )


def _maker(quant: str, dtype: torch.dtype, device: torch.device) -> MakeLinear:
    match _known(quant):
        case "int8":
            from .quant.int8 import make_int8

            return partial(make_int8, device=device)
        case "nf4":
            from .quant.nf4 import make_nf4

            return partial(make_nf4, device=device)
        case "llm-int8":
            from .quant.llm_int8 import make_llm_int8

            return partial(make_llm_int8, device=device)
    return partial(make_linear, dtype=dtype, device=device)


def _known(quant: str) -> str:
    if quant not in QUANTS:
        raise ConfigError(f"unknown quantization {quant!r}: use {', '.join(QUANTS)}")
    return quant
