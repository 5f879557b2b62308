"""What every test runs under: offline, seeded, one fresh event loop per test."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONSAFEPATH"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # pytest-asyncio warns when this is unset, and warnings are errors here
    config._inicache.setdefault("asyncio_default_fixture_loop_scope", "function")
