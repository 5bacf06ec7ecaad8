"""The logger: rank 0 speaks, the others warn."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.log import configure, logger


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    logger.handlers.clear()
    logger.propagate = True  # on a logger that does not, pytest hangs a handler of its own
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.mark.parametrize(
    ("level", "rank", "want"),
    [
        ("info", 0, logging.INFO),
        ("INFO", 0, logging.INFO),
        ("warning", 0, logging.WARNING),
        ("debug", 0, logging.DEBUG),
        ("info", 1, logging.WARNING),
        ("warning", 3, logging.WARNING),
        ("error", 3, logging.ERROR),
        ("debug", 3, logging.DEBUG),
    ],
)
def test_levels(level: str, rank: int, want: int) -> None:
    configure(level, rank)
    assert logger.level == want


def test_an_unknown_level_is_a_sentence() -> None:
    with pytest.raises(UsageError, match=r"DIST_LOWBIT_LOG is 'loud'; expected one of .*warning.*"):
        configure("loud")


def test_configuring_again_adds_no_second_handler_and_says_each_line_once() -> None:
    for _ in range(3):
        configure("info")
    assert len(logger.handlers) == 1
    assert not logger.propagate
    out = io.StringIO()
    handler = logger.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(out)
    logger.info("ready")
    logger.debug("not this")
    assert out.getvalue() == "dist_lowbit: ready\n"
