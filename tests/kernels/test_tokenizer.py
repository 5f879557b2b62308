"""Tokenizer ids against transformers, and streams of text that never show half a character or a stop string."""

from __future__ import annotations

import json

import pytest
from helpers.gguf_files import byte_letters, byte_level_vocabulary, random_strings, spm_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from swarmnode.kernels import tokenizer as module
from swarmnode.kernels.loading.vocabulary import tokenizer_json
from swarmnode.kernels.tokenizer import TextStream, Tokenizer
from swarmnode.protocol.errors import ConfigError, CorruptCheckpoint

TEXTS = ["hello world", " the  hello\n", "héllo 😀 你好 don't 123", "a<0x0A>b <eos>x", ""]


def of(entries, architecture="llama") -> Tokenizer:
    import numpy as np

    metadata = {"general.architecture": architecture}
    for key, value in entries:
        numbers = isinstance(value, list) and not isinstance(value[0], str)
        metadata[key] = np.array(value) if numbers else value
    return Tokenizer(tokenizer_json(metadata, None))


@pytest.fixture(scope="module")
def spm() -> Tokenizer:
    return of(spm_vocabulary())


@pytest.fixture(scope="module")
def gemma() -> Tokenizer:
    return of(spm_vocabulary(gemma=True), "gemma3")


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return of(byte_level_vocabulary("llama-bpe"))


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    return [stream.push(token).text for token in ids] + [stream.finish().text]


def test_special_tokens_surround_a_text_only_when_asked(spm):
    assert spm.encode("hello")[0] == spm.token_id("<bos>") == 2
    assert spm.encode("hello", add_special=False) == spm.encode("hello")[1:]
    assert spm.decode(spm.encode("hello world")) == "hello world"
    assert spm.decode(spm.encode("hello"), skip_special=False).startswith("<bos>")
    assert spm.token(2) == "<bos>"
    assert spm.vocab_size > 256


def test_ids_outside_the_vocabulary_show_nothing(spm):
    assert spm.decode([10**9]) == ""
    assert spm.token(10**9) is None
    assert spm.token_id("no such token") is None


@pytest.mark.parametrize("kind", ["spm", "gemma", "byte_level"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="helo wrdt\n.,é😀你𝒳​", max_size=40), cut=st.integers(0, 10))
def test_streamed_pieces_join_to_the_decoded_text(kind, text, cut, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special=False)
    prompt, rest = ids[:cut], ids[cut:]
    if "\ufffd" in tokenizer.decode(prompt):  # a prompt that ends inside a character shows it broken
        return
    pieces = streamed(TextStream(tokenizer, prompt), rest)
    whole = tokenizer.decode(ids)
    assert tokenizer.decode(prompt) + "".join(pieces) == whole
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["spm", "gemma", "byte_level"])
def test_many_byte_tokens_in_a_row_stay_whole_characters(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = "漢字かな交じり文😀🤯" * 5  # not in the vocabularies: 3 or 4 byte tokens each
    ids = tokenizer.encode(text, add_special=False)
    assert len(ids) > 100
    for start in (0, 12, 28):  # 12 and 28 bytes are whole characters
        prompt = ids[:start] if kind != "spm" else ids[: start + 1]
        pieces = streamed(TextStream(tokenizer, prompt), ids[len(prompt) :])
        assert tokenizer.decode(prompt) + "".join(pieces) == text
        assert all(len(piece) <= 1 for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=40))
def test_any_ids_stream_without_error_and_in_bounded_steps(spm, ids):
    stream = TextStream(spm)
    for token in ids:
        stream.push(token)
        assert len(stream._pending) < module._MAX_PENDING
        assert len(stream._context) <= module._MAX_CONTEXT + module._MAX_PENDING
    stream.finish()


def test_unfinished_bytes_are_shown_at_the_end(spm):
    first_byte = spm.token_id("<0xF0>")
    stream = TextStream(spm)
    assert stream.push(first_byte).text == ""
    assert stream.finish().text == "\ufffd"


def test_a_stop_string_is_found_across_pieces_and_never_shown(byte_level):
    ids = byte_level.encode("say hello there", add_special=False)
    stream = TextStream(byte_level, stops=["hello t"])
    pieces = [stream.push(token) for token in ids]
    assert "".join(piece.text for piece in pieces) == "say "
    assert pieces[-1].stopped
    assert stream.finish() == module.Piece("", stopped=True)


def test_what_only_looks_like_a_stop_string_is_given_back(byte_level):
    ids = byte_level.encode("say hello there", add_special=False)
    for stops in (["hello x"], ["hellooo", "there!"], ["re\n"]):
        assert "".join(streamed(TextStream(byte_level, stops=stops), ids)) == "say hello there"


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(byte_level, text, stops):
    stream = TextStream(byte_level, stops=stops)
    shown = "".join(streamed(stream, byte_level.encode(text, add_special=False)))
    # the first to be completed stops the text; of several completed by one token, the earliest
    ends = [min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)]
    if ends[0] is None:
        assert shown == text
    else:
        completed = text[: ends[0]]
        assert shown == completed[: min(completed.find(stop) for stop in stops if stop in completed)]


def test_bounds_on_stops_and_text(spm):
    with pytest.raises(ConfigError, match="stop strings"):
        TextStream(spm, stops=["x"] * (module.MAX_STOPS + 1))
    for stop in ("", "x" * (module.MAX_STOP_LENGTH + 1)):
        with pytest.raises(ConfigError, match="must have"):
            TextStream(spm, stops=[stop])
    with pytest.raises(ConfigError, match="tokenized at once"):
        spm.encode("x" * (module.MAX_TEXT + 1))


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[" * 10_000, b'{"version":"1.0","model":{"type":"BPE"}}'])
def test_junk_is_no_tokenizer(data):
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json cannot be used"):
        Tokenizer(data)


def test_the_size_is_bounded():
    with pytest.raises(CorruptCheckpoint, match="at most"):
        Tokenizer(bytes(module.MAX_JSON_BYTES + 1))


def test_truncation_and_padding_of_a_file_are_off(spm):
    document = json.loads(tokenizer_json(dict(spm_vocabulary()) | _arrays(spm_vocabulary()), None))
    document["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(json.dumps(document).encode())
    assert tokenizer.encode("hello world the hello") == spm.encode("hello world the hello")


def _arrays(entries):
    import numpy as np

    return {k: np.array(v) for k, v in entries if isinstance(v, list) and not isinstance(v[0], str)}


def test_the_alphabet_of_bytes_is_gpt2s():
    letters = byte_letters()
    assert (letters[ord("a")], letters[32], letters[10], letters[0]) == ("a", "Ġ", "Ċ", "Ā")
    assert len(set(letters)) == 256


def test_seeded_strings_are_the_same_everywhere():
    strings = random_strings(1000)
    assert len(strings) == 1000
    assert strings[:50] == random_strings(1000)[:50]
    assert sum("😀" in text for text in strings) > 5
