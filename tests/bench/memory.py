"""What a server holds beyond its weights: `swarmnode join` of six blocks of Gemma 3 270M, waiting for work.

    python tests/bench/memory.py

Resident: every page counted in full, as if no other process shared libraries with it. PSS: shared pages by share.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/helpers

from helpers.server_memory import BARS_MIB, QUANTS, measure_server


def main() -> None:
    cache = Path(tempfile.gettempdir()) / "swarmnode-test-cache"
    print(f"{'weights':10} {'MiB':>6} {'resident':>9} {'PSS':>6} {'beyond weights':>15} {'bar':>5}  bitsandbytes")
    for quant in QUANTS:
        found = measure_server(quant, cache)
        print(
            f"{quant:10} {found.weights_mib:6.0f} {found.resident_mib:9.0f} {found.proportional_mib:6.0f}"
            f" {found.beyond_mib:15.0f} {BARS_MIB[quant]:5}  {'loaded' if found.bitsandbytes else 'not loaded'}"
        )


if __name__ == "__main__":
    main()
