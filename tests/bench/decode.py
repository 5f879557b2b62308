"""Decode rate of the real Gemma 3 270M: the swarm against our own single process and against transformers.

One thread per process, everything on this machine, one run. The bound for a chain of stages that take turns is the
single process' own rate; what is missing from it is hops, frames and thread hand-overs.

    python tests/bench/decode.py [--no-transformers]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.processes import environment, swarm

PROMPT = "The history of the city begins"
TOKENS = 96
LLAMA_CPP_RPC = 58.0
"""llama.cpp RPC, Q4_K_M weights, 2 nodes on loopback, one thread each, measured on this kind of machine."""


async def generate(peers: tuple[str, ...], cache: Path, *, local_ends: bool) -> float:
    """Tokens per second of a client; without peers the whole model runs in this process."""
    from swarmnode import Node, NodeConfig

    config = NodeConfig(listen=(), peers=peers, dht_server=False, cache_dir=cache)
    async with Node(config) as node:
        if not peers:
            await node.serve("gemma3-270m", quant="none")
        model = await node.model("gemma3-270m", local_ends=local_ends)
        async for _ in model.generate(PROMPT, max_new_tokens=TOKENS):
            pass
        assert model.last_stats is not None
        return model.last_stats.tokens_per_s


def engine_rate(cache: Path) -> float:
    """Our engine in a plain loop: blocks, head, greedy choice; no node at all."""
    import torch
    from swarmnode.kernels.engine import load_embedding, load_head, load_span
    from swarmnode.kernels.kvcache import KVPool
    from swarmnode.kernels.loading.checkpoint import open_checkpoint
    from swarmnode.kernels.span import Piece
    from swarmnode.kernels.tokenizer import Tokenizer
    from swarmnode.protocol.tensors import Codec

    checkpoint = open_checkpoint("gemma3-270m", cache_dir=cache)
    dtype, blocks = torch.bfloat16, checkpoint.config.num_blocks
    span = load_span(checkpoint, 0, blocks, dtype=dtype)
    embedding, head = load_embedding(checkpoint, dtype=dtype), load_head(checkpoint, dtype=dtype)
    lane = KVPool(1 << 28, checkpoint.config, 0, blocks, dtype).open_lane()
    ids = Tokenizer(checkpoint.tokenizer).encode(PROMPT)
    position, began = 0, 0.0
    with torch.inference_mode():
        for number in range(TOKENS):
            lane.reserve(position + len(ids))
            piece = Piece(lane, position, len(ids), frozenset(), Codec.BF16)
            rows = span.run(embedding(torch.tensor(ids)), [piece], 0, blocks)
            position += len(ids)
            ids = [int(head.logits(rows[-1:]).argmax())]
            if number == 0:
                began = time.perf_counter()
    return (TOKENS - 1) / (time.perf_counter() - began)


def transformers_rate(cache: Path) -> float:
    """Hugging Face transformers, bf16, on the same dequantized weights."""
    import torch
    from helpers.gemma import transformers_gemma
    from swarmnode.kernels.loading.checkpoint import open_checkpoint
    from swarmnode.kernels.tokenizer import Tokenizer

    checkpoint = open_checkpoint("gemma3-270m", cache_dir=cache)
    model = transformers_gemma(checkpoint, torch.bfloat16)
    ids = torch.tensor([Tokenizer(checkpoint.tokenizer).encode(PROMPT)])
    marks = []
    with torch.inference_mode():
        past = None
        for _ in range(TOKENS):
            out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            marks.append(time.perf_counter())
    return (TOKENS - 1) / (marks[-1] - marks[0])


def rows(with_transformers: bool = True) -> list[tuple[str, float]]:
    """(what, tokens per second)."""
    import torch
    import uvloop

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            cache = Path(name) / "cache"
            env = environment(home, home / "cache")
            found = [("our engine, plain loop", engine_rate(cache))]
            if with_transformers:
                found.append(("transformers bf16", transformers_rate(cache)))
            found.append(("one node, whole model", asyncio.run(generate((), cache, local_ends=False))))
            for spans in (["0:18"], ["0:9", "9:18"], ["0:6", "6:12", "12:18"]):
                with swarm(env, spans) as (_, addresses):
                    rate = uvloop.run(generate((addresses[0],), cache, local_ends=False))
                found.append((f"{len(spans)} server processes, thin client", rate))
    finally:
        torch.set_num_threads(threads)
    return found


def main() -> None:
    """Print the table."""
    table = rows("--no-transformers" not in sys.argv)
    base = table[0][1]
    print(f"{'Gemma 3 270M, 1 thread a process':36} {'tokens/s':>9} {'of engine':>10}")
    for what, rate in table:
        print(f"{what:36} {rate:9.1f} {rate / base:9.0%}")
    print(f"{'llama.cpp RPC, 2 nodes (recorded)':36} {LLAMA_CPP_RPC:9.1f} {LLAMA_CPP_RPC / base:9.0%}")


if __name__ == "__main__":
    main()
