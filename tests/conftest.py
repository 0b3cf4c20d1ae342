"""The settings of all tests: their Ray clusters, their threads, and that none changes the logging of the next."""

import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterator

# Ray reads these when it is imported: the clusters of tests have a token of their own.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

# torch reads it when it is imported, also in processes that tests start. The models of tests are so small that a second
# thread costs more than it brings, tenfold on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from _pytest.nodeid import coerce_node_id
from hypothesis import settings

from deploy.logs import ROOMS

settings.register_profile("sparkmoe", deadline=None)  # a machine that others use may stall at any time
settings.load_profile("sparkmoe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Number the tests of one name, of which pytest-xdist would run only one: schemathesis makes one per operation."""
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.nodeid] += 1
        if (count := seen[item.nodeid]) > 1:
            item._id = coerce_node_id(f"{item.nodeid}[{count}]")  # pytest has no public way


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Keep torch to one thread even if something imported it before the variable was set."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Undo what a test does to our loggers: a Fleet, for one, configures those of its process."""
    loggers = [logging.getLogger(room) for room in ROOMS]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers
