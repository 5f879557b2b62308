"""A server's memory beyond its weights, measured on real processes; bitsandbytes only where it is used."""

import sys

import pytest
from helpers.server_memory import BARS_MIB, QUANTS, measure_server


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quant", QUANTS)
def test_memory_beyond_the_weights(quant, cache_dir):
    found = measure_server(quant, cache_dir)
    assert found.proportional_mib <= found.resident_mib
    assert found.weights_mib > 10
    assert found.beyond_mib < BARS_MIB[quant], found
    assert found.bitsandbytes == (quant in ("nf4", "llm-int8"))
