"""`swarmnode bench`: what this machine could do for a swarm, without joining one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from .commands import use_threads
from .config import NodeConfig
from .console import Console, milliseconds

if TYPE_CHECKING:
    from ..kernels.bench import BlockFigures, Limits

COLUMNS: Final = ("weights", "MB a block", "decode", "of limit", "prefill 128", "of limit")


def bench(config: NodeConfig, model: str, quants: Sequence[str] | None, threads: int | None, console: Console) -> int:
    """Measure limits, blocks and head. Raises ConfigError, ModelNotFound, CorruptCheckpoint, UnsupportedModel."""
    use_threads(threads)
    from ..kernels import bench as measured  # torch is loaded here, after its threads are settled
    from ..kernels.loading.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model, cache_dir=config.cache_dir)
    limits = measured.machine_limits()
    if not console.as_json:
        _show_limits(limits, console)
    chosen = quants or (_installed() if checkpoint.config.foreign is None else ("none",))
    figures = list(measured.block_figures(checkpoint, chosen, limits))
    head_s, head_bytes = measured.head_seconds(checkpoint)
    if console.as_json:
        body = {"limits": asdict(limits), "model": model, "blocks": [asdict(found) for found in figures]}
        console.json(body | {"head": {"seconds": head_s, "bytes": head_bytes}})
        return 0
    console.data(f"{model}, one of its {checkpoint.config.num_blocks} blocks:")
    console.table(COLUMNS, [_row(found) for found in figures])
    share = head_bytes / limits.bytes_per_s / head_s
    console.data(f"head: {head_bytes / 1e6:.0f} MB, {milliseconds(head_s)} a token, {share:.0%} of the limit")
    return 0


def _installed() -> Sequence[str]:
    """The ways to hold weights that this installation can measure."""
    from importlib.util import find_spec

    return ("none", "int8", "nf4") if find_spec("bitsandbytes") else ("none", "int8")


def _show_limits(limits: Limits, console: Console) -> None:
    rates = [("fp32", limits.fp32_per_s), ("bf16", limits.bf16_per_s), ("int8", limits.int8_per_s)]
    told = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates if rate is not None)
    console.data(
        f"{limits.threads} thread{'s' if limits.threads > 1 else ''}: reads {limits.bytes_per_s / 1e9:.1f} GB/s, "
        f"multiplies {told} billion operations/s"
    )
    if not limits.bf16_native:
        console.data("this processor emulates bf16: unquantized weights are held in fp32, so prefer --quant int8")


def _row(found: BlockFigures) -> tuple[str, ...]:
    return (
        found.quant,
        f"{found.bytes / 1e6:.1f}",
        milliseconds(found.decode_s),
        f"{found.decode_share:.0%}",
        milliseconds(found.prefill_s),
        f"{found.prefill_share:.0%}",
    )
