"""Families that are not ours, run by transformers' own layers: slower, not row-exact, but right.

Sessions, lanes, cache books, cuts and ends are those of all models; only what a block computes is foreign. Pieces of a
pass run one after another, because masks and positions are transformers' business and it knows one sequence at a time.
So rows depend on how a sequence was cut into passes, in the last bits, and the compute class is one of its own (`hf`).

Between embedding and block 0 some models add positions, scale or project. That belongs to block 0 here, and the
embedding end is the bare table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch

from ..protocol.errors import ConfigError, LocalProtocolError, UnsupportedModel
from . import codecs
from .fallback_skeleton import Arrived, Flow, Skeleton
from .fallback_weights import Loader
from .head import Embedding, Head
from .kvcache import KVPool
from .loading.foreign import ForeignFolder
from .memory import give_back_memory, loading_memory
from .span import Piece, Span, lossless

QUANT: Final = "hf"
"""What is announced where others announce a quantization."""
PASS_ROWS: Final = 256
"""Rows that go through the layers at once: eager attention holds heads x rows x context scores."""
HEAD_ROWS: Final = 128
_CHECK_ROWS: Final = 3
_CHECK_BYTES: Final = 1 << 40
_SAME: Final = 0.2
"""How far a row's change may be off, for rounding; a row that sees later ones is off by more."""

Progress = Callable[[int, int], None]


class _Through(Flow):
    """One sequence through blocks [start, end)."""

    def __init__(self, span: FallbackSpan, piece: Piece, rows: torch.Tensor, start: int, end: int) -> None:
        self.tuples = span.tuples
        self._dtype = span.dtype
        self._piece = piece
        self._rows = rows
        self._start = start
        self._end = end

    def at(self, index: int, layer: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
        if index < self._start:
            return self.pack(hidden)
        if index == self._start and index > 0:
            hidden = self._rows.unsqueeze(0)
        elif index > self._start and index in self._piece.cuts and not lossless(self._piece.codec, self._dtype):
            hidden = codecs.round_trip(hidden[0], self._piece.codec).unsqueeze(0)
        out = layer(hidden.to(self._dtype))
        hidden = (out[0] if isinstance(out, tuple) else out).to(self._dtype)
        if index == self._end - 1:
            raise Arrived(hidden[0])
        return self.pack(hidden)


class _IntoHead(Flow):
    """No layer runs; after the last one come these rows."""

    def __init__(self, tuples: bool, last: int, rows: torch.Tensor) -> None:
        self.tuples = tuples
        self._last = last
        self._rows = rows

    def at(self, index: int, layer: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
        return self.pack(self._rows.unsqueeze(0) if index == self._last else hidden)


class _Entering(Flow):
    """Stops before layer 0."""

    def at(self, index: int, layer: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
        raise Arrived(hidden[0])


class FallbackSpan(Span):
    """Blocks [start, end) of a foreign model. Made by `load_fallback_span`."""

    def __init__(self, folder: ForeignFolder, skeleton: Skeleton, start: int, end: int, dtype: torch.dtype) -> None:
        super().__init__(folder.config, start, (), dtype=dtype, quant=QUANT, device=skeleton.device)
        self.end = end
        self.tuples = skeleton.tuples
        self._skeleton = skeleton
        self._layers = list(skeleton.layers)[start:end]

    @property
    def size_bytes(self) -> int:
        """Memory of the weights."""
        return sum(weight.nbytes for layer in self._layers for weight in layer.parameters())

    def _run(self, hidden: torch.Tensor, pieces: Sequence[Piece], start: int, end: int) -> torch.Tensor:
        rows = hidden.to(device=self.device, dtype=self.dtype)
        found, first = [], 0
        for piece in pieces:
            for begin in range(0, piece.count, PASS_ROWS):
                count = min(PASS_ROWS, piece.count - begin)
                part = rows[first + begin : first + begin + count]
                found.append(self._run_piece(piece, part, piece.position + begin, start, end))
            first += piece.count
            piece.cache.length = piece.position + piece.count
        return torch.cat(found)

    def _run_piece(self, piece: Piece, rows: torch.Tensor, position: int, start: int, end: int) -> torch.Tensor:
        from .fallback_cache import lane_cache

        config = self.config
        if position + rows.shape[0] > config.max_positions:
            raise LocalProtocolError(f"position {position} is past the model's {config.max_positions}")
        caches = piece.cache.blocks[start - piece.cache.start : end - piece.cache.start]
        cache = lane_cache(config.num_blocks, start, caches, position, config.num_kv_heads, config.head_dim)
        try:
            self._skeleton.run(rows, position, cache, _Through(self, piece, rows, start, end))
        except Arrived as arrived:
            return arrived.hidden
        raise LocalProtocolError(f"transformers did not come to block {end - 1}")

    def check(self) -> None:
        """Run a few rows through every block, so that a model that cannot be run fails here and not in a session.

        Raises UnsupportedModel.
        """
        pool = KVPool(_CHECK_BYTES, self.config, self.start, self.end, self.dtype, self.device)
        lane = pool.open_lane()
        rows = torch.linspace(-1, 1, _CHECK_ROWS * self.config.hidden_size).view(_CHECK_ROWS, -1)
        with self._skeleton.guarded("cannot be run"):
            self.run(rows[:2], [Piece(lane, 0, 2)])
            self.run(rows[2:], [Piece(lane, 2, 1)])
            self._check_borders(pool, rows)
            several = self._first_row(pool, rows)
            alone = self._first_row(pool, rows[:1])
        change = (alone - rows[:1].to(alone)).norm()
        if not (several - alone).norm() <= _SAME * change:
            raise UnsupportedModel(
                f"model family {self._skeleton.name!r}: a token depends on those after it, so it generates no text"
            )

    def _check_borders(self, pool: KVPool, rows: torch.Tensor) -> None:
        """Raise UnsupportedModel where more than hidden states goes from block to block."""
        lane, count = pool.open_lane(), rows.shape[0]
        whole = self.run(rows, [Piece(lane, 0, count)])
        for index in range(self.start, self.end):
            part = pool.open_lane(index, index + 1)
            rows = self.run(rows, [Piece(part, 0, count)], index, index + 1)
        if not torch.isfinite(whole).all():
            raise UnsupportedModel(f"model family {self._skeleton.name!r} gives no finite numbers")
        if not (rows - whole).norm() <= _SAME * whole.norm():
            raise UnsupportedModel(
                f"model family {self._skeleton.name!r} hands more than hidden states from layer to layer"
            )

    def _first_row(self, pool: KVPool, rows: torch.Tensor) -> torch.Tensor:
        """The first row after the span's first block."""
        lane = pool.open_lane()
        return self.run(rows, [Piece(lane, 0, rows.shape[0])], self.start, self.start + 1)[:1].float()


class FallbackEmbedding(Embedding):
    """Token ids -> rows of the bare table."""

    def __init__(self, skeleton: Skeleton, dtype: torch.dtype) -> None:
        self._module = skeleton.model.get_input_embeddings()
        self._dtype = dtype
        self._device = skeleton.device

    @property
    def size_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._module.parameters())

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            rows: torch.Tensor = self._module(ids.to(self._device))
            return rows.to(self._dtype)


class FallbackHead(Head):
    """Everything after the last block: final norm, LM head, scales and caps."""

    def __init__(self, skeleton: Skeleton, dtype: torch.dtype) -> None:
        self._skeleton = skeleton
        self._dtype = dtype
        self._hidden_size = skeleton.hidden_size

    @property
    def size_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._skeleton.model.get_output_embeddings().parameters())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dim() != 2 or hidden.shape[1] != self._hidden_size:
            raise LocalProtocolError(f"hidden states {tuple(hidden.shape)} are not [rows, {self._hidden_size}]")
        skeleton, last = self._skeleton, len(self._skeleton.layers) - 1
        with torch.inference_mode():
            rows = hidden.to(device=skeleton.device, dtype=self._dtype)
            parts = [
                skeleton.run_head(part, _IntoHead(skeleton.tuples, last, part)).float()
                for part in torch.split(rows, HEAD_ROWS)
            ]
            return torch.cat(parts)


def load_fallback_span(
    checkpoint: object,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    quant: str,
    device: torch.device,
    progress: Progress | None,
) -> Span:
    """What engine.load_span does for a foreign model. Raises ConfigError, CorruptCheckpoint, UnsupportedModel."""
    folder = _folder(checkpoint)
    if quant != "none":
        raise ConfigError(
            f"--quant {quant} is not supported for {folder.name}: transformers' own layers run it: leave it out"
        )
    skeleton, loader = _skeleton(folder, dtype, device)
    with loading_memory():
        _load_around(skeleton, loader, folder, with_embedding=False, with_head=False)
        for index in range(start, end):
            loader.load(folder.stored(folder.block_names(index)))
            loader.finish(partial(_is_below, f"{skeleton.path}.{index}"))
            give_back_memory()
            if progress is not None:
                progress(index - start + 1, end - start)
    span = FallbackSpan(folder, skeleton, start, end, dtype)
    span.check()
    return span


def load_fallback_embedding(checkpoint: object, *, dtype: torch.dtype, device: torch.device) -> Embedding:
    """What engine.load_embedding does for a foreign model."""
    folder = _folder(checkpoint)
    skeleton, loader = _skeleton(folder, dtype, device)
    _load_around(skeleton, loader, folder, with_embedding=True, with_head=False)
    embedding = FallbackEmbedding(skeleton, dtype)
    _check_entrance(skeleton, embedding)
    return embedding


def load_fallback_head(checkpoint: object, *, dtype: torch.dtype, device: torch.device) -> Head:
    """What engine.load_head does for a foreign model."""
    folder = _folder(checkpoint)
    skeleton, loader = _skeleton(folder, dtype, device)
    _load_around(skeleton, loader, folder, with_embedding=False, with_head=True)
    return FallbackHead(skeleton, dtype)


def _folder(checkpoint: object) -> ForeignFolder:
    if not isinstance(checkpoint, ForeignFolder):
        raise ConfigError("a model of this family is served from a folder in Hugging Face layout")
    return checkpoint


def _skeleton(folder: ForeignFolder, dtype: torch.dtype, device: torch.device) -> tuple[Skeleton, Loader]:
    skeleton = Skeleton(folder.settings, device)
    return skeleton, Loader(skeleton, str(folder.path), dtype, device)


def _load_around(
    skeleton: Skeleton, loader: Loader, folder: ForeignFolder, *, with_embedding: bool, with_head: bool
) -> None:
    """Load what lies outside the blocks: all of it is small but for the two tables."""
    tied = folder.config.tied_head and (with_embedding or with_head)
    tables = {skeleton.embedding_path: with_embedding or tied, skeleton.head_path: with_head or tied}
    left_out = [path.rpartition(".")[2] for path, wanted in tables.items() if not wanted]
    loader.load(folder.stored(name for name in folder.others if name.split(".")[-2:-1][0] not in left_out))
    if tied:
        loader.tie()
    excluded = [skeleton.path, *(path for path, wanted in tables.items() if not wanted)]
    loader.finish(lambda path: not any(_is_below(root, path) for root in excluded))


def _is_below(root: str, path: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def _check_entrance(skeleton: Skeleton, embedding: Embedding) -> None:
    """Raise UnsupportedModel unless tokens enter block 0 as rows of the table alone."""
    ids = torch.arange(_CHECK_ROWS, device=skeleton.device)
    rows = embedding(ids)
    entered = []
    with skeleton.guarded("cannot be run"), torch.inference_mode():
        for run in (partial(skeleton.run_ids, ids), partial(skeleton.run, rows, 0, None)):
            try:
                run(_Entering())
            except Arrived as arrived:
                entered.append(arrived.hidden.float())
    if len(entered) < 2 or not torch.allclose(entered[0], entered[1], rtol=1e-2, atol=1e-3):
        raise UnsupportedModel(f"model family {skeleton.name!r} makes more of tokens than rows of a table")
