import os
import signal

import pytest
import torch
from small_runs import SIGNALS, place, play  # noqa: F401 (fixtures for all tests)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """One seed, and one thread: matmuls this small only wait for a second one. Signal handlers of a run are taken
    back."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, handlers):
        signal.signal(number, handler)
