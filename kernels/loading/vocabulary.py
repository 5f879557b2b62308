"""A GGUF file's vocabulary as a tokenizer.json, so that one library tokenizes for every checkpoint format.

A GGUF stores tokens, scores or merges, and token types; normalizer, splitting and decoding are implied by the name of
the scheme. The ids must equal Hugging Face's for the same model. SentencePiece vocabularies carry no merges: a BPE
merge exists for every way to cut a token into two others, better tokens first. Gemma needs two fixes: its scores do
not follow its merge order (token ids do), and runs of spaces are stored as spaces where the scheme spells them U+2581.

The JSON is written here, not by the tokenizers library: it is hashed into the model digest, so equal files must give
equal bytes whatever the version of the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from .gguf_file import Value

CONTROL: Final = 3
USER_DEFINED: Final = 4
SPACE: Final = "\u2581"
MAX_MERGED: Final = 256
"""Longest token, in characters, that is cut into merges: cutting is quadratic in hostile vocabularies otherwise."""

_PREFIX: Final = "tokenizer.ggml."
TABLES: Final = tuple(_PREFIX + name for name in ("tokens", "scores", "token_type", "merges"))
"""The metadata that is only needed to make tokenizer.json."""
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3: Final = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES: Final = ("llama3", "llama-v3", "llama-bpe", "smaug-bpe", "falcon3")
_QWEN2_NAMES: Final = ("qwen2", "deepseek-r1-qwen")
SPLITS: Final[Mapping[str, str | None]] = {
    **dict.fromkeys(("default", "gpt-2"), None),
    **dict.fromkeys(_LLAMA3_NAMES, _LLAMA3),
    **dict.fromkeys(_QWEN2_NAMES, _QWEN2),
    "tekken": _TEKKEN,
}
"""tokenizer.ggml.pre -> how byte-level BPE cuts text into words; None is GPT-2's own way."""

Json = dict[str, Any]


def tokenizer_json(metadata: Mapping[str, Value], path: Path) -> bytes | None:
    """The file's tokenizer as tokenizer.json bytes; None when it has no vocabulary.

    Raises UnsupportedModel on a scheme we cannot express, CorruptCheckpoint on inconsistent tables.
    """
    scheme = metadata.get(_PREFIX + "model")
    if scheme in (None, "none", "no_vocab"):
        return None
    vocabulary = _Vocabulary(metadata, path)
    if scheme == "gpt2":
        parts = _byte_level(vocabulary)
    elif scheme == "llama" and str(metadata.get("general.architecture")).startswith("gemma"):
        parts = _gemma(vocabulary)
    elif scheme == "llama":
        parts = _sentencepiece(vocabulary)
    else:
        raise UnsupportedModel(f"{path}: tokenizer {scheme!r} is not supported: llama (SentencePiece) and gpt2 are")
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(parts["model"]["vocab"]),
        **parts,
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


class _Vocabulary:
    """The tables of one file, checked against each other."""

    def __init__(self, metadata: Mapping[str, Value], path: Path) -> None:
        self._metadata = metadata
        self.path = path
        self.tokens: Sequence[str] = self._strings("tokens", required=True)
        self.types = self._numbers("token_type")
        self.scores = self._numbers("scores")
        self.merges = self._strings("merges", required=False)

    def string(self, name: str, default: str) -> str:
        value = self._metadata.get(_PREFIX + name, default)
        return value if isinstance(value, str) else default

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._metadata.get(_PREFIX + name, default))

    def special(self, name: str) -> tuple[int, str] | None:
        """(id, content) of a token the metadata names by id."""
        index = self._metadata.get(f"{_PREFIX}{name}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.tokens):
            raise CorruptCheckpoint(f"{self.path}: {name}_token_id {index!r:.40} is no token of the vocabulary")
        return index, self.tokens[index]

    def added_tokens(self, spelled: Mapping[str, int]) -> list[Json]:
        """Tokens matched whole in the text, before anything else: those the scheme did not respell."""
        return [
            {
                **{"id": index, "content": self.tokens[index], "single_word": False, "lstrip": False},
                **{"rstrip": False, "normalized": False, "special": int(self.types[index]) == CONTROL},
            }
            for index in np.flatnonzero(np.isin(self.types, (CONTROL, USER_DEFINED))).tolist()
            if self.tokens[index] in spelled
        ]

    def implied_merges(self, tokens: Sequence[str], ranks: Sequence[float]) -> list[tuple[str, str]]:
        """Every way to cut a token into two others: lower rank first, then the longer left part."""
        known = {token: index for index, token in enumerate(tokens)}
        found = []
        for token, rank in zip(tokens, ranks, strict=True):
            if len(token) > MAX_MERGED:
                continue
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in known and right in known:
                    found.append((rank, -cut, cut - len(token), known[token], known[left], left, right))
        found.sort()
        return [item[-2:] for item in found]

    def split_merges(self) -> list[tuple[str, str]]:
        """The file's own merges, 'left right' each."""
        pairs = [merge.split(" ") for merge in self.merges]
        if any(len(pair) != 2 for pair in pairs):
            raise CorruptCheckpoint(f"{self.path}: a merge of the vocabulary is no pair")
        return [(left, right) for left, right in pairs]

    def template(self, add_bos: bool) -> Json | None:
        """The post-processor that puts BOS before and EOS behind a text."""
        bos = self.special("bos") if self.flag("add_bos_token", add_bos) else None
        eos = self.special("eos") if self.flag("add_eos_token", False) else None
        specials = [special for special in (bos, eos) if special is not None]

        def around(sequence: str, kind: int) -> list[Json]:
            first = [{"SpecialToken": {"id": bos[1], "type_id": kind}}] if bos else []
            last = [{"SpecialToken": {"id": eos[1], "type_id": kind}}] if eos else []
            return [*first, {"Sequence": {"id": sequence, "type_id": kind}}, *last]

        return {
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": [*around("A", 0), *around("B", 1)],
            "special_tokens": {
                content: {"id": content, "ids": [index], "tokens": [content]} for index, content in specials
            },
        }

    def _strings(self, name: str, *, required: bool) -> list[str]:
        value = self._metadata.get(_PREFIX + name)
        if value is None and not required:
            return []
        if not isinstance(value, list) or not value:
            raise CorruptCheckpoint(f"{self.path}: {_PREFIX}{name} is no list of strings")
        return value

    def _numbers(self, name: str) -> np.ndarray[Any, Any]:
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            return np.zeros(len(self.tokens))
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise CorruptCheckpoint(f"{self.path}: {_PREFIX}{name} does not fit {len(self.tokens)} tokens")
        return value


def _model(tokens: Sequence[str], merges: Sequence[tuple[str, str]], **options: Any) -> Json:
    return {
        **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
        **{"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
        **options,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    }


def _gemma(vocabulary: _Vocabulary) -> Json:
    """SentencePiece BPE without a space before the text; words keep the space behind them."""
    spelled = [SPACE * len(t) if " " in t and not t.strip() else t for t in vocabulary.tokens]
    unknown = vocabulary.special("unknown")
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            **{"type": "Split", "pattern": {"String": " "}},
            **{"behavior": "MergedWithPrevious", "invert": False},
        },
        "post_processor": vocabulary.template(add_bos=True),
        "decoder": _spaces_decoder(strip=False),
        "model": _model(
            spelled,
            vocabulary.implied_merges(spelled, range(len(spelled))),
            unk_token=unknown[1] if unknown else None,
        ),
    }


def _sentencepiece(vocabulary: _Vocabulary) -> Json:
    """Llama's and Mistral's SentencePiece BPE."""
    prefix = vocabulary.flag("add_space_prefix", True)
    merges = vocabulary.split_merges() or vocabulary.implied_merges(
        vocabulary.tokens, (-vocabulary.scores.astype(np.float64)).tolist()
    )
    scheme = "first" if prefix else "never"
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "post_processor": vocabulary.template(add_bos=True),
        "decoder": _spaces_decoder(strip=prefix),
        "model": _model(vocabulary.tokens, merges),
    }


def _byte_level(vocabulary: _Vocabulary) -> Json:
    """GPT-2's byte-level BPE with the model's way of cutting words."""
    name = vocabulary.string("pre", "default")
    if name not in SPLITS:
        raise UnsupportedModel(f"{vocabulary.path}: pre-tokenizer {name!r} is not supported: {', '.join(SPLITS)} are")
    split = SPLITS[name]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split is None}
    words: Json = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    llama3 = name in _LLAMA3_NAMES
    return {
        "normalizer": {"type": "NFC"} if name in _QWEN2_NAMES else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, bytes_only]} if split else bytes_only,
        "post_processor": vocabulary.template(add_bos=llama3),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _model(
            vocabulary.tokens,
            vocabulary.split_merges(),
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=llama3,  # as in Llama 3's own tokenizer.json: a word that is a token needs no merging
        ),
    }


def _spaces_decoder(*, strip: bool) -> Json:
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
