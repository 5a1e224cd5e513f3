"""Writes the weights of a checkpoint for other people's code, and says what the file cannot carry.

    python scripts/export.py --ckpt results/000-DiT-XL-2/checkpoints/0400000.safetensors --output DiT-XL-2.pt
    python scripts/export.py --ckpt DiT-XL-2-256x256.pt --format diffusers --output dit-xl-2-256

`official` is a flat state dict, as `--ckpt` of the official sample.py and sample_ddp.py takes it. `diffusers` is a
folder with a DiTTransformer2DModel, the scheduler of its process, and a README with the lines that load them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runtime.config import parse_config, setting

from models import DiT, Network, create_model
from models.diffusers_format import diffusers_twin
from models.loading import unknown_weights
from models.recognise import recognise
from runtime.checkpoint import Checkpoint, load_weights, read_checkpoint
from runtime.errors import UserError, blame, run
from runtime.files import atomic_path, check_writable

FORMATS = ("official", "diffusers")
OFFICIAL_CLASSES = 1000

README = """# Weights of {model} for diffusers

```python
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

transformer = DiTTransformer2DModel.from_pretrained("transformer")
for block in transformer.transformer_blocks:  # no saved config carries this, and without it images are slightly wrong
    block.norm1.emb.time_proj.downscale_freq_shift = 0
scheduler = DDIMScheduler.from_pretrained("scheduler")
pipeline = DiTPipeline(transformer, AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-ema"), scheduler)
```

What these files do not carry:

{notes}
"""


@dataclass(frozen=True)
class ExportConfig:
    """Settings of export.py."""

    ckpt: Path | None = setting(None, "checkpoint: ours, or an official file (required)")
    weights: str = setting("ema", "which weights of a training checkpoint", ("ema", "model"))
    format: str = setting("official", "whose", FORMATS)
    output: Path | None = setting(None, "file ending in .pt, or for diffusers a new folder (required)")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name in ("ckpt", "output"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name}: required")
        if self.output is not None and (self.output.suffix == ".pt") != (self.format == "official"):
            kind = "a file ending in .pt" if self.format == "official" else "a folder"
            raise ValueError(f"--output {self.output}: --format {self.format} writes {kind}")


def open_network(ckpt: Path, checkpoint: Checkpoint) -> tuple[str, Network, dict[str, Any]]:
    """Name and network with the weights; settings of the process, those of the official code where nobody says.

    Raises:
        UserError: if nothing in the registry fits the weights.
    """
    if checkpoint.meta is not None:
        fields, process = dict(checkpoint.meta["model"]), dict(checkpoint.meta["process"])
        name = fields.pop("name")
    else:
        with blame(f"--ckpt {ckpt}"):
            found = recognise(checkpoint.weights)
            if found is None:
                raise ValueError(unknown_weights(checkpoint.weights))
        name, fields, process = found.name, found.config, {"name": "gaussian"}
    with blame(f"--ckpt {ckpt}"):
        network = create_model(name, **fields)
    load_weights(network, checkpoint.weights, f"--ckpt {ckpt} as {name}")
    return name, network.eval(), process


def notes_on(network: Network, format: str) -> list[str]:
    """What other code does not learn from the file, in sentences."""
    notes = [
        "the autoencoder, the names of the classes and the preset of guidance: say them to whoever gets the file",
        "optimizer state and the second set of weights (average or network): this is for sampling, not for training on",
    ]
    if format == "official":
        notes.append("the process (noise schedule, what is predicted): the official code assumes its own")
        if network.num_classes != OFFICIAL_CLASSES:
            notes.append(f"the null class {network.num_classes}: the official scripts always take {OFFICIAL_CLASSES}")
        return notes
    notes += [
        "the frequencies of the timestep features (downscale_freq_shift 0): set it after loading, as the README.md "
        "in the exported folder shows",
        "positions: computed anew there, equal to within float32 rounding of the table",
        "guidance of the first 3 latent channels, as official figures have it: DiTPipeline guides all of them",
        "the predicted variance: deterministic schedulers drop it",
    ]
    if network.num_classes != OFFICIAL_CLASSES:
        notes.append(f"the null class {network.num_classes}: DiTPipeline always takes {OFFICIAL_CLASSES}")
    return notes


def export_official(network: Network, path: Path) -> None:
    """A flat state dict, whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save(network.state_dict(), temporary)


def export_diffusers(name: str, network: Network, process: dict[str, Any], folder: Path, notes: Sequence[str]) -> None:
    """transformer/, scheduler/ and README.md in a new folder, whole or not at all.

    Raises:
        UserError: if diffusers has no such model.
    """
    from diffusers import DDIMScheduler

    if type(network) is not DiT:
        raise UserError(f"--format diffusers: diffusers has no {name}; only the plain DiT")
    with blame("--format diffusers"):
        twin: Any = diffusers_twin(network)
    scheduler: Any = DDIMScheduler(
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule=process.get("noise_schedule", "linear"),
        prediction_type="sample" if process.get("predict_xstart") else "epsilon",
        clip_sample=False,
    )
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        twin.save_pretrained(unfinished / "transformer")
        scheduler.save_pretrained(unfinished / "scheduler")
        text = README.format(model=name, notes="\n".join(f"- {note}" for note in notes))
        (unfinished / "README.md").write_text(text)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main(argv: Sequence[str]) -> None:
    """Parses flags, writes the file or folder, says what it lacks."""
    config = parse_config(ExportConfig, argv, program="export.py", description=__doc__.split("\n")[0])
    assert config.ckpt is not None and config.output is not None  # __post_init__ saw to it
    if config.output.exists():
        raise UserError(f"--output {config.output}: exists already; delete it, or give another name")
    check_writable(config.output, "--output")
    name, network, process = open_network(config.ckpt, read_checkpoint(config.ckpt, config.weights))
    notes = notes_on(network, config.format)
    if config.format == "official":
        export_official(network, config.output)
    else:
        export_diffusers(name, network, process, config.output, notes)
    print(f"Wrote the {config.weights} weights of {name} to {config.output}. Not carried:")
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    sys.exit(run(main, "export.py"))
