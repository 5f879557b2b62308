"""GGUF vocabularies as tokenizer.json: the same ids as transformers gives for the same file."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers.gguf_files import byte_level_vocabulary, random_strings, spm_vocabulary, write_gguf
from helpers.tiny_models import make_checkpoint
from swarmnode.kernels.loading.gguf_file import GgufFile
from swarmnode.kernels.loading.vocabulary import MAX_MERGED, tokenizer_json
from swarmnode.kernels.tokenizer import Tokenizer
from swarmnode.protocol.errors import CorruptCheckpoint, UnsupportedModel

PATH = Path("x.gguf")
VOCABULARIES = {
    "spm": ("llama", spm_vocabulary()),
    "gemma": ("gemma3", spm_vocabulary(gemma=True)),
    "llama-bpe": ("llama", byte_level_vocabulary("llama-bpe")),
    "qwen2": ("qwen2", byte_level_vocabulary("qwen2")),
    "tekken": ("llama", byte_level_vocabulary("tekken")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("hf"), "llama", vocab_size=32, hidden_size=32, num_hidden_layers=1)


def as_metadata(entries, architecture="llama"):
    numeric = {k: np.array(v) for k, v in entries if isinstance(v, list) and not isinstance(v[0], str)}
    return {"general.architecture": architecture, **dict(entries), **numeric}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_equal_transformers(name, folder, tmp_path):
    from transformers import AutoTokenizer

    architecture, entries = VOCABULARIES[name]
    path = write_gguf(tmp_path / "x.gguf", folder, architecture, extra=entries)
    oracle = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    ours = Tokenizer(tokenizer_json(GgufFile(path).metadata, path))
    texts = ["", "hello world", "  the hello\n\nthe", "a<eos>b <|im_start|>x [mm]", *random_strings(200)]
    for text in texts:
        text = unicodedata.normalize("NFC", text)  # Qwen's own tokenizer normalizes; the oracle leaves it out
        ids = ours.encode(text)
        assert ids == oracle.encode(text), repr(text)
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_equal_files_give_equal_bytes():
    metadata = as_metadata(spm_vocabulary())
    assert tokenizer_json(metadata, PATH) == tokenizer_json(dict(metadata), PATH)


def test_a_file_may_have_no_vocabulary():
    assert tokenizer_json({"general.architecture": "llama"}, PATH) is None
    assert tokenizer_json({"tokenizer.ggml.model": "no_vocab"}, PATH) is None


def test_llama3_words_that_are_tokens_need_no_merging():
    """As in Llama 3's own tokenizer.json, and llama.cpp; BOS too where the file does not say."""
    entries = [(k, v) for k, v in byte_level_vocabulary("llama-bpe") if not k.endswith("add_bos_token")]
    tokens = [*dict(entries)["tokenizer.ggml.tokens"], "whole", "<|begin_of_text|>"]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos_token_id": len(tokens) - 1}
    changes["tokenizer.ggml.token_type"] = np.array([1] * (len(tokens) - 1) + [3])
    ours = Tokenizer(tokenizer_json({**as_metadata(entries), **changes}, PATH))
    assert ours.encode("whole") == [len(tokens) - 1, len(tokens) - 2]


def test_end_tokens_are_added_when_the_file_says_so():
    metadata = as_metadata([*spm_vocabulary(), ("tokenizer.ggml.add_eos_token", True)])
    ids = Tokenizer(tokenizer_json(metadata, PATH)).encode("hello")
    assert (ids[0], ids[-1]) == (2, 1)


def test_a_file_without_a_space_in_front_gets_none():
    metadata = as_metadata([*spm_vocabulary(), ("tokenizer.ggml.add_space_prefix", False)])
    ours = Tokenizer(tokenizer_json(metadata, PATH))
    assert ours.token(ours.encode("hello")[1]) == "hello"
    assert ours.decode(ours.encode(" hello")) == " hello"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, UnsupportedModel, r"rwkv.*SentencePiece"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "mpt"}, UnsupportedModel, r"'mpt'.*qwen2"),
        ({"tokenizer.ggml.tokens": 5}, CorruptCheckpoint, "no list of strings"),
        ({"tokenizer.ggml.tokens": []}, CorruptCheckpoint, "no list of strings"),
        ({"tokenizer.ggml.scores": np.zeros(3)}, CorruptCheckpoint, "does not fit"),
        ({"tokenizer.ggml.token_type": "x"}, CorruptCheckpoint, "does not fit"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, CorruptCheckpoint, "bos_token_id"),
        ({"tokenizer.ggml.bos_token_id": -1}, CorruptCheckpoint, "bos_token_id"),
        ({"tokenizer.ggml.merges": ["a b c"]}, CorruptCheckpoint, "no pair"),
    ],
)
def test_what_cannot_be_expressed_is_told(changes, error, words):
    with pytest.raises(error, match=words):
        tokenizer_json({**as_metadata(spm_vocabulary()), **changes}, PATH)


def test_long_tokens_are_not_cut_into_merges():
    """Cutting is quadratic: 100,000 hostile tokens of a megabyte would take for ever."""
    tokens = ["a", "a" * MAX_MERGED, "a" * (MAX_MERGED - 1), "a" * (MAX_MERGED + 1), "a" * 10_000]
    entries = [("tokenizer.ggml.model", "llama"), ("tokenizer.ggml.tokens", tokens)]
    merges = json.loads(tokenizer_json(as_metadata(entries), PATH))["model"]["merges"]
    assert sorted(map("".join, merges)) == ["a" * MAX_MERGED] * 2
