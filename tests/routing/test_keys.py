from __future__ import annotations

import pytest
from swarmnode.routing import keys

DIGEST = bytes(range(32))
GOLDEN_MODELS = "1cb243d38f3f6536c5c754cfe74c619bc9bc95115f097842cc38b37c3e5584ce"
GOLDEN_BLOCKS = "8bb16875af79aab5370396ce30cd8f32f68eb7f7b64368a15f1ff5e79b80ed19"


def test_golden_values_stay_what_deployed_nodes_use():
    assert keys.models_key("main").hex() == GOLDEN_MODELS
    assert keys.blocks_key("main", DIGEST, 3).hex() == GOLDEN_BLOCKS


def test_swarm_digest_group_and_kind_all_matter():
    made = {
        keys.models_key("main"),
        keys.models_key("other"),
        keys.blocks_key("main", DIGEST, 0),
        keys.blocks_key("other", DIGEST, 0),
        keys.blocks_key("main", DIGEST, 1),
        keys.blocks_key("main", DIGEST[::-1], 0),
    }
    assert len(made) == 6
    assert {len(key) for key in made} == {keys.KEY_BYTES}


@pytest.mark.parametrize(("digest", "group"), [(b"short", 0), (DIGEST, -1), (DIGEST, 2**32)])
def test_our_own_mistakes_are_told(digest, group):
    with pytest.raises(ValueError, match=r"digest|group"):
        keys.blocks_key("main", digest, group)


@pytest.mark.parametrize(
    ("span", "groups"),
    [((0, 16), [0]), ((0, 17), [0, 1]), ((15, 33), [0, 1, 2]), ((16, 17), [1]), ((4, 4), [])],
)
def test_groups_of_span(span, groups):
    assert list(keys.groups_of_span(*span)) == groups


def test_distance_and_prefix():
    zero = bytes(32)
    one = bytes(31) + b"\x01"
    top = b"\x80" + bytes(31)
    assert keys.distance(zero, one) == 1
    assert keys.distance(one, one) == 0
    assert keys.common_prefix_bits(zero, one) == 255
    assert keys.common_prefix_bits(zero, top) == 0
    assert keys.common_prefix_bits(top, top) == keys.KEY_BITS
