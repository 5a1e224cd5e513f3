"""Archives written in place are those that NumPy and zipfile know."""

import io
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from data.npz_file import NpzFile, Piece, crc_of


@pytest.mark.parametrize("sizes", [[], [5], [0, 3], [7, 7, 1], [1000, 1, 0, 70_000, 70_000, 13]])
def test_checksums_of_pieces_give_the_checksum_of_the_whole(sizes: list[int]) -> None:
    content = np.random.default_rng(0).bytes(sum(sizes))
    stream = io.BytesIO(content)
    pieces = [Piece(zlib.crc32(stream.read(size)), size) for size in sizes]
    assert crc_of(pieces) == zlib.crc32(content)


@pytest.mark.parametrize("shape", [(7, 4, 4, 3), (1, 1), (300, 8, 8, 1)])
def test_rows_written_in_any_order_make_an_npz(shape: tuple[int, ...], tmp_path: Path) -> None:
    rows, labels = np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.arange(shape[0])
    file = NpzFile(tmp_path / "a.npz", shape)
    file.create()
    starts = list(range(0, shape[0], 3))
    pieces = {start: file.write(start, rows[start : start + 3]) for start in reversed(starts)}
    assert all(pieces[start] == file.read_piece(start, min(start + 3, shape[0])) for start in starts)
    for _ in range(2):  # a process that was killed in between seals again
        file.seal([pieces[start] for start in starts], {"arr_1": labels})
        with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
            assert loaded.files == ["arr_0", "arr_1"]
            assert np.array_equal(loaded["arr_0"], rows) and loaded["arr_0"].dtype == np.uint8
            assert np.array_equal(loaded["arr_1"], labels) and loaded["arr_1"].dtype == labels.dtype
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
        assert [(info.compress_type, info.date_time) for info in archive.infolist()] == [(0, (1980, 1, 1, 0, 0, 0))] * 2


def test_an_archive_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and the offset of the directory need 64 bits. The file is sparse: nothing of it is written or read."""
    shape = (50, 10_000, 10_000)
    file = NpzFile(tmp_path / "large.npz", shape)
    file.create()
    zeros = Piece(zlib.crc32(bytes(10**7)), 10**7)
    file.seal([zeros] * 500, {"arr_1": np.arange(50)})
    with zipfile.ZipFile(tmp_path / "large.npz") as archive:
        large, small = archive.infolist()
        assert large.file_size == large.compress_size == 5 * 10**9 + 128 and small.header_offset > 2**32
        with archive.open(large) as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            assert np.lib.format.read_array_header_1_0(member) == (shape, False, np.dtype(np.uint8))
    with np.load(tmp_path / "large.npz") as loaded:
        assert np.array_equal(loaded["arr_1"], np.arange(50))


def test_a_piece_that_was_cut_short_is_told_from_a_whole_one(tmp_path: Path) -> None:
    file = NpzFile(tmp_path / "a.npz", (4, 100))
    file.create()
    piece = file.write(0, np.zeros((4, 100), np.uint8))
    with (tmp_path / "a.npz").open("rb+") as raw:
        raw.truncate(file.bytes_reserved - 1)
    assert file.read_piece(0, 4) != piece


def test_systems_without_fdatasync_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (4, 100), np.uint8)
    for name in ("a.npz", "b.npz"):
        file = NpzFile(tmp_path / name, rows.shape)
        file.create()
        file.seal([file.write(0, rows)], {})
        monkeypatch.delattr(os, "fdatasync", raising=False)  # for the second
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
