"""For all tests."""

import os
import secrets

# Ray reads these when it is imported: the clusters of tests have a token of their own.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

import pytest
import torch
from hypothesis import settings

settings.register_profile("sparkmoe", deadline=None)  # a machine that others use may stall at any time
settings.load_profile("sparkmoe")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models of tests are so small that a second thread costs more than it brings, tenfold on a busy machine."""
    torch.set_num_threads(1)
