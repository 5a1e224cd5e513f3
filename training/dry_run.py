"""A dry run: settings, data, network, cost, and the memory that a process will need.

The memory of a step is predicted: a forward pass over a few images with tensors that have no values shows what each
image keeps for the backward pass on this device, in this precision; the rest is counted. Compiled code keeps less.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from diffusion.loss import Batch
from runtime.distributed import World
from training.setup import Setup, recompute_activations

PROBES = (2, 4)  # images of the two trial passes
# While the backward pass is inside a block, gradients of the block's inner tensors coexist with what was kept for them.
INSIDE_BLOCK = 0.5


def predict_memory(setup: Setup, world: World) -> dict[str, int]:
    """Bytes on a process's device at the peak of a training step, by part, and their "peak".

    The peak is where the backward pass starts or, if gradients outweigh activations, where it ends. Not in it: the
    CUDA context, the allocator's fragments, and what an autoencoder needs while it encodes.

    Args:
        setup: of the run; its network may have tensors without values.
        world: its processes.
    """
    network, optimization = setup.network, setup.config.optimization
    rows = optimization.global_batch_size // world.size // optimization.grad_accum
    weights = _bytes([*network.parameters(), *network.buffers()])
    gradients = _bytes(p for p in network.parameters() if p.requires_grad)
    kept = _at(rows, [kept_activations(setup, probe) for probe in PROBES])
    block, recomputed = kept // len(network.blocks), setup.config.compute.grad_checkpointing
    if recomputed:
        recompute_activations(network)
        kept = _at(rows, [kept_activations(setup, probe) for probe in PROBES])
    lasting = {
        "weights": weights,
        "averaged weights": weights,
        "optimizer, two moments": 2 * gradients,
        "autoencoder": setup.encoder.weight_bytes,
        "images and draws of a step": _draws_bytes(setup, world),
    }
    passing = {
        "gradients": gradients,
        "kept for the backward pass": kept,
        "inside a block": int(block * (INSIDE_BLOCK + recomputed)),  # one block is recomputed
    }
    start = passing["kept for the backward pass"] + passing["inside a block"]
    if world.size > 1 or optimization.grad_accum > 1:
        start += gradients  # DDP's buckets hold room for them all the time; micro-batches add theirs up
    return {**lasting, **passing, "peak": sum(lasting.values()) + max(start, gradients)}


def kept_activations(setup: Setup, rows: int) -> int:
    """Bytes that one forward pass of the loss keeps for the backward pass, weights not counted."""
    network, loss = setup.network, setup.loss
    device = next(network.parameters()).device
    weights = {_storage(tensor) for tensor in [*network.parameters(), *network.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor.detach()
        return tensor

    def keep_inputs(block: torch.nn.Module, args: tuple[object, ...]) -> None:
        for tensor in args:
            if isinstance(tensor, Tensor):
                keep(tensor)  # a recomputed block keeps its inputs where the hooks below do not see them

    draws = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, loss.draw(0, rows))
    conditioning = {name: torch.zeros(rows, dtype=torch.long, device=device) for name in network.conditioning}
    latents = torch.zeros(rows, *network.sample_shape, device=device)
    batch = Batch(latents, conditioning, torch.zeros(rows, dtype=torch.long))
    hooks = [block.register_forward_pre_hook(keep_inputs) for block in network.blocks]
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = loss(batch, draws, 0, {})  # the graph lives until it is counted
            total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del losses
    finally:
        for hook in hooks:
            hook.remove()
    return total


def print_dry_run(setup: Setup, world: World, fake: FakeTensorMode) -> None:
    """Print everything, on rank 0; nothing is written."""
    network, config = setup.network, setup.config
    with fake:
        memory = predict_memory(setup, world)
    if not world.is_main:
        return
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    image = setup.dataset[0, 0][0]
    size = config.optimization.global_batch_size
    local = size // world.size
    work = network.cost()
    step = 6 * sum(work.values()) * size  # 2 FLOP a MAC; the backward pass costs two forward passes
    print(json.dumps(setup.document(), indent=2))
    print(f"\n{config.model} on {world.device.type}, {world.size} process{'es' if world.size > 1 else ''}")
    print(f"parameters          {parameters:,}, of which {trained:,} are trained")
    print(f"data                {len(setup.dataset):,} images, {len(setup.dataset.classes):,} classes")
    print(f"training            {setup.total_steps:,} steps of {size} images")
    print(f"batch of a process  {local} x {tuple(image.shape)} {str(image.dtype).removeprefix('torch.')} from the data")
    print(f"                    {local} x {network.sample_shape} float32 latents")
    print(f"\nMACs of one image forward: {sum(work.values()) / 1e9:.4f} G; a step: {step / 1e12:.4g} TFLOP")
    for name, count in work.items():
        print(f"  {name.replace('_', ' '):<28}{count / 1e9:>12.4f} G")
    uncompiled = ", uncompiled (compiled blocks keep less)" if config.compute.compile else ""
    peak = memory.pop("peak")
    print(f"\nmemory of a process at the peak of a step, predicted{uncompiled}: {peak / 1e9:.3f} GB")
    for name, count in memory.items():
        print(f"  {name:<28}{count / 1e9:>12.3f} GB")
    print("Gradients grow while kept activations shrink: the peak is at one end or the other.")
    for warning in setup.warnings():
        print(f"Warning: {warning}")


def _at(rows: int, probed: list[int]) -> int:
    """A straight line through the two probes, at another number of images."""
    (few, many), (at_few, at_many) = PROBES, probed
    return round(at_few + (at_many - at_few) / (many - few) * (rows - few))


def _draws_bytes(setup: Setup, world: World) -> int:
    """This process's latents, their noise, and the encoder's noise if there is any."""
    local = setup.config.optimization.global_batch_size // world.size
    latents = (2 + setup.encoder.stochastic) * local
    return 4 * latents * int(torch.Size(setup.network.sample_shape).numel())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # tensors without values have no address
