"""Trains a network of the family: alone, or on many processes under torchrun.

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

from runtime import distributed
from runtime.checkpoint import read_checkpoint
from runtime.config import parse_config, to_dict
from runtime.distributed import World
from runtime.errors import UserError, run
from runtime.files import check_folder
from runtime.resume import Resumable, cut_metrics, differences, find_resumable, read_resumable
from runtime.run_log import RunLog, create_run_folder
from training.config import FREE_ON_RESUME, TrainConfig
from training.dry_run import print_dry_run
from training.setup import Setup, initialise, set_up
from training.trainer import Trainer


def find_run(setup: Setup) -> Resumable | None:
    """The run that --resume means.

    Raises:
        UserError: if a checkpoint was named that is unusable, or was made with other settings.
    """
    config = setup.config
    settings = to_dict(config)
    if config.resume is None:
        return None
    # A cosine spans all steps: with another number of them, the steps already taken would have been others.
    free = FREE_ON_RESUME if config.lr_schedule == "constant" else FREE_ON_RESUME - {"epochs", "max_steps"}
    if config.init_from is not None:
        free -= {"init_from"}  # with --resume auto: the run that began there, or a new one
    if config.resume == "auto":
        return find_resumable(config.results_dir, settings, free, partial(print, file=sys.stderr))
    resumable = read_resumable(Path(config.resume))
    changed = differences(resumable.meta["train"], settings, free)
    if changed:
        raise UserError(f"--resume {config.resume}: the run has other settings: {'; '.join(changed[:3])}")
    return resumable


def open_run(setup: Setup, world: World, resumable: Resumable | None) -> Path | None:
    """The run's folder, on the main process: the one to go on in, or a new one with its config."""
    if not world.is_main:
        return None
    if resumable is not None:
        cut_metrics(resumable.folder, resumable.meta["step"])
        RunLog(resumable.folder).line(f"Resumed {resumable.folder} at step {resumable.meta['step']}")
        return resumable.folder
    folder = create_run_folder(setup.config.results_dir, setup.config.model.replace("/", "-"))
    (folder / "checkpoints").mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(setup.config), indent=2) + "\n")
    RunLog(folder).line(f"Experiment directory created at {folder}")
    return folder


def main(argv: Sequence[str]) -> None:
    """Parses flags, sets up, trains."""
    config = parse_config(TrainConfig, argv, program="train.py", description=__doc__.split("\n")[0])
    if not config.dry_run:
        check_folder(config.results_dir, "--results-dir")
    with distributed.world(config.device, config.dist_timeout) as world:
        distributed.allow_tf32(config.precision != "fp32")
        start = read_checkpoint(config.init_from, flag="--init-from") if config.init_from else None
        setup = set_up(config, world.device, start)
        notes = initialise(setup, start) if start else []
        del start  # a second copy of all weights
        if config.dry_run:
            print_dry_run(setup, world)
            return
        resumable = find_run(setup)
        distributed.barrier()  # every rank has looked before the main one makes a new folder
        folder = open_run(setup, world, resumable)
        for note in notes if resumable is None else ():
            RunLog(folder).line(f"--init-from: {note}")
        Trainer(setup, world, folder, resumable).run()


if __name__ == "__main__":
    sys.exit(run(main, "train.py"))
