"""A family that swarmnode does not implement, in whole nodes: served, generated with, repaired, refused."""

from __future__ import annotations

import pytest
import torch
from helpers.foreign_models import make_foreign
from helpers.swarms import VOCAB, TinySwarm, byte_tokenizer, collect, ids_of
from helpers.tiny_models import load_oracle
from swarmnode.protocol.errors import ConfigError

PROMPT = [3 + (7 * n + n * n // 5) % 256 for n in range(150)]
"""Two prefill chunks."""
COUNT = 12
THIRDS = ((0, 1), (1, 2), (2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """GPT-2: learned positions belong to block 0, the head is the embedding."""
    torch.set_num_threads(1)
    folder = make_foreign(
        tmp_path_factory.mktemp("gpt2"), "gpt2", vocab_size=VOCAB, eos_token_id=None, bos_token_id=None
    )
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    model = load_oracle(folder)
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=COUNT, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return out[0, len(PROMPT) :].tolist()


@pytest.fixture
async def swarm(folder, tmp_path):
    async with TinySwarm(tmp_path, folder, repair_timeout_s=10) as swarm:
        await swarm.serve_all(*THIRDS)
        yield swarm
        await swarm.settled()


async def write(model, at=None, do=None):
    tokens = []
    async for piece in model.generate(PROMPT, max_new_tokens=COUNT, wire="fp32"):
        tokens.append(piece.token_id)
        if len(tokens) == at:
            await do()
    return tokens


@pytest.mark.parametrize("local_ends", [True, False])
async def test_three_servers_write_what_transformers_writes(local_ends, swarm, expected):
    model = await swarm.model(local_ends=local_ends)
    assert await write(model) == expected
    assert len(model.last_stats.route) == len(THIRDS)


async def test_a_server_dies(swarm, expected):
    await swarm.serve_all(*THIRDS)
    model = await swarm.model()
    assert await write(model, at=4, do=lambda: swarm.kill(swarm.serving(1))) == expected
    assert model.last_stats.repairs == 1


async def test_two_at_once_through_one_server(folder, tmp_path, expected):
    async with TinySwarm(tmp_path, folder) as swarm:
        await swarm.serve(0, 3)
        model = await swarm.model(local_ends=False)
        other = await swarm.model(local_ends=False)
        first = model.generate(PROMPT, max_new_tokens=COUNT, wire="fp32")
        tokens = [(await anext(first)).token_id]
        assert ids_of(await collect(other.generate(PROMPT, max_new_tokens=COUNT, wire="fp32"))) == expected
        assert tokens + ids_of(await collect(first)) == expected
        await swarm.settled()


async def test_it_is_announced_as_what_it_is(swarm):
    model = await swarm.model()
    announced = [server.announcement for server in (await model.view(fresh=True)).servers]
    assert {each.quant for each in announced} == {"hf"}
    assert len({each.compute_class for each in announced}) == 1


async def test_quantization_is_refused(folder, tmp_path):
    async with TinySwarm(tmp_path, folder) as swarm:
        with pytest.raises(ConfigError, match="--quant nf4 is not supported"):
            await swarm.serve(0, 3, quant="nf4")
