"""The trace schema: lines round trip, hostile text stays tame, and anything else is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import trace
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.trace import TraceEvent, check_header, clean, decode, encode, header

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\nerror: all is lost\u202e\u2028\x9b31m" + "x" * 500


def test_an_event_survives_a_line():
    event = TraceEvent(1.25, "yamux:ping", {"opaque": 7, "ok": True, "text": "ü", "list": [1, [2]], "none": None})
    line = encode(event)
    assert "\n" not in line
    assert decode(line) == event
    assert json.loads(line)["name"] == "yamux:ping"


@pytest.mark.parametrize("client", [True, False])
def test_the_header_says_schema_and_side(client):
    line = header(title="a title\x1b[2J", client=client, wall=1.8e9, time=3.5)
    assert check_header(line) is client
    assert "\\u001b" not in line
    body = json.loads(line)
    assert body["file_schema"] == trace.SCHEMA
    assert body["common_fields"]["reference_time"] == {"clock": "monotonic", "time": 3.5, "wall": 1.8e9}


def test_hostile_text_is_cut_and_printable():
    tame = clean(HOSTILE)
    assert len(tame) == trace.MAX_TEXT
    assert tame.isprintable()
    assert tame.startswith("?]0;owned??[2J??error: all is lost")
    assert clean("plain") == "plain"
    assert clean("x" * trace.MAX_TEXT) == "x" * trace.MAX_TEXT
    assert clean("x" * (trace.MAX_TEXT + 1)) == "x" * (trace.MAX_TEXT - 1) + "…"


@given(st.text(max_size=400), st.integers(1, 300))
def test_clean_text_is_always_short_and_printable(text, limit):
    tame = clean(text, limit)
    assert len(tame) <= limit
    assert tame.isprintable()
    assert clean(tame, limit) == tame


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('{"time": "x", "name": "a:b", "data": {}}', "not an event"),
        ('{"time": 1, "name": 5, "data": {}}', "not an event"),
        ('{"time": 1, "name": "a:b", "data": []}', "not an event"),
        ('{"time": 1, "name": "a\\u001b:b", "data": {}}', "not printable"),
        (json.dumps({"time": 1, "name": "n" * (trace.MAX_NAME + 1), "data": {}}), "over 64 characters"),
        ('"' + "x" * trace.MAX_LINE + '"', "at most"),
    ],
)
def test_what_is_no_event_is_refused(line, words):
    with pytest.raises(ConfigError, match=words):
        decode(line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{}", "it says None"),
        ('{"file_schema": "urn:other\\u001b[2J"}', r"urn:other\?\[2J"),
        (json.dumps({"file_schema": trace.SCHEMA}), "vantage_point"),
        (json.dumps({"file_schema": trace.SCHEMA, "vantage_point": {"type": "network"}}), "client or server"),
    ],
)
def test_what_is_no_trace_is_refused(line, words):
    with pytest.raises(ConfigError, match=words):
        check_header(line)


@given(st.text(max_size=200))
def test_junk_never_raises_anything_else(line):
    for parse in (decode, check_header):
        try:
            parse(line)
        except ConfigError:
            pass
