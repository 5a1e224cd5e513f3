"""Mistakes of merge_lora.py; what it writes is tested with the training that makes updates (test_fine_tuning.py)."""

from pathlib import Path

import pytest
import torch

from runtime.errors import run
from runtime.groups import save_checkpoint
from scripts.merge_lora import main


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A checkpoint without updates."""
    path = tmp_path / "plain.safetensors"
    save_checkpoint(path, {"model": {"a.weight": torch.ones(2)}}, {"format": 2, "step": 1})
    return path


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--ckpt: give a checkpoint of a run with --train-only lora"),
        (["--ckpt", "{plain}"], "--output, --adapter: give one of them, or both"),
        (["--ckpt", "{plain}", "--output", "a.pt"], "--output a.pt: must end in .safetensors"),
        (["--ckpt", "{plain}", "--adapter", "{plain}.d"], "plain.safetensors: has no low-rank updates; give a"),
        (["--ckpt", "no.safetensors", "--adapter", "{plain}.d"], "--ckpt no.safetensors"),
    ],
)
def test_mistakes_are_one_line(plain: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, "merge_lora.py", [word.format(plain=plain) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and [path.name for path in plain.parent.iterdir()] == ["plain.safetensors"]
