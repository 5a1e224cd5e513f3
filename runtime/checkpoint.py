"""Checkpoints of any code: one set of weights from a file, and into a network.

Ours hold tensors and JSON only (`runtime.groups`); those of others are read by `runtime.foreign`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from runtime.adapters import merge_adapters
from runtime.errors import UserError
from runtime.foreign import ForeignWeights, read_foreign
from runtime.groups import FORMAT, is_ours, read_groups
from runtime.json_file import Json
from runtime.parts import is_sharded
from runtime.pretrained import pretrained_folder, read_weights
from runtime.stores import fetch


class Checkpoint(NamedTuple):
    """One set of weights from a file.

    Attributes:
        weights: Parameter name -> tensor, on the CPU.
        meta: JSON document of our files; None for others.
        group: Name of these weights in our files, such as "model" or "ema-0.9999"; in others "ema" or "model".
        foreign: What another project's file tells; None for ours.
    """

    weights: dict[str, Tensor]
    meta: Json | None
    group: str
    foreign: ForeignWeights | None = None


def read_checkpoint(path: Path, weights: str = "ema", flag: str = "--ckpt") -> Checkpoint:
    """Read one set of weights from any supported file; low-rank updates (LoRA) are merged into their layers.

    Args:
        path: Path of ours (safetensors, or a folder of `runtime.pretrained`), or of another project's file or folder,
            as for `read_foreign`.
        weights: "model", "ema" for the file's average, or the name of one of several averages ("ema-0.9999").
            For files of others without that group, the one that they have.
        flag: Flag in messages.

    Raises:
        UserError: If the file is missing, damaged, not a checkpoint, or holds objects that could run code.
    """
    path = fetch(path, flag)
    if is_sharded(path) or path.suffix == ".safetensors" and is_ours(path):
        groups, meta = read_groups(path, lambda present: [_choose(present, weights, f"{flag} {path}")], flag)
        ((name, tensors),) = groups.items()
        try:
            return Checkpoint(merge_adapters(tensors), meta, name)
        except ValueError as error:
            raise UserError(f"{flag} {path}: {error}") from error
    if (folder := pretrained_folder(path)) is not None:
        return _read_pretrained(folder, weights, f"{flag} {path}")
    foreign = read_foreign(path, weights, flag)
    return Checkpoint(foreign.weights, None, foreign.group, foreign)


def _read_pretrained(folder: Path, weights: str, where: str) -> Checkpoint:
    """Read a folder of `runtime.pretrained`, which has one set of weights."""
    tensors, meta = read_weights(folder, where)
    if meta.get("format", FORMAT) > FORMAT:
        raise UserError(f"{where}: of format {meta['format']}, this version reads up to {FORMAT}; update it")
    group = str(meta["weights"])
    if weights not in (group, "ema"):
        raise UserError(f"{where}: holds no weights under {weights!r}; it has: {group}")
    return Checkpoint(tensors, meta, group)


def _choose(present: Sequence[str], weights: str, where: str) -> str:
    """Resolve "ema" to the only average; other names stay as they are."""
    averages = [group for group in present if is_average(group)]
    if weights != "ema" or weights in present:
        return weights
    if len(averages) > 1:
        raise UserError(f"{where}: holds several averages; choose by --weights: {', '.join(averages)}")
    return averages[0] if averages else weights


def is_average(group: str) -> bool:
    """True for the name of a group of averaged weights."""
    return group == "ema" or group.startswith("ema-")


def load_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    recognise: Callable[[Mapping[str, Tensor]], str | None] | None = None,
) -> None:
    """Copy weights into a network; every name and shape must fit.

    Args:
        network: Network to load into. Parameters without values get copies of the weights in their own dtype.
        weights: Parameter name -> tensor.
        source: File and model in messages.
        recognise: Function that returns the model of weights, if it is known, for the message.

    Raises:
        UserError: As `check_weights`.
    """
    expected = network.state_dict()
    check_weights(expected, weights, source, recognise)
    if not any(tensor.is_meta for tensor in expected.values()):
        network.load_state_dict(dict(weights))
        return
    # Copies, since weights may be those of a file that is mapped into memory, and change with it
    own = {name: tensor.to(expected[name].dtype, copy=True) for name, tensor in weights.items()}
    network.load_state_dict(own, assign=True)


def check_weights(
    expected: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str,
    recognise: Callable[[Mapping[str, Tensor]], str | None] | None = None,
) -> None:
    """Check that weights have the names and shapes of a network's state, and are finite.

    Raises:
        UserError: With both outlines, the number of mismatches, and the first three.
    """
    problems = [
        *(f"missing {name}" for name in expected if name not in weights),
        *(f"unexpected {name}" for name in weights if name not in expected),
        *(
            f"{name} is {_shape(weights[name])}, expected {_shape(tensor)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ),
    ]
    for name, tensor in weights.items():
        if name in expected and expected[name].is_floating_point():
            if not tensor.is_floating_point():
                raise UserError(f"{source}: {name} holds {str(tensor.dtype).removeprefix('torch.')}; quantised?")
            if tensor.is_meta or hasattr(tensor, "fake_mode"):  # without values
                continue
            # A sum is finite only if all terms are, and needs no mask of their number; one of finite terms may overflow
            # A float64 may be finite, and infinite in the network's float32
            if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.to(expected[name].dtype).isfinite().all():
                raise UserError(f"{source}: {name} has NaN or infinity; the weights are damaged, or training failed")
    if problems:
        other = recognise(weights) if recognise is not None else None
        actual = f"those of {other}, {_outline(weights)}" if other else _outline(weights)
        raise UserError(
            f"{source}: the weights do not fit the model in {len(problems)} places; expected {_outline(expected)}, "
            f"found {actual}: {'; '.join(problems[:3])}"
        )


def _outline(weights: Mapping[str, Tensor]) -> str:
    """Outline of an architecture: "292 tensors, 28 blocks, width 1152"."""
    blocks = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    width = next(
        (f", width {w.shape[0]}" for name, w in weights.items() if name.endswith("x_embedder.proj.weight")), ""
    )
    return f"{len(weights)} tensors, {len(blocks)} blocks{width}"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a single number"
