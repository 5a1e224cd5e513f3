"""Train a network of the family: alone, or on many processes under torchrun.

    torchrun --nproc-per-node 8 train.py --data-path /imagenet/train --model DiT-XL/2
    python train.py --dataset digits --model DiT-digits/2 --max-steps 100

Flags and defaults are the official ones; a run's folder holds log.txt, metrics.jsonl, config.json and checkpoints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch._subclasses import FakeTensorMode

from diffusion import PROCESSES
from runtime import distributed, migrate
from runtime.checkpoint import read_checkpoint
from runtime.distributed import World
from runtime.errors import UserError, run
from runtime.files import check_folder
from runtime.settings import differences, document, flag_of, flatten, free_settings, parse
from training.config import KINDS, TrainSettings
from training.dry_run import print_dry_run
from training.losses import LOSSES
from training.optimization import OPTIMIZERS
from training.run import ResumeState, RunLog, create_run_folder, cut_metrics, find_resume_state, read_resume_state
from training.setup import Setup, initialise, set_up
from training.trainer import DRAWS, Trainer

PROGRAM = "train.py"
upgrade = partial(migrate.run_config, cls=TrainSettings, kinds=KINDS, program=PROGRAM)


def changes_since(setup: Setup, meta: dict[str, Any]) -> list[str]:
    """Settings of a checkpoint's run that are others now, and that its result depends on."""
    config = setup.config
    # A cosine spans all steps: with another number of them, the steps already taken would have been others.
    free = free_settings(TrainSettings)
    if config.optimization.lr_schedule != "constant":
        free -= {"optimization.epochs", "optimization.max_steps"}
    if config.run.init_from is not None:
        free -= {"run.init_from"}  # with --resume auto: the run that began there, or a new one
    names = setup.owners
    defaults = document(
        TrainSettings(),
        model=(config.model, setup.network.config),
        process=(names.process, PROCESSES[names.process]()),
        loss=(names.loss, LOSSES[names.loss].settings()),
        optimizer=(names.optimizer, OPTIMIZERS[names.optimizer]()),
    )
    owners = {name: meta[name] for name in ("model", "process", "loss", "optimizer") if name in meta}
    # Settings that did not exist yet had the effect of their defaults.
    then = flatten(defaults) | flatten(upgrade(meta["train"])) | flatten(owners)
    return differences(then, setup.document(), free, partial(flag_of, TrainSettings, KINDS))


def find_run(setup: Setup) -> ResumeState | None:
    """The run that --resume means.

    Raises:
        UserError: if a checkpoint was named that is unusable, or was made with other settings.
    """
    resume, changes = setup.config.run.resume, partial(changes_since, setup)
    if resume is None:
        return None
    if resume == "auto":
        return find_resume_state(setup.config.run.results_dir, changes, partial(print, file=sys.stderr))
    saved = read_resume_state(Path(resume))
    changed = changes(saved.meta)
    if changed:
        raise UserError(f"--resume {resume}: the run has other settings: {'; '.join(changed[:3])}")
    return saved


def open_run(setup: Setup, world: World, saved: ResumeState | None) -> Path | None:
    """The run's folder, on rank 0: the one to resume, or a new one with its config."""
    if not world.is_main:
        return None
    if saved is not None:
        cut_metrics(saved.folder, saved.meta["step"])
        log = RunLog(saved.folder)
        log.line(f"Resumed {saved.folder} at step {saved.meta['step']}")
        if saved.meta.get("draws") != DRAWS:
            log.line("Note: random draws changed with version 0.2: times, noise and dropped labels differ from its own")
        return saved.folder
    folder = create_run_folder(setup.config.run.results_dir, setup.config.model.replace("/", "-"))
    (folder / "checkpoints").mkdir()
    settings = {"format": 2, "script": PROGRAM, **setup.document()}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    RunLog(folder).line(f"Experiment directory created at {folder}")
    return folder


def main(argv: Sequence[str]) -> None:
    """Parse flags, set up, train."""
    given = parse(TrainSettings, argv, program=PROGRAM, doc=__doc__, kinds=KINDS, migrate=upgrade)
    config = given.general
    if not config.run.dry_run:
        check_folder(config.run.results_dir, "--results-dir")
    with distributed.world(config.compute.device, config.compute.dist_timeout) as world:
        distributed.allow_tf32(config.compute.precision != "fp32")
        start = read_checkpoint(config.run.init_from, flag="--init-from") if config.run.init_from else None
        if config.run.dry_run:
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            print_dry_run(set_up(given, world.device, start, fake), world, fake)
            return
        setup = set_up(given, world.device, start)
        notes = initialise(setup, start) if start else []
        del start  # a second copy of all weights
        saved = find_run(setup)
        distributed.barrier()  # every rank has searched before rank 0 makes a new folder
        folder = open_run(setup, world, saved)
        for note in notes if saved is None else ():
            RunLog(folder).line(f"--init-from: {note}")
        Trainer(setup, world, folder, saved).run()


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
