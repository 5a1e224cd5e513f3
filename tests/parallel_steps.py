"""Steps of training under a strategy, in one process or as a script on several: `parallel_steps.py OUTPUT CASES`.

Cases are JSON, each with the "name" of its results and the "argv" of train.py; "double": in float64 throughout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime import distributed
from runtime.distributed import World
from runtime.sharding import local, whole
from tests.networks import randomise
from training.config import parse_settings
from training.setup import set_up
from training.trainer import MicroBatch, Trainer, batches

STEPS = 20


def doubled(piece: MicroBatch) -> MicroBatch:
    """A micro-batch in float64."""
    batch, draws = piece
    for name, tensor in {**vars(batch), **batch.conditioning}.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            where = batch.conditioning if name in batch.conditioning else vars(batch)
            where[name] = tensor.double()
    draws = draws._replace(
        t=draws.t.double() if draws.t.is_floating_point() else draws.t,
        noise=draws.noise.double(),
        extra={k: v.double() if v.is_floating_point() else v for k, v in draws.extra.items()},
    )
    return batch, draws


def train(world: World, argv: list[str], *, double: bool = False, steps: int = STEPS) -> dict[str, Tensor]:
    """Losses and gradient norms of some steps from random weights, (steps,) each, and the state after the last.

    Also "held": bytes of weights, average and moments that each process holds, (size,).
    """
    setup = set_up(parse_settings(argv), world.device)
    if double:
        setup.loss.double()
    if not next(setup.network.parameters()).is_meta:
        randomise(setup.network).train()
    with mock.patch.object(Tensor, "float", Tensor.double if double else Tensor.float):  # as parts in float32 ask for
        trainer = Trainer(setup, world)
        losses, norms = [], []
        for step, pieces in batches(setup, world, 0):
            norms.append(trainer.train_step(step, [doubled(piece) for piece in pieces] if double else pieces))
            losses.append(distributed.mean_over_ranks(trainer.meter._sums["loss"].double().clone()))
            trainer.meter._sums.clear()
            if step + 1 == steps:
                break
    groups = trainer.state.groups()
    parts = (local(tensor) for tensors in groups.values() for tensor in tensors.values())
    held = torch.tensor(float(sum(part.untyped_storage().nbytes() for part in parts)))
    tensors = {f"{group}/{name}": whole(t).clone() for group, members in groups.items() for name, t in members.items()}
    results = {"losses": torch.stack(losses), "norms": torch.stack(norms), "held": distributed.from_all_ranks(held)}
    return {**results, **tensors}


def main() -> None:
    """Train every case on all ranks, and write the results of rank 0."""
    output, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    with distributed.world("cpu") as world:
        for case in cases:
            result: dict[str, Any] = train(world, case["argv"], double=case["double"])
            if world.is_main:
                save_file(result, output / f"{case['name']}.safetensors")


if __name__ == "__main__":
    main()
