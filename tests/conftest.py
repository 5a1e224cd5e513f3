"""Settings of every test: one thread, as the golden numbers were recorded, and a known random state."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def known_random_state() -> None:
    torch.manual_seed(0)
