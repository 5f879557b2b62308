"""Every kind of byte stream against the one conformance suite."""

import pytest
from helpers.kinds import cases
from helpers.stream_trouble import TROUBLE
from helpers.streams import BASICS

CHECKS = [*BASICS, *TROUBLE]


async def pass_check(kind, check):
    async with kind.world() as world:
        await check(world)
        await world.end()


@pytest.mark.virtual
@pytest.mark.parametrize(("kind", "check"), cases(CHECKS, virtual=True))
async def test_stream(kind, check):
    await pass_check(kind, check)


@pytest.mark.loops
@pytest.mark.usefixtures("leakproof")
@pytest.mark.parametrize(("kind", "check"), cases(CHECKS, virtual=False))
async def test_socket_stream(kind, check):
    await pass_check(kind, check)
