"""What a whole server process holds beyond its weights, as the kernel counts it."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from helpers.processes import Process, environment

MODEL = "gemma3-270m"
BLOCKS = (3, 9)
"""Neither end of the model: no embedding, no head."""
QUANTS = ("none", "int8", "nf4", "llm-int8")
BARS_MIB = {"none": 330, "int8": 330, "nf4": 450, "llm-int8": 450}
"""Beyond weights and KV; higher where bitsandbytes is loaded."""


@dataclass(frozen=True)
class ServerMemory:
    """Of a server that waits for work, so its cache is empty."""

    resident_mib: float
    """All pages, libraries in full: what it would be charged if nobody shared them."""
    proportional_mib: float
    """PSS: pages shared with others by share."""
    weights_mib: float
    bitsandbytes: bool
    """Whether the library is in its memory."""

    @property
    def beyond_mib(self) -> float:
        """Resident, without the weights: never less than the same by PSS."""
        return self.resident_mib - self.weights_mib


def weight_bytes(quant: str, cache: Path) -> int:
    """What the span's weights take."""
    import torch
    from swarmnode.kernels.engine import load_span
    from swarmnode.kernels.loading.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(MODEL, cache_dir=cache)
    return load_span(checkpoint, *BLOCKS, dtype=torch.bfloat16, quant=quant).size_bytes


def measure_server(quant: str, cache: Path) -> ServerMemory:
    """Start `swarmnode join`, wait until it serves, look, and kill it."""
    span = f"{BLOCKS[0]}:{BLOCKS[1]}"
    with tempfile.TemporaryDirectory() as home:
        arguments = ["join", MODEL, "--serve", span, "--quant", quant, "--listen", "/ip4/127.0.0.1/tcp/0"]
        process = Process(arguments, environment(Path(home), cache))
        try:
            process.ready()
            process.says("serving blocks")
            folder = Path(f"/proc/{process.child.pid}")
            counted = dict(re.findall(r"^(\w+): +(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE))
            loaded = "libbitsandbytes" in (folder / "maps").read_text()
        finally:
            process.child.kill()
            process.finish()
    return ServerMemory(
        resident_mib=int(counted["Rss"]) / 1024,
        proportional_mib=int(counted["Pss"]) / 1024,
        weights_mib=weight_bytes(quant, cache) / 2**20,
        bitsandbytes=loaded,
    )
