"""The example rows of docs/spec/tensors.md, made by the arithmetic that servers use."""

import re
from pathlib import Path

import pytest
import torch
from swarmnode.kernels.codecs import decode, encode
from swarmnode.protocol.tensors import Codec

PAGE = (Path(__file__).parents[2] / "docs" / "spec" / "tensors.md").read_text()
PLAIN = [1.0, -2.5, 0.0, 103794.0]
ROWS = {Codec.FP32: PLAIN, Codec.BF16: PLAIN, Codec.INT8S: [0.5, -100.0, 8.0, 2.0, -2.0, 64.0, 1000.0, 0.0]}


@pytest.mark.parametrize("codec", Codec)
def test_example_rows(codec):
    (block,) = re.findall(rf"^```vector\.tensors\.{codec.label}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    raw = bytes.fromhex("".join(re.split(r" {3,}", line)[0] for line in block.splitlines()))
    row = torch.tensor([ROWS[codec]])
    assert encode(row, codec) == raw
    assert torch.allclose(decode(raw, codec, 1, row.shape[1], torch.float32), row, rtol=0.02)
