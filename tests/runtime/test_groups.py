"""Groups of tensors that are opened first and read later: by rows, by shares, and nothing that is not asked for."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.groups import check_groups, check_stored, open_groups, save_checkpoint, save_part
from runtime.parts import Part, files_of
from runtime.tensor_file import Piece

META = {"format": 2, "step": 7}
TABLE = torch.arange(21.0).reshape(7, 3)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name and first row of each piece that is read."""
    pieces: list[tuple[str, int]] = []
    tensor = Piece.tensor

    def noted(piece: Piece) -> Tensor:
        pieces.append((piece.name, piece.start))
        return tensor(piece)

    monkeypatch.setattr(Piece, "tensor", noted)
    return pieces


def in_parts(folder: Path, last: float = 20.0) -> Path:
    """A table of 3, 3 and 1 rows in three files, a number and half a table in the first."""
    table = TABLE.clone()
    table[-1, -1] = last
    for number, start in enumerate((0, 3, 6)):
        parts = {"model/table": Part(table[start : start + 3], (7, 3), start)}
        if number == 0:
            parts |= {
                "optimizer/table/step": Part(torch.tensor(5.0), ()),
                "ema-0.9/half": Part(TABLE[:2].half(), (2, 3)),
            }
        save_part(folder, number, 3, parts, META)
    return folder


def test_rows_are_those_of_the_whole_tensor_and_no_other_file_is_read(
    tmp_path: Path, read: list[tuple[str, int]]
) -> None:
    groups, meta = open_groups(in_parts(tmp_path / "0000007.sharded"))
    assert meta == META and groups.keys() == {"model", "optimizer", "ema-0.9"}
    table, half = groups["model"]["table"], groups["ema-0.9"]["half"]
    assert table.outline().is_meta and table.outline().shape == (7, 3) and half.outline().dtype == torch.float16
    assert not read, "opening reads no tensor"
    for start in range(8):
        for stop in range(start, 8):
            read.clear()
            rows = table.rows(start, stop)
            assert torch.equal(rows, TABLE[start:stop]) and rows.shape == (stop - start, 3)
            touched = {first for first in (0, 3, 6) if max(start, first) < min(stop, first + 3)}
            assert {first for _, first in read} == touched, (start, stop)
    assert torch.equal(table.read(), TABLE) and groups["optimizer"]["table/step"].read() == 5


def test_another_process_can_read_what_was_opened_here(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", {"model": {"table": TABLE}}, META)
    for path in (in_parts(tmp_path / "0000007.sharded"), tmp_path / "a.safetensors"):
        table = open_groups(path)[0]["model"]["table"]
        table.all_rows()  # the file is open
        assert torch.equal(pickle.loads(pickle.dumps(table)).rows(2, 7), TABLE[2:7])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_of_a_check_are_all_of_it_and_each_piece_is_looked_at_once(
    tmp_path: Path, read: list[tuple[str, int]], count: int
) -> None:
    path = in_parts(tmp_path / "0000007.sharded")
    groups, _ = open_groups(path)
    for number in range(count):
        check_stored(groups, path, "--resume", number, count)
    assert sorted(read) == [
        ("ema-0.9/half", 0),
        *(("model/table", row) for row in (0, 3, 6)),
        ("optimizer/table/step", 0),
    ]
    content = files_of(path)[1].read_bytes()
    files_of(path)[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    groups, _ = open_groups(path)
    found = []
    for number in range(count):
        try:
            check_stored(groups, path, "--resume", number, count)
        except UserError as error:
            found.append(str(error))
    assert found == [f"--resume {path}: damaged or incomplete checkpoint (model/table does not match its checksum)"], (
        "by one of the processes"
    )


@pytest.mark.parametrize("last", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, last: float) -> None:
    path = in_parts(tmp_path / "0000007.sharded", last)
    with pytest.raises(UserError, match=r"^--resume .*0000007.sharded: model/table has NaN or infinity$"):
        check_stored(open_groups(path)[0], path, "--resume")


def test_a_group_that_is_missing_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    groups, _ = open_groups(in_parts(tmp_path / "0000007.sharded"))
    check_groups(groups, ["model", "optimizer"], "--resume x")
    with pytest.raises(
        UserError, match="^--resume x: holds no weights under 'ema'; it has: ema-0.9, model, optimizer$"
    ):
        check_groups(groups, ["model", "ema"], "--resume x")
