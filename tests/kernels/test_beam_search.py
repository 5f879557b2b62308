"""Beam search against transformers' own, on a toy model whose logits depend on the whole text."""

from __future__ import annotations

import pytest
import torch
from swarmnode.kernels.beams import NEVER, BeamSearch
from swarmnode.kernels.sampling import continuations
from swarmnode.protocol.errors import ServerFailed
from swarmnode.protocol.sampling import SamplingParams
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
VOCAB = 50
PROMPT = [3, 14, 15, 9, 2, 6]


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.35)
    return model


def search(toy, params: SamplingParams, count: int, beams: int, ends, **options) -> list[tuple[int, ...]]:
    beam_search = BeamSearch(beams, count, frozenset(ends), **options)
    while not beam_search.done:
        texts = [[*PROMPT, *beam.tokens] for beam in beam_search.running]
        with torch.no_grad():
            logits = toy(torch.tensor(texts)).logits[:, -1]
        running = beam_search.running
        moves = beam_search.step(
            [continuations(row, params, text, beam_search.wanted) for row, text in zip(logits, texts, strict=True)]
        )
        again = [(*running[move.parent].tokens, move.token) for move in moves]
        assert again == [beam.tokens for beam in beam_search.running]
    return [beam.tokens for beam in beam_search.best(beams)]


def oracle(toy, count: int, beams: int, ends, **options) -> list[tuple[int, ...]]:
    config = GenerationConfig(
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=VOCAB - 1,
        **options,
    )
    out = toy.generate(torch.tensor([PROMPT]), generation_config=config)[:, len(PROMPT) :].tolist()
    return [cut(row, ends, count) for row in out]


def cut(row: list[int], ends, count: int) -> tuple[int, ...]:
    """Without what pads it to the longest."""
    first = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
    return tuple(row[: min(first + 1, count)])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True, NEVER])
@pytest.mark.parametrize(("beams", "ends"), [(2, ()), (3, (7,)), (4, (1, 7, 20, 33)), (5, tuple(range(10)))])
def test_beams_equal_those_of_transformers(beams, ends, early_stopping, length_penalty, toy):
    options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    expected = oracle(toy, 14, beams, ends, **options)
    assert search(toy, SamplingParams(), 14, beams, ends, **options) == expected
    assert len(expected) == beams


def test_penalties_come_after_the_softmax_as_there(toy):
    expected = oracle(toy, 12, 3, (7,), repetition_penalty=1.6)
    assert search(toy, SamplingParams(repetition_penalty=1.6), 12, 3, (7,)) == expected
    assert search(toy, SamplingParams(), 12, 3, (7,)) != expected


def test_one_token_and_one_beam(toy):
    assert search(toy, SamplingParams(), 1, 4, ()) == oracle(toy, 1, 4, ())
    greedy = toy.generate(
        torch.tensor([PROMPT]),
        generation_config=GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=VOCAB - 1),
    )
    assert search(toy, SamplingParams(), 9, 1, ()) == [tuple(greedy[0, len(PROMPT) :].tolist())]


def test_nonsense_is_no_continuation():
    with pytest.raises(ServerFailed, match="not finite"):
        continuations(torch.tensor([1.0, float("nan")]), SamplingParams(), [], 2)
