"""Encode prompts for a checkpoint into the file that `--prompt-embeds` of sample.py and sample_ddp.py reads.

    python scripts/encode_prompts.py --ckpt Latte-skip.pt --prompt-file prompts.txt --output prompts.safetensors
    python sample.py --ckpt Latte-skip.pt --prompt-embeds prompts.safetensors

Sampling then needs no text encoder and no extra package, and gives the same samples. The checkpoint decides how many
tokens a prompt has, which encoder encodes it unless --text-encoder names another, and which masks its network sees.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.loading import load_network
from runtime.command_line import parse_config
from runtime.devices import DeviceName, choose_device
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from runtime.settings import setting
from sampling.prompts import NULL, Prompts, TextSettings, open_prompts

PROGRAM = "encode_prompts.py"


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Settings of encode_prompts.py."""

    ckpt: Path | None = setting(None, "checkpoint of the network: a file, the name of a released one, or owner/name")
    weights: str = setting("ema", "weights of a training checkpoint: ema, model, or one of several averages by name")
    text: TextSettings = field(default_factory=TextSettings)
    output: Path = setting(Path("prompts.safetensors"), "the file")
    overwrite: bool = setting(False, "replace an existing file")
    device: DeviceName | None = setting(None, "where to encode", shown="cuda, else mps, else cpu")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.ckpt is None:
            raise ValueError("--ckpt: required")
        if self.text.prompt_embeds is not None:
            raise ValueError(f"--prompt-embeds {self.text.prompt_embeds}: is encoded; give --prompt or --prompt-file")
        if self.output.suffix != ".safetensors":
            raise ValueError(f"--output {self.output}: must end in .safetensors")


def as_tensors(prompts: Prompts) -> dict[str, Tensor]:
    """Tensors of the file: `text` (P, L, K), `text_mask` (P, L), and `null_text`, `null_text_mask`.

    Unconditional rows are one where they are equal, otherwise P.
    """
    null = prompts.null or {}
    same = all(torch.equal(leaf, leaf[:1].expand_as(leaf)) for leaf in null.values())
    rows = {NULL + name: leaf[:1] if same else leaf for name, leaf in null.items()}
    return {name: leaf.clone(memory_format=torch.contiguous_format) for name, leaf in {**prompts.rows, **rows}.items()}


def main(argv: Sequence[str]) -> None:
    """Parse flags, encode, write the file."""
    config = parse_config(EncodeSettings, argv, program=PROGRAM, doc=__doc__)
    assert config.ckpt is not None  # checked by the settings
    if config.output.exists() and not config.overwrite:
        raise UserError(f"--output {config.output}: is there already; --overwrite replaces it")
    check_writable(config.output, "--output")
    texts, device = config.text.read(), choose_device(config.device)
    network, info = load_network(config.ckpt, weights=config.weights)
    if "text" not in network.conditioning:
        raise UserError(f"--ckpt {config.ckpt}: its network takes no text; give a checkpoint of one that does")
    prompts = open_prompts(config.text, network, info, device, texts)
    assert prompts is not None  # of a network that takes text
    with atomic_path(config.output, alone=True) as path:
        save_file(as_tensors(prompts), path)
    unit = "prompt" if prompts.size == 1 else "prompts"
    print(f"Saved {prompts.size} {unit} of {tuple(prompts.rows['text'].shape[1:])} to {config.output}")


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
