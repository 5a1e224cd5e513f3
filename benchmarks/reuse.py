"""Whole sampling runs that reuse state, each against one that never does and against the ratio of executed MACs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from benchmarks.costs import run_cost
from benchmarks.report import aligned
from benchmarks.sampling import SamplingRun, prepare
from benchmarks.timing import Case, Row
from diffusion.caching import check_keeps_state
from models import family_of
from runtime.settings import Values
from sampling.pipeline import Pipeline


class ReuseRun(Protocol):
    """A sampling run of some images that reuses state."""

    @property
    def images(self) -> int:
        """Images that are sampled at a time."""

    @property
    def refresh(self) -> list[bool]:
        """One flag per step, whether it computes state."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Modules that are called where, and only where, a block runs."""

    @property
    def macs(self) -> int:
        """MACs of one image."""

    @property
    def precision(self) -> str:
        """Precision of the network: fp32 or bf16."""

    def latents(self) -> Tensor:
        """Sample."""


class PipelineRun(SamplingRun):
    """A run of one of our networks."""

    @property
    def refresh(self) -> list[bool]:
        """One flag per step, whether it computes state."""
        return [evaluation.refresh for evaluation in self.prepared.table]

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Blocks of the network."""
        return self.pipeline.network.blocks

    @property
    def macs(self) -> int:
        """MACs of one image."""
        return run_cost(self.pipeline.network, self.refresh)

    @property
    def precision(self) -> str:
        """Precision of the network."""
        return "bf16" if self.prepared.config.compute.precision == "bf16" else "fp32"


def reuse_runs(
    pipeline: Pipeline, steps: int, intervals: Sequence[int], images: int, precision: str
) -> dict[str, PipelineRun]:
    """Prepare unguided runs that compute state every so often: by Skip-Cache's rule (N), or in a flow by sharing (R).

    Raises:
        ValueError: If the network keeps no state.
        UserError: For numbers of steps that the sampler cannot take.
    """
    check_keeps_state(pipeline.network)
    flow = family_of(pipeline.info.model).process == "flow"
    label, rule, sampler = ("R", "sharing_interval", "euler") if flow else ("N", "cache_interval", "ddpm")
    fixed: Values = {"sampler": sampler, "num_sampling_steps": steps, "cfg_scale": 1.0, "precision": precision}
    return {f"{label} = {n}": PipelineRun(*prepare(pipeline, images, **fixed, **{rule: n})) for n in intervals}


def reuse_case(name: str, run: ReuseRun) -> Case:
    """A run, with the operations that it executes."""
    flop = 2.0 * run.images * run.macs
    return Case(name, lambda: run, type(run).latents, flop=flop, images=run.images, precision=run.precision)


def count_blocks(blocks: Iterable[nn.Module], work: Callable[[], object]) -> int:
    """Count the blocks that run during a piece of work."""
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [block.register_forward_hook(add) for block in blocks]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return count


def results(rows: Sequence[Row], runs: Sequence[ReuseRun]) -> list[Values]:
    """Results of timed runs against the first one, which computes state at every step.

    A speed-up is the median over rounds of the first run's time over a run's own; the bound is the ratio of their MACs.
    Blocks are counted while the run is done once more.
    """
    first, entries = rows[0], []
    for row, run in zip(rows, runs, strict=True):
        speedup = statistics.median(a / b for a, b in zip(first.rounds, row.rounds, strict=True))
        bound, full = first.flop / row.flop, sum(run.refresh)
        steps = {"full_steps": full, "cached_steps": len(run.refresh) - full}
        work = {"blocks": count_blocks(run.blocks, run.latents), "macs": round(row.flop / 2 / run.images)}
        times = {"rounds": row.rounds, "seconds": row.seconds}
        shares = {"bound": bound, "speedup": speedup, "share_of_bound": speedup / bound}
        entries.append({"name": row.name, **steps, **work, **times, **shares})
    return entries


def table(entries: Sequence[Values]) -> str:
    """The results as a Markdown table."""
    columns = {
        "state computed": "{name}",
        "full": "{full_steps}",
        "reused": "{cached_steps}",
        "blocks run": "{blocks:,}",
        "G MACs": "{giga:,.1f}",
        "s": "{seconds:.2f}",
        "bound": "{bound:.3f} x",
        "speed-up": "{speedup:.3f} x",
        "of bound": "{share_of_bound:.1%}",
    }
    rows = [[form.format(**row, giga=row["macs"] / 1e9) for form in columns.values()] for row in entries]
    return aligned(list(columns), rows)
