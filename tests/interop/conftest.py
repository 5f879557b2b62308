"""The outside peers: installed once into build/, skipped with the reason where they cannot be."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from helpers import js_peer, py_peer


@dataclass(frozen=True)
class Outside:
    """One other implementation of libp2p."""

    name: str
    run: Any
    """Makes a process with the arguments given; see tests/interop/js/node.mjs."""
    agent: str
    """What its agent string has in it."""
    early_muxer: bool
    """It agrees on the muxer inside the Noise handshake."""


def _js():
    if js_peer.npm() is None:
        pytest.skip("npm is not installed")
    return Outside(
        name="js",
        run=partial(js_peer.js_peer, _installed(js_peer)),
        agent="js-libp2p/3.3.11",
        early_muxer=True,
    )


def _py():
    if not py_peer.can_install():
        pytest.skip("no compiler and libgmp headers, which py-libp2p's fastecdsa needs (gcc, libgmp-dev)")
    return Outside(
        name="py",
        run=partial(py_peer.py_peer, _installed(py_peer)),
        agent="py-libp2p/0.8.1",
        early_muxer=False,
    )


def _installed(peer):
    try:
        return peer.install()
    except RuntimeError as exc:  # without a network there is nothing to test with
        pytest.skip(f"cannot be installed here: {str(exc)[-300:]}")


MAKERS = {"js": _js, "py": _py}
MARKS = {"js": pytest.mark.interop_js, "py": pytest.mark.interop_py}


@pytest.fixture(scope="session", params=[pytest.param(name, marks=mark) for name, mark in MARKS.items()])
def outside(request):
    """js-libp2p, then py-libp2p."""
    return MAKERS[request.param]()
