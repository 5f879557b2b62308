"""A weight in parts is the whole weight, to the bit, for whoever quantizes it piece by piece."""

import weakref
from itertools import pairwise

import pytest
import torch
from swarmnode.kernels import weight as weight_module
from swarmnode.kernels.quant.llm_int8 import make_llm_int8
from swarmnode.kernels.quant.nf4 import NF4Linear
from swarmnode.kernels.weight import Weight

CPU = torch.device("cpu")
MATRIX = torch.randn(150, 640, generator=torch.Generator().manual_seed(2))


def parted(tensor, *borders):
    edges = (0, *borders, tensor.shape[0])
    parts = [lambda first=first, last=last: tensor[first:last].clone() for first, last in pairwise(edges)]
    return Weight((tensor.shape[0], tensor.shape[1]), parts)


def test_parts_come_in_order_and_one_at_a_time():
    seen, alive = [], []

    def use(first, part):
        assert not any(reference() is not None for reference in alive)
        alive.append(weakref.ref(part))
        seen.append((first, part.shape[0]))

    parted(MATRIX, 40, 41).each(use)
    assert seen == [(0, 40), (40, 1), (41, 109)]


@pytest.mark.parametrize("borders", [(), (1,), (40, 41, 149), (64, 128)])
@pytest.mark.parametrize(("multiple", "values"), [(1, 640), (32, 1), (32, 640 * 70), (32, 1 << 20), (7, 640 * 8)])
def test_groups_are_even_and_filled_with_zeros(monkeypatch, borders, multiple, values):
    monkeypatch.setattr(weight_module, "GROUP_VALUES", values)
    found = []
    parted(MATRIX, *borders).groups(multiple, lambda first, rows: found.append((first, rows.clone())))
    together = torch.cat([rows for _, rows in found])
    firsts = [first for first, _ in found]
    assert firsts == [sum(rows.shape[0] for _, rows in found[:index]) for index in range(len(found))]
    assert all(rows.shape[0] % multiple == 0 for _, rows in found)
    assert together.shape[0] < 150 + multiple
    assert torch.equal(together[:150], MATRIX)
    assert not together[150:].any()


def test_joined_is_the_matrix_and_no_copy_of_a_stored_one():
    assert torch.equal(parted(MATRIX, 3, 90).joined(torch.float32), MATRIX)
    assert torch.equal(parted(MATRIX, 3, 90).joined(torch.bfloat16), MATRIX.bfloat16())
    assert Weight.of(MATRIX).joined(torch.float32) is MATRIX


@pytest.mark.parametrize(
    "make", [lambda weight: NF4Linear(weight, None, CPU), lambda weight: make_llm_int8(weight, None, CPU)]
)
def test_what_is_quantized_by_groups_equals_the_whole(monkeypatch, make):
    rows = torch.randn(5, 640, generator=torch.Generator().manual_seed(3))
    whole = make(Weight.of(MATRIX))(rows)
    monkeypatch.setattr(weight_module, "GROUP_VALUES", 640 * 40)
    assert torch.equal(make(parted(MATRIX, 13, 77))(rows), whole)
    assert not torch.equal(make(parted(MATRIX.flip(0), 13, 77))(rows), whole)
