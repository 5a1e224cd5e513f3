"""The table of finetune_demo.sh, from samples and checkpoints whose scores are known."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.digits import load_digits, write_digits
from data.image_folder import ImageFolder
from runtime.errors import run
from runtime.groups import save_checkpoint
from scripts.finetune_report import main
from tests.processes import ROOT


def write_method(folder: Path, name: str, images: np.ndarray, labels: np.ndarray, trained: int) -> None:
    np.savez(folder / f"{name}.npz", arr_0=images, arr_1=labels)
    path = folder / name / "000-DiT" / "checkpoints" / "0000001.safetensors"
    path.parent.mkdir(parents=True)
    moments = {"a/exp_avg": torch.zeros(trained), "a/exp_avg_sq": torch.zeros(trained), "a/step": torch.zeros(())}
    save_checkpoint(path, {"model": {"a": torch.zeros(trained)}, "optimizer": moments}, {"format": 2, "step": 1})


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in cells}


def test_real_digits_are_recognised_and_wrong_labels_are_not(tmp_path, capsys):
    images, labels = load_digits("test")
    old = labels < 7
    write_method(tmp_path, "base", images[old], labels[old], 30)
    write_method(tmp_path, "full", images, np.where(old, (labels + 1) % 7, labels), 20)  # old ones are forgotten
    write_method(tmp_path, "labels", images, np.where(old, labels, 7 + (labels + 1) % 3), 10)  # or the new
    assert run(main, "finetune_report.py", ["--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    table = rows(out)
    assert out.strip() == (tmp_path / "finetune.md").read_text().strip() and "LoRA" not in table
    assert [table[name][0] for name in ("before", "all weights", "label table")] == ["30", "20", "10"]
    real_new, distance_new, real_old, distance_old = table["real test images"][1:]
    assert float(real_new) > 0.95 and float(real_old) > 0.95
    assert table["before"][1:] == ["", "", real_old, distance_old]
    assert table["all weights"][1:3] == [real_new, distance_new] and float(table["all weights"][3]) < 0.05
    assert float(table["label table"][1]) < 0.1 and table["label table"][3:] == [real_old, distance_old]


@pytest.mark.parametrize("content", ["nothing", "samples alone"])
def test_a_folder_without_samples_or_checkpoints(tmp_path, capsys, content):
    if content != "nothing":
        images, labels = load_digits("test")
        np.savez(tmp_path / "full.npz", arr_0=images[:20], arr_1=labels[:20])
    assert run(main, "finetune_report.py", ["--output-dir", str(tmp_path)]) == 2
    words = {"nothing": "holds no samples; run scripts/finetune_demo.sh", "samples alone": "no checkpoint in"}[content]
    assert words in capsys.readouterr().err


def test_digits_are_written_as_photos_of_few_classes(tmp_path):
    write_digits(tmp_path, range(7, 10))
    images, labels = load_digits("train")
    folder = ImageFolder(tmp_path, 8, channels=1, flip=False)
    assert folder.classes == ["7", "8", "9"] and len(folder) == int((labels >= 7).sum())
    image, label, _ = folder[0, 0]
    assert label == 0 and np.array_equal(image[0].numpy(), images[labels == 7][0, :, :, 0])


@pytest.mark.slow
def test_the_demonstration_runs_from_end_to_end_and_resumes(tmp_path):
    """With few steps the scores say nothing; a second call trains nothing again."""
    numbers = {"DIGITS_STEPS": "6", "DIGITS_TUNING_STEPS": "4", "DIGITS_SAMPLES": "20"}
    environment = os.environ | numbers | {"DIGITS_PYTHON": sys.executable}
    outputs = []
    for _ in range(2):
        command = ["bash", str(ROOT / "scripts" / "finetune_demo.sh"), str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(rows(done.stdout))
    assert {"before", "all weights", "label table", "real test images"} <= outputs[0].keys()
    assert outputs[0] == outputs[1]
    trained = {name: int(row[0].replace(",", "")) for name, row in outputs[0].items() if row[0][:1].isdecimal()}
    assert trained["label table"] == 11 * 96 < trained["all weights"]
