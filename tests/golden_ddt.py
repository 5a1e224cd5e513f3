"""The networks that the recorded numbers of the official DDT belong to, and what the manifest calls equal."""

from __future__ import annotations

from torch import Tensor

from models import DDT
from models.ddt import DDTConfig
from tests.golden_data import arrays, table

DIVIDED = ("ddt_a", "ddt_b")
NETWORKS = (*DIVIDED, "idit")
# Largest absolute differences, from the manifest.
FORWARD, LOSS, TRAJECTORY = 2e-5, 1e-4, 2e-4
OUR_NAMES = {"num_groups": "num_heads", "num_blocks": "depth", "num_encoder_blocks": "encoder_depth"}


def golden_ddt(name: str) -> DDT:
    """One of `NETWORKS` with its recorded weights, strictly loaded, in evaluation mode."""
    recorded = table(f"ddt/{name}/config")
    shape = (recorded.pop("in_channels"), *recorded.pop("latent_hw"))
    for other in ("model", "null_class"):
        recorded.pop(other)
    settings = {OUR_NAMES.get(field, field): value for field, value in recorded.items()}
    network = DDT(DDTConfig(**{"encoder_depth": None, "sample_shape": shape} | settings))
    network.load_state_dict(arrays(f"ddt/{name}/state_dict"))
    return network.eval()


def assert_within(actual: Tensor, reference: Tensor, tolerance: float) -> None:
    """Asserts equal shapes and max|actual - reference| <= tolerance; NaN is never close."""
    assert actual.shape == reference.shape
    error = float((actual.detach().double() - reference.double()).abs().max())
    assert error <= tolerance, f"differs by {error:.2e}; allowed: {tolerance:.0e}"
