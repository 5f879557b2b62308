"""What quantization and wire codecs cost in quality: perplexity of the real Gemma 3 270M on a public-domain text.

    python tests/bench/quality.py [--tokens N] [--threads N] [--part wire|blocks|kv|all] [--json]

The text is tests/data/devils-dictionary.txt, one window from its start, each token predicted from all before it.
transformers runs on the same dequantized weights, so its fp32 row is the reference for KL and top-1 agreement. "exact
head" means fp32 logits, so that only the blocks differ; a bf16 server's head has 8 bits, as in the row that says so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/helpers

from helpers.gemma import transformers_gemma
from swarmnode.kernels.engine import DTYPES, load_embedding, load_head, load_span
from swarmnode.kernels.head import Head
from swarmnode.kernels.kvcache import KVPool
from swarmnode.kernels.loading.checkpoint import Checkpoint, open_checkpoint
from swarmnode.kernels.span import Piece, Span
from swarmnode.kernels.tokenizer import Tokenizer
from swarmnode.protocol.tensors import Codec

TEXT = Path(__file__).parents[1] / "data" / "devils-dictionary.txt"
CUTS = frozenset({6, 12})
CHUNK = 256
"""Rows of logits at a time: 262,144 columns in fp32 are 1 MiB a row."""


@dataclass(frozen=True)
class Row:
    """One way to run the model."""

    name: str
    perplexity: float
    change: float
    """Against transformers in fp32."""
    divergence: float
    """Mean KL from its distributions."""
    agreement: float
    """Share of tokens with the same likeliest one."""


class Scores:
    """Compares hidden states' logits with the reference's, chunk by chunk."""

    def __init__(self, ids: torch.Tensor, reference: torch.Tensor, head: Head) -> None:
        self._ids = ids
        self._head = head
        parts = torch.split(reference[: len(ids) - 1], CHUNK)
        self._wanted = [torch.log_softmax(head.logits(part), -1) for part in parts]  # 1 MiB a token
        self._base = self._row("", reference, head, 1.0).perplexity

    def row(self, name: str, hidden: torch.Tensor, head: Head | None = None) -> Row:
        return self._row(name, hidden, head or self._head, self._base)

    def _row(self, name: str, hidden: torch.Tensor, head: Head, base: float) -> Row:
        loss = divergence = agreement = 0.0
        count = len(self._ids) - 1
        for first in range(0, count, CHUNK):
            part = slice(first, min(first + CHUNK, count))
            found = torch.log_softmax(head.logits(hidden[part]), -1)
            wanted = self._wanted[first // CHUNK]
            targets = self._ids[part.start + 1 : part.stop + 1, None]
            loss -= float(found.gather(1, targets).double().sum())
            divergence += float((wanted.exp() * (wanted - found)).double().sum())
            agreement += float((found.argmax(-1) == wanted.argmax(-1)).sum())
        perplexity = math.exp(loss / count)
        return Row(name, perplexity, perplexity / base - 1, divergence / count, agreement / count)


def ours(
    checkpoint: Checkpoint,
    span: Span,
    ids: torch.Tensor,
    codec: Codec | None = None,
    kv: torch.dtype | None = None,
) -> torch.Tensor:
    """Hidden states after the last block, in prefills of CHUNK rows; keys and values stored in `kv`."""
    config = checkpoint.config
    embedded = load_embedding(checkpoint, dtype=span.dtype)(ids)
    lane = KVPool(1 << 31, config, 0, config.num_blocks, kv or span.dtype).open_lane()
    cuts, wire = (CUTS, codec) if codec is not None else (frozenset(), Codec.BF16)
    parts = []
    for first in range(0, len(ids), CHUNK):
        rows = embedded[first : first + CHUNK]
        parts.append(span.run(rows, [Piece(lane, first, len(rows), cuts, wire)]).float())
    lane.free()
    return torch.cat(parts)


def theirs(checkpoint: Checkpoint, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """transformers' hidden states before its final norm."""
    model = transformers_gemma(checkpoint, dtype)
    model.model.norm = torch.nn.Identity()
    with torch.inference_mode():
        return model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0].float()


def measure(checkpoint: Checkpoint, ids: torch.Tensor, part: str) -> Iterator[Row]:
    head, small_head = (load_head(checkpoint, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    reference = theirs(checkpoint, torch.float32, ids)
    scores = Scores(ids, reference, head)
    yield scores.row("transformers fp32", reference)
    yield scores.row("transformers bf16", theirs(checkpoint, torch.bfloat16, ids))
    if part in ("wire", "all"):
        yield from wire_rows(checkpoint, ids, scores)
    if part in ("blocks", "all"):
        yield from block_rows(checkpoint, ids, scores, small_head)
    if part in ("kv", "all"):
        yield from kv_rows(checkpoint, ids, scores)


def wire_rows(checkpoint: Checkpoint, ids: torch.Tensor, scores: Scores) -> Iterator[Row]:
    span = load_span(checkpoint, 0, checkpoint.config.num_blocks, dtype=torch.float32)
    yield scores.row("none, fp32", ours(checkpoint, span, ids))
    for codec in (Codec.FP32, Codec.BF16, Codec.INT8S):
        hidden = ours(checkpoint, span, ids, codec)
        yield scores.row(f"none, fp32, wire {codec.label} at {', '.join(map(str, sorted(CUTS)))}", hidden)


def block_rows(checkpoint: Checkpoint, ids: torch.Tensor, scores: Scores, small_head: Head) -> Iterator[Row]:
    for quant in ("none", "int8", "nf4", "llm-int8"):
        span = load_span(checkpoint, 0, checkpoint.config.num_blocks, dtype=torch.bfloat16, quant=quant)
        hidden = ours(checkpoint, span, ids)
        yield scores.row(f"{quant}, bf16, exact head", hidden)
        if quant == "int8":
            yield scores.row(f"{quant}, bf16, 8-bit head", hidden, small_head)


def kv_rows(checkpoint: Checkpoint, ids: torch.Tensor, scores: Scores) -> Iterator[Row]:
    for name, dtype in DTYPES.items():
        span = load_span(checkpoint, 0, checkpoint.config.num_blocks, dtype=dtype)
        for kv, stored in ((name, dtype), ("int8", torch.int8)):
            yield scores.row(f"none, {name}, exact head, keys and values {kv}", ours(checkpoint, span, ids, kv=stored))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2_400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=("wire", "blocks", "kv", "all"), default="all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint("gemma3-270m", cache_dir=Path(tempfile.gettempdir()) / "swarmnode-test-cache")
    ids = torch.tensor(Tokenizer(checkpoint.tokenizer).encode(TEXT.read_text())[: options.tokens])
    print(f"{len(ids) - 1} tokens scored", file=sys.stderr)
    if not options.json:
        print("| blocks | perplexity | change | KL | same top 1 |\n|---|---|---|---|---|")
    for row in measure(checkpoint, ids, options.part):
        if options.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        print(
            f"| {row.name} | {row.perplexity:.2f} | {row.change:+.1%} | {row.divergence:.1e} | {row.agreement:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
