"""The one trainer: a loop over steps, what a step changes, and what is said and saved along the way.

Which images, noise and dropped labels a step sees follows from (seed, step). So a run that stops anywhere goes on just
where it was, and the number of processes and micro-batches changes nothing but rounding.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import GlobalBatches
from diffusion import Batch, Draws
from runtime import distributed
from runtime.checkpoint import load_weights, save_checkpoint
from runtime.config import to_dict
from runtime.distributed import World
from runtime.ema import EMA
from runtime.errors import FAILED_STATUS
from runtime.finite import FiniteGuard
from runtime.profiling import trace_steps
from runtime.resume import ALIGNMENT, Resumable
from runtime.run_log import RunLog
from runtime.stopping import INTERRUPTED_STATUS, stop_on_signal
from training.setup import Setup
from training.validation import Validation

if TYPE_CHECKING:
    from training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`: linear warm-up, then constant or cosine."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps)
    return config.lr * (config.lr_final_ratio + (1 - config.lr_final_ratio) * (1 + math.cos(math.pi * done)) / 2)


def checkpoint_meta(setup: Setup, step: int) -> dict[str, Any]:
    """The JSON document of a checkpoint: all that sample.py needs to know."""
    return {
        "format": 1,
        "step": step,
        "model": {"name": setup.config.model, **dataclasses.asdict(setup.network.config)},
        "process": {"name": setup.objective.process.name, **setup.process_settings},
        "data": {"vae": setup.config.vae, "image_shape": setup.dataset.image_shape, "classes": setup.dataset.classes},
        "train": to_dict(setup.config),
    }


class TrainingState:
    """All that a step changes: weights, their average, the optimizer, the count of steps."""

    def __init__(self, setup: Setup) -> None:
        config, self.network, self.step = setup.config, setup.network, 0
        self.trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.alignment = setup.objective.alignment
        if self.alignment is not None:
            self.trained |= {f"{ALIGNMENT}.{name}": p for name, p in self.alignment.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.lr, betas=config.adam_betas, weight_decay=config.weight_decay, fused=True
        )
        self.ema = EMA(self.network, config.ema_decay, ramp=config.ema_ramp)

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The state as named tensors."""
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.trained.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        groups = {"model": self.network.state_dict(), "ema": self.ema.network.state_dict(), "optimizer": moments}
        return groups if self.alignment is None else {**groups, ALIGNMENT: self.alignment.state_dict()}

    def restore(self, resumable: Resumable) -> None:
        """Takes a checkpoint's place in the run.

        Raises:
            UserError: if it belongs to another network.
        """
        source = f"--resume {resumable.folder}"
        load_weights(self.network, resumable.groups["model"], source)
        load_weights(self.ema.network, resumable.groups["ema"], source)
        if self.alignment is not None:
            load_weights(self.alignment, resumable.groups[ALIGNMENT], source)
        for name, parameter in self.trained.items():
            moments = {
                key: resumable.groups["optimizer"][f"{name}/{key}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[parameter] = moments
        self.step = self.ema.updates = resumable.meta["step"]


class LossMeter:
    """Averages losses between two log lines, on the device: reading them waits for it, so that happens only then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()  # some losses end before others
        self._steps, self._since = 0, time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Counts one step's per-sample losses."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().mean()
        self._counts.update(losses.keys())
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Time that did not go into steps."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """Means over steps and processes, and steps per second; starts anew."""
        sums = distributed.mean_over_ranks(torch.stack(list(self._sums.values()))).tolist()
        values = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        now = time.perf_counter()
        values["steps_per_sec"] = self._steps / (now - self._since)
        self._sums, self._counts, self._steps, self._since = {}, Counter(), 0, now
        return values


class Trainer:
    """The training loop, and what it says and saves along the way.

    Args:
        setup: what is trained, on what.
        world: this process among its peers.
        folder: of the run, on the main process; None elsewhere.
        resumable: where to go on.
    """

    def __init__(self, setup: Setup, world: World, folder: Path | None, resumable: Resumable | None) -> None:
        self.setup, self.config, self.world, self.folder = setup, setup.config, world, folder
        self.log = RunLog(folder, tensorboard=self.config.tensorboard)
        self.state = TrainingState(setup)
        if resumable is not None:
            self.state.restore(resumable)
        if self.config.compile:
            setup.network.compile_blocks()
        self.objective: nn.Module = setup.objective
        if world.size > 1:
            devices = [world.device.index] if world.device.type == "cuda" else None
            self.objective = DistributedDataParallel(setup.objective, device_ids=devices, gradient_as_bucket_view=True)
        self.guard = FiniteGuard(self.state.optimizer, world.device)
        self.meter = LossMeter()
        self.validation = Validation(setup, self.state.ema.network, world) if self.config.eval_every else None

    def run(self) -> None:
        """Trains to the last step, or until asked to stop.

        Raises:
            SystemExit: with `INTERRUPTED_STATUS` after a signal (the state is saved), or 1 after a non-finite step
                where that is fatal.
        """
        state, total = self.state, self.setup.total_steps
        parameters = sum(p.numel() for p in state.network.parameters())
        self.log.line(f"{self.config.model.rsplit('-', 1)[0]} Parameters: {parameters:,}")
        source = self.config.data_path or self.config.dataset
        self.log.line(f"Dataset contains {len(self.setup.dataset):,} images ({source})")
        epochs = "" if self.config.max_steps else f"{self.config.epochs} epochs, "
        self.log.line(f"Training for {epochs}{total:,} steps...")
        for doubt in self.setup.objective.recipe.doubts(total):
            self.log.line(f"Warning: {doubt}")
        remembered = self.config.ema_decay**total
        if remembered > 0.05 and not self.config.ema_ramp:
            self.log.line(
                f"Warning: at --ema-decay {self.config.ema_decay} the average still holds {remembered:.0%} of the "
                "untrained weights at the end; add --ema-ramp, or sample with --weights model"
            )
        hidden = None if self.world.is_main else True
        traces = self.folder / "profile" if self.config.profile and self.folder is not None else None
        with (
            stop_on_signal() as stop,
            tqdm(total=total, initial=state.step, disable=hidden, unit="step") as bar,
            trace_steps(traces) as end_of_step,
        ):
            for step, pieces in batches(self.setup, self.world, state.step):
                grad_norm = self.train_step(step, pieces)
                state.step = step + 1
                bar.update()
                end_of_step()
                if state.step % self.config.log_every == 0:
                    self.report(grad_norm)
                if self.validation is not None and (state.step % self.validation.every == 0 or state.step == total):
                    self.validate(self.validation)
                stopping = stop.by_any_rank()
                if state.step % self.config.ckpt_every == 0 or state.step == total or stopping:
                    self.save()
                if stopping and state.step < total:
                    self.log.line(f"Stopped by a signal at step {state.step}; --resume auto goes on from here")
                    raise SystemExit(INTERRUPTED_STATUS)
        if traces is not None and not list(traces.iterdir()):
            self.log.line("Warning: --profile found nothing to trace: the run was shorter than 15 steps")
        self.log.line("Done!")

    def train_step(self, step: int, pieces: Sequence[tuple[Batch, Draws]]) -> Tensor:
        """One step over this process's micro-batches; returns the norm of the gradient, on the device."""
        state, config = self.state, self.config
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, self.setup.total_steps)
        state.optimizer.zero_grad(set_to_none=True)
        batch_mean = self.setup.objective.mean_statistic(pieces, step) if len(pieces) > 1 else None
        seen: list[dict[str, Tensor]] = []
        for number, (batch, draws) in enumerate(pieces, start=1):
            with averaging(self.objective, wanted=number == len(pieces)):
                losses = self.objective(batch, step, draws, batch_mean)
                (losses["loss"].mean() / len(pieces)).backward()
            seen.append(losses)
        losses = {name: torch.cat([piece[name].detach() for piece in seen]) for name in seen[0]}
        gradients = [p.grad for p in state.trained.values() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if config.grad_clip is not None and config.grad_norm_mode == "clip":
            torch.nn.utils.clip_grads_with_norm_(state.trained.values(), config.grad_clip, grad_norm)
        limit = config.grad_clip if config.grad_norm_mode == "skip" else None
        self.guard.watch(step, losses["loss"].mean(), grad_norm, limit)
        state.optimizer.step()
        state.ema.update()
        self.meter.add(losses)
        return grad_norm

    def report(self, grad_norm: Tensor) -> None:
        """A log line, a line of metrics, and word of non-finite steps."""
        step, values = self.state.step, self.meter.read()
        rate = learning_rate(self.config, step - 1, self.setup.total_steps)
        line = f"(step={step:07d}) Train Loss: {values['loss']:.4f}, Train Steps/Sec: {values['steps_per_sec']:.2f}"
        name = self.setup.objective.recipe.statistic_name
        if name is not None:
            line += f", {name.replace('_', ' ')}: {values[name]:.3f}"
        self.log.line(line)
        if self.config.grad_norm_mode == "skip":
            values["updates_skipped"] = self.guard.count_too_large()
        self.log.metrics(step=step, lr=rate, grad_norm=float(grad_norm), **values)
        self.check_finite()

    def validate(self, validation: Validation) -> None:
        """Loss on held-out images, pictures and scores of the averaged weights."""
        found = validation.run()
        self.meter.pause(found.seconds)
        if self.folder is None:
            return
        found.save_grid(self.folder / "samples" / f"{self.state.step:07d}.png")
        self.log.line(f"(step={self.state.step:07d}) {found.summary()}")
        self.log.metrics(step=self.state.step, **found.values)

    def check_finite(self) -> None:
        """Says what was skipped; ends the run on all processes if that is fatal."""
        message = self.guard.report()
        if message is None:
            return
        self.log.line(message)
        if self.config.non_finite == "fatal":
            self.log.line("Weights and average are as before that step. --non-finite skip goes on.")
            raise SystemExit(FAILED_STATUS)

    def save(self) -> None:
        """Writes a checkpoint, then removes those that are no longer wanted."""
        self.check_finite()
        if self.folder is None:
            return
        path = self.folder / "checkpoints" / f"{self.state.step:07d}.safetensors"
        save_checkpoint(path, self.state.groups(), checkpoint_meta(self.setup, self.state.step))
        self.log.line(f"Saved checkpoint to {path}")
        if self.config.keep_last is not None:
            for old in sorted(path.parent.glob("[0-9]*.safetensors"))[: -self.config.keep_last]:
                old.unlink()


def averaging(objective: nn.Module, *, wanted: bool) -> AbstractContextManager[None]:
    """Whether a backward pass averages gradients over processes; of several micro-batches only the last one need."""
    return nullcontext() if wanted or not isinstance(objective, DistributedDataParallel) else objective.no_sync()


def batches(setup: Setup, world: World, first_step: int) -> Iterator[tuple[int, list[tuple[Batch, Draws]]]]:
    """Each step's number and this rank's rows of its batch, with their draws, in micro-batches."""
    config, size = setup.config, setup.config.global_batch_size
    steps = range(first_step, setup.total_steps)
    keys = GlobalBatches(
        len(setup.dataset), size, rank=world.rank, world=world.size, seed=config.global_seed, steps=steps
    )
    workers = min(config.num_workers, os.cpu_count() or 1) if setup.dataset.worth_workers else 0
    loader: DataLoader[Any] = DataLoader(
        setup.dataset,  # type: ignore[arg-type]  # items are asked for by (epoch, index)
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        persistent_workers=workers > 0,
    )
    local, first_row = size // world.size, world.rank * size // world.size
    piece = local // config.grad_accum
    for step, (images, y, index) in zip(steps, loader, strict=True):
        draws = setup.objective.draw(step, size, setup.latent_shape, world.device)
        pixels, labels = images.to(world.device, non_blocking=True), y.to(world.device, non_blocking=True)
        pieces = []
        for start in range(0, local, piece):
            rows = slice(start, start + piece)
            own = draws.rows(first_row + start, first_row + start + piece)
            latents = setup.autoencoder.encode(pixels[rows], own.encoder_noise)
            raw = None if setup.objective.alignment is None else pixels[rows].float() / 255
            pieces.append((Batch(latents, labels[rows], index[rows], raw), own))
        yield step, pieces
