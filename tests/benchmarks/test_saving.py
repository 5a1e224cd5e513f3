"""Times of saving and loading checkpoints: what is compared is what is meant."""

from pathlib import Path

import pytest

from benchmarks import saving
from runtime import tensor_file
from runtime.errors import UserError
from runtime.zip_checksums import PartChecksums

MODEL = "DiT-debug/2"


def test_loading_is_timed_with_and_without_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saving, "ROUNDS", 1)
    saving.print_loading(MODEL, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["ours", "zip .pt", "zip .pt, half used"]
    assert all(line.count("(") == 3 for line in lines[1:4]) and lines[4].startswith("peak memory")


@pytest.mark.parametrize("name", ["ours", "zip .pt"])
def test_damage_is_found_only_with_checksums(tmp_path: Path, name: str) -> None:
    path = saving.write_files(MODEL, tmp_path)[name]
    before = tensor_file.checksum, PartChecksums.compare
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # of a weight's last bits
    path.unlink()
    path.write_bytes(content)
    saving.load_unchecked(path)
    assert before == (tensor_file.checksum, PartChecksums.compare)
    with pytest.raises(UserError, match="does not match its checksum"):
        saving.load_network(path)


def test_saves_are_timed_in_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "ROUNDS", 2)
    result = saving.measure(MODEL, tmp_path)
    assert result["bytes"] > 1e5
    assert all(result[name] > 0 for name in ("copy", "pause", "sharded pause", "whole save", "first pause"))
    assert not (tmp_path / "0000003.sharded").exists(), "each save is one of its own"
