"""The training loop."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed._composable import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import GlobalBatches, conditioning
from data.dataset import Example, read_batches
from data.pixels import to_unit_range
from diffusion.loss import Batch, Draws
from models import Network, family_name
from runtime import distributed
from runtime.distributed import World
from runtime.errors import FAILED_STATUS, UserError, error_prefix
from runtime.licences import origin_of
from runtime.saver import BackgroundSaver, Saver, ShardedSaver, State
from runtime.stores import parse_path
from training.interruption import INTERRUPTED_STATUS, stop_on_signal
from training.log import RunLog, reported, warnings_logged
from training.mirror import RunMirror
from training.network import START
from training.optimization import FiniteGuard
from training.profiling import trace_steps
from training.resume import ResumeState
from training.run_files import thin
from training.setup import Setup, encode
from training.state import TrainingState, checkpoint_meta
from training.validation import Validation

MicroBatch = tuple[Batch, Draws]


class LossMeter:
    """Averages losses between two log lines, on the device: reading them synchronises, so that happens only then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()  # some losses end before others
        self._steps, self._since = 0, time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Count one step's per-sample losses."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().mean()
        self._counts.update(losses.keys())
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on steps."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """Means over steps and processes, and steps per second; then start again."""
        sums = distributed.mean_over_ranks(torch.stack(list(self._sums.values()))).tolist()
        values = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        now = time.perf_counter()
        values["steps_per_sec"] = self._steps / (now - self._since)
        self._sums, self._counts, self._steps, self._since = {}, Counter(), 0, now
        return values


class Trainer:
    """The training loop, its log and its checkpoints.

    Args:
        setup: Setup of the run.
        world: This process and its place among all.
        folder: Folder of the run, on rank 0; None writes nothing.
        saved: The checkpoint to continue from; None starts at step 0.
        mirror: Brings the run to an object store, if --results-dir is there.
    """

    def __init__(
        self,
        setup: Setup,
        world: World,
        folder: Path | None = None,
        saved: ResumeState | None = None,
        mirror: RunMirror | None = None,
    ) -> None:
        if saved is not None:  # its checkpoints still say where the run began
            run = saved.meta["train"].get("run", {})
            first, how = run.get("init_from"), run.get("frame_positions")
            start = None if first is None else parse_path(first)
            began = replace(setup.config.run, init_from=start, frame_positions=how)
            setup.config = replace(setup.config, run=began)
        self.setup, self.config, self.world, self.folder = setup, setup.config, world, folder
        self.mirror = mirror
        self.log = RunLog(folder)
        self.repeats = saved is not None and not saved.changed  # steps that follow may have been made before
        self.state = TrainingState(setup)
        self.saver = self.make_saver()
        if saved is not None:
            with error_prefix(f"--resume {saved.folder}: it was trained with another autoencoder"):
                setup.encoder.check_same(saved.meta.get("autoencoder", {}))
            setup.digests.pop(START, None)
            setup.digests |= {name: saved.meta[name] for name in (START,) if name in saved.meta}  # the first file's
            setup.origin = origin_of(saved.path, saved.meta)
            self.state.restore(saved)
        if self.config.compute.grad_checkpointing:
            recompute_activations(setup.network)
        if self.config.compute.compile:
            setup.network.compile_blocks()
        self.loss = setup.parallel.wrap(setup.loss)
        limit = self.config.optimization.skip_updates_above
        self.guard = FiniteGuard(self.state.optimizer, world.device, limit)
        self.meter = LossMeter()
        data = setup.validation
        self.validation = None if data is None else Validation(setup, data, self.state.ema.network, world)

    def run(self) -> None:
        """Train to the last step, or until a signal asks to stop.

        Raises:
            SystemExit: With `INTERRUPTED_STATUS` after a signal (the state is saved), or 1 after a non-finite step
                where that is fatal.
            UserError: On every rank, if a checkpoint could not be saved.
        """
        state, total, run = self.state, self.setup.total_steps, self.config.run
        first = state.step
        self.introduce()
        traces = self.folder / "profile" if run.profile and self.folder is not None else None
        with (
            reported(self.log, self.setup, state.step, repeats=self.repeats),
            self.last_save_finished(),
            stop_on_signal() as stop,
            distributed.Votes() as votes,
            warnings_logged(self.log),
            tqdm(total=total, initial=state.step, disable=None if self.world.is_main else True, unit="step") as bar,
            trace_steps(traces) as end_of_step,
        ):
            for step, pieces in batches(self.setup, self.world, state.step):
                grad_norm = self.train_step(step, pieces)
                state.step = step + 1
                bar.update()
                end_of_step()
                if state.step % run.log_every == 0:
                    self.report(grad_norm)
                if self.validation is not None and self.validation.is_due(state.step):
                    self.validate(self.validation)
                stopping = votes.ask(stop.received or self.saver.failed)  # `save` raises its error on all ranks
                if state.step % run.ckpt_every == 0 or state.step == total or stopping:
                    self.save()
                if state.step == total or stopping:
                    self.wait_for_save()
                elif step == first:  # from now on the optimizer has its state
                    self.saver.prepare(state.groups())
                if stopping and state.step < total:
                    self.log.line(f"Stopped by a signal at step {state.step}; --resume auto resumes here")
                    raise SystemExit(INTERRUPTED_STATUS)
        if traces is not None and not list(traces.iterdir()):
            self.log.line("Warning: --profile found nothing to trace: the run was shorter than 15 steps")
        self.log.line("Done!")

    def introduce(self) -> None:
        """Log what is trained on what, and the warnings."""
        parameters = sum(p.numel() for p in self.state.network.parameters())
        self.log.line(f"{family_name(self.config.model)} Parameters: {parameters:,}")
        unit = "clips" if len(self.setup.dataset.image_shape) == 4 else "images"
        self.log.line(f"Dataset contains {len(self.setup.dataset):,} {unit} ({self.setup.source})")
        epochs = "" if self.config.optimization.max_steps else f"{self.config.optimization.epochs} epochs, "
        step, total = self.state.step, self.setup.total_steps
        ended = f"Already at step {step:,} of {total:,}: nothing to train; a larger --max-steps or --epochs continues"
        self.log.line(ended if step >= total else f"Training for {epochs}{total:,} steps...")
        for warning in self.setup.warnings():
            self.log.line(f"Warning: {warning}")

    def train_step(self, step: int, pieces: Sequence[MicroBatch]) -> Tensor:
        """One step over this process's micro-batches; returns the norm of the gradient, on the device."""
        state, optimization = self.state, self.config.optimization
        for group in state.optimizer.param_groups:
            group["lr"] = optimization.learning_rate(state.updates, self.setup.total_steps)
        state.optimizer.zero_grad(set_to_none=True)
        shared = self.setup.loss.shared(pieces, step)
        seen: list[dict[str, Tensor]] = []
        for number, (batch, draws) in enumerate(pieces, start=1):
            with self.setup.parallel.backward(last=number == len(pieces)):
                losses = self.loss(batch, draws, step, shared)
                (losses["loss"].mean() / len(pieces)).backward()
            seen.append(losses)
        losses = {name: torch.cat([piece[name].detach() for piece in seen]) for name in seen[0]}
        grad_norm = state.collect_gradients()
        self.meter.add(losses)
        if self.guard.drops(grad_norm):
            return grad_norm
        limit = optimization.grad_clip if step >= optimization.grad_clip_start else None
        if limit is not None and optimization.grad_norm_mode == "clip":
            torch.nn.utils.clip_grads_with_norm_(state.trained.values(), limit, grad_norm)
            limit = None
        self.guard.watch(step, losses["loss"].mean(), grad_norm, limit)
        self.guard.step()
        state.ema.update()
        state.updates += 1
        return grad_norm

    def report(self, grad_norm: Tensor) -> None:
        """Write a log line and a line of metrics, and report non-finite steps."""
        step, values = self.state.step, self.meter.read()
        rate = self.state.optimizer.param_groups[0]["lr"]
        line = f"(step={step:07d}) Train Loss: {values['loss']:.4f}, Train Steps/Sec: {values['steps_per_sec']:.2f}"
        for name in self.setup.loss.logged:
            line += f", {name.replace('_', ' ')}: {values[name]:.3f}"
        if dropped := self.guard.count_dropped():
            line += f", updates dropped: {dropped}"
        self.log.line(line)
        if self.config.optimization.skip_updates_above is not None:
            values |= {"updates_dropped": dropped, "updates": self.state.updates}
        if self.config.optimization.grad_norm_mode == "skip":
            values["updates_skipped"] = self.guard.count_too_large()
        self.log.metrics(step=step, lr=rate, grad_norm=float(grad_norm), **values)
        self.check_finite()

    def validate(self, validation: Validation) -> None:
        """Log the loss on held-out images, samples and scores of the averaged weights."""
        report = validation.run()
        self.meter.pause(report.seconds)
        if self.folder is None:
            return
        for path in report.save_grid(self.folder / "samples" / f"{self.state.step:07d}.png"):
            self.log.samples(self.state.step, path)
        self.log.line(f"(step={self.state.step:07d}) {report.summary()}")
        self.log.metrics(step=self.state.step, **report.values)

    def check_finite(self) -> None:
        """Log skipped steps; end the run on all processes if that is fatal."""
        message = self.guard.report()
        if message is None:
            return
        self.log.line(message)
        if self.config.optimization.non_finite == "fatal":
            self.log.line("The weights are as before that step. --non-finite skip continues.")
            raise SystemExit(FAILED_STATUS)

    def save(self) -> None:
        """Copy the state to host memory, and start to write a checkpoint from it.

        Raises:
            UserError: On every rank, if the save before failed.
        """
        self.check_finite()
        self.wait_for_save()  # on all ranks, before any of them waits for another in `save`
        state, step = self.state, self.state.step
        meta = checkpoint_meta(self.setup, step, state.updates, state.ema.averaged)
        self.saver.save(State(step, state.groups(), meta))

    def make_saver(self) -> Saver:
        """The saver of this process."""
        folder = None if self.folder is None else self.folder / "checkpoints"
        if self.config.run.checkpoint_format == "sharded":
            common = distributed.broadcast(folder)
            return BackgroundSaver(None, self.saved) if common is None else ShardedSaver(common, self.saved)
        return BackgroundSaver(folder, self.saved)

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is whole.

        Raises:
            UserError: On every rank, if it could not be saved.
        """
        with distributed.raise_on_all_ranks():
            self.saver.wait()

    def saved(self, path: Path, step: int) -> None:
        """Log a new checkpoint and bring it to the store, then remove those that --keep-last leaves out."""
        self.log.line(f"Saved checkpoint to {path}")
        if self.mirror is not None:
            self.mirror.saved(path, step, self.config.run.keep_last)
        if self.folder is not None and self.config.run.keep_last is not None:
            thin(self.folder, step, self.config.run.keep_last)

    @contextmanager
    def last_save_finished(self) -> Iterator[None]:
        """Wait for a save in flight if the block ends with an error, which stays the one that is raised."""
        try:
            yield
        except BaseException:
            try:
                self.saver.wait()
            except UserError as error:
                self.log.line(f"Error: {error}")
            raise


def recompute_activations(network: Network) -> None:
    """Recompute the activations of every block in the backward pass instead of keeping them."""
    for block in network.blocks:
        checkpoint(block)


def batches(setup: Setup, world: World, first_step: int) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Each step's number and this rank's rows of its batch, in micro-batches."""
    optimization, size = setup.config.optimization, setup.config.optimization.global_batch_size
    steps = range(first_step, setup.total_steps)
    keys = GlobalBatches(
        len(setup.dataset), size, rank=world.rank, world=world.size, seed=optimization.global_seed, steps=steps
    )
    workers = min(setup.config.data.num_workers, os.cpu_count() or 1) if setup.dataset.worth_workers else 0
    loader: DataLoader[Example] = DataLoader(
        setup.dataset,  # type: ignore[arg-type]  # items are asked for by (epoch, index)
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        persistent_workers=workers > 0,
    )
    for step, (images, labels, index) in zip(steps, read_batches(loader), strict=True):
        yield step, micro_batches(setup, world, step, images, conditioning(labels), index)


def micro_batches(
    setup: Setup, world: World, step: int, images: Tensor, cond: Mapping[str, Tensor], index: Tensor
) -> list[MicroBatch]:
    """Cut this rank's rows of a step into micro-batches, encode them and draw their randomness, on the device.

    Args:
        setup: Setup of the run.
        world: This process and its place among all.
        step: Number of the step.
        images: This rank's rows as the data set gives them.
        cond: Their conditioning.
        index: Their places in the data set.
    """
    optimization, first = setup.config.optimization, world.rank * len(images)
    count = len(images) // optimization.grad_accum
    images = images.to(world.device, non_blocking=True)
    cond = {name: leaf.to(world.device, non_blocking=True) for name, leaf in cond.items()}
    null, pieces = setup.null_rows(count, world.device), []
    for start in range(0, len(images), count):
        own, rows = slice(start, start + count), range(first + start, first + start + count)  # of rank, of all
        draws = setup.loss.draw(step, optimization.global_batch_size, rows, world.device)
        latents = encode(setup, images[own], step, rows)
        raw = None if setup.loss.alignment is None else to_unit_range(images[own])
        pieces.append((Batch(latents, {name: leaf[own] for name, leaf in cond.items()}, index[own], raw, null), draws))
    return pieces
