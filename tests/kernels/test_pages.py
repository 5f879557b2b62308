"""Keys and values in 8 bits: error bounds, rows that stand alone, poison that stays where it is, memory."""

import pytest
import torch
from helpers.tiny_models import RandomCheckpoint, make_config
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.kernels.attention import TILE
from swarmnode.kernels.engine import load_span
from swarmnode.kernels.kvcache import KVPool
from swarmnode.kernels.pages import LEVELS, Page, groups, pack, read, slot_width
from swarmnode.kernels.span import Piece

WIDTH = 24
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)


def unpack(packed, width=WIDTH):
    """Packed rows [2, heads, rows, slot width], up to a tile of them, as they come out of a page."""
    slots = torch.zeros(*packed.shape[:2], TILE, packed.shape[3], dtype=torch.int8)
    slots[:, :, : packed.shape[2]] = packed
    out = torch.empty(*packed.shape[:2], TILE, width)
    read([Page(slots, width, None)], out)
    return out[:, :, : packed.shape[2]]


def rows(seed, count, spread=4.0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, count, WIDTH, generator=rng) * torch.exp(
        torch.randn(2, 3, count, 1, generator=rng) * spread
    )


@pytest.mark.parametrize(("width", "size"), [(256, 64), (128, 64), (64, 64), (80, 40), (96, 48), (24, 24), (134, 134)])
def test_no_value_is_off_by_more_than_half_a_step_of_its_group(width, size):
    """Half a step, and what the scale itself loses in bf16: at most 2^-9 of the largest value, half a step more."""
    fresh = torch.randn(2, 3, 60, width, generator=torch.Generator().manual_seed(width))
    fresh *= torch.exp(4 * torch.randn(2, 3, 60, width, generator=torch.Generator().manual_seed(width + 1)))
    assert groups(width) == width // size
    steps = fresh.unflatten(-1, (-1, size)).abs().amax(-1, keepdim=True) / LEVELS
    error = (unpack(pack(fresh), width) - fresh).unflatten(-1, (-1, size)).abs()
    assert (error <= steps * 0.51).float().mean() > 0.98
    assert (error <= steps * 1.01).all()


@given(st.lists(FLOATS, min_size=WIDTH, max_size=WIDTH))
def test_any_finite_row_keeps_its_bound(values):
    fresh = torch.tensor(values).expand(2, 1, 1, WIDTH)
    found = unpack(pack(fresh))
    assert torch.isfinite(found).all()
    largest = fresh.abs().max()
    assert ((found - fresh).abs() <= largest / LEVELS * 1.01 + 2.0**-125).all()


def test_a_row_does_not_depend_on_others():
    fresh = rows(2, 60)
    whole = pack(fresh)
    for first, last in ((0, 1), (1, 3), (5, 6), (7, 60)):
        assert torch.equal(pack(fresh[:, :, first:last]), whole[:, :, first:last])
        assert torch.equal(pack(fresh[1:, 2:, first:last]), whole[1:, 2:, first:last])


def test_zeros_are_exact_and_empty_slots_are_zeros():
    assert unpack(pack(torch.zeros(2, 1, 5, WIDTH))).eq(0).all()
    assert unpack(torch.zeros(2, 1, 5, slot_width(WIDTH, torch.int8), dtype=torch.int8)).eq(0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(poison):
    fresh = rows(3, 10)
    clean = unpack(pack(fresh))
    fresh[0, 1, 4, 7] = poison
    found = unpack(pack(fresh))
    assert not torch.isfinite(found[0, 1, 4]).any()
    found[0, 1, 4] = clean[0, 1, 4]
    assert torch.equal(found, clean)


@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True, "family": "gemma3", "norm_offset": 1.0}], ids=["llama", "normed"]
)
def test_blocks_with_keys_in_8_bits_stay_near(changes):
    """Against the same blocks with float keys; the bound is twice what was seen."""
    config = make_config(num_blocks=3, **changes)
    span = load_span(RandomCheckpoint(config), 0, 3, dtype=torch.float32)
    hidden = torch.randn(200, config.hidden_size, generator=torch.Generator().manual_seed(4))
    pools = [KVPool(1 << 26, config, 0, 3, dtype) for dtype in (torch.float32, torch.int8)]
    expected, found = (span.run(hidden, [Piece(pool.open_lane(), 0, 200)]) for pool in pools)
    error = float((found - expected).norm() / expected.norm())
    assert 1e-5 < error < 0.02
    assert pools[1].used_bytes * 3 < pools[0].used_bytes


def test_the_books_say_half():
    config = make_config(head_dim=128, num_heads=2)
    bf16, in_8_bits = (KVPool(1 << 24, config, 0, 2, dtype) for dtype in (torch.bfloat16, torch.int8))
    assert in_8_bits.slot_bytes / bf16.slot_bytes == (128 + 4) / 256
    assert in_8_bits.free_tokens > 1.9 * bf16.free_tokens
    assert in_8_bits.need(1000, 0, 2) < 0.52 * bf16.need(1000, 0, 2)
    lane = in_8_bits.open_lane()
    lane.reserve(1)
    assert in_8_bits.used_bytes == sum(b.pages[0].slots.numel() for b in lane.blocks) == in_8_bits.page_bytes * 2
