"""Merge the parts of a job that was cut by --shard: samples, latents, or features, of which the scores are computed.

    python scripts/merge.py samples.1-of-3.npz samples.2-of-3.npz samples.3-of-3.npz --output samples.npz
    python scripts/merge.py latents.*-of-3 --output latents
    python scripts/merge.py samples.scores.*-of-3 --output samples.scores.json

The result has the bytes, or the scores, of one job without --shard. Parts may be given in any order, and are left as
they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.latent_parts import merge_latents
from data.sample_parts import merge_samples
from evaluator.__main__ import OPENERS
from evaluator.evaluation import evaluate
from evaluator.parts import DESCRIPTION, open_parts
from runtime import distributed
from runtime.command_line import parse_config
from runtime.errors import UserError, run
from runtime.files import check_writable
from runtime.settings import positional, setting

PROGRAM = "merge.py"


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Settings of merge.py."""

    parts: tuple[Path, ...] = positional("files or folders of all parts, in any order")
    output: Path | None = setting(None, "new file or folder", shown="required")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.output is None:
            raise ValueError("--output: required")


def merge(paths: Sequence[Path], output: Path) -> str:
    """Merge parts, and compute the scores of features; returns a line about the result.

    Raises:
        UserError: If they do not belong together, one is missing or not finished, or the output exists.
    """
    folders = [path.is_dir() and path.suffix != ".partial" for path in paths]
    if any(folders) and not all(folders):
        file, folder = paths[folders.index(False)], paths[folders.index(True)]
        raise UserError(f"{file}: is no folder of latents or features, but {folder} is one; give the parts of one job")
    if output.exists():
        raise UserError(f"--output {output}: exists already; choose another name, or move it")
    check_writable(output, "--output")
    if all(folders) and any((path / DESCRIPTION).exists() for path in paths):
        config, ordered = open_parts(paths, output)
        with distributed.world(config.device) as world:
            evaluate(config, world, OPENERS, ordered)
        return f"Merged {len(paths)} parts of an evaluation to {output}"
    if all(folders):
        count, left_out = merge_latents(paths, output)
        return f"Merged {count:,} latents to {output}, left out {left_out:,}"
    return f"Merged {merge_samples(paths, output):,} samples to {output}"


def main(argv: Sequence[str]) -> None:
    """Parse flags, merge, say where."""
    config = parse_config(MergeSettings, argv, program=PROGRAM, doc=__doc__)
    assert config.output is not None  # `__post_init__` checked it
    print(merge(config.parts, config.output))


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
