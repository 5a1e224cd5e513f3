"""Plan training and sampling on many H100s: memory, communication, MFU, batches, checkpoints, bandwidth, costs.

    python scripts/plan_scale.py                       # the tables of docs/scaling.md
    python scripts/plan_scale.py --gpus 16 128

All on paper: where each number comes from is said at the constants in benchmarks/scaling.py. Numbers of GPUs are whole
nodes of eight.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from benchmarks import scaling
from benchmarks.report import aligned
from benchmarks.scaling import NETWORKS, NODE, Parallel, network_size
from runtime.command_line import parse_config
from runtime.errors import run
from runtime.settings import setting

IMAGES = 32  # of a GPU and step, where a table needs a number
LATENT_BYTES = 16_384  # of a stored image: mean and deviation, 8 x 32 x 32 in float16
JPEG_BYTES = 106_000  # of a typical photo of ImageNet
SEEN = 7_000_000 * 256  # images that the published XL/2 was trained on
BATCHES = (256, 1024, 4096, 16_384, 131_072)
BATCH, RATE, DECAY = 256, 1e-4, 0.9999  # of the published recipe
PARALLELS: tuple[Parallel, ...] = get_args(Parallel)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of plan_scale.py."""

    gpus: tuple[int, ...] = setting((8, 64, 512, 4096), "numbers of GPUs, in whole nodes of eight")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for gpus in self.gpus:
            if gpus < NODE or gpus % NODE:
                raise ValueError(f"--gpus {gpus}: must be a multiple of {NODE}, the GPUs of a node")


def percent(share: float) -> str:
    """A share of one with a decimal."""
    return f"{share:.1%}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in three digits."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}" if seconds < 1000 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.3g} s"


def networks() -> str:
    """Sizes of the three networks."""
    rows = []
    for name in NETWORKS:
        size = network_size(name)
        config = {"hidden_size": 1152, "depth": 28, "num_heads": 16} | NETWORKS[name]
        rows.append(
            [
                name, *(str(config[key]) for key in ("depth", "hidden_size", "num_heads")),
                f"{size.parameters / 1e9:.2f}", f"{size.macs / 1e9:,.0f}", f"{size.trained_flop / 1e12:.2f}",
                f"{size.kept / 1e6:,.0f}", f"{size.recomputed / 1e6:,.0f}", f"{size.saved / 1e9:.1f}",
            ]
        )  # fmt: skip
    titles = ["network", "depth", "width", "heads", "G parameters", "G MACs", "TFLOP trained", "MB kept"]
    return aligned([*titles, "MB recomputed", "GB saved"], rows)


def memory(gpus: Sequence[int]) -> str:
    """Memory of a GPU, and images of a micro-batch that fit."""
    rows = []
    for name in NETWORKS:
        size = network_size(name)
        for parallel in PARALLELS:
            for count in gpus if parallel == "FSDP" else gpus[:1]:  # the others' memory is that of any number
                fits = [
                    scaling.images_that_fit(size, parallel, count, recompute=recompute) for recompute in (False, True)
                ]
                rows.append(
                    [
                        name, parallel, f"{count:,}" if parallel == "FSDP" else "any",
                        f"{scaling.state_bytes(size, parallel, count) / 1e9:.1f}", *(f"{n:,}" for n in fits),
                    ]
                )  # fmt: skip
    return aligned(["network", "parallel", "GPUs", "GB without images", "images", "recomputed"], rows, left=2)


def communication(gpus: Sequence[int]) -> str:
    """Communication of a step, bounds of the MFU, and the batch that hides the communication."""
    rows = []
    for name in NETWORKS:
        size = network_size(name)
        for parallel in PARALLELS:
            for count in gpus:
                if not scaling.images_that_fit(size, parallel, count, recompute=True):
                    continue
                recompute = scaling.images_that_fit(size, parallel, count, recompute=False) < IMAGES
                sent, seconds = scaling.traffic(size, parallel, count)
                work = scaling.compute_seconds(size, IMAGES, recompute=recompute)
                low, high = scaling.mfu_bounds(size, parallel, count, IMAGES, recompute=recompute)
                hiding = scaling.hiding_images(size, parallel, count)
                rows.append(
                    [
                        name, parallel, f"{count:,}", f"{sent / 1e9:.1f}", f"{seconds * 1e3:.0f}", f"{work * 1e3:,.0f}",
                        "yes" if recompute else "no", percent(low), percent(high), f"{hiding:,}", f"{hiding * count:,}",
                    ]
                )  # fmt: skip
    titles = ["network", "parallel", "GPUs", "GB sent", "ms", "ms of work", "recomputed", "MFU from", "to"]
    return aligned([*titles, "images that hide it", "global batch"], rows, left=2)


def batches() -> str:
    """Learning rate, average and length of training by global batch, at as many images in total."""
    rows = []
    for batch in BATCHES:
        times, gpus = batch / BATCH, batch // IMAGES
        steps = SEEN / batch
        step = [
            IMAGES * network_size(name).trained_flop / scaling.PEAK
            / scaling.mfu_bounds(network_size(name), "HSDP", max(gpus, NODE), IMAGES, recompute=name != "XL/2")[1]
            for name in NETWORKS
        ]  # fmt: skip
        rows.append(
            [
                f"{batch:,}", f"{gpus:,}", f"{RATE * times**0.5:.2g}", f"{RATE * times:.2g}", f"{DECAY**times:.4f}",
                f"{steps:,.0f}", *(f"{steps * seconds / 86400:,.1f}" for seconds in step),
            ]
        )  # fmt: skip
    titles = ["global batch", "GPUs", "rate, root", "rate, linear", "decay of the average", "steps"]
    return aligned([*titles, *(f"{name}: days" for name in NETWORKS)], rows, left=0)


def checkpoints(gpus: Sequence[int]) -> str:
    """Interval of checkpoints against the mean time between failures, one file and shards."""
    rows = []
    for name in NETWORKS:
        saved = network_size(name).saved
        for count in gpus:
            to_failure = scaling.seconds_to_failure(count)
            for kind, writers in (("one file", 1), ("shards", count)):
                pause = scaling.PAUSE * saved / writers / scaling.PCIE
                written = saved / max(1, writers / NODE) / scaling.STORE
                intervals = [rule(pause, to_failure) for rule in (scaling.young, scaling.daly)]
                chosen = max(intervals[1], written)
                rows.append(
                    [
                        name, f"{count:,}", kind, duration(to_failure), duration(pause), duration(written),
                        *map(duration, intervals), percent(scaling.lost_share(chosen, pause, to_failure)),
                    ]
                )  # fmt: skip
    titles = ["network", "GPUs", "kind", "MTBF", "pause", "write", "Young", "Daly", "lost"]
    return aligned(titles, rows)


def bandwidth(gpus: Sequence[int]) -> str:
    """Bytes a second that data and start-up need."""
    rows = []
    for name in NETWORKS:
        size = network_size(name)
        images = scaling.recorded().rate / size.trained_flop
        for count in gpus:
            rows.append(
                [
                    name, f"{count:,}", f"{images * count:,.0f}", f"{images * count * LATENT_BYTES / 1e9:,.3f}",
                    f"{images * count * JPEG_BYTES / 1e9:,.2f}", f"{size.saved * count / 1e12:,.2f}",
                    f"{size.saved / 1e12:,.2f}",
                ]
            )  # fmt: skip
    titles = ["network", "GPUs", "images/s", "latents: GB/s", "photos: GB/s", "TB read at a resume", "from shards"]
    return aligned(titles, rows)


def sampling(gpus: Sequence[int]) -> str:
    """Time and cost of 50,000 guided images."""
    rows = []
    for name in NETWORKS:
        size = network_size(name)
        for sampler in scaling.recorded().images:
            for count in (1, *gpus):
                seconds = scaling.sampling_seconds(size, sampler, count)
                hours = seconds * count / 3600
                useful = scaling.sampling_seconds(size, sampler, 1) / (seconds * count)
                rows.append(
                    [
                        name, sampler, f"{count:,}", duration(seconds), f"{hours:,.1f}", percent(useful),
                        f"{hours * scaling.PRICE:,.0f}",
                    ]
                )  # fmt: skip
    return aligned(["network", "sampler", "GPUs", "time", "GPU hours", "busy", "dollars"], rows, left=2)


def tables(gpus: Sequence[int]) -> dict[str, str]:
    """All tables by title."""
    return {
        "Networks": networks(),
        "Memory": memory(gpus),
        "Communication and MFU": communication(gpus),
        "Batch and learning rate": batches(),
        "Checkpoints and failures": checkpoints(gpus),
        "Data and stores": bandwidth(gpus),
        "50,000 samples": sampling(gpus),
    }


def main(argv: Sequence[str]) -> None:
    """Parse flags, print the tables."""
    config = parse_config(PlanSettings, argv, program="plan_scale.py", doc=__doc__)
    print("\n\n".join(f"## {title}\n\n{table}" for title, table in tables(config.gpus).items()))


if __name__ == "__main__":
    sys.exit(run(main, "plan_scale.py"))
