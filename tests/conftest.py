"""For all tests."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("sparkmoe", deadline=None)  # a machine that others use may stall at any time
settings.load_profile("sparkmoe")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models of tests are so small that a second thread costs more than it brings, tenfold on a busy machine."""
    torch.set_num_threads(1)
