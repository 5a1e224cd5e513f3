"""Files of earlier formats in the shape of the current one: one function for each kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def latent_index(old: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the index or manifest of a latent store from format 1 into format 2.

    Format 1 knew one kind of encoder, AutoencoderKL, and recorded its scaling factor alone. A document of another
    format is returned as it is.
    """
    if old.get("format") != 1:
        return dict(old)
    names = {"vae": "name", "encoder_sha256": "sha256", "scale": "scaling_factor"}
    encoder = {"class": "AutoencoderKL", "stochastic": True, "shift_factor": 0.0, "latents_mean": [], "latents_std": []}
    encoder |= {new: old[name] for name, new in names.items() if name in old}
    kept = {name: value for name, value in old.items() if name not in (*names, "moments_shape")}
    shape = {"row_shape": old["moments_shape"]} if "moments_shape" in old else {}
    return {**kept, **shape, "format": 2, "encoder": encoder}
