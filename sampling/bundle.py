"""Folders that diffusers loads by itself: weights, autoencoder, and the code that samples from them.

    model_index.json                pipeline and components
    pipeline.py                     `FamilyPipeline`, with process, samplers, guidance and the sampling loop
    transformer/FAMILY_network.py   the family's network as a model of diffusers
    transformer/                    config.json and weights, as in `runtime.pretrained`
    vae/                            the autoencoder; none for pixels

The code is generated from this project's modules (sampling/flatten.py), so that it is the same to the letter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from data.encoders import Encoder, Pixels
from models import FAMILIES, family_name
from runtime.errors import UserError
from runtime.json_file import Json
from runtime.pretrained import ENCODER, FOR_DIFFUSERS, PREFIX, SHARD_SIZE, write_weights
from sampling.flatten import flatten

PIPELINE, PIPELINE_CLASS = "pipeline", "FamilyPipeline"
SOURCES = "sampling.bundled"
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
WITHOUT_SCALING = {"AutoencoderRAE"}  # autoencoders of diffusers with pixels of another range
MODEL = '''

class {name}Transformer(FamilyTransformer):
    """The family {family}."""

    network_class, config_class = {network}, {config}
'''


def module_name(family: str) -> str:
    """Name of the file with a family's network, such as "skip_dit_network"."""
    return f"{family.lower().replace('-', '_')}_network"


def class_name(family: str) -> str:
    """Name of its class in that file."""
    return f"{family.replace('-', '')}Transformer"


def network_source(family: str) -> str:
    """Generate the module of a family's network.

    Raises:
        ValueError: If two of its parts have one name.
    """
    row = FAMILIES[family]
    names = [f"{each.__module__}.{each.__qualname__}" for each in (row.network, row.config)]
    source = flatten([*names, f"{SOURCES}.FamilyTransformer"], f"{family} for diffusers, from dit-family (Apache-2.0).")
    own = MODEL.format(
        name=family.replace("-", ""), family=family, network=row.network.__name__, config=row.config.__name__
    )
    return source + own


def pipeline_source() -> str:
    """Generate the module of the pipeline, the same for every family."""
    return flatten([f"{SOURCES}.{PIPELINE_CLASS}"], "Pipeline for networks of dit-family (Apache-2.0), for diffusers.")


def write_bundle(
    folder: Path,
    weights: Mapping[str, Tensor],
    document: Json,
    encoder: Encoder,
    shard_size: int | str = SHARD_SIZE,
) -> None:
    """Write all files but the card into a folder that exists.

    Args:
        folder: The folder.
        weights: The network's, by name.
        document: From `sampling.publishing.document_of`.
        encoder: Its encoder, in float32.
        shard_size: Largest size of a file of weights, in bytes or as "5GB".

    Raises:
        UserError: For an autoencoder that the pipeline does not know how to decode with.
    """
    import diffusers  # heavy, and only exports need it

    module: nn.Module | None = getattr(encoder, "module", None)
    vae = type(module).__name__
    if (module is None and not isinstance(encoder, Pixels)) or vae in WITHOUT_SCALING:
        raise UserError(f"--vae {encoder.name}: a pipeline of diffusers is not written with it; save it for this code")
    family, place = family_name(document["model"]["name"]), folder / FOR_DIFFUSERS
    place.mkdir()
    version = {"_diffusers_version": diffusers.__version__}
    config = {"_class_name": class_name(family), **version}
    write_weights(place, weights, document, shard_size, WEIGHTS, PREFIX, config)
    (place / f"{module_name(family)}.py").write_text(network_source(family))
    (folder / f"{PIPELINE}.py").write_text(pipeline_source())
    index = {
        "_class_name": [PIPELINE, PIPELINE_CLASS],
        **version,
        FOR_DIFFUSERS: [module_name(family), class_name(family)],
        ENCODER: [None, None] if module is None else ["diffusers", vae],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if Path(encoder.name).is_dir():
        shutil.copytree(encoder.name, folder / ENCODER)
    elif module is not None:
        module.save_pretrained(folder / ENCODER)  # type: ignore[operator]  # of diffusers
