"""TensorFlow's tests run in a session of their own.

Beside others they are taken out: TensorFlow, then Triton's library (which torchvision and diffusers load) in one
process is an abort, not a failure.
"""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.get_closest_marker("tf")]
    if ours and len(ours) < len(items):
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]
