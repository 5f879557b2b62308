"""CausalLM is used as a transformers model is, and gives what that gives; from a thread, beside a loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch
from helpers.swarms import TinySwarm, make_model
from helpers.tiny_models import load_oracle
from swarmnode import CausalLM
from swarmnode.node.client.causal import DEFAULT_LENGTH
from swarmnode.protocol.errors import ConfigError, NoRoute
from transformers import TextStreamer

THIRDS = ((0, 1), (1, 2), (2, 3))
PROMPT = torch.tensor([[107, 104, 111, 111, 114]])
LONG = torch.tensor([[3 + (7 * n + n * n // 5) % 256 for n in range(150)]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
async def use(folder, tmp_path):
    """Run a function of a CausalLM on a thread, while this loop serves."""
    async with TinySwarm(tmp_path, folder) as swarm:
        await swarm.serve_all(*THIRDS)

        async def use(work: Callable[[CausalLM], None], *, local_ends: bool = True) -> None:
            name = swarm.model_path if local_ends else None
            folders = {f"{kind}_dir": tmp_path / "lm" / kind for kind in ("data", "state", "cache")}

            def run() -> None:
                with CausalLM.from_pretrained(
                    name, peers=swarm.entrance, local_ends=local_ends, dtype="fp32", **folders
                ) as lm:
                    work(lm)

            await asyncio.to_thread(run)

        yield use
        await swarm.settled()


@pytest.mark.parametrize("local_ends", [True, False])
async def test_generate_gives_what_transformers_gives(local_ends, use, folder):
    oracle = load_oracle(folder)

    def work(lm):
        for prompt in (PROMPT, LONG):
            expected = oracle.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=1)
            assert torch.equal(lm.generate(prompt, max_new_tokens=20, wire="fp32"), expected)
        beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9, "pad_token_id": 1}
        expected = oracle.generate(PROMPT, do_sample=False, **beams)
        assert torch.equal(lm.generate(PROMPT, wire="fp32", **beams), expected)
        assert lm.generate(PROMPT).shape == (1, DEFAULT_LENGTH)
        assert lm.generate(PROMPT, max_length=9).shape == (1, 9)

    await use(work, local_ends=local_ends)


async def test_batches_with_padding(use, folder):
    oracle = load_oracle(folder)
    padded = torch.tensor([[0, 0, 107, 104, 111], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def work(lm):
        whole = lm.generate(padded, attention_mask=mask, max_new_tokens=8, wire="fp32")
        assert torch.equal(whole[:, :5], padded)
        for row, prompt in enumerate((padded[:1, 2:], padded[1:])):
            expected = oracle.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=1)
            assert torch.equal(whole[row, 5:], expected[0, prompt.shape[1] :])
        end = int(whole[0, 6])
        first = (whole[0, 5:] == end).nonzero()[0].item()
        cut = lm.generate(padded, attention_mask=mask, max_new_tokens=8, wire="fp32", eos_token_id=end, pad_token_id=99)
        assert cut[0, 5 + first] == end
        assert (cut[0, 6 + first :] == 99).all()

    await use(work)


async def test_draws_follow_torchs_seed_or_the_one_given(use):
    def work(lm):
        how = {"max_new_tokens": 12, "do_sample": True, "temperature": 6.0, "num_return_sequences": 3}
        torch.manual_seed(5)
        first = lm.generate(PROMPT, **how)
        assert first.shape == (3, 17)
        assert len({tuple(row) for row in first.tolist()}) == 3
        assert not torch.equal(lm.generate(PROMPT, **how), first)
        torch.manual_seed(5)
        assert torch.equal(lm.generate(PROMPT, **how), first)
        assert torch.equal(lm.generate(PROMPT, seed=7, **how), lm.generate(PROMPT, seed=7, **how))

    await use(work)


class ByteTokenizer:
    """What a TextStreamer asks of a tokenizer."""

    def __init__(self, tokenizer):
        self.decode = lambda ids, **_: tokenizer.decode(ids)


async def test_a_streamer_of_transformers(use, capsys):
    def work(lm):
        streamer = TextStreamer(ByteTokenizer(lm.tokenizer), skip_prompt=True)
        out = lm.generate(PROMPT, max_new_tokens=12, streamer=streamer, wire="fp32")
        assert capsys.readouterr().out == lm.tokenizer.decode(out[0, 5:].tolist()) + "\n"
        with pytest.raises(ConfigError, match="one sequence"):
            lm.generate(PROMPT, streamer=streamer, num_return_sequences=2)

    await use(work)


async def test_a_streamer_that_fails_frees_every_server(use):
    class Broken:
        def put(self, value):
            raise ZeroDivisionError

        def end(self):
            raise AssertionError("it did not end")

    def work(lm):
        with pytest.raises(ZeroDivisionError):
            lm.generate(LONG, max_new_tokens=50, streamer=Broken())

    await use(work)


@pytest.mark.parametrize("local_ends", [True, False])
async def test_logits_and_hidden_states_of_any_block(local_ends, use, folder):
    """Behind the last block transformers shows what the final norm made of it: so only those before are compared."""
    with torch.no_grad():
        expected = load_oracle(folder)(LONG, output_hidden_states=True)

    def work(lm):
        assert (lm(LONG, wire="fp32").logits - expected.logits).abs().max() < 1e-4
        for after in ((1,), (2,), (1, 2)):
            states = lm.hidden_states(LONG, after=after, wire="fp32")
            assert len(states) == len(after)
            for state, block in zip(states, after, strict=True):
                assert (state - expected.hidden_states[block]).abs().max() < 1e-3
        if local_ends:
            whole = lm(LONG, output_hidden_states=True, wire="fp32").hidden_states
            assert len(whole) == 4
            assert torch.equal(whole[0], expected.hidden_states[0])
        else:
            with pytest.raises(ConfigError, match="local_ends"):
                lm.hidden_states(LONG, after=(0,))
        with pytest.raises(ConfigError, match="3 blocks"):
            lm.hidden_states(LONG, after=(4,))

    await use(work, local_ends=local_ends)


async def test_custom_spans(use, folder):
    with torch.no_grad():
        states = load_oracle(folder)(LONG, output_hidden_states=True).hidden_states

    def work(lm):
        with lm.session(max_length=200, span=(1, 2), wire="fp32") as session:
            parts = [session.step(part) for part in states[1].split([100, 50], 1)]
            assert (torch.cat(parts, 1) - states[2]).abs().max() < 1e-3
            session.truncate(20)
            assert session.position == 20

    await use(work)


async def test_a_coroutine_is_told_to_use_node(use):
    loops = []

    def work(lm):
        loops.append(threading.current_thread())

        async def wrong():
            lm.generate(PROMPT)

        with pytest.raises(ConfigError, match="use Node"):
            asyncio.run(wrong())

    await use(work)
    assert loops


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_beams": 2, "do_sample": True}, "beams are not drawn"),
        ({"num_beams": 2, "stop_strings": "x"}, "beams are not drawn"),
        ({"attention_mask": torch.ones(1, 2)}, "attention mask"),
        ({"max_length": 5}, "max_new_tokens is 0"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
    ],
)
async def test_what_cannot_be_done_is_named(options, problem, use):
    def work(lm):
        with pytest.raises(ConfigError, match=problem):
            lm.generate(PROMPT, **options)
        with pytest.raises(ConfigError, match="shape"):
            lm.generate(PROMPT[0])

    await use(work)


async def test_a_failure_is_told_and_leaves_it_usable(folder, tmp_path):
    async with TinySwarm(tmp_path, folder) as swarm:
        await swarm.serve_all((0, 1), (2, 3))

        def run():
            lm = CausalLM.from_pretrained(swarm.model_path, peers=swarm.entrance, local_ends=True)
            with pytest.raises(NoRoute, match="1:2"):
                lm.generate(PROMPT)
            assert lm.config.num_blocks == 3
            lm.close()
            lm.close()

        await asyncio.to_thread(run)
