"""For all tests."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models of tests are so small that a second thread costs more than it brings, tenfold on a busy machine."""
    torch.set_num_threads(1)
