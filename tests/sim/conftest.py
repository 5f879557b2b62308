"""Simulations make objects by the million and no cycles: looking for those takes half of the time."""

import gc

import pytest


@pytest.fixture(autouse=True)
def without_garbage_collection():
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def pytest_collection_modifyitems(items):
    """Slow simulations get a quarter of an hour: on a busy machine a minute of one core may take ten."""
    for item in items:
        if "sim" in item.path.parts and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(900))
