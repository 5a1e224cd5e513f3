"""Saving of checkpoints: training stops for a copy to host memory, files are written in the background."""

from __future__ import annotations

import mmap
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from runtime import distributed
from runtime.errors import UserError
from runtime.groups import check_finite, save_checkpoint, save_part
from runtime.parts import SUFFIX, Part
from runtime.sharding import is_divided, local, place_of, whole

Groups = Mapping[str, Mapping[str, Tensor]]
Buffers = dict[tuple[str, str], Tensor]  # copies of tensors by group and name


class State(NamedTuple):
    """Contents of a checkpoint.

    Attributes:
        step: Number of steps taken.
        groups: Group name -> tensor name -> tensor, on any device.
        meta: JSON values.
    """

    step: int
    groups: Groups
    meta: Mapping[str, object]


class Saver(Protocol):
    """Writer of a run's checkpoints; one that divides them over processes has one part on each."""

    @property
    def failed(self) -> bool:
        """True if the save that `wait` would wait for has ended with an error."""

    def prepare(self, groups: Groups) -> None:
        """Get the memory of the first save ready in the background, given a state with the tensors that it will have.

        Without it, or after a save, that is a part of the save; nothing is sent between processes.
        """

    def save(self, state: State) -> None:
        """Wait for the save in flight, then start another; the state may change once this returns.

        Raises:
            UserError: If the save in flight failed; the other one is not started.
        """

    def wait(self) -> None:
        """Wait for the save in flight, or for the memory of the first one.

        Raises:
            UserError: If it failed; earlier checkpoints are intact.
        """


class _Background(ABC):
    """Keeps a copy of this process's share of the state in host memory between saves, and writes it in a thread."""

    def __init__(self) -> None:
        self._buffers: Buffers = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._preparing: Future[Buffers] | None = None

    @property
    def failed(self) -> bool:
        """True if the save that `wait` would wait for has ended with an error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def prepare(self, groups: Groups) -> None:
        """Allocate the copy in the background; after the first save there is one."""
        if self._buffers or self._writing is not None or self._preparing is not None:
            return
        outlines = {
            (group, name): (shape, tensor.dtype)
            for group, tensors in groups.items()
            for name, tensor in tensors.items()
            if (shape := self._shape(group, name, tensor)) is not None
        }
        self._preparing = self._thread.submit(allocate, outlines)

    def save(self, state: State) -> None:
        """Wait for the save in flight, copy the state to host memory, and start to write the copy.

        Raises:
            UserError: If the save in flight failed; the other one is not started.
        """
        self.wait()  # the buffers are its own until then
        copy = state._replace(groups=self._copy(state.groups))
        self._writing = self._thread.submit(self._write, copy)

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            UserError: If it failed: the numbers are not finite, or the file cannot be written, as on a full disk.
        """
        if self._preparing is not None:
            self._buffers, self._preparing = self._preparing.result(), None
        writing, self._writing = self._writing, None  # an error is raised once
        if writing is not None:
            writing.result()

    @torch.no_grad()
    def _copy(self, groups: Groups) -> Groups:
        before, self._buffers = self._buffers, {}  # without those of tensors that are gone
        copied: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                own = self._share(group, name, tensor)
                if own is None:
                    continue
                buffer = before.pop((group, name), None)
                if buffer is None or buffer.shape != own.shape or buffer.dtype != own.dtype:
                    buffer = torch.empty(own.shape, dtype=own.dtype)
                copied[group][name] = self._buffers[group, name] = buffer.copy_(own)
        return copied

    @abstractmethod
    def _share(self, group: str, name: str, tensor: Tensor) -> Tensor | None:
        """This process's share of a tensor of the state; None for nothing."""

    def _shape(self, group: str, name: str, tensor: Tensor) -> torch.Size | None:
        """Shape of this process's share of a tensor, without communication; None for nothing."""
        own = self._share(group, name, tensor)
        return None if own is None else own.shape

    @abstractmethod
    def _write(self, state: State) -> None:
        """Write the copy, in the thread."""


class BackgroundSaver(_Background):
    """A `Saver` of one file each, by one process. It keeps a copy of the state in host memory between saves.

    Tensors that processes hold in parts are joined one by one, so that a device never holds more than one of them
    whole; all processes then call `save` together.

    Args:
        folder: Existing folder of the files, which are named by their step; None on processes that write nothing.
        finished: Function of path and step, called in the background once the file is whole.
    """

    def __init__(self, folder: Path | None, finished: Callable[[Path, int], None]) -> None:
        super().__init__()
        self._folder, self._finished = folder, finished

    def _share(self, group: str, name: str, tensor: Tensor) -> Tensor | None:
        full = whole(tensor)
        return None if self._folder is None else full

    def _shape(self, group: str, name: str, tensor: Tensor) -> torch.Size | None:
        return None if self._folder is None else tensor.shape  # of a divided tensor, that of the whole

    def _write(self, state: State) -> None:
        if self._folder is None:
            return
        check_finite(state.groups, unsaved(state))
        path = self._folder / f"{state.step:07d}.safetensors"
        save_checkpoint(path, state.groups, state.meta)
        self._finished(path, state.step)


class ShardedSaver(_Background):
    """A `Saver` of a folder each, in which every process writes a file of its part of the state.

    Nothing is sent between processes but a word on success, by a separate group; the folder gets its name when all
    files are written. Constructing it is a collective operation.

    Args:
        folder: Existing folder of these folders, which are named by their step, the same on every process.
        finished: Function of path and step, called in the background of rank 0 once the folder is whole.
    """

    def __init__(self, folder: Path, finished: Callable[[Path, int], None]) -> None:
        super().__init__()
        self._folder, self._finished, self._group = folder, finished, distributed.thread_group()
        self._rank, self._ranks = distributed.place()
        self._process = distributed.broadcast(os.getpid())  # a name that `sweep` knows as left-over once it ended
        self._places: dict[str, tuple[tuple[int, ...], int]] = {}
        self._wholes = 0

    def _copy(self, groups: Groups) -> Groups:
        self._places, self._wholes = {}, 0
        return super()._copy(groups)

    def _share(self, group: str, name: str, tensor: Tensor) -> Tensor | None:
        if is_divided(tensor):
            start, is_first = place_of(tensor)
            own = local(tensor) if is_first else None
        else:  # every process has it: they take turns
            start, own = 0, tensor if self._wholes % self._ranks == self._rank else None
            self._wholes += 1
        if own is None or (not own.numel() and tensor.numel()):
            return None
        self._places[f"{group}/{name}"] = (tuple(tensor.shape), start)
        return own

    def _write(self, state: State) -> None:
        path = self._folder / f"{state.step:07d}{SUFFIX}"
        partial = path.with_name(f".{path.stem}.{self._process}.tmp{SUFFIX}")
        tensors = {f"{group}/{name}": t for group, members in state.groups.items() for name, t in members.items()}

        def write_own() -> None:
            check_finite(state.groups, unsaved(state))
            parts = {name: Part(tensor, *self._places[name]) for name, tensor in tensors.items()}
            save_part(partial, self._rank, self._ranks, parts, state.meta)

        def rename() -> None:
            if self._rank == 0:
                try:
                    os.replace(partial, path)
                except OSError as error:
                    raise UserError(
                        f"{path}: could not be written ({error}); earlier checkpoints are intact"
                    ) from error

        try:
            for work in (write_own, rename):
                with distributed.raise_on_all_ranks(self._group):
                    work()
        except UserError:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self._rank == 0:
            self._finished(path, state.step)


def allocate(outlines: Mapping[tuple[str, str], tuple[torch.Size, torch.dtype]]) -> Buffers:
    """Memory for tensors of these shapes, which the system has given: it maps a page when that is first written to.

    Where there is not enough, those that were made; a save needs the others, and reports that.
    """
    buffers: Buffers = {}
    with suppress(RuntimeError, MemoryError):
        for name, (shape, dtype) in outlines.items():
            buffer = torch.empty(shape, dtype=dtype)
            buffer.view(-1).view(torch.uint8).numpy()[:: mmap.PAGESIZE] = 0  # NumPy: in this thread alone
            buffers[name] = buffer
    return buffers


def unsaved(state: State) -> str:
    """The start of a message about a state that is not saved."""
    return f"step {state.step}: not saved; earlier checkpoints are intact"
