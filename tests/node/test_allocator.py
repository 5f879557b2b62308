"""The allocator setting: accepted where there is glibc, harmless elsewhere.

In a process of its own: it is global.
"""

import subprocess
import sys


def test_it_is_accepted_or_declined():
    code = "from swarmnode.node.allocator import keep_freed_memory as keep; print(keep())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("True", "False")
