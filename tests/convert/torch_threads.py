"""For tests that run torch."""

import pytest


def one():
    """A fixture. A second one only waits, and takes the time of a core that other tests could use."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
