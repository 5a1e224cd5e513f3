"""Pictures of a card: names that are refused, and notes of others."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.pixels import save_png
from runtime.errors import UserError
from sampling.cards.pictures import caption, check_names, check_pictures, read_note, show_pictures

WEIGHTS = {"model": {"name": "DiT-digits/2"}, "weights": "ema-0.9999", "step": 4}
NOTE = {
    "script": "sample.py",
    "checkpoint": {"file": "0000004.safetensors", "model": "DiT-digits/2", "weights": "ema-0.9999", "step": 4},
    "flags": ["--seed", "0", "--prompt", "a dog"],
    "cfg_scale": 4.0,
    "device": "cpu",
    "torch": "2.6.0",
}


def picture(path: Path, note: str = "") -> Path:
    path.parent.mkdir(exist_ok=True)
    save_png(np.zeros((4, 4, 3), np.uint8), path, "sample.py", note)
    return path


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["README.md"], "a/README.md: no picture by its name; give .png"),
        (["Loss.PNG"], "the card has a curve of this name; rename the picture"),
        (["no.png"], "no such file"),
        (["grid.png", "../b/grid.png"], "two pictures are named grid.png"),
    ],
)
def test_names_that_would_replace_others_are_refused(names: list[str], words: str, tmp_path: Path) -> None:
    for name in ("a/README.md", "a/Loss.PNG", "a/grid.png", "b/grid.png"):
        if name.lower().endswith("png"):
            picture(tmp_path / name.lower()).rename(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"^--pictures .*{words}"):
        check_names([tmp_path / "a" / name for name in names])


def test_files_that_are_no_whole_pictures_are_refused(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    check_pictures([path], WEIGHTS, "--pictures")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="--pictures .*a.png: cannot be read as a picture"):
        check_pictures([path], WEIGHTS, "--pictures")


@pytest.mark.parametrize(("name", "value"), [("model", "DiT-S/2"), ("weights", "model"), ("step", 5)])
def test_pictures_of_other_weights_are_refused(name: str, value: object, tmp_path: Path) -> None:
    check_pictures([picture(tmp_path / "a.png", json.dumps(NOTE))], WEIGHTS, "--pictures")
    other = {**NOTE, "checkpoint": {**NOTE["checkpoint"], name: value}}  # type: ignore[dict-item]
    with pytest.raises(UserError, match="--pictures .*a.png: of 0000004.safetensors .*not of these weights"):
        check_pictures([picture(tmp_path / "a.png", json.dumps(other))], WEIGHTS, "--pictures")


@pytest.mark.parametrize("note", ["", "a holiday", "[1]", "[" * 50_000, '{"checkpoint": 3}'])
def test_notes_of_others_are_none(note: str, tmp_path: Path) -> None:
    path = picture(tmp_path / "my picture.png", note)
    assert read_note(path) == {}
    link, text = show_pictures([path], "digits", {"cfg_scale": 1.5})
    assert link == "![samples](my%20picture.png)\n" and "does not say by which settings" in text


def test_a_caption_is_a_command_and_names_both_scales() -> None:
    text = caption(NOTE, "me/digits", {"cfg_scale": 1.5})
    assert "`python sample.py --ckpt me/digits --seed 0 --prompt 'a dog'`, on cpu with PyTorch 2.6.0." in text
    assert "Its guidance scale is 4.0; the default of `Pipeline.sample` and sample_ddp.py is 1.5." in text
    assert "default" not in caption(NOTE, "me/digits", {"cfg_scale": 4.0})
