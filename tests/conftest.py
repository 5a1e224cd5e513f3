"""Settings of every test: one thread, as the golden numbers were recorded, and a known random state."""

import gc

gc.disable()  # imports and collection make no garbage; each full collection would walk through all of PyTorch

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.object_stores import place, quick_stores, s3, s3_server  # noqa: E402, F401  (fixtures)

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave everything that is imported out of later collections, which take a quarter of a second each otherwise."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Return to a state in which extension modules can check for leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def known_random_state() -> None:
    torch.manual_seed(0)
