"""The compute class is stable within a configuration and differs between them; timings are per block."""

import pytest
import torch
from helpers.tiny_models import RandomCheckpoint, make_config
from swarmnode.kernels import measure
from swarmnode.kernels.engine import load_span
from swarmnode.kernels.kvcache import KVPool
from swarmnode.protocol.errors import ConfigError


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def test_classes_differ_by_what_decides_bits(monkeypatch):
    fp32 = measure.compute_class("none", torch.float32)
    others = [
        measure.compute_class("none", torch.bfloat16),
        measure.compute_class("int8", torch.float32),
        measure.compute_class("nf4", torch.bfloat16),
        measure.compute_class("llm-int8", torch.bfloat16),
        measure.compute_class("none", torch.float32, kv="int8"),
    ]
    monkeypatch.setattr(measure, "KERNEL_REVISION", 999)
    others.append(measure.compute_class("none", torch.float32))
    assert len({fp32, *others}) == 7
    assert all(len(found) == measure.CLASS_BYTES for found in (fp32, *others))


def test_block_times_leave_the_pool_as_it_was():
    config = make_config()
    span = load_span(RandomCheckpoint(config), 0, 2, dtype=torch.float32)
    pool = KVPool(1 << 24, config, 0, 2, torch.float32)
    decode_s, prefill_s = measure.block_times(span, pool)
    assert 0 < decode_s < prefill_s
    assert (pool.used_bytes, pool.lanes) == (0, 0)


def test_block_times_with_a_budget_of_one_tile():
    config = make_config()
    span = load_span(RandomCheckpoint(config), 0, 2, dtype=torch.float32)
    tile = 64 * 2 * 2 * 2 * 32 * 4
    assert all(value > 0 for value in measure.block_times(span, KVPool(tile, config, 0, 2, torch.float32)))
    with pytest.raises(ConfigError, match="raise it"):
        measure.block_times(span, KVPool(tile - 1, config, 0, 2, torch.float32))


def test_limits_are_positive():
    assert measure.read_bandwidth(1 << 20) > 1e6
    assert measure.matmul_rate(torch.float32, 64) > 1e6
