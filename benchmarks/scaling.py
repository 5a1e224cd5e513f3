"""Arithmetic of training and sampling on many GPUs: memory, communication, MFU, and checkpoints.

Nothing is measured here. MACs and parameters are the networks' own, kept activations are counted as by `--dry-run`, and
speeds are measured on one H200 (`RECORDED`), are a vendor's, or are assumed, as said at each constant.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch._subclasses import FakeTensorMode

from benchmarks.cases import blank_conditioning
from models import create_model
from runtime.live_memory import LiveMemory
from training.trainer import recompute_activations

RECORDED = Path(__file__).parent / "results" / "nvidia-h200-2026-11-26.json"
Parallel = Literal["DDP", "FSDP", "HSDP"]

# Vendor: data sheets of H100 SXM, H200 and DGX H100.
PEAK = 989.4e12  # dense bf16 FLOP/s of either
MEMORY = 80e9  # bytes of an H100
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s of memory
NODE = 8  # GPUs
NVLINK = 450e9  # bytes/s of a GPU within the node, each direction
NETWORK_CARD = 50e9  # bytes/s of a GPU's network card, each direction: 400 Gb/s
PCIE = 64e9  # bytes/s from GPU to host, each direction

# Published: 419 unexpected interruptions of 16,384 GPUs in 54 days (arXiv 2407.21783, section 3.3.4).
GPU_HOURS_TO_FAILURE = 16384 * 54 * 24 / 419

# Assumed.
USABLE = 0.9  # share of memory: the rest for context, fragments and workspaces
LINK_SHARE = 0.8  # share of a link's bandwidth that collectives reach
HOP = 5e-6  # seconds from node to node
BUCKET = 25 * 2**20  # bytes that DDP reduces at a time, PyTorch's default
FIRST_BUCKET = 2**20  # the same of the first ones, so that communication begins early
STORE = 2e9  # bytes/s that one process writes to a store
RESTART = 600.0  # seconds from a failure to the first new step
DECODE_SHARE = 0.35  # share of the peak that the autoencoder's decoder reaches
PRICE = 2.5  # dollars an hour of a GPU

# Measured, docs/benchmarks.md.
PAUSE = 1.03  # pause of a save, in copies of the same bytes
DECODE = 622.2e9  # FLOP of the autoencoder's decoder at 256 pixels, counted

# Overrides of DiT-XL/2: heads of 128 channels, of which no attention kernel computes more than are used.
NETWORKS: dict[str, dict[str, object]] = {
    "XL/2": {},
    "3B": {"hidden_size": 2304, "depth": 32, "num_heads": 18},
    "20B": {"hidden_size": 4608, "depth": 52, "num_heads": 36},
}


class Size(NamedTuple):
    """Size of a network."""

    parameters: int  # P
    macs: int  # of one image, forward
    depth: int  # blocks
    kept: int  # bytes of activations an image in bf16 autocast, blocks not compiled
    recomputed: int  # the same where every block is recomputed, one block's activations included

    @property
    def block(self) -> float:
        """Parameters of a block, the embedders spread over all."""
        return self.parameters / self.depth

    @property
    def saved(self) -> int:
        """Bytes of a checkpoint: weights, average and two moments, float32."""
        return 16 * self.parameters

    @property
    def trained_flop(self) -> int:
        """FLOP of an image's training step: two a MAC, and a backward pass as dear as two forward."""
        return 6 * self.macs


@cache
def network_size(name: str) -> Size:
    """Size of a network of `NETWORKS`, without memory for its weights."""
    with torch.device("meta"):
        network = create_model("DiT-XL/2", **NETWORKS[name])
    depth = len(network.blocks)
    (first, kept), (first_recomputed, recomputed) = (_kept(NETWORKS[name], recompute=r) for r in (False, True))
    return Size(
        sum(p.numel() for p in network.parameters()),
        sum(network.cost().values()),
        depth,
        first + (depth - 1) * kept,
        first_recomputed + (depth - 1) * recomputed + kept,
    )


def _kept(overrides: dict[str, object], *, recompute: bool) -> tuple[int, int]:
    """Bytes an image that a network of one block keeps for its backward pass, and those of every further block."""
    one, two = (kept_bytes({**overrides, "depth": depth}, recompute=recompute) for depth in (1, 2))
    return one, two - one


def kept_bytes(overrides: dict[str, object], *, recompute: bool = False) -> int:
    """Bytes that a forward pass in bf16 autocast keeps for each image of a batch, with tensors without values."""
    counts = []
    for rows in (1, 2):  # the difference has no casts of weights in it
        with FakeTensorMode():
            network = create_model("DiT-XL/2", **overrides).train()
            if recompute:
                recompute_activations(network)
            x, t = torch.empty(rows, *network.sample_shape), torch.empty(rows)
            conditioning = blank_conditioning(network, rows)
            with LiveMemory(network.parameters()) as memory, torch.autocast("cpu", torch.bfloat16):
                before = memory.live
                sample = network(x, t, **conditioning).sample
                counts.append(memory.live - before)
                del sample
    return counts[1] - counts[0]


class Recorded(NamedTuple):
    """Measurements of DiT-XL/2 on one H200, blocks compiled."""

    rate: float  # FLOP/s of a training step at batch 256, the optimizer's time left out
    optimizer: float  # seconds of AdamW and average
    images: dict[str, float]  # guided images/s by sampler, without the autoencoder
    step: dict[int, float]  # seconds of a training step by batch


@cache
def recorded() -> Recorded:
    """Read the measurements."""
    rows = {row["name"]: row for row in json.loads(RECORDED.read_text())["rows"]}
    optimizer = rows["AdamW, fused"]["seconds"] + rows["EMA, one foreach"]["seconds"]
    step = {}
    for batch in (32, 128, 256):
        row = rows[f"bf16, batch {batch}, blocks compiled"]
        step[batch] = row["seconds"] * batch / row["images"]
    rate = rows["bf16, batch 256, blocks compiled"]["flop_per_second"] * step[256] / (step[256] - optimizer)
    samplers = ("DDPM-250", "DDIM-50", "DPM-Solver++-20")
    images = {s: rows[f"{s}, 32 guided images, bf16, blocks compiled"]["images_per_second"] for s in samplers}
    return Recorded(rate, optimizer, images, step)


def shards(parallel: Parallel, gpus: int) -> int:
    """GPUs that share one copy of the training state."""
    return {"DDP": 1, "FSDP": gpus, "HSDP": min(NODE, gpus)}[parallel]


def state_bytes(size: Size, parallel: Parallel, gpus: int) -> float:
    """Bytes of a GPU without activations: weights, gradients, two moments and average in float32, and buffers.

    Buffers are bf16 weights: all with DDP; with the others those of two blocks, one of which is being gathered, and a
    block's gradient in bf16 and float32.
    """
    buffers = 2 * size.parameters if parallel == "DDP" else (2 * 2 + 2 + 4) * size.block
    return 20 * size.parameters / shards(parallel, gpus) + buffers


def images_that_fit(size: Size, parallel: Parallel, gpus: int, *, recompute: bool) -> int:
    """Images of a GPU's micro-batch that fit an H100; 0 if not even the state does."""
    free = USABLE * MEMORY - state_bytes(size, parallel, gpus)
    return max(0, math.floor(free / (size.recomputed if recompute else size.kept)))


def buckets(name: str, cap: int = BUCKET) -> list[int]:
    """Bytes of DDP's all-reduces of a step, from the last layers to the first.

    A bucket ends at the tensor that fills it. After the first step DDP orders tensors as their gradients arrive, which
    differs within blocks.

    Args:
        name: Network of `NETWORKS`.
        cap: Bytes that fill a bucket; the first one is full with `FIRST_BUCKET`.
    """
    with torch.device("meta"):
        network = create_model("DiT-XL/2", **NETWORKS[name])
    full, last = list[int](), 0
    for size in reversed([p.nbytes for p in network.parameters() if p.requires_grad]):
        last += size
        if last >= (cap if full else FIRST_BUCKET):
            full.append(last)
            last = 0
    return [*full, *([last] if last else [])]


class Traffic(NamedTuple):
    """Communication of a GPU in a training step."""

    sent: float  # bytes
    seconds: float  # if nothing else were done


def traffic(size: Size, parallel: Parallel, gpus: int) -> Traffic:
    """Communication of a step: N - 1 parts of N pass every link of a ring, and all-reduces between nodes are trees.

    DDP reduces float32 gradients. FSDP gathers bf16 weights twice and scatters float32 sums of gradients once. HSDP
    does so within nodes, and reduces each GPU's part of the sums between nodes meanwhile. The cards of a node share
    the traffic of its rings.
    """
    nodes, p = math.ceil(gpus / NODE), size.parameters
    ring = LINK_SHARE * (NVLINK if nodes == 1 else min(NVLINK, NODE * NETWORK_CARD))
    part, tree = (gpus - 1) / gpus, 2 * math.ceil(math.log2(nodes)) * HOP
    if parallel == "DDP":
        sent = 2 * part * 4 * p
        return Traffic(sent, sent / ring + math.ceil(4 * p / BUCKET) * tree)
    whole = (2 + 2 + 4) * p
    if parallel == "FSDP":
        return Traffic(part * whole, part * whole / ring + 3 * size.depth * (nodes - 1) * HOP)
    local = min(NODE, gpus)
    inside, between = (local - 1) / local * whole, 2 * (nodes - 1) / nodes * 4 * p / local
    over_cards = between / (LINK_SHARE * NETWORK_CARD) + (size.depth * tree if nodes > 1 else 0)
    return Traffic(inside + between, max(inside / (LINK_SHARE * NVLINK), over_cards))


def compute_seconds(size: Size, images: float, *, recompute: bool) -> float:
    """Seconds of a GPU's forward and backward passes at the rate of XL/2 on an H200; recomputing adds a forward."""
    return images * size.trained_flop * (4 / 3 if recompute else 1) / recorded().rate


def optimizer_seconds(size: Size, parallel: Parallel, gpus: int, device: str = "H100") -> float:
    """Seconds of AdamW and average, which are bound by memory."""
    share = size.parameters / network_size("XL/2").parameters / shards(parallel, gpus)
    return recorded().optimizer * share * BANDWIDTH["H200"] / BANDWIDTH[device]


def mfu_bounds(
    size: Size, parallel: Parallel, gpus: int, images: int, *, recompute: bool = False
) -> tuple[float, float]:
    """Share of the peak in a step, where communication waits for all computation and where it overlaps with it."""
    work = compute_seconds(size, images, recompute=recompute)
    sent, fixed = traffic(size, parallel, gpus).seconds, optimizer_seconds(size, parallel, gpus)
    useful = images * size.trained_flop / PEAK
    return useful / (work + sent + fixed), useful / (max(work, sent) + fixed)


def hiding_images(size: Size, parallel: Parallel, gpus: int) -> int:
    """Images of a GPU from which on computation takes as long as communication."""
    return math.ceil(traffic(size, parallel, gpus).seconds / compute_seconds(size, 1, recompute=False))


def seconds_to_failure(gpus: int) -> float:
    """Mean time between failures of a job."""
    return GPU_HOURS_TO_FAILURE * 3600 / gpus


def young(pause: float, to_failure: float) -> float:
    """Seconds of training between two saves, by Young: sqrt(2 pause MTBF)."""
    return math.sqrt(2 * pause * to_failure)


def daly(pause: float, to_failure: float) -> float:
    """The same by Daly's series (2006), which also holds where pauses are not short."""
    if pause >= 2 * to_failure:
        return to_failure
    x = pause / (2 * to_failure)
    return math.sqrt(2 * pause * to_failure) * (1 + math.sqrt(x) / 3 + x / 9) - pause


def lost_share(interval: float, pause: float, to_failure: float) -> float:
    """Share of time that is not training's: pauses, work that is done again, restarts; by Daly's exact model."""
    whole = to_failure * math.exp(RESTART / to_failure) * math.expm1((interval + pause) / to_failure)
    return 1 - interval / whole


def sampling_seconds(size: Size, sampler: str, gpus: int, images: int = 50_000, batch: int = 32) -> float:
    """Seconds for images in batches, guided and decoded, at the rate of XL/2 on an H200; the busiest GPU decides."""
    batches = math.ceil(images / (batch * gpus))
    rate = recorded().images[sampler] * network_size("XL/2").macs / size.macs
    return batches * batch * (1 / rate + DECODE / (DECODE_SHARE * PEAK))
