"""Peak memory while a span loads and is quantized, seen from outside: a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from helpers.tiny_models import RandomCheckpoint, make_config
from swarmnode.kernels.engine import load_span

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10

class Counted:
    def __init__(self, config):
        self.config, self.head_kind = config, "float"
    def block(self, index, dtype):
        return RandomCheckpoint(self.config).block(index, dtype)

config = make_config(num_blocks=8, hidden_size=1024, intermediate_size=4096, num_heads=16, num_kv_heads=16, head_dim=64)
small = make_config(num_blocks=1, hidden_size=256, intermediate_size=512)
load_span(RandomCheckpoint(small), 0, 1, dtype=torch.bfloat16, quant=sys.argv[1])  # libraries, buffers
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
span = load_span(Counted(config), 0, 8, dtype=torch.bfloat16, quant=sys.argv[1])
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        peak = int(line.split()[1]) << 10
print(json.dumps({"peak": peak - before, "final": resident() - before, "size": span.size_bytes,
                  "block": config.block_parameters() * 4}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("quant", "blocks"), [("none", 1), ("int8", 3), ("nf4", 4.5), ("llm-int8", 5)])
def test_the_peak_is_the_final_size_and_some_copies_of_one_block(quant, blocks):
    """`blocks` in fp32 at most, whatever the span's length: one as read, one fused, and what its library copies."""
    tests = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-P", "-c", CODE, quant, tests], capture_output=True, timeout=100, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["final"] <= found["size"] * 1.1, found
    assert found["peak"] <= (found["size"] + blocks * found["block"]) * 1.1, found
