"""Opening the checkpoints of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from demo.controls import Opened
from runtime.devices import choose_device
from sample import PROGRAM, SampleSettings
from sampling.config import parse_settings
from sampling.pipeline import Pipeline


def open_all(paths: Sequence[Path], flags: Callable[[Path], tuple[str, ...]]) -> list[Opened]:
    """Open checkpoints, under names that tell them apart.

    Args:
        paths: The checkpoints.
        flags: Flags of sample.py that open each.

    Raises:
        UserError: As `open_checkpoint`.
    """
    return [open_checkpoint(path, flags(path), name) for path, name in zip(paths, names_of(paths), strict=True)]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Run and step of checkpoints of train.py, and of others the file's name; with folders above, if need be."""
    for above in range(max(len(path.absolute().parts) for path in paths)):
        names = [_name(path.absolute(), above) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path}, {number}" for number, path in enumerate(paths, start=1)]  # the same file twice


def _name(path: Path, above: int) -> str:
    own = [path.parents[1].name, path.stem] if path.parent.name == "checkpoints" else [path.name]
    folders = path.parents[2 if len(own) == 2 else 0].parts[-above:] if above else ()
    return ", ".join([str(Path(*folders, own[0])), *own[1:]])


def open_checkpoint(path: Path, flags: tuple[str, ...], name: str | None = None) -> Opened:
    """Open a checkpoint as sample.py does with these flags.

    Raises:
        UserError: For anything about the file or the flags that does not fit.
    """
    given = parse_settings(SampleSettings, flags, PROGRAM, None)
    pipeline = Pipeline.open(given, choose_device(given.general.compute.device), default_vae="mse")
    return Opened(name or names_of([path])[0], flags, pipeline)
