"""What a run would be, said before it starts: data, network, cost, and the memory that a process will need.

The memory of a step is predicted, not met: a forward pass over a few images shows what each image leaves behind for the
backward pass, on this device, in this precision, compiled or not; the rest is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from diffusion import Batch
from runtime.config import to_dict
from runtime.distributed import World

if TYPE_CHECKING:
    from training.setup import Setup

PROBES = (2, 4)  # images of the two trial passes
# While the backward pass is inside a block, gradients of the block's inner tensors stand beside what was kept for them.
INSIDE_BLOCK = 0.5


def predict_memory(setup: Setup, world: World) -> dict[str, int]:
    """Bytes on a process's device at the peak of a training step, by part, and their "peak".

    The peak lies where the backward pass starts or, if gradients outweigh activations, where it ends. Not in it: the
    CUDA context, the allocator's fragments, and what an autoencoder needs while it encodes.
    """
    network, config = setup.network, setup.config
    rows = config.global_batch_size // world.size // config.grad_accum
    weights = _bytes([*network.parameters(), *network.buffers()])
    gradients = _bytes(p for p in network.parameters() if p.requires_grad)
    kept = _at(rows, [kept_activations(setup, probe, world.device) for probe in PROBES])
    block = kept
    if config.grad_checkpointing:
        network.grad_checkpointing = False
        block = _at(rows, [kept_activations(setup, probe, world.device) for probe in PROBES])
        network.grad_checkpointing = True
    block //= len(network.blocks)
    lasting = {
        "weights": weights,
        "averaged weights": weights,
        "optimizer, two moments": 2 * gradients,
        "autoencoder": setup.autoencoder.weight_bytes,
        "images and draws of a step": _draws_bytes(setup, world),
    }
    passing = {
        "gradients": gradients,
        "kept for the backward pass": kept,
        "inside a block": int(block * (INSIDE_BLOCK + config.grad_checkpointing)),  # one block is recomputed
    }
    start = passing["kept for the backward pass"] + passing["inside a block"]
    if world.size > 1 or config.grad_accum > 1:
        start += gradients  # DDP's buckets hold room for them all the time; micro-batches add theirs up
    return {**lasting, **passing, "peak": sum(lasting.values()) + max(start, gradients)}


def kept_activations(setup: Setup, rows: int, device: torch.device) -> int:
    """Bytes that one forward pass of the objective keeps for the backward pass, weights not counted."""
    network, objective, shape = setup.network, setup.objective, setup.latent_shape
    known = {_place(tensor) for tensor in [*network.parameters(), *network.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _place(tensor) not in known:
            kept[_place(tensor)] = tensor.detach()
        return tensor

    def run_block(block: Callable[..., Any], *args: Tensor | None) -> Any:
        for tensor in args:
            if tensor is not None:
                keep(tensor)  # a recomputed block holds on to them out of sight
        return type(network).run_block(network, block, *args)

    batch = Batch(torch.zeros(rows, *shape, device=device), *torch.zeros(2, rows, dtype=torch.long, device=device))
    try:
        network.run_block = run_block  # type: ignore[method-assign]  # of this network alone, and taken back below
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = objective(batch, 0, objective.draw(0, rows, shape, device))  # the graph lives until it is counted
            total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del losses
    finally:
        del network.run_block
    return total


def print_dry_run(setup: Setup, world: World) -> None:
    """Prints everything, on the main process; nothing is written."""
    network, config = setup.network, setup.config
    if config.compile:
        network.compile_blocks()
    memory = predict_memory(setup, world)
    if not world.is_main:
        return
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    image, label, _ = setup.dataset[0, 0]
    local = config.global_batch_size // world.size
    work = network.multiply_adds()
    step = 6 * sum(work.values()) * config.global_batch_size  # 2 FLOP a multiply-add; backward costs two forwards
    print(json.dumps(to_dict(config), indent=2))
    print(f"\n{config.model} on {world.device.type}, {world.size} process{'es' if world.size > 1 else ''}")
    print(f"parameters          {parameters:,}, of which {trained:,} are trained")
    print(f"data                {len(setup.dataset):,} images, {len(setup.dataset.classes):,} classes")
    print(f"training            {setup.total_steps:,} steps of {config.global_batch_size} images")
    print(f"batch of a process  {local} x {tuple(image.shape)} {str(image.dtype).removeprefix('torch.')} from the data")
    print(f"                    {local} x {setup.latent_shape} float32 latents, labels such as {int(label)}")
    print(f"\nmultiply-adds of one image forward: {sum(work.values()) / 1e9:.4f} G; a step: {step / 1e12:.4g} TFLOP")
    for name, count in work.items():
        print(f"  {name.replace('_', ' '):<28}{count / 1e9:>12.4f} G")
    print(f"\nmemory of a process at the peak of a step, predicted: {memory.pop('peak') / 1e9:.3f} GB")
    for name, size in memory.items():
        print(f"  {name:<28}{size / 1e9:>12.3f} GB")
    print("Gradients grow while what was kept shrinks: the peak is at one end or the other.")


def _at(rows: int, probed: list[int]) -> int:
    """A straight line through the two probes, at another number of images."""
    (few, many), (at_few, at_many) = PROBES, probed
    return round(at_few + (at_many - at_few) / (many - few) * (rows - few))


def _draws_bytes(setup: Setup, world: World) -> int:
    """Two latents' worth of noise for the global batch, and this process's latents."""
    config = setup.config
    latents = 2 * config.global_batch_size + config.global_batch_size // world.size
    return 4 * latents * int(torch.Size(setup.latent_shape).numel())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_place(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
