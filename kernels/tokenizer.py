"""Text <-> token ids, and token ids -> a stream of text. Torch-free: it also runs where there is no model.

A tokenizer.json may come from a stranger (with a manifest, by digest), so its size is bounded and whatever the library
says about it becomes our error. A stream holds back what may still change: bytes of an unfinished character, and text
that may turn out to be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tokenizers import Tokenizer as Backend

from ..protocol.errors import ConfigError, CorruptCheckpoint

MAX_JSON_BYTES: Final = 64 * 1024 * 1024
MAX_TEXT: Final = 16 * 1024 * 1024
"""Characters that are tokenized in one call."""
MAX_STOPS: Final = 16
MAX_STOP_LENGTH: Final = 1024
_REPLACEMENT: Final = "\ufffd"
_MAX_PENDING: Final = 8
"""Tokens that may wait for the rest of a character, which has at most 4 bytes: more are no character."""
_MAX_CONTEXT: Final = 16
"""Tokens decoded again in front of new ones, because decoders treat the first token of a text specially."""


class Tokenizer:
    """A model's tokenizer. Raises CorruptCheckpoint when the JSON is no tokenizer."""

    def __init__(self, json_bytes: bytes) -> None:
        if len(json_bytes) > MAX_JSON_BYTES:
            raise CorruptCheckpoint(f"tokenizer.json of {len(json_bytes)} bytes: at most {MAX_JSON_BYTES} are allowed")
        try:
            self._backend = Backend.from_buffer(json_bytes)
        except ValueError as exc:
            raise CorruptCheckpoint(f"tokenizer.json cannot be used: {exc}") from exc
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def vocab_size(self) -> int:
        """Ids are below this, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The ids of a text; with `add_special`, between the model's own begin and end tokens.

        A rendered chat template holds its special tokens as text already: encode it with add_special=False.
        """
        if len(text) > MAX_TEXT:
            raise ConfigError(f"text of {len(text)} characters: at most {MAX_TEXT} can be tokenized at once")
        return self._backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids. Ids outside the vocabulary give nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling, special ones too."""
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The spelling of a token."""
        return self._backend.id_to_token(token_id)

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether every token has the same id in both."""
        return self._backend.get_vocab(True) == other._backend.get_vocab(True)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step of a stream adds to the text."""

    text: str
    """New characters; empty while they are held back."""
    stopped: bool = False
    """A stop string was completed: the text ends before it."""


class TextStream:
    """Token ids in, pieces of text out: whole characters only, and nothing of a stop string.

    All pieces joined equal the decoding of all ids, cut before the first stop string. Raises ConfigError on bad stops.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), stops: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        if len(self._stops) > MAX_STOPS:
            raise ConfigError(f"{len(self._stops)} stop strings: at most {MAX_STOPS} are allowed")
        if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in self._stops):
            raise ConfigError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters")
        self._context = _context(tokenizer, prompt_ids)
        self._context_text = tokenizer.decode(self._context)
        self._pending: list[int] = []
        self._held = ""
        self._stopped = False

    def push(self, token_id: int) -> Piece:
        """Add a token; once stopped, every piece is empty and stopped."""
        if self._stopped:
            return Piece("", stopped=True)
        self._pending.append(token_id)
        return self._release(self._decoded(final=False), final=False)

    def finish(self) -> Piece:
        """The end of the ids: what was held back, unfinished bytes as the decoder shows them."""
        if self._stopped:
            return Piece("", stopped=True)
        return self._release(self._decoded(final=True), final=True)

    def _decoded(self, *, final: bool) -> str:
        """The characters of the pending tokens, decoded behind their context; none while one is unfinished.

        The context always begins at a whole character: byte tokens decode as a run, and a run cut inside a
        character is all replacement characters.
        """
        text = self._tokenizer.decode([*self._context, *self._pending])
        if text.endswith(_REPLACEMENT) and not final and len(self._pending) < _MAX_PENDING:
            return ""
        if text.startswith(self._context_text):
            added = text[len(self._context_text) :]
        else:  # broken bytes made the decoder change its mind about what is out already
            added = self._tokenizer.decode(self._pending)
        if not added and len(self._context) + len(self._pending) <= _MAX_CONTEXT:
            self._context += self._pending  # special tokens show nothing, so they are no context alone
        else:
            self._context = self._pending
        self._context_text = self._tokenizer.decode(self._context)
        self._pending = []
        return added

    def _release(self, added: str, *, final: bool) -> Piece:
        self._held += added
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._stopped = True
            text, self._held = self._held[: min(found)[0]], ""
            return Piece(text, stopped=True)
        keep = 0 if final else self._possible_stop()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return Piece(text)

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


def _context(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """The shortest end of the prompt that shows whole characters."""
    for length in range(1, min(_MAX_CONTEXT, len(prompt_ids)) + 1):
        tail = list(prompt_ids[-length:])
        text = tokenizer.decode(tail)
        if text and not text.startswith(_REPLACEMENT):
            return tail
    return []
