"""Safetensors files under checksums: every damaged bit is found, wherever it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtime.errors import UserError
from runtime.groups import read_groups, save_checkpoint
from runtime.tensor_file import DTYPES, read_tensors, write_tensors

TENSORS = {"a/weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
DOCUMENT = {"step": 3, "nested": {"lr": 1e-4, "names": ["x", "ü"]}}


def written(folder: Path) -> Path:
    write_tensors(folder / "a.safetensors", TENSORS, DOCUMENT, "kind")
    return folder / "a.safetensors"


def test_a_file_comes_back_and_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    tensors, document = read_tensors(path, "kind")
    assert document == DOCUMENT and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert {written(tmp_path).read_bytes() for _ in range(5)} == {content}
    with pytest.raises(KeyError):
        read_tensors(path, "other kind")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tensors(tmp_path / "a", {"x": torch.zeros(3, dtype=dtype)}, {}, "kind")
    assert read_tensors(tmp_path / "a", "kind")[0]["x"].dtype == dtype


def test_no_flipped_bit_and_no_truncation_is_silent(tmp_path: Path) -> None:
    content = written(tmp_path).read_bytes()
    (control, _), damaged = read_tensors(tmp_path / "a.safetensors", "kind"), tmp_path / "b.safetensors"
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(content), 300, replace=False):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << (bit % 8)
        damaged.write_bytes(bytes(broken))
        try:
            tensors, document = read_tensors(damaged, "kind")
        except (ValueError, KeyError) as error:
            assert "\n" not in str(error)
            continue
        # Blanks of JSON, and escapes, may be written otherwise
        assert document == DOCUMENT and all(torch.equal(tensors[name], control[name]) for name in TENSORS)
    for length in rng.choice(len(content), 40, replace=False):
        damaged.write_bytes(content[:length])
        with pytest.raises((ValueError, KeyError)):
            read_tensors(damaged, "kind")


def test_names_dtypes_and_shapes_are_covered(tmp_path: Path) -> None:
    """The bytes of the tensors are intact."""
    path = written(tmp_path)
    content = path.read_bytes()
    for old, new in ((b'"shape":[3,4]', b'"shape":[4,3]'), (b'"a/weight"', b'"a/weighs"'), (b'"I64"', b'"U64"')):
        assert content.count(old) >= 1
        path.write_bytes(content.replace(old, new))
        with pytest.raises((ValueError, KeyError)):
            read_tensors(path, "kind")


def test_files_of_earlier_versions_are_read_and_checked_as_far_as_they_can_be(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "now.safetensors", {"model": {"x": torch.ones(2)}}, {"format": 2, "step": 1})
    sums = json.dumps({"model/x": __import__("zlib").crc32(torch.ones(2).numpy().tobytes())})
    metadata = {"dit_family": json.dumps({"format": 2, "step": 1}), "crc32": sums}
    old = tmp_path / "old.safetensors"
    save_file({"model/x": torch.ones(2)}, old, metadata)
    groups, meta = read_groups(old, lambda names: names)
    assert torch.equal(groups["model"]["x"], torch.ones(2)) and meta == {"format": 2, "step": 1}
    save_file({"model/x": torch.zeros(2)}, old, metadata)
    with pytest.raises(UserError, match="model/x does not match its checksum"):
        read_groups(old, lambda names: names)
    save_file({"model/x": torch.zeros(2)}, old, {"dit_family": metadata["dit_family"]})
    assert read_groups(old, lambda names: names)[1] == {"format": 2, "step": 1}
