import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.sampling import Choice
from swarmnode.protocol.token_rows import LEAST_LOGPROB, ROW_BYTES, decode, encode

VOCAB = 1000


@given(st.lists(st.builds(Choice, st.integers(0, VOCAB - 1), st.floats(-(2.0**99), 0, width=32)), max_size=20))
def test_choices_come_back(choices):
    payload = encode(choices)
    assert len(payload) == ROW_BYTES * len(choices)
    assert decode(payload, VOCAB) == choices


def test_rows_are_joined_by_joining_bytes():
    assert decode(encode([Choice(1, -1)]) + encode([Choice(2, -2)]), VOCAB) == [Choice(1, -1), Choice(2, -2)]


def test_impossible_tokens_still_travel():
    assert decode(encode([Choice(1, float("-inf"))]), VOCAB)[0].logprob == pytest.approx(LEAST_LOGPROB)


@pytest.mark.parametrize(
    "payload",
    [
        b"1234567",
        struct.pack("<If", VOCAB, -1.0),
        struct.pack("<If", 1, 0.5),
        struct.pack("<If", 1, float("nan")),
        struct.pack("<If", 1, float("-inf")),
    ],
)
def test_junk_is_refused(payload):
    with pytest.raises(RemoteProtocolError):
        decode(payload, VOCAB)
