"""What every test runs under.

Offline; one fresh event loop per test; coroutine tests may not leave tasks behind. Choose the loop by a
marker:

    (none)                 the standard library's loop
    @pytest.mark.virtual   a virtual clock (helpers/virtual.py): only in-memory I/O, deterministic, jumps
    when idle @pytest.mark.loops     twice: standard library and uvloop, for tests over real sockets

`pytestmark = pytest.mark.usefixtures("leakproof")` makes a module fail on leaked threads and file
descriptors too.
"""

import asyncio
import functools
import gc
import inspect
import os
import threading

import hypothesis
import pytest
from helpers.virtual import LoopClock, VirtualLoop
from swarmnode.node.clock import Clock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONSAFEPATH"] = "1"

# the same examples in every run: a flaky test is a bug, and a longer search is made by hand with another
# profile
hypothesis.settings.register_profile("repo", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repo")

PATIENCE_TICKS = 20
"""Loop iterations a finished test's tasks get to end by themselves."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # pytest-asyncio warns when this is unset, and warnings are errors here
    config._inicache.setdefault("asyncio_default_fixture_loop_scope", "function")
    config.addinivalue_line("markers", "virtual: runs on a virtual clock, in memory only")
    config.addinivalue_line("markers", "loops: runs on the standard library's loop and on uvloop")


def pytest_asyncio_loop_factories(config, item):
    if item.get_closest_marker("virtual"):
        return {"virtual": VirtualLoop}
    if item.get_closest_marker("loops"):
        return {"asyncio": asyncio.SelectorEventLoop, **_uvloop()}
    return {"asyncio": asyncio.new_event_loop}


def _uvloop():
    try:
        import uvloop
    except ImportError:  # not on Windows
        return {}
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items):
    for item in items:
        if inspect.iscoroutinefunction(getattr(item, "obj", None)):
            # first in, last out: after the fixtures that own hosts have ended
            item.fixturenames.insert(0, "no_leaked_tasks")
        if "leakproof" in getattr(item, "fixturenames", ()):
            # around the event loop too, whose descriptors come and go with it
            item.fixturenames.remove("leakproof")
            item.fixturenames.insert(0, "leakproof")


@pytest.fixture
async def no_leaked_tasks():
    """Fails a coroutine test that leaves a task running."""
    yield
    me = asyncio.current_task()
    for _ in range(PATIENCE_TICKS):
        left = {task for task in asyncio.all_tasks() if task is not me}
        if not left:
            return
        await asyncio.sleep(0)
    pytest.fail(f"tasks left running: {sorted(map(repr, left))}")


@pytest.fixture
def leakproof():
    """Fails a test that leaves threads or file descriptors behind."""
    _warm_up()
    threads, files = set(threading.enumerate()), _open_files()
    yield
    gc.collect()
    left = [thread.name for thread in threading.enumerate() if thread not in threads]
    assert not left, f"threads left running: {left}"
    assert _open_files() <= files, "file descriptors left open"


@functools.cache
def _warm_up():
    """uvloop keeps two descriptors from its first loop on."""
    for factory in _uvloop().values():
        loop = factory()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture
def clock(request):
    """The clock to hand to what is tested: virtual under the virtual marker, else the machine's."""
    return LoopClock() if request.node.get_closest_marker("virtual") else Clock()


@pytest.fixture
def lab():
    """Network namespaces and emulated links, gone with the test (marker netns); skips where they cannot be made."""
    from lab.spaces import Lab, Unavailable

    try:
        with Lab() as made:
            yield made
    except Unavailable as exc:
        pytest.skip(f"no lab here: {exc}")
