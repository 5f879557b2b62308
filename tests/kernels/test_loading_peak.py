"""What loading takes for a moment: never more than the final size, a block as it is stored, and a tenth of both."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers.tiny_models import make_config
from swarmnode.kernels.loading.safetensors import serialize
from swarmnode.kernels.loading.shapes import block_shapes
from swarmnode.kernels.models.config import ExpertsConfig

BLOCKS = 4
DENSE = {"hidden_size": 1536, "intermediate_size": 4096, "num_heads": 12, "num_kv_heads": 12, "head_dim": 128}
EXPERTS = {**DENSE, "hidden_size": 1024, "intermediate_size": 2048, "num_heads": 8, "num_kv_heads": 8}
STORED = {
    "model_type": "llama",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
}

# VmHWM is the kernel's own peak of everything resident, pages of the mapped file included; clear_refs starts it over.
CODE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from swarmnode.kernels.engine import load_span
from swarmnode.kernels.loading.checkpoint import open_checkpoint

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

folder, small, quant = sys.argv[1:4]
opened = [open_checkpoint(Path(each), cache_dir=Path(folder) / "cache") for each in (small, folder)]
load_span(opened[0], 0, 1, dtype=torch.bfloat16, quant=quant)  # libraries and their buffers
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
span = load_span(opened[1], 0, opened[1].config.num_blocks, dtype=torch.bfloat16, quant=quant)
print(json.dumps({"peak": status("VmHWM") - before, "final": status("VmRSS") - before, "size": span.size_bytes}))
"""


def write_folder(folder, config, stored):
    """A checkpoint of random numbers in bf16; returns the bytes of one block."""
    folder.mkdir()
    (folder / "config.json").write_text(hf_config(config))
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    tensors = {}
    for index in range(config.num_blocks):
        for name, shape in block_shapes(config, index).items():
            count = torch.Size(shape).numel()
            values = noise.repeat(-(-count // len(noise)))[:count].view(shape)
            tensors[f"model.layers.{index}.{stored.get(name, name)}"] = values
    vocabulary = noise[: 64 * config.hidden_size].view(64, config.hidden_size)
    tensors |= {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}
    tensors["model.norm.weight"] = noise[: config.hidden_size]
    with (folder / "model.safetensors").open("wb") as file:
        for chunk in serialize(tensors, {}):
            file.write(chunk)
    return sum(values.nbytes for name, values in tensors.items() if name.startswith("model.layers.0."))


def hf_config(config):
    found = {
        **STORED,
        "num_hidden_layers": config.num_blocks,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }
    if config.experts is not None:
        found |= {
            "model_type": "mixtral",
            "num_local_experts": config.experts.count,
            "num_experts_per_tok": config.experts.active,
            "sliding_window": None,
        }
    return json.dumps(found)


MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def mixtral_names(config):
    found = {"mlp.router.weight": "block_sparse_moe.gate.weight"}
    for number in range(config.experts.count):
        for ours, theirs in MIXTRAL.items():
            found[f"mlp.experts.{number}.{ours}.weight"] = f"block_sparse_moe.experts.{number}.{theirs}.weight"
    return found


@pytest.fixture(scope="module", params=["dense", "experts"])
def folders(request, tmp_path_factory):
    """The folder to load, a small one to warm up with, the bytes of one stored block."""
    base = tmp_path_factory.mktemp("peak")
    if request.param == "dense":
        make, names = partial(make_config, **DENSE), lambda config: {}
    else:
        experts = ExpertsConfig(count=6, active=2, intermediate_size=2048)
        make, names = partial(make_config, **EXPERTS, experts=experts), mixtral_names
    small, big = make_config(num_blocks=1, hidden_size=256, intermediate_size=512), make(num_blocks=BLOCKS)
    write_folder(base / "small", small, {})
    return base / "big", base / "small", write_folder(base / "big", big, names(big))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quant", ["none", "int8", "nf4", "llm-int8"])
def test_the_peak_is_the_final_size_and_one_stored_block(folders, quant):
    folder, small, block = folders
    command = [sys.executable, "-P", "-c", CODE, str(folder), str(small), quant]
    done = subprocess.run(command, capture_output=True, timeout=100, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["final"] <= found["size"] * 1.1, found
    assert found["peak"] <= (found["size"] + block) * 1.1, found
