"""What speculation is for: over paths that take time a repetitive text comes in a fraction of the traversals' time."""

import pytest
from helpers.internet import Internet
from helpers.swarms import make_model
from test_whole_sessions import serve

pytestmark = pytest.mark.virtual

LOOP = [3 + n % 7 for n in range(60)]
TOKENS = 100


async def test_a_repetitive_text_comes_in_less_than_half_the_time(tmp_path, clock):
    folder = str(make_model(tmp_path / "model", "gemma3"))
    async with Internet(3, tmp_path) as internet:
        servers, client = await serve(internet, folder, (0, 2), (2, 3))
        model = await client.model(dtype="fp32", local_ends=False)
        took, texts = [], []
        for speculate in ("off", "auto"):
            texts.append([])
            async for piece in model.generate(LOOP, max_new_tokens=TOKENS, wire="fp32", speculate=speculate):
                texts[-1].append(piece.token_id)
            took.append(model.last_stats.decode_s)
        assert texts[0] == texts[1]
        path = (client, servers[0]), (servers[0], servers[1]), (servers[1], client)
        traversal = sum(internet.rtt_s(*pair) for pair in path) / 2
        assert took[0] == pytest.approx(traversal * (TOKENS - 1), rel=0.05)
        assert took[0] / took[1] > 1.8
