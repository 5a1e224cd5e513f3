"""Checkpoints in parts: every reader sees whole tensors, and what is damaged, missing or mixed is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.checkpoint import read_checkpoint
from runtime.errors import UserError
from runtime.groups import is_whole, read_groups, save_part
from runtime.parts import Part, files_of
from runtime.weight_files import weights_sha256

META = {"format": 2, "step": 7}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model/w": (5, 3), "model/b": (5,), "ema-0.9/w": (5, 3), "optimizer/w/step": (), "model/one": (1, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, meta: dict[str, object] = META, numbers: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Three parts of two rows and of one, the whole tensors in the second."""
    for number in numbers:
        parts = {}
        for name, tensor in tensors().items():
            start = min(2 * number, len(tensor)) if tensor.ndim else 0
            rows = tensor[start : start + 2] if tensor.ndim else tensor
            if (number == 1) if tensor.ndim == 0 else len(rows):
                parts[name] = Part(rows, tuple(tensor.shape), start)
        save_part(folder, number, 3, parts, meta)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "0000007.sharded")


def test_every_tensor_is_whole_again_and_the_document_is_that_of_the_save(folder: Path) -> None:
    groups, meta = read_groups(folder, lambda present: present)
    assert meta == META and groups.keys() == {"model", "ema-0.9", "optimizer"}
    for name, tensor in tensors().items():
        group, rest = name.split("/", 1)
        assert torch.equal(groups[group][rest], tensor), name
    weights = read_checkpoint(folder)
    assert weights.group == "ema-0.9" and weights.weights.keys() == {"w"}
    assert is_whole(folder) and len(weights_sha256(folder)) == 64


def test_torch_distributed_checkpoint_reads_the_same_tensors(folder: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    empty = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    load(empty, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(empty[name], tensor) for name, tensor in tensors().items())


def test_a_flipped_bit_a_missing_file_and_a_file_of_another_save_are_refused(folder: Path, tmp_path: Path) -> None:
    digest = weights_sha256(folder)
    other = write(tmp_path / "0000008.sharded", {**META, "step": 8})
    first, second, third = files_of(folder)
    content = second.read_bytes()
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert weights_sha256(folder) != digest
    with pytest.raises(UserError, match=r"0000007.sharded: damaged or incomplete checkpoint \(.* checksum\)"):
        read_groups(folder, lambda present: present)
    shutil.copy(files_of(other)[1], second)
    with pytest.raises(UserError, match="its files are of different saves"):
        read_groups(folder, lambda present: present)
    second.unlink()
    with pytest.raises(UserError, match="2 files of 3 are there"):
        read_groups(folder, lambda present: present)
    assert not is_whole(folder)
    for path in (first, third):
        path.unlink()
    with pytest.raises(UserError, match="0 files of none are there"):
        read_groups(folder, lambda present: present)
    with pytest.raises(UserError, match="gone.sharded: no such file"):
        read_groups(tmp_path / "gone.sharded", lambda present: present)


def test_rows_that_no_file_has_are_missed(tmp_path: Path) -> None:
    folder = tmp_path / "0000001.sharded"
    save_part(folder, 0, 1, {"model/w": Part(torch.ones(2, 3), (5, 3), 0)}, META)
    with pytest.raises(UserError, match="model/w is not whole"):
        read_groups(folder, lambda present: present)
