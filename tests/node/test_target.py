"""Results a client takes, and those it must not."""

import struct

import numpy as np
import pytest
import torch
from swarmnode.kernels.codecs import encode
from swarmnode.node.client.target import Target
from swarmnode.protocol import token_rows
from swarmnode.protocol.chain import ChainSpec
from swarmnode.protocol.messages import Output, Result, Want
from swarmnode.protocol.sampling import Choice
from swarmnode.protocol.tensors import Codec, payload_size
from swarmnode.routing.planner import PlanRequest

VOCAB = 50


def target(output: Output, codec: Codec = Codec.FP32, hidden: int = 640) -> Target:
    spec = ChainSpec(
        session=bytes(16), digest=bytes(32), start=0, end=2, codec=codec, cuts=(0, 2), max_length=9, output=output
    )
    size = {Output.HIDDEN: payload_size(codec, 1, hidden), Output.LOGITS: 4 * VOCAB, Output.TOKEN: 0}[output]
    return Target(spec=spec, request=PlanRequest(), view=None, row_bytes=size, max_payload=1 << 20, vocab=VOCAB)


def result(want: Want = Want.ALL, count: int = 3, **changes) -> Result:
    return Result(epoch=0, position=0, count=count, want=int(want), **changes)


@pytest.mark.parametrize("hidden", [640, 64, 100, 4])
@pytest.mark.parametrize("codec", list(Codec))
def test_hidden_states_must_be_numbers(codec, hidden):
    rows = torch.randn(3, hidden, generator=torch.Generator().manual_seed(1)) * 50
    good = encode(rows, codec)
    aim = target(Output.HIDDEN, codec, hidden)
    assert aim.fits(result(), good)
    assert not aim.fits(result(), good[:-1])
    assert not aim.fits(result(), b"\xff" * len(good))
    for broken in (float("nan"), float("inf")):
        rows[1, 0] = broken
        payload = np.frombuffer(encode(rows, codec), np.uint8)
        assert not aim.fits(result(), payload.tobytes())


def test_logits_must_be_numbers():
    logits = np.zeros((3, VOCAB), np.float32)
    assert target(Output.LOGITS).fits(result(), logits.tobytes())
    logits[1, 1] = -np.inf
    assert target(Output.LOGITS).fits(result(), logits.tobytes())
    logits[2, 2] = np.nan
    assert not target(Output.LOGITS).fits(result(), logits.tobytes())


def test_tokens_must_be_tokens():
    aim = target(Output.TOKEN)
    assert aim.fits(result(Want.LAST, token=49, logprob=-1.0), b"")
    assert not aim.fits(result(Want.LAST, token=50), b"")
    assert not aim.fits(result(Want.LAST), b"")
    assert aim.fits(result(), token_rows.encode([Choice(1, -1.0)] * 3))
    assert not aim.fits(result(), token_rows.encode([Choice(1, -1.0)] * 2))
    assert not aim.fits(result(), struct.pack("<If", VOCAB, -1.0) * 3)
    assert aim.fits(result(Want.NOTHING), b"")
    assert not aim.fits(result(Want.NOTHING), b"x")
