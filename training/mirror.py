"""Runs on an object store: trained in a local working folder, from which finished files are brought to the store.

In the store a checkpoint counts once its record, NNNNNNN.json, is there: it names the checkpoint's files with sizes and
digests and is written last. A store has no locks: a run belongs to the job that started last, and its token is in
owner.json; another job finds that out before it brings its next checkpoint, and ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from filelock import FileLock

from runtime.errors import UserError
from runtime.files import check_folder
from runtime.groups import is_whole
from runtime.json_file import Json, parse_json
from runtime.locks import locked
from runtime.parts import files_of, is_sharded
from runtime.store_folder import Digest, StoreFolder
from runtime.stores import Address, cache_folder
from training.run_files import ASIDE, RUN_NAME, checkpoints_in, run_number, runs_in

FLAG = "--results-dir"
OWNER, TOKEN = "owner.json", ".token"
CHECKPOINTS = "checkpoints"


class RunMirror:
    """Runs at an address, and the working folder that this machine has for them.

    Args:
        address: The folder of all runs.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        name = hashlib.sha256(str(address).encode()).hexdigest()[:16]
        self.results = cache_folder() / "runs" / name / (address.name or "runs")
        self._store = StoreFolder(address, FLAG)
        self._token = ""
        self._brought: dict[Path, tuple[int, int]] = {}  # sizes and times of small files that the store has

    # ------------------------------------------------------------------------------------------------------------------
    # Before the training

    def prepare(self) -> None:
        """Check that the store can be written to, and bring what an earlier job on this machine could not (rank 0).

        Raises:
            UserError: In one line, if the store fails.
        """
        check_folder(self.results, FLAG)
        self._store.check_writable()
        for run in runs_in(self.results):
            token = run / TOKEN
            if not token.is_file() or token.read_text() != self._owner(run).get("token"):
                continue  # of another machine by now
            with ExitStack() as stack:
                try:
                    stack.enter_context(locked(run, FLAG))
                except UserError:
                    continue  # a job of this machine trains in it
                there = self.checkpoints(run)
                for path in reversed(checkpoints_in(run)):
                    if path not in there and is_whole(path):
                        self._bring_checkpoint(path)

    def first_number(self) -> int:
        """The first number above those of all runs in the store."""
        return 1 + max((run_number(Path(name)) for name in self._run_names()), default=-1)

    def runs(self) -> Iterator[Path]:
        """Working folders of the store's runs, newest first, with their settings, log and metrics."""
        for name in sorted(self._run_names(), key=lambda name: run_number(Path(name)), reverse=True):
            with self._lock():
                self._fetch_small(name)
            yield self.results / name

    def checkpoints(self, run: Path) -> list[Path]:
        """Working paths of a run's checkpoints that are whole in the store, newest first; they need not be here."""
        found = []
        for step, record in self._records(run).items():
            names = {Path(name).parts[0] for name in record}
            found += [(step, run / CHECKPOINTS / name) for name in names]
        return [path for _, path in sorted(found, reverse=True)]

    def fetch(self, path: Path) -> Path:
        """Copy a checkpoint to its working path, as far as it is not there, and compare digests; returns the path.

        Raises:
            UserError: In one line, if it is not in the store, or damaged.
        """
        run = path.parent.parent
        record = self._records(run, path.stem).get(int(path.stem) if path.stem.isdecimal() else -1, {})
        if not any(Path(name).parts[0] == path.name for name in record):
            raise UserError(f"--resume {self.address / run.name}/{CHECKPOINTS}/{path.name}: no such whole checkpoint")
        with self._lock():
            self._fetch_small(run.name)
            for name, expected in record.items():
                self._store.download(f"{run.name}/{CHECKPOINTS}/{name}", run / CHECKPOINTS / name, expected)
        return path

    def working_path(self, address: Path) -> Path:
        """Working path of a checkpoint's address."""
        return self.results / address.relative_to(self.address)

    def claim(self, run: Path, step: int) -> None:
        """Make a run this job's, and set its checkpoints after a step aside in the store (rank 0)."""
        self._token, self._brought = uuid.uuid4().hex, {}
        owner = {"token": self._token, "pid": os.getpid(), "host": socket.gethostname()}
        owner["started"] = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        self._store.write(f"{run.name}/{OWNER}", (json.dumps(owner) + "\n").encode())
        (run / TOKEN).write_text(self._token)
        for later, record in self._records(run).items():
            if later > step:
                self._store.remove(self._record_name(run, later))
                for name in record:
                    full = f"{run.name}/{CHECKPOINTS}/{name}"
                    first, _, rest = name.partition("/")
                    aside = f"{first}{ASIDE}/{rest}" if rest else f"{first}{ASIDE}"
                    self._store.rename(full, f"{run.name}/{CHECKPOINTS}/{aside}")
        self.bring_small(run)

    # ------------------------------------------------------------------------------------------------------------------
    # During the training, on rank 0

    def saved(self, path: Path, step: int, keep: int | None) -> None:
        """Bring a checkpoint, log and metrics to the store, and remove checkpoints there but for the newest ones.

        Raises:
            UserError: In one line, if the store fails after several attempts, or another job has the run by now. The
                checkpoint stays here; `--resume auto` on this machine brings it.
        """
        run = path.parent.parent
        self._check_owner(run)
        self._bring_checkpoint(path)
        self.bring_small(run)
        if keep is not None:
            records = self._records(run)
            for old in sorted((other for other in records if other <= step), reverse=True)[keep:]:
                self._store.remove(self._record_name(run, old))
                for name in records[old]:
                    self._store.remove(f"{run.name}/{CHECKPOINTS}/{name}")

    def finish(self, run: Path | None, *, failed: bool) -> None:
        """Bring what was written since (rank 0); after a failure a store that fails too is a warning."""
        if run is None:
            return
        try:
            if failed and self._owner(run).get("token") != self._token:
                return  # which may be the failure
            self._check_owner(run)
            self.bring_small(run)
        except UserError as error:
            if not failed:
                raise
            print(f"warning: {error}", file=sys.stderr)

    def bring_small(self, run: Path) -> None:
        """Bring the files of a run that are new or changed: all but checkpoints and hidden ones."""
        for path in sorted(run.rglob("*")):
            parts = path.relative_to(run).parts
            if not path.is_file() or parts[0] in (CHECKPOINTS, OWNER) or any(part.startswith(".") for part in parts):
                continue
            stat = path.stat()
            stamp = stat.st_size, stat.st_mtime_ns
            if self._brought.get(path) != stamp:
                self._store.write(f"{run.name}/{'/'.join(parts)}", path.read_bytes())  # it may grow meanwhile
                self._brought[path] = stamp

    def _bring_checkpoint(self, path: Path) -> None:
        run, step = path.parent.parent, int(path.stem)
        if not is_whole(path):
            raise UserError(
                f"{path}: parts that other machines wrote are not here; sharded checkpoints go to a store from a "
                "folder that all machines share: set DIT_STORE_CACHE"
            )
        self._store.remove(self._record_name(run, step))  # before files of its name are replaced
        record = {}
        for file in files_of(path) if is_sharded(path) else [path]:
            name = file.relative_to(path.parent).as_posix()
            size, digest = self._store.upload(file, f"{run.name}/{CHECKPOINTS}/{name}")
            record[name] = {"size": size, "sha256": digest}
        self._store.write(self._record_name(run, step), (json.dumps({"files": record}, indent=2) + "\n").encode())

    # ------------------------------------------------------------------------------------------------------------------
    # Files in the store

    def _lock(self) -> FileLock:
        """Processes of one machine copy in turn."""
        self.results.mkdir(parents=True, exist_ok=True)
        return FileLock(self.results / ".lock")

    def _run_names(self) -> set[str]:
        first = {name.partition("/")[0] for name in self._store.names() if "/" in name}
        return {name for name in first if RUN_NAME.fullmatch(name)}

    def _record_name(self, run: Path, step: int) -> str:
        return f"{run.name}/{CHECKPOINTS}/{step:07d}.json"

    def _records(self, run: Path, stem: str = "") -> dict[int, dict[str, Digest]]:
        """Files of every checkpoint that is whole, or of one: step -> name -> digest."""
        records = {}
        for name in self._store.names(f"{run.name}/{CHECKPOINTS}"):
            place = Path(name)
            own = place.suffix == ".json" and place.stem.isdecimal() and len(place.parts) == 3
            if own and (not stem or place.stem == stem):
                files = self._document(name).get("files", {})
                records[int(place.stem)] = {file: Digest(each["size"], each["sha256"]) for file, each in files.items()}
        return records

    def _document(self, name: str) -> Json:
        content = self._store.read(name)
        try:
            return parse_json(content.decode()) if content is not None else {}
        except ValueError as error:
            raise UserError(f"{FLAG} {self.address / name}: damaged ({error}); remove it") from error

    def _owner(self, run: Path) -> Json:
        return self._document(f"{run.name}/{OWNER}")

    def _check_owner(self, run: Path) -> None:
        owner = self._owner(run)
        if owner.get("token") != self._token:
            who = f"process {owner.get('pid')} on {owner.get('host')}, started {owner.get('started')}"
            raise UserError(
                f"{FLAG} {self.address / run.name}: in use by another job since then ({who}); this one ends"
            )

    def _fetch_small(self, name: str) -> None:
        """Copy settings, log, metrics and the tracker's record of a run, unless this machine's job wrote them last."""
        run = self.results / name
        token = run / TOKEN
        if token.is_file() and token.read_text() == self._owner(run).get("token"):
            return
        run.mkdir(parents=True, exist_ok=True)
        for small in ("config.json", "log.txt", "metrics.jsonl", "tracking.json"):
            content = self._store.read(f"{name}/{small}")
            if content is not None:
                (run / small).write_bytes(content)
