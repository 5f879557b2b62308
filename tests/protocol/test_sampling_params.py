"""Sampling parameters: ranges, messages, wire form."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import sampling
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.sampling import SamplingParams

NAN, INF = float("nan"), float("inf")

valid = st.builds(
    SamplingParams,
    temperature=st.floats(0, sampling.MAX_TEMPERATURE),
    top_k=st.integers(0, sampling.MAX_TOP_K),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    seed=st.integers(0, sampling.MAX_SEED),
    repetition_penalty=st.floats(0, sampling.MAX_PENALTY, exclude_min=True),
    frequency_penalty=st.floats(-sampling.MAX_PENALTY, sampling.MAX_PENALTY),
    presence_penalty=st.floats(-sampling.MAX_PENALTY, sampling.MAX_PENALTY),
    penalty_last_n=st.integers(0, sampling.MAX_LOOKBACK),
    logit_bias=st.dictionaries(
        st.integers(0, sampling.MAX_TOP_K), st.floats(-sampling.MAX_BIAS, sampling.MAX_BIAS), max_size=20
    ),
    choices=st.integers(1, sampling.MAX_CHOICES),
)


@given(valid)
def test_wire_form_round_trips(params):
    assert SamplingParams.from_wire(params.to_wire()) == params
    assert len(params.to_wire()) < 110 + 15 * len(params.logit_bias)
    assert params.fits_wire


def test_golden_wire_form():
    assert SamplingParams().to_wire() == b"\x80"
    wire = SamplingParams(temperature=0.5, top_k=40, seed=7).to_wire()
    assert wire == bytes.fromhex("83 01 cb3fe0000000000000 02 28 05 07")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", sampling.MAX_TEMPERATURE + 1),
        ("temperature", NAN),
        ("temperature", INF),
        ("temperature", True),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", sampling.MAX_TOP_K + 1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("seed", -1),
        ("seed", sampling.MAX_SEED + 1),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", -sampling.MAX_PENALTY - 1),
        ("presence_penalty", NAN),
        ("penalty_last_n", -1),
        ("penalty_last_n", sampling.MAX_LOOKBACK + 1),
        ("choices", 0),
        ("choices", sampling.MAX_CHOICES + 1),
        ("logit_bias", "5=1"),
        ("logit_bias", 7),
    ],
)
def test_silly_values_name_parameter_and_range(name, value):
    with pytest.raises(ConfigError, match=rf"{name} is .*: use (a|up to)"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("bias", "problem"),
    [
        ([5], "pairs of token id"),
        ([(5, 1.0, 2)], "pairs of token id"),
        ({-1: 1.0}, "a token id of logit_bias is -1"),
        ({"5": 1.0}, "a token id of logit_bias is '5'"),
        ({5: 101.0}, "logit_bias of token 5 is 101.0"),
        ({5: NAN}, "logit_bias of token 5 is nan"),
        ([(5, 1.0), (5, 2.0)], "token 5 twice"),
        (dict.fromkeys(range(sampling.MAX_BIASES + 1), 1.0), f"up to {sampling.MAX_BIASES}"),
    ],
)
def test_wrong_biases_are_named(bias, problem):
    with pytest.raises(ConfigError, match=problem):
        SamplingParams(logit_bias=bias)


def test_biases_are_kept_in_order_and_may_be_too_many_for_a_tail():
    assert SamplingParams(logit_bias={9: 1, 3: -2.5}).logit_bias == ((3, -2.5), (9, 1.0))
    assert not SamplingParams(logit_bias=dict.fromkeys(range(sampling.MAX_BIASES), 1.0)).fits_wire


@pytest.mark.parametrize(
    "wire",
    [
        None,
        [],
        b"",
        {10: 5},
        {10: [5]},
        {10: [[1, "x"]]},
        {11: 0},
        {1: -1.0},
        {1: "x"},
        {2: 2**40},
        {5: None},
        {3: NAN},
    ],
)
def test_hostile_wire_values_are_the_peers_fault(wire):
    with pytest.raises(RemoteProtocolError):
        SamplingParams.from_wire(msgpack.packb(wire))


@given(st.binary(max_size=60))
def test_junk_parses_or_is_the_peers_fault(junk):
    try:
        SamplingParams.from_wire(junk)
    except RemoteProtocolError:
        return


def test_oversized_wire_form_is_refused():
    with pytest.raises(RemoteProtocolError, match="at most 1024"):
        SamplingParams.from_wire(msgpack.packb({99: bytes(sampling.MAX_WIRE_BYTES)}))


def test_unknown_wire_keys_are_ignored():
    wire = msgpack.packb({1: 0.5, 99: "later", "x": 1})
    assert SamplingParams.from_wire(wire) == SamplingParams(temperature=0.5)
