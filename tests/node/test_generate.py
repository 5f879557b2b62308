"""What comes out of a chain of servers is what one machine gives: tiny models, transformers as the oracle."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch
from helpers.swarms import TinySwarm, collect, eventually, ids_of, make_model, spans_in_use, text_of
from helpers.tiny_models import load_oracle
from swarmnode.kernels.tokenizer import Tokenizer
from swarmnode.node.client import chain, link
from swarmnode.protocol.errors import ConfigError, NoRoute, ServerBusy
from swarmnode.protocol.sampling import SamplingParams

FAMILIES = ("llama", "llama-mqa-biases", "mistral", "qwen2", "qwen3", "gemma3", "gemma3-untied-softcap")
THIRDS = ((0, 1), (1, 2), (2, 3))
PROMPT = [104 + 3, 101 + 3, 108 + 3, 108 + 3, 111 + 3]
LONG = [3 + (7 * n + n * n // 5) % 256 for n in range(300)]
"""Three prefill chunks, and longer than every window."""
ONE_TILE = 2 * 64 * 256
"""Bytes of KV cache that 64 tokens need in two blocks of the tiny Llama."""
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoint folders by variation, each made when first asked for."""
    made = {}

    def checkpoint(name: str, **changes):
        key = name, *sorted(changes.items())
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(name), name, **changes)
        return made[key]

    return checkpoint


@pytest.fixture
async def thirds(checkpoints, tmp_path):
    """A Llama over three servers."""
    async with TinySwarm(tmp_path, checkpoints("llama")) as swarm:
        await swarm.serve_all(*THIRDS)
        yield swarm
        await swarm.settled()


def oracle_tokens(folder, prompt: list[int], count: int) -> list[int]:
    """What transformers writes, greedily."""
    out = load_oracle(folder).generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


async def greedy(model, prompt, count: int, **options) -> list[int]:
    return ids_of(await collect(model.generate(prompt, max_new_tokens=count, wire="fp32", **options)))


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_over_three_servers_equal_transformers(family, checkpoints, tmp_path):
    folder = checkpoints(family)
    async with TinySwarm(tmp_path, folder) as swarm:
        await swarm.serve_all(*THIRDS)
        model, thin = await swarm.model(), await swarm.model(local_ends=False)
        for prompt in (PROMPT, LONG):
            expected = oracle_tokens(folder, prompt, 40)
            assert await greedy(model, prompt, 40) == expected
            assert len(model.last_stats.route) == 3
            assert await greedy(thin, prompt, 40) == expected
        await swarm.settled()


@pytest.mark.parametrize("local_ends", [True, False])
async def test_logits_of_a_whole_sequence(local_ends, thirds, checkpoints):
    model = await thirds.model(local_ends=local_ends)
    with torch.no_grad():
        expected = load_oracle(checkpoints("llama"))(torch.tensor([LONG])).logits[0]
    logits = await model.forward(LONG, wire="fp32")
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
async def test_hidden_states_by_steps_and_truncations(family, checkpoints, tmp_path):
    """Whatever the steps, rows equal those of one pass through transformers' blocks."""
    folder = checkpoints(family)
    config = load_oracle(folder).config
    hidden = torch.randn(2, 200, config.hidden_size, generator=torch.Generator().manual_seed(3))
    async with TinySwarm(tmp_path, folder) as swarm:
        await swarm.serve_all((0, 2), (2, 3))
        model = await swarm.model()
        async with await model.session(max_length=256, batch=2, wire="fp32") as whole:
            expected = await whole.step(hidden)
        async with await model.session(max_length=256, batch=2, wire="fp32") as session:
            parts = [await session.step(part) for part in hidden.split([1, 130, 1, 68], dim=1)]
            assert torch.equal(torch.cat(parts, 1), expected)
            for position in (199, 150, 190, 20, 0):
                position = min(position, session.position)
                await session.truncate(position)
                assert session.position == position
                again = await session.step(hidden[:, position : position + 30])
                assert torch.equal(again, expected[:, position : position + 30]), position
        await swarm.settled()
    assert (expected - oracle_hidden(folder, hidden)).abs().max() < 1e-3


def oracle_hidden(folder, hidden: torch.Tensor) -> torch.Tensor:
    """transformers' blocks on the same hidden states, before the final norm."""
    caught = []
    model = load_oracle(folder).model
    model.layers[-1].register_forward_hook(lambda _, __, out: caught.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(inputs_embeds=hidden)
    return caught[0]


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8s"])
async def test_cut_points_decide_not_servers(wire, thirds):
    """One server that covers a cut encodes and decodes there, so three servers and a new one give the same rows."""
    model = await thirds.model()
    hidden = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(4))
    async with await model.session(max_length=64, wire=wire) as session:
        first = await session.step(hidden[:, :10])
        await thirds.serve(0, 3)
        await thirds.kill(thirds.serving(1))
        second = await session.step(hidden[:, 10:])
    async with TinySwarm(thirds._home / "other", thirds.model_path) as other:
        await other.serve_all(*THIRDS)
        async with await (await other.model()).session(max_length=64, wire=wire) as session:
            assert torch.equal(await session.step(hidden), torch.cat([first, second], 1))


async def test_a_seed_decides_the_text_whatever_the_chain(checkpoints, tmp_path):
    texts = []
    for number, spans in enumerate(([(0, 3)], THIRDS)):
        async with TinySwarm(tmp_path / str(number), checkpoints("llama")) as swarm:
            await swarm.serve_all(*spans)
            for local_ends in (True, False):
                model = await swarm.model(local_ends=local_ends)
                pieces = model.generate(PROMPT, max_new_tokens=48, sampling=SAMPLED, wire="fp32")
                texts.append(ids_of(await collect(pieces)))
            other = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=12)
            pieces = model.generate(PROMPT, max_new_tokens=48, sampling=other, wire="fp32")
            assert ids_of(await collect(pieces)) != texts[0]
            await swarm.settled()
    assert texts[0] == texts[1] == texts[2] == texts[3]


async def test_penalties_need_the_history_and_the_client_has_it(thirds):
    """A thin client then gets logits and samples itself."""
    params = SamplingParams(repetition_penalty=1.5)
    both = [
        await greedy(await thirds.model(local_ends=local_ends), PROMPT, 30, sampling=params)
        for local_ends in (True, False)
    ]
    assert both[0] == both[1]
    assert both[0] != await greedy(await thirds.model(), PROMPT, 30)


@pytest.mark.parametrize("local_ends", [True, False])
async def test_biases_and_log_probabilities_whoever_samples(local_ends, thirds, checkpoints):
    model = await thirds.model(local_ends=local_ends)
    first, second = (await greedy(model, PROMPT, 2))[:2]
    bias = SamplingParams(logit_bias={first: -100.0})
    assert first not in await greedy(model, PROMPT, 20, sampling=bias)
    many = SamplingParams(logit_bias={first: -100.0, **{300 + number: 1.0 for number in range(200)}})
    assert not many.fits_wire
    assert await greedy(model, PROMPT, 20, sampling=many) == await greedy(model, PROMPT, 20, sampling=bias)
    pieces = await collect(model.generate(PROMPT, max_new_tokens=12, wire="fp32", top_logprobs=3))
    tokens = ids_of(pieces)
    assert tokens[:2] == [first, second]
    with torch.no_grad():
        logits = load_oracle(checkpoints("llama"))(torch.tensor([PROMPT + tokens])).logits[0]
    for number, piece in enumerate(pieces):
        expected = torch.log_softmax(logits[len(PROMPT) - 1 + number], 0)
        values, ids = expected.topk(3)
        assert piece.logprob == pytest.approx(expected[piece.token_id].item(), abs=1e-4)
        assert [token for token, _ in piece.top_logprobs] == ids.tolist()
        assert [value for _, value in piece.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)


async def test_text_ends_at_a_stop_token(thirds):
    model = await thirds.model()
    whole = await greedy(model, PROMPT, 30)
    pieces = await collect(
        model.generate(PROMPT, max_new_tokens=30, wire="fp32", stop_token_ids=[whole[20], whole[25]])
    )
    ends = min(whole.index(whole[20]), whole.index(whole[25]))
    assert ids_of(pieces) == whole[: ends + 1]
    assert pieces[-1].finish_reason == "stop"


async def test_text_comes_in_whole_characters(thirds, checkpoints):
    model = await thirds.model()
    pieces = await collect(model.generate("héllo ☃ 世界", max_new_tokens=120, sampling=SAMPLED))
    tokenizer = Tokenizer((checkpoints("llama") / "tokenizer.json").read_bytes())
    prompt = tokenizer.encode("héllo ☃ 世界")
    assert model.last_stats.prompt_tokens == len(prompt)
    whole = tokenizer.decode(prompt + ids_of(pieces))
    assert tokenizer.decode(prompt) + text_of(pieces) == whole
    assert [piece.finish_reason for piece in pieces] == [None] * 119 + ["length"]
    assert all(piece.logprob <= 0 for piece in pieces)


async def test_text_ends_before_a_stop_string(thirds):
    model = await thirds.model()
    whole = text_of(await collect(model.generate(PROMPT, max_new_tokens=60, wire="fp32")))
    stop = whole[20:23]
    pieces = await collect(model.generate(PROMPT, max_new_tokens=60, wire="fp32", stop=["never to be seen", stop]))
    assert text_of(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert len(pieces) < 60


async def test_text_ends_at_an_end_token(checkpoints, tmp_path):
    folder = checkpoints("llama")
    end = oracle_tokens(folder, PROMPT, 20)[15]
    first = oracle_tokens(folder, PROMPT, 20).index(end)
    ending = make_model(tmp_path / "ending", "llama", eos_token_id=end)
    async with TinySwarm(tmp_path, ending) as swarm:
        await swarm.serve_all(*THIRDS)
        pieces = await collect((await swarm.model()).generate(PROMPT, max_new_tokens=60, wire="fp32"))
    assert len(pieces) == first + 1
    assert pieces[-1].token_id == end
    assert pieces[-1].finish_reason == "stop"


async def test_generations_at_once_equal_their_solo_runs(thirds):
    model, thin = await thirds.model(), await thirds.model(local_ends=False)
    prompts = [LONG[n : n + 1 + 23 * n] for n in range(8)]
    alone = [await greedy(model, prompt, 24) for prompt in prompts]
    both = await asyncio.gather(*(greedy(each, prompt, 24) for prompt in prompts for each in (model, thin)))
    assert both[::2] == alone
    assert both[1::2] == alone


@pytest.mark.parametrize("local_ends", [True, False])
async def test_closing_the_iterator_frees_every_server(local_ends, thirds):
    model = await thirds.model(local_ends=local_ends)
    async with contextlib.aclosing(model.generate(LONG, max_new_tokens=100)) as pieces:
        async for _ in pieces:
            status = [await node.status() for node in thirds.servers]
            assert [one.sessions for one in status] == [1, 1, 1]
            break
    await thirds.settled()
    assert model.last_stats.new_tokens == 1


@pytest.mark.parametrize("moment", range(6))
async def test_cancelling_a_task_frees_every_server(moment, thirds):
    """Wherever it is: planning, opening, in the prefill, between tokens."""
    model = await thirds.model()
    task = asyncio.create_task(collect(model.generate(LONG, max_new_tokens=150)))
    for _ in range((0, 3, 30, 100, 300, 1000)[moment]):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await thirds.settled()
    assert await greedy(model, PROMPT, 3)


@pytest.mark.parametrize("opened", [0, 1, 2])
async def test_cancelling_while_a_chain_opens_frees_who_has_answered(opened, thirds, monkeypatch):
    """A chain opens side by side: at the time of the cancellation some servers hold the session, the others not yet."""
    model = await thirds.model()
    open_link, reached = chain.open_link, asyncio.Event()
    held = {node.peer_id.raw for node in thirds.servers[opened:]}

    async def slow(host, hop, *rest):
        if hop.peer not in held:
            return await open_link(host, hop, *rest)
        await eventually(lambda: sessions_at(thirds) == opened, "the others did not open")
        reached.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(chain, "open_link", slow)
    task = asyncio.create_task(collect(model.generate(LONG, max_new_tokens=3)))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await thirds.settled()


async def test_cancelling_before_a_server_has_answered_frees_it(thirds, monkeypatch):
    model = await thirds.model()
    reached = asyncio.Event()

    async def silent(frames):
        """What takes the server's answer never comes round to it."""
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(link.FrameStream, "receive", silent)
    task = asyncio.create_task(collect(model.generate(LONG, max_new_tokens=3)))
    await reached.wait()
    monkeypatch.undo()
    await eventually(lambda: sessions_at(thirds) == 3, "no session was opened")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await thirds.settled()


def sessions_at(swarm) -> int:
    return sum(len(node._server.sessions) for node in swarm.servers)


async def test_cancelling_under_a_time_limit(thirds):
    model = await thirds.model()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(write_for_ever(model), 0.15)
    await thirds.settled()


async def write_for_ever(model) -> None:
    while True:
        await collect(model.generate(LONG, max_new_tokens=100))


async def test_full_servers_are_routed_round(checkpoints, tmp_path):
    """Announcements say there is room; when a session is opened it is promised to others, who then never run short."""
    hidden = torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(1))
    async with TinySwarm(tmp_path, checkpoints("llama")) as swarm:
        await swarm.serve(0, 1)
        small = [await swarm.serve(1, 3, kv_bytes=3 * ONE_TILE) for _ in range(2)]
        model = await swarm.model()
        sessions = [await model.session(max_length=128, wire="fp32") for _ in range(2)]
        for session in sessions:
            await session.step(hidden[:, :5])
        assert sum(len(spans_in_use(node)) for node in small) == 2
        with pytest.raises(ServerBusy, match="promised"):
            await model.session(max_length=128, wire="fp32")
        await swarm.serve(1, 3)
        expected = await greedy(await swarm.model(), PROMPT, 10)
        outs = await asyncio.gather(*(session.step(hidden[:, 5:]) for session in sessions))
        assert all(torch.equal(out, outs[0]) for out in outs)
        assert sum(len(spans_in_use(node)) for node in small) == 2
        assert await greedy(model, PROMPT, 10) == expected
        for session in sessions:
            await session.close()
        await swarm.settled()


async def test_a_full_swarm_refuses_politely(checkpoints, tmp_path):
    async with TinySwarm(tmp_path, checkpoints("llama")) as swarm:
        await swarm.serve(0, 3, kv_bytes=200_000)
        model = await swarm.model()
        sessions = []

        async def fill() -> None:
            for _ in range(100):
                sessions.append(await model.session(max_length=64, wire="fp32"))
                await sessions[-1].step(torch.zeros(1, 64, 64))

        with pytest.raises(ServerBusy, match="KV cache is full"):
            await fill()
        assert sessions
        await asyncio.gather(*(session.close() for session in sessions))
        await swarm.settled()
        assert len(await greedy(model, PROMPT, 4)) == 4


async def test_no_route_is_told_before_anything_is_loaded(checkpoints, tmp_path, monkeypatch):
    async with TinySwarm(tmp_path, checkpoints("llama")) as swarm:
        await swarm.serve_all((0, 1), (2, 3))
        model = await swarm.model()
        monkeypatch.setattr(type(model), "tokenizer", property(lambda self: pytest.fail("the tokenizer was made")))
        monkeypatch.setattr(model, "_local_ends", lambda: pytest.fail("embedding and head were loaded"))
        for generation in (model.generate("text", max_new_tokens=4), model.conversation().generate("text")):
            with pytest.raises(NoRoute, match="1:2"):
                await collect(generation)
        await swarm.settled()


async def test_no_route_names_the_missing_blocks(checkpoints, tmp_path):
    async with TinySwarm(tmp_path, checkpoints("llama")) as swarm:
        await swarm.serve_all((0, 1), (2, 3))
        model = await swarm.model()
        with pytest.raises(NoRoute, match="1:2") as caught:
            await collect(model.generate(PROMPT, max_new_tokens=4))
        assert caught.value.missing == ((1, 2),)
        with pytest.raises(NoRoute, match="1:2"):
            await model.route()
        await swarm.settled()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": [100_000]}, "vocabulary"),
        ({"prompt": [-1]}, "vocabulary"),
        ({"prompt": [1] * 400, "max_new_tokens": 200}, "512 positions"),
        ({"prompt": [1], "wire": "fp7"}, "fp7"),
        ({"prompt": [1], "stop_token_ids": [1, 999]}, "stop token id 999"),
        ({"prompt": [1], "top_logprobs": 101}, "top_logprobs is 101"),
        ({"prompt": [1], "stop": [""]}, "stop string"),
    ],
)
async def test_bad_arguments_are_named_before_anything_is_opened(arguments, problem, thirds):
    model = await thirds.model()
    with pytest.raises(ConfigError, match=problem):
        await collect(model.generate(**arguments))


async def test_bad_hidden_sessions_are_named(thirds):
    model = await thirds.model()
    for options, problem in (
        ({"span": (0, 9)}, "3 blocks"),
        ({"batch": 0}, "batch"),
        ({"max_length": 10_000}, "512 positions"),
    ):
        with pytest.raises(ConfigError, match=problem):
            await model.session(**options)
    async with await model.session(max_length=8, wire="fp32") as session:
        with pytest.raises(ConfigError, match="takes"):
            await session.step(torch.zeros(1, 2, 32))
