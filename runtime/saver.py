"""Saving of checkpoints: training stops for a copy to host memory, the file is written in the background."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from runtime.checkpoint import check_finite, save_checkpoint
from runtime.sharding import whole

Groups = Mapping[str, Mapping[str, Tensor]]


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

    def save(self, state: State) -> None:
        """Wait for the save in flight, then start another; the state may change once this returns.

        Raises:
            UserError: If the save in flight failed; the other one is not started.
        """

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            UserError: If it failed; earlier checkpoints are intact.
        """


class BackgroundSaver:
    """A `Saver` of one file each, by one process. It keeps a copy of the state in host memory between saves.

    Tensors that processes hold in parts are joined one by one, so that a device never holds more than one of them
    whole; all processes then call `save` together.

    Args:
        folder: Existing folder of the files, which are named by their step; None on processes that write nothing.
        finished: Function of path and step, called in the background once the file is whole.
    """

    def __init__(self, folder: Path | None, finished: Callable[[Path, int], None]) -> None:
        self._folder, self._finished = folder, finished
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """True if the save that `wait` would wait for has ended with an error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def save(self, state: State) -> None:
        """Wait for the save in flight, copy the state to host memory, and start to write the copy.

        Raises:
            UserError: If the save in flight failed; the other one is not started.
        """
        self.wait()  # the buffers are its own until then
        copy = state._replace(groups=self._copy(state.groups))
        if self._folder is not None:
            self._writing = self._thread.submit(self._write, copy, self._folder)

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            UserError: If it failed: the numbers are not finite, or the file cannot be written, as on a full disk.
        """
        writing, self._writing = self._writing, None  # an error is raised once
        if writing is not None:
            writing.result()

    @torch.no_grad()
    def _copy(self, groups: Groups) -> Groups:
        before, self._buffers = self._buffers, {}  # without those of tensors that are gone
        for group, tensors in groups.items():
            for name, part in tensors.items():
                tensor = whole(part)
                if self._folder is None:
                    continue
                buffer = before.pop((group, name), None)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
                self._buffers[group, name] = buffer.copy_(tensor)
        copied: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
        for (group, name), buffer in self._buffers.items():
            copied[group][name] = buffer
        return copied

    def _write(self, state: State, folder: Path) -> None:
        check_finite(state.groups, f"step {state.step}: not saved; earlier checkpoints are intact")
        path = folder / f"{state.step:07d}.safetensors"
        save_checkpoint(path, state.groups, state.meta)
        self._finished(path, state.step)
