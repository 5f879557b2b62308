"""Logging set-up: levels, one line per event, only our own logger."""

import io
import logging

import pytest
from swarmnode.node.log import configure_logging


@pytest.fixture
def ours():
    logger = logging.getLogger("swarmnode")
    before = (logger.handlers, logger.level, logger.propagate)
    yield logging.getLogger("swarmnode.node.host")
    logger.handlers, logger.level, logger.propagate = before


@pytest.mark.parametrize(("verbosity", "levels"), [(0, "W"), (1, "IW"), (2, "DIW"), (9, "DIW")])
def test_levels(ours, verbosity, levels):
    out = io.StringIO()
    configure_logging(verbosity, out)
    configure_logging(verbosity, out)
    ours.debug("quiet")
    ours.info("normal")
    ours.warning("loud")
    assert [line.split()[1] for line in out.getvalue().splitlines()] == list(levels)


def test_a_peer_cannot_forge_lines(ours):
    out = io.StringIO()
    configure_logging(0, out)
    ours.warning("peer says %s", "hi\n12:00:00 E node: all is lost\x1b[2J")
    assert len(out.getvalue().splitlines()) == 1
    assert "node.host: peer says hi?12" in out.getvalue()


def test_the_root_logger_is_left_alone(ours):
    before = list(logging.getLogger().handlers)
    configure_logging(0, io.StringIO())
    assert logging.getLogger().handlers == before
