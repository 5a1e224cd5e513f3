"""A dry run: settings, data, network, cost, and the memory that a process will need.

The memory is that of one step which is computed with tensors that have shapes and no values, on this device and in this
precision. Blocks are not compiled there; compiled ones keep less.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.data import default_collate

from data import conditioning
from models.layers import exact_parameters
from runtime.devices import choose_device
from runtime.distributed import World
from runtime.errors import is_first
from runtime.given import Given
from runtime.launch import machine_size, world_size
from runtime.live_memory import LiveMemory
from training.config import TrainSettings
from training.parallel import gathered_precision
from training.setup import Setup, set_up
from training.trainer import micro_batches, recompute_activations

EXAMPLE_SIZE = 8  # processes of the comparison of strategies where there is one


def predict_memory(setup: Setup, world: World, fake: FakeTensorMode) -> dict[str, int]:
    """Bytes on a process's device at the peak of a training step, "peak", and those of its parts.

    Not in them: the CUDA context, the allocator's fragments, and workspaces inside operations.

    Args:
        setup: Setup with a network of tensors without values; it can be used once.
        world: This process and its place among all.
        fake: Mode of these tensors.
    """
    optimization, loss, parts = setup.config.optimization, setup.loss, dict[str, int]()
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    average = sum(tensor.nbytes for tensor in [*setup.network.parameters(), *setup.network.buffers()])
    if setup.config.compute.grad_checkpointing:
        recompute_activations(setup.network)
    images, labels, index = default_collate([setup.dataset[0, 0]])
    local = optimization.global_batch_size // world.size
    with fake, LiveMemory([*loss.parameters(), *loss.buffers()], world.device) as memory:
        parts |= {"weights": memory.live, "averaged weights": average, "autoencoder": setup.encoder.weight_bytes}
        optimizer = setup.optimizer.make(trained, optimization.lr)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        parts["gradients"] = memory.live - parts["weights"]
        optimizer.step()
        parts["optimizer"] = memory.live - parts["gradients"] - parts["weights"]
        if world.size == 1 and optimization.grad_accum == 1:
            optimizer.zero_grad(set_to_none=True)  # DDP's buckets and micro-batches keep theirs
        before, memory.peak = memory.live, memory.live
        rows = {name: _rows(leaf, local) for name, leaf in conditioning(labels).items()}
        pieces = micro_batches(setup, world, 0, _rows(images, local), rows, _rows(index, local))
        parts["images and draws of a step"] = memory.live - before
        before = memory.live
        losses = loss(*pieces[0], 0, loss.shared(pieces, 0))
        parts["kept for the backward pass"] = memory.live - before
        losses["loss"].mean().backward()
    return {**parts, "peak": memory.peak + parts["averaged weights"] + parts["autoencoder"]}


def divide(setup: Setup, memory: Mapping[str, int], holders: int) -> dict[str, int]:
    """Parts of `predict_memory` where so many processes hold weights, average, gradients and optimizer together.

    "gathered" is new: the outermost part, two blocks (one in use, one on its way) in the precision of autocast, and the
    whole gradient of one in float32.
    """
    if holders == 1:
        return {**memory, "gathered": 0}
    own, lower = list(setup.loss.parameters()), gathered_precision(setup.loss)
    exact = set[Tensor]() if lower is None else {p for block in setup.network.blocks for p in exact_parameters(block)}
    blocks = [_part(set(block.parameters()) - exact, 1) for block in setup.network.blocks]
    parts = {
        "weights": _part(own, holders, exact),
        "averaged weights": _part(setup.network.parameters(), holders, exact),
        "gradients": _part((p for p in own if p.requires_grad), holders, exact),
    }
    whole = memory["gradients"]
    parts["optimizer"] = round(memory["optimizer"] * parts["gradients"] / whole) if whole else 0
    size = 1.0 if lower is None else lower.itemsize / torch.float32.itemsize
    gathered = memory["weights"] - sum(blocks) - _part(exact, 1) + round((2 * size + 1) * max(blocks, default=0))
    freed = sum(memory[name] - count for name, count in parts.items())
    return {**memory, **parts, "gathered": gathered, "peak": memory["peak"] - freed + gathered}


def _part(tensors: Iterable[Tensor], holders: int, whole: Collection[Tensor] = ()) -> int:
    """Bytes of a process's part of tensors, the first and largest: rows are divided, and padded to equal numbers."""
    return sum(t.nbytes if t in whole else -(-len(t) // holders) * t[:1].nbytes for t in tensors)


def _rows(example: Tensor, count: int) -> Tensor:
    """A batch like a batch of one, without values."""
    return torch.empty(count, *example.shape[1:], dtype=example.dtype)


def dry_run(given: Given[TrainSettings]) -> None:
    """Print everything about a run, on rank 0; nothing is written, and no process waits for another.

    Raises:
        UserError: For anything that does not fit, as `set_up`.
    """
    world = World(0, world_size(), choose_device(given.general.compute.device))
    if not is_first():
        return
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    setup = set_up(given, world.device, fake=fake)
    print(json.dumps(setup.document(), indent=2))
    print_size(setup, world)
    whole = predict_memory(setup, world, fake)
    memory = divide(setup, whole, given.general.compute.holders)
    uncompiled = ", uncompiled (compiled blocks keep less)" if setup.config.compute.compile else ""
    print(f"\nmemory of a process at the peak of a step, predicted{uncompiled}: {memory.pop('peak') / 1e9:.3f} GB")
    for name, count in memory.items():
        print(f"  {name:<28}{count / 1e9:>12.3f} GB")
    print("The peak is less than their sum: kept activations are freed while gradients are made.")
    print_strategies(setup, whole, world.size if world.size > 1 else EXAMPLE_SIZE)
    print_host_memory(setup, whole, memory, world.size)
    for line in [*setup.start_notes, *(f"Warning: {warning}" for warning in setup.warnings())]:
        print(line)


def print_strategies(setup: Setup, whole: Mapping[str, int], size: int) -> None:
    """Print what each of `size` processes holds of weights, average, gradients and optimizer under every strategy."""
    group = setup.config.compute.shard_ranks or min(machine_size(), size)
    holders = {"ddp": 1, "fsdp": size, **({"hsdp": group} if 1 < group < size and size % group == 0 else {})}
    print(f"weights, average, gradients and optimizer on each of {size} processes, and what is gathered for a block:")
    for name, count in holders.items():
        parts = divide(setup, whole, count)
        lasting = sum(parts[part] for part in ("weights", "averaged weights", "gradients", "optimizer"))
        together = f"(divided by {count})" if count > 1 else ""
        print(f"  --parallel {name:<5}{together:<14}{lasting / 1e9:>10.3f} GB +{parts['gathered'] / 1e9:>8.3f} GB")


def print_host_memory(setup: Setup, whole: Mapping[str, int], own: Mapping[str, int], size: int) -> None:
    """Print what training holds besides the device's memory, from the parts of one process and of each of `size`."""
    saved, who = ("weights", "averaged weights", "optimizer"), "rank 0"
    copied = sum(whole[part] for part in saved)
    if setup.config.run.checkpoint_format == "sharded":
        divided = setup.config.compute.holders > 1
        copied, who = (sum(own[part] for part in saved) if divided else copied // size), "each process"
    print(f"host memory of {who} for the copy that a checkpoint is written from: {copied / 1e9:.3f} GB")
    if setup.config.compute.holders > 1:
        print(f"host memory of rank 0 for the weights of a new network: {whole['weights'] / 1e9:.3f} GB")


def print_size(setup: Setup, world: World) -> None:
    """Print the sizes of network, data and steps, and the cost of a step."""
    network, size = setup.network, setup.config.optimization.global_batch_size
    trained, parameters = (
        sum(p.numel() for p in network.parameters() if p.requires_grad or frozen) for frozen in (False, True)
    )
    image = setup.dataset[0, 0][0]
    work, local = network.cost(), size // world.size
    step = 6 * setup.loss.macs(0) * size  # 2 FLOP a MAC; the backward pass costs two forward passes
    print(f"\n{setup.config.model} on {world.device.type}, {world.size} process{'es' if world.size > 1 else ''}")
    print(f"parameters          {parameters:,}, of which {trained:,} are trained")
    print(f"data                {len(setup.dataset):,} images, {len(setup.dataset.classes):,} classes")
    print(f"training            {setup.total_steps:,} steps of {size} images")
    print(f"batch of a process  {local} x {tuple(image.shape)} {str(image.dtype).removeprefix('torch.')} from the data")
    print(f"                    {local} x {network.sample_shape} float32 latents")
    print(f"\nMACs of one image forward: {sum(work.values()) / 1e9:.4f} G; a step: {step / 1e12:.4g} TFLOP")
    for name, count in work.items():
        print(f"  {name.replace('_', ' '):<28}{count / 1e9:>12.4f} G")
