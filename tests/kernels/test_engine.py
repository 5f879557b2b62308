"""Loading, defaults, refusals, the head's storage, and the block against the plain reference."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import Q8Checkpoint, RandomCheckpoint, make_config
from swarmnode.kernels import linear
from swarmnode.kernels import span as span_module
from swarmnode.kernels.attention import attend, attend_fused, plan_queries
from swarmnode.kernels.engine import default_quant, load_embedding, load_head, load_span, span_bytes
from swarmnode.kernels.kvcache import KVPool
from swarmnode.kernels.linear import PlainLinear, make_linear
from swarmnode.kernels.models.config import RopeConfig
from swarmnode.kernels.norms import RMSNorm
from swarmnode.kernels.quant import int8
from swarmnode.kernels.quant.int8 import LEVELS, Int8Linear, Int8Weight, PortableInt8Linear, make_int8, quantize
from swarmnode.kernels.quant.llm_int8 import LlmInt8Linear, make_llm_int8
from swarmnode.kernels.quant.nf4 import NF4Linear, load_bitsandbytes, make_nf4
from swarmnode.kernels.quant.products import HALF_LEVELS, FbgemmProduct, OneDnnProduct, available_products
from swarmnode.kernels.reference import run_block
from swarmnode.kernels.span import Piece
from swarmnode.kernels.weight import Weight
from swarmnode.protocol.errors import ConfigError, CorruptCheckpoint, LocalProtocolError, ServerBusy

CPU = torch.device("cpu")
CONFIG = make_config()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "activation": "gelu"},
        {
            "family": "gemma3",
            "qk_norm": True,
            "post_norms": True,
            "norm_offset": 1.0,
            "activation": "gelu_tanh",
            "sliding_window": 30,
            "sliding_blocks": (True, False),
            "local_rope": RopeConfig(theta=300.0),
        },
    ],
)
@pytest.mark.parametrize(
    ("dtype", "quant", "bound"),
    [
        (torch.float32, "none", 1e-5),
        (torch.bfloat16, "none", 2e-2),
        (torch.bfloat16, "int8", 3e-2),
        (torch.bfloat16, "nf4", 0.3),
        (torch.bfloat16, "llm-int8", 5e-2),
    ],
)
def test_blocks_against_the_plain_reference(changes, dtype, quant, bound):
    checkpoint = RandomCheckpoint(make_config(**changes))
    rows = torch.randn(100, 128, generator=torch.Generator().manual_seed(2))
    expected = rows
    for index in range(2):
        expected = run_block(checkpoint.config, index, checkpoint.block(index, torch.float32), expected)
    span = load_span(checkpoint, 0, 2, dtype=dtype, quant=quant)
    pool = KVPool(1 << 24, checkpoint.config, 0, 2, dtype)
    assert relative_error(span.run(rows, [Piece(pool.open_lane(), 0, 100)]).float(), expected) < bound


def test_loading_reports_every_block():
    seen = []
    load_span(RandomCheckpoint(CONFIG), 0, 2, dtype=torch.float32, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]


def test_refusals_name_what_is_possible():
    checkpoint = RandomCheckpoint(CONFIG)
    for start, end in ((0, 3), (1, 1), (-1, 1)):
        with pytest.raises(ConfigError, match="2 blocks"):
            load_span(checkpoint, start, end, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"'int3'.*none, int8, nf4, llm-int8"):
        load_span(checkpoint, 0, 1, dtype=torch.float32, quant="int3")


def test_damaged_blocks_are_refused():
    class Damaged(RandomCheckpoint):
        def block(self, index, dtype):
            return self.damage(super().block(index, dtype))

    damaged = Damaged(CONFIG)
    damaged.damage = lambda tensors: {k: v for k, v in tensors.items() if "k_proj" not in k}
    with pytest.raises(CorruptCheckpoint, match=r"self_attn\.k_proj\.weight"):
        load_span(damaged, 0, 1, dtype=torch.float32)
    damaged.damage = lambda tensors: tensors | {"mlp.up_proj.weight": torch.ones(3, 3)}
    with pytest.raises(CorruptCheckpoint, match=r"mlp\.up_proj\.weight.*\(3, 3\)"):
        load_span(damaged, 0, 1, dtype=torch.float32)


def test_default_quantization():
    small = make_config(num_blocks=10)
    big = make_config(num_blocks=40, hidden_size=5120, intermediate_size=13824, num_heads=40, num_kv_heads=40)
    assert default_quant(small, 10, 10 * small.block_parameters() * 2) == "none"
    assert default_quant(small, 10, 1000) == "int8"
    assert default_quant(big, 40, 1000) == "nf4"
    sizes = [span_bytes(small, 10, torch.bfloat16, quant) for quant in ("none", "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("quant", ["none", "int8", "nf4", "llm-int8"])
def test_estimated_size_is_the_real_one(quant):
    config = make_config(hidden_size=512, intermediate_size=512, head_dim=128)
    span = load_span(RandomCheckpoint(config), 0, 2, dtype=torch.bfloat16, quant=quant)
    assert span.size_bytes == pytest.approx(span_bytes(config, 2, torch.bfloat16, quant), rel=0.25)


def test_a_pass_is_checked():
    span = load_span(RandomCheckpoint(CONFIG), 0, 2, dtype=torch.float32)
    pool = KVPool(1 << 24, CONFIG, 0, 2, torch.float32)
    lane, rows = pool.open_lane(), torch.zeros(4, 128)
    for hidden, pieces, borders in (
        (rows, [Piece(lane, 0, 3)], (0, 2)),
        (rows[:0], [], (0, 2)),
        (rows[:, :5], [Piece(lane, 0, 4)], (0, 2)),
        (rows, [Piece(lane, 0, 2), Piece(lane, 2, 2)], (0, 2)),
        (rows, [Piece(lane, 0, 4), Piece(pool.open_lane(), 0, 0)], (0, 2)),
        (rows, [Piece(lane, 0, 4)], (1, 3)),
        (rows, [Piece(pool.open_lane(0, 1), 0, 4)], (0, 2)),
        (rows, [Piece(lane, 1, 4)], (0, 2)),
    ):
        with pytest.raises(LocalProtocolError):
            span.run(hidden, pieces, *borders)
    assert lane.length == 0


def test_rows_of_a_pass_are_bounded(monkeypatch):
    monkeypatch.setattr(span_module, "MAX_ROWS", 3)
    span = load_span(RandomCheckpoint(CONFIG), 0, 1, dtype=torch.float32)
    lane = KVPool(1 << 24, CONFIG, 0, 1, torch.float32).open_lane()
    with pytest.raises(LocalProtocolError):
        span.run(torch.zeros(4, 128), [Piece(lane, 0, 4)])


def test_a_full_cache_extends_no_lane():
    span = load_span(RandomCheckpoint(CONFIG), 0, 2, dtype=torch.float32)
    pool = KVPool(3 * 64 * 2 * 2 * 2 * 32 * 4, CONFIG, 0, 2, torch.float32)
    lanes = [pool.open_lane(), pool.open_lane()]
    with pytest.raises(ServerBusy):
        span.run(torch.zeros(200, 128), [Piece(lanes[0], 0, 100), Piece(lanes[1], 0, 100)])
    assert [lane.length for lane in lanes] == [0, 0]


@pytest.mark.parametrize("scale", [1.0, 8.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_8_bit_embedding_is_exact(dtype, scale):
    config = make_config(tied_head=True, embed_scale=scale)
    checkpoint = Q8Checkpoint(config)
    ids = torch.tensor([0, 5, 63, 5])
    expected = checkpoint.embedding(torch.float32)[ids].to(dtype)
    if scale != 1.0:
        expected = expected * torch.tensor(scale, dtype=dtype)
    embedding = load_embedding(checkpoint, dtype=dtype)
    assert torch.equal(embedding(ids), expected)
    assert embedding.size_bytes < 64 * 128 * 1.1


def test_an_8_bit_head_stays_small_and_close():
    checkpoint = Q8Checkpoint(make_config(tied_head=True))
    hidden = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    exact = load_head(checkpoint, dtype=torch.float32)
    small = load_head(checkpoint, dtype=torch.bfloat16)
    norm = RMSNorm(checkpoint.final_norm(torch.float32)["norm.weight"], 1e-6, CPU)
    assert relative_error(exact.logits(hidden), norm(hidden) @ checkpoint.embedding(torch.float32).T) < 1e-6
    assert relative_error(small.logits(hidden), exact.logits(hidden)) < 8e-3
    assert small.size_bytes < 64 * 128 * 1.1
    assert torch.equal(small.logits(hidden)[3:4], small.logits(hidden[3:4]))


def test_head_checks_its_rows():
    head = load_head(RandomCheckpoint(CONFIG), dtype=torch.float32)
    with pytest.raises(LocalProtocolError):
        head.logits(torch.zeros(2, 5))


@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_int8_activations_keep_15_bits(outlier):
    rng = torch.Generator().manual_seed(4)
    weight, rows = torch.randn(300, 256, generator=rng), torch.randn(8, 256, generator=rng)
    rows[:, 3] *= outlier
    expected = rows @ quantize(Weight.of(weight)).floats().T
    linear = make_int8(Weight.of(weight), None, CPU)
    assert isinstance(linear, Int8Linear)
    assert relative_error(linear(rows), expected) < 2e-4
    assert relative_error(expected, rows @ weight.T) < 1.2e-2


def test_int8_of_zeros_and_of_many_rows():
    linear = make_int8(Weight.of(torch.zeros(1024, 64)), torch.ones(1024), CPU)
    assert torch.equal(linear(torch.zeros(4, 64)), torch.ones(4, 1024))
    weight = torch.randn(1024, 64, generator=torch.Generator().manual_seed(1))
    linear, rows = make_int8(Weight.of(weight), None, CPU), torch.ones(4100, 64)
    assert torch.equal(linear(rows)[-4:], linear(rows[:4]))


@pytest.mark.parametrize("make", [make_int8, make_nf4])
def test_small_weights_are_rounded_but_plain(make):
    weight, rows = torch.randn(96, 128, generator=torch.Generator().manual_seed(4)), torch.eye(128)
    small = make(Weight.of(weight), None, CPU)
    assert isinstance(small, PlainLinear)
    big = make(Weight.of(weight.repeat(8, 1)), None, CPU)
    assert relative_error(small(rows), big(rows)[:, :96]) < 5e-3


def int8_linear(weight, kind=FbgemmProduct, bias=None):
    return Int8Linear(weight, [kind(weight.values, weight.scales)], bias)


@pytest.mark.parametrize("columns", [None, torch.linspace(0.1, 9, 128)])
def test_portable_int8_is_the_same_weight(columns):
    rng = torch.Generator().manual_seed(4)
    weight, rows, bias = torch.randn(96, 128, generator=rng), torch.randn(8, 128, generator=rng), torch.randn(96)
    quantized = quantize(Weight.of(weight))
    quantized = Int8Weight(quantized.values, quantized.scales, columns)
    portable = PortableInt8Linear(quantized, bias)(rows)
    assert relative_error(portable, int8_linear(quantized, bias=bias)(rows)) < 1e-2
    assert relative_error(portable, rows @ quantized.floats().T + bias) < 1e-2


@pytest.mark.parametrize("levels", [127, 63])
def test_both_integer_libraries_give_the_same_bits(monkeypatch, levels):
    """So servers whose torch or processor choose differently still compute alike."""
    if len(available_products()) < 2:
        pytest.skip("this torch has only one of them")
    monkeypatch.setattr(int8, "row_levels", lambda: levels)
    rng = torch.Generator().manual_seed(4)
    weight = quantize(Weight.of(torch.randn(320, 256, generator=rng)))
    for count in (1, 3, 40):
        rows = torch.randn(count, 256, generator=rng)
        found = [int8_linear(weight, kind)(rows) for kind in (FbgemmProduct, OneDnnProduct)]
        assert torch.equal(*found)
        assert relative_error(found[0], rows @ weight.floats().T) < 4e-4


def test_rows_without_vnni_cannot_saturate():
    """Pairs u8 * s8 are added in 16 bits there."""
    assert 2 * (HALF_LEVELS + HALF_LEVELS + 1) * LEVELS < 2**15 <= 2 * 255 * LEVELS


def test_a_wide_weight_is_sliced_alike(monkeypatch):
    rng = torch.Generator().manual_seed(4)
    weight, rows = torch.randn(1000, 96, generator=rng), torch.randn(5, 96, generator=rng)
    whole = make_int8(Weight.of(weight), None, CPU)(rows)
    monkeypatch.setattr(int8, "_WIDE", 500)
    monkeypatch.setattr(int8, "_SLICE", 300)
    assert torch.equal(make_int8(Weight.of(weight), None, CPU)(rows), whole)


@pytest.mark.parametrize("amx", [False, True])
def test_without_native_bf16_weights_are_held_in_fp32(monkeypatch, amx):
    linear.multiplies_bf16.cache_clear()
    monkeypatch.setattr(linear, "cpu_has", lambda probe: amx and "amx" in probe)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    try:
        weight, rows = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)), torch.eye(256)
        made = make_linear(Weight.of(weight), None, torch.bfloat16, CPU)
        big = make_config(num_blocks=40, hidden_size=5120, intermediate_size=13824, num_heads=40, num_kv_heads=40)
        room = span_bytes(big, 40, torch.bfloat16, "int8")
        assert made.size_bytes == 512 * 256 * (2 if amx else 4)
        assert span_bytes(CONFIG, 1, torch.bfloat16, "none") == CONFIG.block_parameters() * (2 if amx else 4)
        assert (default_quant(big, 40, room), default_quant(big, 40, room - 1)) == ("nf4" if amx else "int8", "nf4")
        assert torch.equal(made(rows), weight.bfloat16().float().T)
    finally:
        linear.multiplies_bf16.cache_clear()


def test_llm_int8_is_bitsandbytes_own():
    library = load_bitsandbytes()
    rng = torch.Generator().manual_seed(4)
    weight, rows = torch.randn(320, 256, generator=rng), torch.randn(8, 256, generator=rng)
    rows[3, 7] = 70_000.0  # more than fp16 holds
    module = library.nn.Linear8bitLt(256, 320, bias=False, has_fp16_weights=False, threshold=6.0)
    module.load_state_dict({"weight": weight})
    expected = module.to("cpu").eval()(rows.clamp(max=65_504))
    made = make_llm_int8(Weight.of(weight), torch.ones(320), CPU)
    assert isinstance(made, LlmInt8Linear)
    assert torch.equal(made(rows), expected + 1)
    assert relative_error(made(rows[:3]) - 1, rows[:3] @ weight.T) < 2e-2
    assert relative_error(made(rows)[3], rows[3] @ weight.T) < 0.1  # of 70,000, 65,504 are left


def test_nf4_is_bitsandbytes_own():
    library = load_bitsandbytes()
    rng = torch.Generator().manual_seed(4)
    weight, rows = torch.randn(96, 128, generator=rng), torch.randn(8, 128, generator=rng)
    packed, state = library.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    expected = rows @ library.functional.dequantize_4bit(packed, state).T
    linear = NF4Linear(Weight.of(weight), torch.ones(96), CPU)
    assert relative_error(linear(rows) - 1, expected) < 1e-2
    odd = NF4Linear(Weight.of(weight[:50]), None, CPU)  # outputs are padded inside
    assert torch.equal(odd(rows), linear(rows)[:, :50] - 1) or relative_error(odd(rows), expected[:, :50]) < 1e-2


def test_nf4_falls_back_where_blocks_do_not_fit(caplog):
    caplog.set_level("INFO")
    linear = make_nf4(Weight.of(torch.randn(64, 96)), None, CPU)
    assert not isinstance(linear, NF4Linear)
    assert "96 values is held in int8" in caplog.text


def test_bitsandbytes_gets_no_package_named_kernels():
    """It imports `kernels`, which at our root is this project and elsewhere may download."""
    root = Path(__file__).parents[2]
    code = (
        "import sys; from swarmnode.kernels.quant.nf4 import load_bitsandbytes; load_bitsandbytes();"
        "assert 'kernels' not in sys.modules; import os; assert 'HF_HUB_OFFLINE' not in os.environ"
    )
    import os

    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "HF_HUB_OFFLINE")
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    assert b"kernels" not in done.stderr


@pytest.mark.parametrize("window", [None, 20])
def test_fused_attention_agrees(window):
    rng = torch.Generator().manual_seed(1)
    queries = torch.randn(100, 4, 16, generator=rng)
    keys, values = torch.randn(2, 192, 16, generator=rng), torch.randn(2, 192, 16, generator=rng)
    for block in plan_queries(30, 100, group=2, window=window, device=CPU):
        part = slice(block.key_start, block.key_end)
        ours, fused = (torch.zeros(block.last - block.first, 64) for _ in range(2))
        attend(queries[block.first : block.last], keys[:, part], values[:, part], block, ours)
        attend_fused(queries[block.first : block.last], keys[:, part], values[:, part], block, fused)
        assert torch.allclose(ours, fused, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["none", "int8", "nf4", "llm-int8"])
def test_on_a_gpu(quant):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    checkpoint = RandomCheckpoint(make_config(hidden_size=256, intermediate_size=512))
    rows = torch.randn(90, 256, generator=torch.Generator().manual_seed(2))

    def run(device):
        span = load_span(checkpoint, 0, 2, dtype=torch.bfloat16, quant=quant, device=device)
        head = load_head(checkpoint, dtype=torch.bfloat16, device=device)
        lane = KVPool(1 << 24, checkpoint.config, 0, 2, torch.bfloat16, device).open_lane()
        hidden = [span.run(rows[:80], [Piece(lane, 0, 80)]), span.run(rows[80:], [Piece(lane, 80, 10)])]
        return head.logits(torch.cat(hidden)).cpu()

    assert relative_error(run("cuda"), run("cpu")) < 5e-2
