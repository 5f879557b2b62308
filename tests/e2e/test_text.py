"""The real model over real processes writes what one machine writes."""

from __future__ import annotations

import pytest
import torch
from helpers.gemma import transformers_gemma
from helpers.swarms import collect, ids_of
from swarmnode.node.node import Node

pytestmark = [pytest.mark.e2e, pytest.mark.weights, pytest.mark.timeout(300)]

THIRDS = ((0, 6), (6, 12), (12, 18))
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
    "Die Hauptstadt von Deutschland",
    "Water boils at",
)
NEAR_TIE = 1e-3
TOKENS = 320


@pytest.fixture(scope="module")
def oracle(gemma):
    """transformers on the same dequantized weights, in fp32."""
    model = transformers_gemma(gemma, torch.float32)
    model.generation_config.eos_token_id = None
    return model


def oracle_greedy(oracle, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Tokens, and by how much each was ahead of the second best."""
    out = oracle.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    gaps = [float(best[0] - best[1]) for best in (logits[0].topk(2).values for logits in out.logits)]
    return out.sequences[0, len(prompt) :].tolist(), gaps


async def near_ties(model, prompt: list[int], expected: list[int], gaps: list[float]) -> int:
    """Follow the oracle's tokens; where ours differ the oracle itself must have been undecided. Returns how often."""
    ties, done = 0, 0
    while done < len(expected):
        rest = len(expected) - done
        ours = ids_of(await collect(model.generate(prompt + expected[:done], max_new_tokens=rest, wire="fp32")))
        same = next((n for n, pair in enumerate(zip(ours, expected[done:], strict=False)) if pair[0] != pair[1]), None)
        if same is None and len(ours) == rest:
            return ties
        at = done + (len(ours) if same is None else same)
        if same is None:  # an end token, which the oracle writes on after
            done = at
            continue
        assert gaps[at] < NEAR_TIE, f"token {at}: {ours[same]} instead of {expected[at]}, which was {gaps[at]} ahead"
        ties, done = ties + 1, at + 1
    return ties


async def test_three_processes_write_what_transformers_writes(fp32, gemma, oracle, node_config):
    """One prompt; all five in the slow test below."""
    fp32.ensure(*THIRDS)
    async with Node(node_config(fp32.address)) as client:
        for local_ends in (False, True):
            model = await client.model("gemma3-270m", local_ends=local_ends, dtype="fp32")
            prompt = model.tokenizer.encode(PROMPTS[0])
            expected, gaps = oracle_greedy(oracle, prompt, 16)
            assert await near_ties(model, prompt, expected, gaps) == 0
            assert len(model.last_stats.route) == 3


@pytest.mark.slow
async def test_three_processes_write_what_transformers_writes_for_five_prompts(fp32, oracle, node_config):
    fp32.ensure(*THIRDS)
    ties = 0
    async with Node(node_config(fp32.address)) as client:
        model = await client.model("gemma3-270m", local_ends=False, dtype="fp32")
        for text in PROMPTS:
            prompt = model.tokenizer.encode(text)
            ties += await near_ties(model, prompt, *oracle_greedy(oracle, prompt, 64))
    print(f"near ties: {ties} of {64 * len(PROMPTS)} tokens")
    assert ties <= 1


@pytest.mark.slow
def test_the_oracle_has_the_weights_transformers_reads_from_the_file(gemma, oracle):
    """transformers' own GGUF reader gives the same tensors, so `oracle` is transformers on the same file."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate installed")
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(gemma.path.parent, gguf_file=gemma.path.name, dtype=torch.float32)
    ours = oracle.state_dict()
    theirs = own.state_dict()
    assert set(theirs) == set(ours)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


async def test_three_processes_write_what_one_process_writes(bf16, gemma, node_config):
    """In the default codec, every token, with and without the model's ends at the client."""
    bf16.ensure(*THIRDS)
    async with Node(node_config()) as alone, Node(node_config(bf16.address)) as client:
        await alone.serve("gemma3-270m", span=(0, 18))
        one = await alone.model("gemma3-270m")
        for text in PROMPTS[:2]:
            expected = await collect(one.generate(text, max_new_tokens=32, wire="bf16"))
            for local_ends in (False, True):
                model = await client.model("gemma3-270m", local_ends=local_ends)
                pieces = await collect(model.generate(text, max_new_tokens=32, wire="bf16"))
                assert ids_of(pieces) == ids_of(expected)
                assert [piece.text for piece in pieces] == [piece.text for piece in expected]
                assert len(model.last_stats.route) == 3


async def test_eight_bit_activations_hardly_change_the_model(bf16, node_config, prose):
    """Teacher-forced on real prose: the same favourite in 95 of 100 places, and a small divergence."""
    bf16.ensure(*THIRDS)
    async with Node(node_config(bf16.address)) as client:
        model = await client.model("gemma3-270m", local_ends=True)
        ids = model.tokenizer.encode(prose[:4000])[:TOKENS]
        exact = (await model.forward(ids, wire="bf16")).log_softmax(-1)
        coarse = (await model.forward(ids, wire="int8s")).log_softmax(-1)
        same = (exact.argmax(-1) == coarse.argmax(-1)).float().mean().item()
        divergence = (exact.exp() * (exact - coarse)).sum(-1).mean().item()
        print(f"int8s over 3 hops, {len(ids)} tokens: top-1 {same:.2%}, KL {divergence:.2e}")
    assert len(ids) >= 300
    assert same >= 0.95
    assert divergence < 5e-3
