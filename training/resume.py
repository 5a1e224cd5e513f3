"""The run that `--resume` means: which checkpoint, in which folder, and what differs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from runtime import distributed
from runtime.documents import defaults_of, flag_of, flatten, free_settings, sections_of
from runtime.errors import UserError, error_prefix
from runtime.groups import check_groups, open_groups
from runtime.json_file import Json, parse_json
from runtime.restoring import check_together
from runtime.settings import flag_name, places
from runtime.stores import parse_path
from runtime.tensor_file import StoredTensor
from training.config import KINDS, TrainSettings, upgrade
from training.mirror import RunMirror
from training.network import DIGESTS
from training.run_files import checkpoints_in, run_of, runs_in
from training.setup import Setup

OTHER_RUN = ("model", "data.dataset", "data.image_size", "data.channels", "data.vae")
# Settings that weights, optimizer state or labels depend on
UNCHANGEABLE = (*OTHER_RUN, "process", "loss.name", "optimizer.name", "optimization.ema_decay")


class ResumeState(NamedTuple):
    """A run to resume.

    Attributes:
        path: The checkpoint.
        folder: Folder of the run; None for a file outside of one, from which a new run continues.
        groups: "model", "optimizer", the averages, and "projector" if the run has one: name -> tensor, not read yet.
        meta: The checkpoint's JSON document.
        changed: Settings that differ, on purpose or without effect on the result, as "--lr (0.1, 0.2)".
    """

    path: Path
    folder: Path | None
    groups: dict[str, dict[str, StoredTensor]]
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
        return any(_is_of(path, OTHER_RUN) for path in self.refused)

    def __str__(self) -> str:
        """Name the first three refused ones, and how to resume with them where that is possible."""
        text = "; ".join([*self.refused.values()][:3])
        if not all(map(can_change, self.refused)):
            return text
        names = " ".join(change.split(" ", 1)[0].removeprefix("--") for change in self.refused.values())
        return f"{text}; --override {names} resumes all the same"


def find_run(setup: Setup, mirror: RunMirror | None = None) -> ResumeState | None:
    """The run that --resume means, as rank 0 finds it, compared with its checksums; all processes call this together.

    Raises:
        UserError: As `candidates`, or if a checkpoint was named that is damaged or has NaN or infinity.
    """
    found = candidates(setup, mirror)
    while (state := distributed.on_rank0(lambda: next(found, None))) is not None:
        try:
            check_together(state.groups, state.path, "--resume", divided=setup.parallel.divides)
            return state
        except UserError as error:
            if setup.config.run.resume != "auto":
                raise
            note_skipped(error)
    return None


def note_skipped(error: UserError) -> None:
    """Say once which checkpoint --resume auto leaves out."""
    if distributed.place()[0] == 0:
        print(f"skipped: {error}", file=sys.stderr)


def candidates(setup: Setup, mirror: RunMirror | None = None) -> Iterator[ResumeState]:
    """The run that --resume means: that of a checkpoint, or the newest run with the same settings.

    Args:
        setup: Setup of the run.
        mirror: The runs of --results-dir if it is on an object store.

    Yields:
        The newest checkpoint; the next one in case that is damaged.

    Raises:
        UserError: If a checkpoint was named that is unusable, or was made with other settings or classes; or if there
            are runs of the same model and data with other settings alone.
    """
    resume = setup.config.run.resume
    if resume is None:
        return
    with error_prefix(""):
        overridden(setup.config.run.override)
    if resume != "auto":
        state = open_resume_state(
            Path(resume) if mirror is None else mirror.fetch(mirror.working_path(parse_path(resume)))
        )
        changes = changes_since(setup, state.meta)
        if changes.refused:
            raise UserError(f"--resume {resume}: the run has other settings: {changes}")
        check_same_classes(f"--resume {resume}", state.meta, setup.dataset.classes)
        yield state._replace(changed=tuple(changes.allowed.values()))
        return
    others: list[tuple[int, str]] = []
    for folder in runs_in(setup.config.run.results_dir) if mirror is None else mirror.runs():
        if mirror is not None and is_other_run(folder, setup):
            continue  # its checkpoints need not be copied
        for path in checkpoints_in(folder) if mirror is None else mirror.checkpoints(folder):
            try:
                state = open_resume_state(path if mirror is None else mirror.fetch(path))
            except UserError as error:
                note_skipped(error)
                continue
            changes = changes_since(setup, state.meta)
            if changes.other or other_data(setup, state.meta):
                break  # another run; its older checkpoints are no closer
            if changes.refused:
                others.append((len(changes.refused), f"run {folder.name} differs in {changes}"))
                break
            check_same_classes(f"--resume auto: {folder}", state.meta, setup.dataset.classes)
            yield state._replace(changed=tuple(changes.allowed.values()))
    if others:
        closest = min(others, key=lambda other: other[0])[1]  # of equals the newest
        raise UserError(f"--resume auto: nothing to resume: {closest}; leave out --resume for a new run")


def can_change(path: str) -> bool:
    """True if a run may be resumed with another value of a setting, "section.field"."""
    return not _is_of(path, UNCHANGEABLE)


def _is_of(path: str, settings: Sequence[str]) -> bool:
    """True if a setting is one of some, or a field of one."""
    return any(path == name or path.startswith(f"{name}.") for name in settings)


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


def unstarted_run(setup: Setup, mirror: RunMirror | None = None) -> Path | None:
    """The newest run of the same settings if it was killed before its first checkpoint; None without --resume auto."""
    if setup.config.run.resume != "auto":
        return None
    for folder in runs_in(setup.config.run.results_dir) if mirror is None else mirror.runs():
        if folder.name.split("-", 1)[1] == setup.config.model.replace("/", "-"):
            if mirror is not None and mirror.checkpoints(folder):
                return None
            return folder if _is_unstarted(folder, setup) else None
    return None


def _is_unstarted(folder: Path, setup: Setup) -> bool:
    """True if a run has these settings, or was killed before it wrote them, and has no checkpoint."""
    names, saved = ({path.name for path in place.glob("[!.]*")} for place in (folder, folder / "checkpoints"))
    if saved or "config.json" not in names:
        return not saved and names <= {"checkpoints"}
    changes = recorded_changes(folder, setup)
    return changes is not None and not changes.refused


def is_other_run(folder: Path, setup: Setup) -> bool:
    """True if a run's settings name another model or other data."""
    changes = recorded_changes(folder, setup)
    return changes is not None and changes.other


def recorded_changes(folder: Path, setup: Setup) -> Changes | None:
    """The settings of config.json that are others now; None if it cannot be read."""
    try:
        return changes_since(setup, {"train": parse_json((folder / "config.json").read_text())})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def open_resume_state(path: Path) -> ResumeState:
    """Open a checkpoint of train.py.

    Raises:
        UserError: If the file is missing, its header is damaged, or it is no such checkpoint.
    """
    groups, meta = open_groups(path, "--resume")
    if meta is None or "train" not in meta or "step" not in meta:
        raise UserError(f"--resume {path}: not a checkpoint of train.py; to start from weights alone use --init-from")
    check_groups(groups, ["model"], f"--resume {path}")
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
    then = defaults_of(TrainSettings) | flatten(sections_of({**setup.owners, **defaults}))
    then |= flatten(upgrade(meta["train"]))
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
