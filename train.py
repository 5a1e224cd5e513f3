"""Train a network of the family: alone, or on many processes under torchrun.

    torchrun --nproc-per-node 8 train.py --data-path /imagenet/train --model DiT-XL/2
    python train.py --dataset digits --model DiT-digits/2 --max-steps 100

Flags and defaults are the official ones; a run's folder holds log.txt, metrics.jsonl, config.json and checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import runtime  # noqa: F401  # first: it reports other packages named models
from data.dataset import check_same_data
from runtime import distributed
from runtime.errors import run
from runtime.files import check_folder
from runtime.stores import Address
from training.config import PROGRAM, parse_settings
from training.dry_run import dry_run
from training.mirror import RunMirror
from training.resume import find_run
from training.run import locked_run
from training.setup import set_up
from training.trainer import Trainer


def main(argv: Sequence[str]) -> None:
    """Parse flags, set up, train."""
    given = parse_settings(argv, __doc__)
    config = given.general
    if config.run.dry_run:
        dry_run(given)
        return
    results = config.run.results_dir
    mirror = RunMirror(results) if isinstance(results, Address) else None
    if mirror is None:
        check_folder(results, "--results-dir")
    with distributed.world(config.compute.device, config.compute.dist_timeout) as world:
        distributed.allow_tf32(config.compute.precision != "fp32")
        if mirror is not None:
            distributed.on_rank0(mirror.prepare)
        setup = set_up(given, world.device)
        check_same_data(setup.dataset)
        saved = find_run(setup, mirror)
        distributed.barrier()  # every rank has searched before rank 0 makes a new folder
        with locked_run(setup, world, saved, mirror) as folder:
            trainer = Trainer(setup, world, folder, saved, mirror)
            del saved  # a second copy of weights, average and optimizer
            trainer.run()


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
