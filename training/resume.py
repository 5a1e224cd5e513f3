"""The run that `--resume` means: which checkpoint, in which folder, and what differs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from runtime.checkpoint import check_finite, is_whole, read_groups
from runtime.errors import UserError, error_prefix
from runtime.files import remove
from runtime.json_file import Json, parse_json
from runtime.parts import SUFFIX, is_sharded
from runtime.settings import document, flag_name, flag_of, flatten, free_settings, places
from training.config import KINDS, TrainSettings, upgrade
from training.network import DIGESTS
from training.setup import Setup

RUN_NAME = re.compile(r"(\d{3,})-.+")
ASIDE = ".aside"  # added to checkpoints that a run has not reached again
OTHER_RUN = ("model", "data.dataset", "data.image_size", "data.channels", "data.vae")
# Settings that weights, optimizer state or labels depend on
UNCHANGEABLE = (*OTHER_RUN, "process", "loss.name", "optimizer.name", "optimization.ema_decay")


class ResumeState(NamedTuple):
    """A run to resume.

    Attributes:
        path: The checkpoint.
        folder: Folder of the run; None for a file outside of one, from which a new run continues.
        groups: "model", "optimizer", the averages, and "projector" if the run has one: name -> tensor.
        meta: The checkpoint's JSON document.
        changed: Settings that differ, on purpose or without effect on the result, as "--lr (0.1, 0.2)".
    """

    path: Path
    folder: Path | None
    groups: dict[str, dict[str, Tensor]]
    meta: Json
    changed: tuple[str, ...] = ()


class Changes(NamedTuple):
    """Settings of a checkpoint's run that are others now: "section.field" -> "--flag (then, now)".

    Attributes:
        refused: Those that the result depends on.
        allowed: Those named by --override, and those that the result does not depend on.
    """

    refused: dict[str, str]
    allowed: dict[str, str]

    @property
    def other(self) -> bool:
        """True for another model or other data: another run is meant."""
        return any(path.startswith(OTHER_RUN) for path in self.refused)

    def __str__(self) -> str:
        """Name the first three refused ones, and how to resume with them where that is possible."""
        text = "; ".join([*self.refused.values()][:3])
        if not all(map(can_change, self.refused)):
            return text
        names = " ".join(change.split(" ", 1)[0].removeprefix("--") for change in self.refused.values())
        return f"{text}; --override {names} resumes all the same"


def find_run(setup: Setup) -> ResumeState | None:
    """The run that --resume means; without its tensors where another process reads them for this one.

    Raises:
        UserError: As `search_run`.
    """
    return setup.parallel.read(
        lambda: search_run(setup), lambda found: None if found is None else found._replace(groups={})
    )


def search_run(setup: Setup) -> ResumeState | None:
    """The run that --resume means: that of a checkpoint, or the newest run with the same settings.

    Raises:
        UserError: If a checkpoint was named that is unusable, or was made with other settings or classes; or if there
            are runs of the same model and data with other settings alone.
    """
    resume = setup.config.run.resume
    if resume is None:
        return None
    with error_prefix(""):
        overridden(setup.config.run.override)
    if resume != "auto":
        state = read_resume_state(Path(resume))
        changes = changes_since(setup, state.meta)
        if changes.refused:
            raise UserError(f"--resume {resume}: the run has other settings: {changes}")
        check_same_classes(f"--resume {resume}", state.meta, setup.dataset.classes)
        return state._replace(changed=tuple(changes.allowed.values()))
    others: list[tuple[int, str]] = []
    for folder in runs_in(setup.config.run.results_dir):
        for path in checkpoints_in(folder):
            try:
                state = read_resume_state(path)
            except UserError as error:
                print(f"skipped: {error}", file=sys.stderr)
                continue
            changes = changes_since(setup, state.meta)
            if changes.other or other_data(setup, state.meta):
                pass
            elif changes.refused:
                others.append((len(changes.refused), f"run {folder.name} differs in {changes}"))
            else:
                check_same_classes(f"--resume auto: {folder}", state.meta, setup.dataset.classes)
                return state._replace(changed=tuple(changes.allowed.values()))
            break  # another run; its older checkpoints are no closer
    if others:
        closest = min(others, key=lambda other: other[0])[1]  # of equals the newest
        raise UserError(f"--resume auto: nothing to resume: {closest}; leave out --resume for a new run")
    return None


def can_change(path: str) -> bool:
    """True if a run may be resumed with another value of a setting, "section.field"."""
    return not path.startswith(UNCHANGEABLE)


def overridden(names: Sequence[str]) -> set[str]:
    """Settings, "section.field", that --override names by their flags.

    Raises:
        ValueError: For an unknown one, or one that a run cannot be resumed with.
    """
    paths = set()
    for name in names:
        place = places(TrainSettings, KINDS).get(flag_name(name.removeprefix("--").replace("-", "_")))
        if place is None:
            raise ValueError(f"--override {name}: there is no flag of this name")
        paths.add(path := ".".join(place.path))
        if not can_change(path):
            raise ValueError(f"--override {name}: weights, optimizer or data depend on it; start a new run")
    return paths


def runs_in(results: Path) -> Iterator[Path]:
    """Folders of runs, newest first."""
    folders = {path: match for path in results.glob("*-*") if (match := RUN_NAME.fullmatch(path.name))}
    yield from sorted((path for path in folders if path.is_dir()), key=run_number, reverse=True)


def unstarted_run(setup: Setup) -> Path | None:
    """The newest run of the same settings if it was killed before its first checkpoint; None without --resume auto."""
    if setup.config.run.resume != "auto":
        return None
    for folder in runs_in(setup.config.run.results_dir):
        if folder.name.split("-", 1)[1] == setup.config.model.replace("/", "-"):
            return folder if _is_unstarted(folder, setup) else None
    return None


def _is_unstarted(folder: Path, setup: Setup) -> bool:
    """True if a run has these settings, or was killed before it wrote them, and has no checkpoint."""
    names, saved = ({path.name for path in place.glob("[!.]*")} for place in (folder, folder / "checkpoints"))
    if saved or "config.json" not in names:
        return not saved and names <= {"checkpoints"}
    try:
        return not changes_since(setup, {"train": parse_json((folder / "config.json").read_text())}).refused
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def run_number(folder: Path) -> int:
    """Number of a run's folder; -1 for other names."""
    match = RUN_NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def checkpoints_in(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    suffixes = (".safetensors", SUFFIX)
    paths = [p for p in (run / "checkpoints").glob("[!.]*") if p.suffix in suffixes and p.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem), reverse=True)


def run_of(path: Path) -> Path | None:
    """Folder of the run that a checkpoint is in; None outside of one."""
    run = path.absolute().parent.parent
    is_run = path.absolute().parent.name == "checkpoints" and path.stem.isdecimal() and (run / "config.json").is_file()
    return path.parent.parent if is_run else None


def read_resume_state(path: Path) -> ResumeState:
    """Read everything from one checkpoint of train.py.

    Raises:
        UserError: If the file is missing, damaged, not finite, or not such a checkpoint.
    """

    def everything(present: Sequence[str]) -> list[str]:
        return list(dict.fromkeys([*present, "model"]))

    groups, meta = read_groups(path, everything, "--resume")
    if meta is None or "train" not in meta or "step" not in meta:
        raise UserError(f"--resume {path}: not a checkpoint of train.py; to start from weights alone use --init-from")
    check_finite(groups, f"--resume {path}")
    return ResumeState(path, run_of(path), groups, meta)


def check_same_classes(where: str, meta: Json, now: Sequence[str]) -> None:
    """Check that labels mean what they did.

    Raises:
        UserError: Naming the first class that differs.
    """
    then = meta.get("data", {}).get("classes")
    if then is None or list(then) == list(now):
        return
    if len(then) != len(now):
        raise UserError(f"{where}: the run has {len(then)} classes, the data {len(now)}")
    label = next(i for i, (old, new) in enumerate(zip(then, now, strict=True)) if old != new)
    raise UserError(
        f"{where}: class {label} was {then[label]!r} and is {now[label]!r} in the data; labels would change their "
        "meaning: restore the names of the folders, or start a new run with --init-from"
    )


def changes_since(setup: Setup, meta: Json) -> Changes:
    """Compare the settings of a checkpoint's run with the present ones."""
    free, run = free_settings(TrainSettings), setup.config.run
    # A cosine spans all steps: with another number of them, the steps already taken would have been others.
    if setup.config.optimization.lr_schedule != "constant":
        free -= {"optimization.epochs", "optimization.max_steps"}
    if run.init_from is not None:
        free -= {"run.init_from", "run.frame_positions"}  # the run that began there is meant
    # Settings that did not exist yet had the effect of their defaults.
    defaults = {kind: (name, type(settings)()) for kind, (name, settings) in setup.owners.items() if kind != "model"}
    then = flatten(document(TrainSettings(), **{**setup.owners, **defaults})) | flatten(upgrade(meta["train"]))
    then |= flatten({kind: meta[kind] for kind in setup.owners if kind in meta})
    override, changes = overridden(run.override), Changes({}, {})
    for path, value in flatten(setup.document()).items():
        if then.get(path) == value or path.startswith("run.") and path in free:
            continue
        allowed = path in free or path in override
        text = f"{flag_of(TrainSettings, KINDS, path)} ({then.get(path)}, {value})"
        (changes.allowed if allowed else changes.refused)[path] = text
    for name, path in DIGESTS.items():
        began, now = meta.get(name), setup.digests.get(name)
        if began is not None and now is not None and began != now:
            kind = changes.allowed if path in override else changes.refused
            flag = flag_of(TrainSettings, KINDS, path)
            kind.setdefault(path, f"{flag} (SHA-256 {began:.12}..., {now:.12}...)")
    return changes


def other_data(setup: Setup, meta: Json) -> bool:
    """True if a run was trained on something else: it has no class and no number of images in common with the data."""
    then = meta.get("data", {})
    if not then.get("classes") or not setup.dataset.classes:
        return False
    return set(then["classes"]).isdisjoint(setup.dataset.classes) and then.get("images") != len(setup.dataset)


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of a run that are newer than the step it is resumed from; returns their new names."""
    renamed = []
    for path in checkpoints_in(folder):
        if int(path.stem) > step:
            target = path.with_name(path.name + ASIDE)
            if is_sharded(path):
                remove(target)  # which a file would replace
            path.replace(target)
            renamed.append(target)
    return renamed


def thin(folder: Path, step: int, keep: int) -> None:
    """Remove old checkpoints of a run, but for the newest readable ones up to the step that was just saved."""
    kept = 0
    for path in checkpoints_in(folder):
        if int(path.stem) > step:
            continue
        if kept >= keep:
            remove(path)
        elif int(path.stem) == step or is_whole(path):
            kept += 1
