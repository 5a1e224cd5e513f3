"""Write the weights of a checkpoint for other code, and say what the file does not carry.

    python scripts/export.py --ckpt results/000-DiT-XL-2/checkpoints/0400000.safetensors --output DiT-XL-2.pt
    python scripts/export.py --ckpt DDT-XL-22en6de-R256 --format pipeline --output ddt-xl-2-256
    python scripts/export.py --ckpt DiT-XL-2-256x256 --format diffusers --output dit-xl-2-256

`official` is a flat state dict, as `--ckpt` of the official sample.py and sample_ddp.py takes it; of DDT models it is a
Lightning checkpoint, as the official main.py (--ckpt_path) and app.py take it. `pipeline` is a folder for every family
that diffusers loads with `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`: the code is in it.
`diffusers` is a folder with diffusers' own DiTTransformer2DModel, the scheduler of its process, and a README with the
lines that load them. `one-file` and `sharded` convert a checkpoint of ours, with all that is in it, between the two
layouts that train.py writes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from models import DDT, DiT, Network
from models.diffusers_format import diffusers_network
from models.latte import Latte
from models.latte_t2v import LatteT2V
from models.loading import CheckpointInfo, load_network
from runtime.command_line import parse_config
from runtime.errors import UserError, error_prefix, run
from runtime.files import atomic_path, check_writable, new_folder
from runtime.groups import read_groups, save_checkpoint, save_part
from runtime.licences import UNKNOWN
from runtime.parts import SUFFIX, Part
from runtime.settings import setting
from sampling.pipeline import Pipeline

OFFICIAL_CLASSES, OFFICIAL_CLIP_CLASSES = 1000, 101
SUFFIXES = (".pt", ".ckpt")
LAYOUTS = ("one-file", "sharded")
KINDS = {  # by format: suffixes of the output, and what it is
    "official": (SUFFIXES, "a file ending in .pt"),
    "one-file": ((".safetensors",), "a file ending in .safetensors"),
    "sharded": ((SUFFIX,), f"a folder ending in {SUFFIX}"),
}
PART_BYTES = 4_000_000_000  # of a file of a sharded checkpoint, about
LIGHTNING_VERSION = "2.5.0"  # Lightning migrates what earlier versions wrote, and does not load without a version
LIGHTNING_PREFIXES = ("ema_denoiser.", "denoiser.")  # the average that samples, the network that it is swapped with
PREDICTION_TYPES = {"epsilon": "epsilon", "x_start": "sample", "v": "v_prediction"}  # in diffusers

README = """---
license: {licence}
---

# Weights of {model} for diffusers

```python
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

transformer = DiTTransformer2DModel.from_pretrained("transformer")
for block in transformer.transformer_blocks:  # no saved config carries this, and without it images are slightly wrong
    block.norm1.emb.time_proj.downscale_freq_shift = 0
scheduler = DDIMScheduler.from_pretrained("scheduler")
pipeline = DiTPipeline(transformer, AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-ema"), scheduler)
```

These files do not carry:

{notes}
"""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of export.py."""

    ckpt: Path | None = setting(
        None,
        "checkpoint: a file, a folder, the name of a released one, or owner/name[@revision] on the hub",
        shown="required",
        remote=True,
    )
    weights: str = setting("ema", "weights of a training checkpoint: ema, model, or one of several averages by name")
    format: Literal["official", "pipeline", "diffusers", "one-file", "sharded"] = setting(
        "official", "code that will load them, or the layout of a whole checkpoint for this code"
    )
    output: Path | None = setting(
        None,
        "file ending in .pt (or .ckpt); for one-file in .safetensors; for others a new folder (.sharded for sharded)",
        shown="required",
    )

    def __post_init__(self) -> None:
        for name in ("ckpt", "output"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name}: required")
        suffixes, kind = KINDS.get(self.format, (None, "a folder"))
        suffix = None if self.output is None else self.output.suffix
        if suffix in SUFFIXES if suffixes is None else suffix not in suffixes:
            raise ValueError(f"--output {self.output}: --format {self.format} writes {kind}")
        if self.format in LAYOUTS and self.weights != "ema":
            raise ValueError(f"--weights {self.weights}: has no effect with --format {self.format}, which takes all")


def notes_on(network: Network, info: CheckpointInfo, format: str) -> list[str]:
    """Facts that the file does not carry to other code, as phrases."""
    notes = [
        "the autoencoder, the names of the classes and the preset of guidance: pass them on with the file",
        "optimizer state and the other set of weights (average or network): this is for sampling, not for training",
        f"the licence of the weights: {licence_of(info) or UNKNOWN}",
    ]
    classes, null_class = getattr(network.config, "num_classes", 0), []
    if isinstance(network, LatteT2V):
        notes[0] = "the autoencoder, the text encoder and the preset of guidance: pass them on with the file"
    expected = OFFICIAL_CLIP_CLASSES if isinstance(network, Latte) else OFFICIAL_CLASSES
    if isinstance(network, DDT):
        notes.append(
            "the sizes of the network and its null class: the YAML config of the official code has to name them"
        )
    elif classes not in (0, expected):
        null_class = [f"the null class {classes}: the official scripts always take {expected}"]
    if format == "official" and classes and network.config.class_dropout_prob == 0:
        null_class = ["a null class, which it was trained without: the official code makes a network with one"]
    if format == "official":
        return [*notes, "the process (noise schedule, prediction): the official code assumes its own", *null_class]
    return [
        *notes,
        "the frequencies of the timestep features (downscale_freq_shift 0): set it after loading, as the README.md "
        "in the exported folder shows",
        "positions: computed again there, equal to within float32 rounding of the table",
        "guidance of the first 3 latent channels, as in official figures: DiTPipeline guides all of them",
        "the predicted variance: deterministic schedulers drop it",
    ]


def licence_of(info: CheckpointInfo) -> str | None:
    """Licence of a checkpoint's weights, or of those that they came from; None if it is not known."""
    return None if info.origin is None else info.origin.licence


def official_content(network: Network, info: CheckpointInfo) -> Mapping[str, object]:
    """Content of an official file: a state dict, flat or as an average, or a Lightning checkpoint with two of them."""
    weights = network.state_dict()
    if isinstance(network, Latte | LatteT2V):
        return {"ema": weights}  # their loaders take no flat file
    if not isinstance(network, DDT):
        return weights
    return {
        "state_dict": {prefix + name: tensor for prefix in LIGHTNING_PREFIXES for name, tensor in weights.items()},
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "epoch": 0,
        "global_step": info.step or 0,
    }


def export_official(network: Network, info: CheckpointInfo, path: Path) -> None:
    """Write a file for the official code, whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save(official_content(network, info), temporary)  # tensors that share memory are written once


def export_diffusers(network: Network, info: CheckpointInfo, folder: Path, notes: Sequence[str]) -> None:
    """Write transformer/, scheduler/ and README.md in a new folder, whole or not at all.

    Raises:
        UserError: If diffusers has no such model.
    """
    from diffusers import DDIMScheduler

    if type(network) is not DiT:
        raise UserError(f"--format diffusers: diffusers has no {info.model}; only the plain DiT")
    default = "epsilon" if info.process == "gaussian" else "velocity"
    prediction = str(info.process_settings.get("prediction", default))
    if info.process != "gaussian" or prediction not in PREDICTION_TYPES:
        raise UserError(f"--format diffusers: DiTPipeline cannot sample from a {info.process} process ({prediction})")
    classes = network.config.num_classes
    if info.encoder == "none" or classes != OFFICIAL_CLASSES:
        lacks = "needs an autoencoder" if info.encoder == "none" else f"takes null class 1000, not {classes}"
        raise UserError(f"--format diffusers: DiTPipeline {lacks}; give --format pipeline, which has no such limit")
    with error_prefix("--format diffusers"):
        transformer: Any = diffusers_network(network)
    scheduler: Any = DDIMScheduler(
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule=info.process_settings.get("noise_schedule", "linear"),
        prediction_type=PREDICTION_TYPES[prediction],
        clip_sample=False,
    )
    with new_folder(folder) as unfinished:
        transformer.save_pretrained(unfinished / "transformer")
        scheduler.save_pretrained(unfinished / "scheduler")
        listed, licence = "\n".join(f"- {note}" for note in notes), licence_of(info) or "other"
        text = README.format(model=info.model, licence=licence, notes=listed)
        (unfinished / "README.md").write_text(text)


def convert(source: Path, output: Path, layout: str) -> None:
    """Write a checkpoint of ours in another layout, with everything that is in it, whole or not at all.

    Raises:
        UserError: If it is none.
    """
    groups, meta = read_groups(source, lambda present: present)
    if meta is None:
        raise UserError(f"--ckpt {source}: --format {layout} is for checkpoints of train.py")
    if layout == "one-file":
        return save_checkpoint(output, groups, meta)
    tensors = {f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()}
    count = max(1, round(sum(tensor.nbytes for tensor in tensors.values()) / PART_BYTES))
    with new_folder(output) as unfinished:
        for number in range(count):
            parts = {name: Part(tensors[name], tuple(tensors[name].shape)) for name in sorted(tensors)[number::count]}
            save_part(unfinished, number, count, parts, meta)


def main(argv: Sequence[str]) -> None:
    """Parse flags, write the file or folder, say what it lacks."""
    config = parse_config(ExportSettings, argv, program="export.py", doc=__doc__)
    assert config.ckpt is not None and config.output is not None  # `__post_init__` checked it
    if config.output.exists():
        raise UserError(f"--output {config.output}: exists already; delete it, or give another name")
    check_writable(config.output, "--output")
    if config.format in LAYOUTS:
        convert(config.ckpt, config.output, config.format)
        print(f"Wrote all of {config.ckpt} to {config.output}")
        return
    if config.format == "pipeline":
        pipeline = Pipeline.from_pretrained(config.ckpt, device="cpu", weights=config.weights)
        pipeline.save_pretrained(config.output, for_diffusers=True, flag="--output")
        print(f"Wrote the {config.weights} weights of {pipeline.info.model} to {config.output}, with its code.")
        return
    network, info = load_network(config.ckpt, weights=config.weights)
    notes = notes_on(network, info, config.format)
    if config.format == "official":
        export_official(network, info, config.output)
    else:
        export_diffusers(network, info, config.output, notes)
    print(f"Wrote the {config.weights} weights of {info.model} to {config.output}. Not carried:")
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    sys.exit(run(main, "export.py"))
