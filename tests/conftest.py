"""Fixtures that every test may use."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def single_thread() -> None:
    """Pin torch to one thread: two pools on two cores are ten times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return ``../shared``, or skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (CIFAR-10 and trained weights), which is absent")
    return SHARED
