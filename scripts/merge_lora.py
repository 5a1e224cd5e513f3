"""Merge the low-rank updates (LoRA) of a run into an ordinary checkpoint, or save them alone for the library peft.

    python scripts/merge_lora.py --ckpt results/001-DiT-XL-2/checkpoints/0002000.safetensors --output merged.safetensors
    python scripts/merge_lora.py --ckpt results/001-DiT-XL-2/checkpoints/0002000.safetensors --adapter lora/

sample.py, export.py and --init-from merge by themselves what they read; the merged file is for others. The folder of
--adapter holds a few megabytes, which peft loads onto the network that the run began with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from models.transfer import LABEL_TABLE
from runtime.adapters import DOWN, UP, has_adapters, merge_adapters
from runtime.checkpoint import is_average
from runtime.command_line import parse_config
from runtime.errors import UserError, error_prefix, run
from runtime.files import atomic_path, check_writable
from runtime.groups import read_groups, save_checkpoint
from runtime.settings import setting

PREFIX = "base_model.model."  # of names in peft's files


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Settings of merge_lora.py."""

    ckpt: Path | None = setting(None, "checkpoint of a run with --train-only lora")
    output: Path | None = setting(None, "merged checkpoint to write, .safetensors")
    adapter: Path | None = setting(None, "folder to write for peft: the averaged updates and the label table alone")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.ckpt is None:
            raise ValueError("--ckpt: give a checkpoint of a run with --train-only lora")
        if self.output is None and self.adapter is None:
            raise ValueError("--output, --adapter: give one of them, or both")
        if self.output is not None and self.output.suffix != ".safetensors":
            raise ValueError(f"--output {self.output}: must end in .safetensors")


def read_updates(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
    """Read the weights of a run, and its averages, with low-rank updates.

    Raises:
        UserError: If there are none.
    """

    def of_weights(present: Sequence[str]) -> list[str]:
        return [name for name in present if name == "model" or is_average(name)]

    groups, meta = read_groups(path, of_weights)
    if meta is None or not all(map(has_adapters, groups.values())):
        raise UserError(f"--ckpt {path}: has no low-rank updates; give a checkpoint of a run with --train-only lora")
    return groups, meta


def save_adapter(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write low-rank updates as peft does: adapter_config.json and adapter_model.safetensors.

    Args:
        weights: Weights of a network with updates.
        folder: Folder, made if need be.
    """
    tensors, layers, rank = dict[str, Tensor](), list[str](), 0
    for name, tensor in weights.items():
        if name.endswith((f".{DOWN}", f".{UP}")):
            tensors[PREFIX + name.replace(".default.", ".")] = tensor.contiguous()
        if name.endswith(f".{DOWN}"):
            layers, rank = [*layers, name.removesuffix(f".{DOWN}")], len(tensor)
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": layers,
    }
    if LABEL_TABLE in weights:
        tensors[PREFIX + LABEL_TABLE] = weights[LABEL_TABLE].contiguous()
        config["modules_to_save"] = [LABEL_TABLE.removesuffix(".weight")]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    with atomic_path(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def main(argv: Sequence[str]) -> None:
    """Parse the flags, read, write."""
    config = parse_config(MergeSettings, argv, program="merge_lora.py", doc=__doc__)
    assert config.ckpt is not None
    if config.output is not None:
        check_writable(config.output, "--output")
    groups, meta = read_updates(config.ckpt)
    if config.output is not None:
        with error_prefix(f"--ckpt {config.ckpt}"):
            save_checkpoint(config.output, {name: merge_adapters(each) for name, each in groups.items()}, meta)
        print(f"{config.output}: an ordinary checkpoint")
    if config.adapter is not None:
        check_writable(config.adapter / "adapter_model.safetensors", "--adapter")
        averaged = next((name for name in groups if is_average(name)), "model")
        save_adapter(groups[averaged], config.adapter)
        print(f"{config.adapter}: updates of {averaged!r} and the label table, for peft")


if __name__ == "__main__":
    sys.exit(run(main, "merge_lora.py"))
