"""Search the steps and weights of a solver for one checkpoint, and write them as a table that sampling takes.

    python scripts/search_solver.py --ckpt a.safetensors --evaluations 8
    python sample.py --ckpt a.safetensors --solver-table results/solvers/a-8.json

The network stays as it is. Its samples in few evaluations are brought close to those in many from the same noise, by
gradients through the network; the table that is best on held-out noise is kept. The same command continues a search
that was interrupted. Source: Wang et al., 2025 (arXiv 2505.21114).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from benchmarks.samplers import check_takes_no_text
from benchmarks.timing import check_at_least
from diffusion import Evaluation, ImageNoise, convert_time, guided, make_sampler
from diffusion.sampling import Denoiser
from diffusion.solver_search import Interval, Lion, SearchedSolver, search_loss, teacher_path
from diffusion.solver_table import write_table
from models import ModelOutput
from models.contract import State
from runtime.command_line import parse_config
from runtime.devices import choose_device
from runtime.documents import to_dict
from runtime.download import sha256_of
from runtime.errors import UserError, run
from runtime.files import check_writable
from runtime.settings import Values, setting
from runtime.tensor_file import read_tensors, write_tensors
from sampling.pipeline import Pipeline

VALIDATION_IMAGES, VALIDATE_EVERY = 64, 25
# A first-order teacher of 100 evaluations is further from the ODE's solution than a good solver of 15.
TEACHERS = {"gaussian": "unipc", "flow": "adams"}
ORDERS = (2, 3)  # of UniPC, the closer of which the search begins at


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of search_solver.py."""

    ckpt: Path | None = setting(
        None, "checkpoint: a file, a folder, a released one by name, or owner/name on the hub", free=True
    )
    evaluations: int = setting(10, "network evaluations of the solver")
    teacher_evaluations: int = setting(100, "network evaluations of the path that it is brought close to")
    batches: int = setting(300, "batches of the search")
    batch_size: int = setting(32, "images of a batch")
    lr: float = setting(1e-2, "learning rate, which falls to 0 on a cosine")
    cfg_scale: float | None = setting(None, "guidance scale; 1: no guidance", shown="the checkpoint's")
    guidance_interval: tuple[float, float] | None = setting(
        None, "guide only strictly between these timesteps", shown="everywhere, or a release's own"
    )
    seed: int = setting(0, "seed of noise and labels")
    grad_checkpointing: bool = setting(False, "keep one evaluation in memory at a time; slower", free=True)
    output: Path | None = setting(None, "the table", shown="results/solvers/CHECKPOINT-EVALUATIONS.json", free=True)
    overwrite: bool = setting(False, "search again where there is a table, or a search with other settings", free=True)
    device: Literal["cuda", "cpu"] | None = setting(None, "where to compute", shown="cuda if there is one", free=True)

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise ValueError("--ckpt: required")
        check_at_least(self, 2, "evaluations")
        check_at_least(self, 1, "batches", "batch_size")
        if self.teacher_evaluations < 2 * self.evaluations:
            raise ValueError(f"--teacher-evaluations {self.teacher_evaluations}: must be twice --evaluations, or more")
        if not 0 < self.lr < 1:
            raise ValueError(f"--lr {self.lr}: must be in (0, 1)")

    @property
    def table_path(self) -> Path:
        """Path of the table."""
        assert self.ckpt is not None
        return self.output or Path("results/solvers") / f"{self.ckpt.stem}-{self.evaluations}.json"


class Search:
    """A search: the solver, its optimizer, and the best table so far.

    Attributes:
        done: Batches that were made.
        best: Distance from the teacher's end on held-out noise, and the parameters.
        first: The same distance of the solver where the search began.
    """

    def __init__(self, pipeline: Pipeline, settings: SearchSettings) -> None:
        chosen: Values = {"cfg_scale": settings.cfg_scale, "guidance_interval": settings.guidance_interval}
        run = pipeline.prepare(**{name: value for name, value in chosen.items() if value is not None})
        self.pipeline, self.settings, self.guidance = pipeline, settings, run.config.guidance
        process: Any = pipeline.process
        pixels, device = pipeline.info.encoder == "none", pipeline.device
        steps = str(settings.teacher_evaluations)
        self.teacher = make_sampler(TEACHERS[process.name], process, steps, pixels=pixels)
        self.scale = self.guidance.cfg_scale or 1.0
        self.interval: Interval = None
        if self.guidance.guidance_interval is not None:
            low, high = (convert_time(t, "index", process.time_convention) for t in self.guidance.guidance_interval)
            self.interval = (low, high)
        solvers = [
            SearchedSolver(process, settings.evaluations, order, clip_denoised=pixels).to(device) for order in ORDERS
        ]
        self.first, self.solver = min(((self.distance(solver), solver) for solver in solvers), key=lambda each: each[0])
        self.optimizer = Lion([*self.solver.parameters()], settings.lr)
        self.done = 0
        self.best = (self.first, self.parameters())

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the solver's parameters."""
        return {name: value.detach().cpu().clone() for name, value in self.solver.named_parameters()}

    def start(self, seed: int, first: int, count: int) -> tuple[Denoiser, Tensor]:
        """Network with the labels of some numbered images bound, and their noise."""
        pipeline, device = self.pipeline, self.pipeline.device
        indices = range(first, first + count)
        labels = torch.tensor(indices, device=device) % max(1, pipeline.num_classes)
        network = pipeline.network
        null = network.null_conditioning(count) if self.scale != 1 else None
        times, channels = pipeline.process.time_convention, self.guidance.guidance_channels
        denoise = guided(network, {"y": labels}, null, times=times, channels=channels)
        return denoise, ImageNoise(seed, indices, network.sample_shape, device).initial()

    def batch(self) -> float:
        """One step of the search; returns its loss."""
        share = self.done / self.settings.batches
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * (1 + math.cos(math.pi * share)) / 2
        count = self.settings.batch_size
        denoise, x = self.start(self.settings.seed, self.done * count, count)
        teacher = teacher_path(denoise, self.teacher, x, self.scale, self.interval)
        student = recomputed(denoise) if self.settings.grad_checkpointing else denoise
        self.optimizer.zero_grad()
        loss = search_loss(self.solver(student, x, self.scale, self.interval), teacher)
        loss.backward()
        self.optimizer.step()
        self.done += 1
        if self.done % VALIDATE_EVERY == 0 or self.done == self.settings.batches:
            self.best = min(self.best, (self.distance(self.solver), self.parameters()), key=lambda each: each[0])
        return float(loss.detach())

    @torch.no_grad()
    def distance(self, solver: SearchedSolver) -> float:
        """Root mean square distance of a solver's end from the teacher's on held-out noise."""
        denoise, x, end = self._held_out
        solved = solver(denoise, x, self.scale, self.interval).points[-1]
        return float((solved - end).square().mean().sqrt())

    @cached_property
    def _held_out(self) -> tuple[Denoiser, Tensor, Tensor]:
        """Held-out noise with its network, and the teacher's end from there."""
        denoise, x = self.start(self.settings.seed + 1, 0, VALIDATION_IMAGES)
        return denoise, x, teacher_path(denoise, self.teacher, x, self.scale, self.interval).points[-1]

    def save(self, path: Path, identity: str) -> None:
        """Write everything that the search is continued from."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{kind}.{name}": value for kind, values in self._groups().items() for name, value in values.items()}
        tensors |= {f"mean.{number}": values["mean"].cpu() for number, values in state.items()}
        numbers = {"done": self.done, "best": self.best[0], "first": self.first}
        write_tensors(path, tensors, {"identity": identity, **numbers}, "search")

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        return {"now": self.parameters(), "best": self.best[1]}

    def load(self, path: Path, identity: str) -> None:
        """Continue a search that was saved.

        Raises:
            UserError: If it had other settings, or the file is damaged.
        """
        try:
            tensors, numbers = read_tensors(path, "search")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: damaged ({error}); --overwrite starts anew") from error
        if numbers["identity"] != identity:
            raise UserError(f"{path}: a search with other settings; --overwrite starts anew")
        self.done, self.first = numbers["done"], numbers["first"]
        self.best = (numbers["best"], {name: tensors[f"best.{name}"] for name in self.parameters()})
        with torch.no_grad():
            for number, (name, parameter) in enumerate(self.solver.named_parameters()):
                parameter.copy_(tensors[f"now.{name}"])
                if f"mean.{number}" in tensors:
                    self.optimizer.state[parameter]["mean"] = tensors[f"mean.{number}"].to(parameter)


def recomputed(denoise: Denoiser) -> Denoiser:
    """The same function; its activations are computed again for gradients."""

    def evaluate(x: Tensor, evaluation: Evaluation, state: State = None, /) -> ModelOutput:
        out: ModelOutput = checkpoint(denoise, x, evaluation, state, use_reentrant=False)
        return out

    return evaluate


def protocol(search: Search, deciding: Values, checksum: str) -> Values:
    """Everything that a table was found with."""
    info, process = search.pipeline.info, search.pipeline.process
    return {
        **deciding,
        "cfg_scale": search.scale,
        "guidance_interval": search.interval,
        "guidance_channels": search.guidance.guidance_channels,
        "teacher": TEACHERS[process.name],
        "model": info.model,
        "process": {"name": info.process, **info.process_settings},
        "checkpoint": {"file": info.path.name, "sha256": checksum, "step": info.step},
        "rmse_on_held_out_noise": {"first": search.first, "best": search.best[0]},
        "torch": torch.__version__,
    }


def finish(search: Search, unfinished: Path, identity: str) -> None:
    """Make the batches that are left, saving now and then; the solver is then the best one."""
    total = search.settings.batches
    with tqdm(total=total, initial=search.done, disable=None, unit="batch") as bar:
        while search.done < total:
            loss = search.batch()
            bar.update()
            bar.set_postfix(loss=f"{loss:.4g}", rmse=f"{search.best[0]:.4g}")
            if search.done % VALIDATE_EVERY == 0:
                search.save(unfinished, identity)
    with torch.no_grad():
        for name, parameter in search.solver.named_parameters():
            parameter.copy_(search.best[1][name])


def main(argv: Sequence[str]) -> None:
    """Parse flags, search, write the table."""
    settings = parse_config(SearchSettings, argv, program="search_solver.py", doc=__doc__)
    assert settings.ckpt is not None
    path = settings.table_path
    check_writable(path, "--output")
    unfinished = path.with_suffix(".search")
    if path.exists() and not settings.overwrite:
        raise UserError(f"--output {path}: exists; --overwrite searches again")
    device = choose_device(settings.device)
    pipeline = Pipeline.from_pretrained(settings.ckpt, device=device)
    check_takes_no_text(pipeline, settings.ckpt)
    pipeline.network.requires_grad_(False)
    checksum, deciding = sha256_of(pipeline.info.path), to_dict(settings)
    for name in ("ckpt", "output", "overwrite", "device", "grad_checkpointing"):
        deciding.pop(name)
    search = Search(pipeline, settings)
    teacher = TEACHERS[pipeline.process.name]
    identity = json.dumps({**deciding, "teacher": teacher, "checkpoint": checksum}, sort_keys=True)
    if unfinished.exists() and not settings.overwrite:
        search.load(unfinished, identity)
        print(f"Continuing {unfinished} after {search.done} of {settings.batches} batches")
    finish(search, unfinished, identity)
    write_table(search.solver.table(protocol(search, deciding, checksum)), path)
    unfinished.unlink(missing_ok=True)
    print(f"RMSE to {settings.teacher_evaluations} evaluations: {search.first:.4f} at first, {search.best[0]:.4f} now")
    print(f"Saved {path}; sample with --solver-table {path}")


if __name__ == "__main__":
    sys.exit(run(main, "search_solver.py"))
