"""Saving in the background: a real copy, kept buffers, order, and errors."""

import mmap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import saver as module
from runtime.errors import UserError
from runtime.groups import read_groups, save_checkpoint, save_part
from runtime.saver import BackgroundSaver, ShardedSaver, State


def state(step, value=1.0):
    tensor = torch.arange(12.0).reshape(3, 4).T * value  # not contiguous
    return State(step, {"model": {"x": tensor}, "optimizer": {"x/step": torch.tensor(value)}}, {"format": 2})


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until this event is set."""
    event = threading.Event()

    def write(path, groups, meta):
        assert event.wait(60)
        save_checkpoint(path, groups, meta)

    monkeypatch.setattr(module, "save_checkpoint", write)
    return event


def test_changes_while_a_save_is_in_flight_are_not_in_the_file(tmp_path, gate):
    finished = []
    saver, now = BackgroundSaver(tmp_path, lambda path, step: finished.append((path.name, step))), state(1)
    save_checkpoint(tmp_path / "expected.safetensors", now.groups, now.meta)
    saver.save(now)
    for tensors in now.groups.values():
        for tensor in tensors.values():
            tensor.fill_(-1)
    assert finished == [] and not saver.failed and not (tmp_path / "0000001.safetensors").exists()
    gate.set()
    saver.wait()
    assert finished == [("0000001.safetensors", 1)]
    assert (tmp_path / "0000001.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_a_save_copies_into_the_buffers_of_the_one_before_once_that_is_written(tmp_path, monkeypatch):
    written = []

    def write(path, groups, meta):
        written.append({(g, n): (t.data_ptr(), t.clone()) for g, members in groups.items() for n, t in members.items()})

    monkeypatch.setattr(module, "save_checkpoint", write)
    saver = BackgroundSaver(tmp_path, lambda path, step: None)
    for step in (1, 2):
        saver.save(state(step, value=float(step)))
    saver.wait()
    first, second = written
    for name, (place, tensor) in first.items():
        assert second[name][0] == place and torch.equal(second[name][1], 2 * tensor)
    saver.save(State(3, {"model": {"x": torch.ones(2)}}, {}))
    saver.wait()
    assert len(saver._buffers) == 1, "tensors that are gone keep no memory"


@pytest.mark.parametrize("kind", [BackgroundSaver, ShardedSaver])
def test_the_first_save_copies_into_memory_that_was_prepared(kind, tmp_path):
    saver, now = kind(tmp_path, lambda path, step: None), state(1)
    saver.prepare(now.groups)
    saver.wait()
    places = {name: buffer.data_ptr() for name, buffer in saver._buffers.items()}
    assert places.keys() == {("model", "x"), ("optimizer", "x/step")}
    saver.save(now)
    saver.prepare(now.groups)  # too late, and without effect
    saver.wait()
    assert {name: buffer.data_ptr() for name, buffer in saver._buffers.items()} == places
    (path,) = tmp_path.iterdir()
    assert torch.equal(read_groups(path, list)[0]["model"]["x"], now.groups["model"]["x"])


def test_a_process_that_writes_nothing_prepares_nothing():
    saver = BackgroundSaver(None, lambda path, step: None)
    saver.prepare(state(1).groups)
    saver.wait()
    assert saver._buffers == {}


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="the system's pages are read in /proc")
def test_prepared_memory_is_there_before_it_is_written_to():
    size = 1 << 26
    buffer = module.allocate({("model", "x"): (torch.Size([size]), torch.uint8)})["model", "x"]
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(buffer.data_ptr() // mmap.PAGESIZE * 8)
        pages = np.frombuffer(file.read(size // mmap.PAGESIZE * 8), np.uint64)
    assert buffer.numel() == size and len(pages) == size // mmap.PAGESIZE
    assert (pages >> np.uint64(63)).all(), "all are in memory"


def test_memory_that_cannot_be_prepared_is_left_to_the_save(tmp_path):
    saver = BackgroundSaver(tmp_path, lambda path, step: None)
    saver.prepare({"model": {"x": torch.zeros(1).expand(1 << 50)}})
    saver.save(state(1))
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["0000001.safetensors"]


def test_an_error_is_raised_once_by_the_next_call_and_nothing_else_is_written(tmp_path):
    saver = BackgroundSaver(tmp_path, lambda path, step: None)
    saver.save(state(1))
    saver.save(state(2, value=float("nan")))
    with pytest.raises(UserError, match="step 2: not saved; earlier checkpoints are intact: model/x has NaN"):
        saver.save(state(3))
    assert not saver.failed
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["0000001.safetensors"]
    assert torch.equal(
        read_groups(tmp_path / "0000001.safetensors", list)[0]["model"]["x"], state(1).groups["model"]["x"]
    )


def test_a_failure_is_seen_without_waiting_and_leaves_the_earlier_file(tmp_path, monkeypatch):
    saver = BackgroundSaver(tmp_path, lambda path, step: None)
    saver.save(state(1))
    saver.wait()
    before = (tmp_path / "0000001.safetensors").read_bytes()

    def full(*_):
        raise UserError("could not write")

    monkeypatch.setattr(module, "save_checkpoint", full)
    saver.save(state(1, value=2.0))
    saver._thread.submit(int).result()  # after the write: there is one thread
    assert saver.failed
    with pytest.raises(UserError, match="could not write"):
        saver.wait()
    assert (tmp_path / "0000001.safetensors").read_bytes() == before


# ----------------------------------------------------------------------------------------------------------------------
# A folder of parts; several processes: tests/training/test_sharded_checkpoints.py


def test_a_folder_has_its_name_once_it_is_whole(tmp_path, monkeypatch):
    gate, finished = threading.Event(), []

    def write(*arguments):
        save_part(*arguments)
        assert gate.wait(60)

    monkeypatch.setattr(module, "save_part", write)
    saver, now = ShardedSaver(tmp_path, lambda path, step: finished.append((path.name, step))), state(1)
    saver.save(now)
    for tensors in now.groups.values():
        for tensor in tensors.values():
            tensor.fill_(-1)
    assert not (tmp_path / "0000001.sharded").exists() and finished == []
    gate.set()
    saver.wait()
    assert finished == [("0000001.sharded", 1)] and [path.name for path in tmp_path.iterdir()] == ["0000001.sharded"]
    groups, meta = read_groups(tmp_path / "0000001.sharded", list)
    assert meta == now.meta and torch.equal(groups["model"]["x"], state(1).groups["model"]["x"])


def test_a_folder_that_cannot_be_written_leaves_nothing_and_the_earlier_one(tmp_path, monkeypatch):
    saver = ShardedSaver(tmp_path, lambda path, step: None)
    saver.save(state(1))
    saver.save(state(2, value=float("nan")))
    with pytest.raises(UserError, match="step 2: not saved; earlier checkpoints are intact: model/x has NaN"):
        saver.wait()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("runtime.groups.write_part", full)
    saver.save(state(3))
    with pytest.raises(UserError, match=r"could not write 52 bytes \(disk full\); earlier checkpoints are intact"):
        saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["0000001.sharded"]
