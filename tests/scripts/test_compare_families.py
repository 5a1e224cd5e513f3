"""The table and the picture of all families."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.small import Result
from evaluator.small import SmallScores
from runtime.errors import run
from scripts import compare_families
from scripts.compare_families import KINDS, off_target, spread, table
from tests.digits_checkpoints import save_digits_checkpoint
from tests.runs import start

FAMILY = {"DiT-digits/2": {}, "DyDiT-digits/2": {"flops_target": 0.9}, "DDT-digits/2": {}, "Skip-DiT-digits/2": {}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of every family, as the scripts leave them; of the Skip-DiT two seeds."""
    actual = []
    for number, (model, train) in enumerate(FAMILY.items()):
        folder = tmp_path_factory.mktemp("out")
        for seed in range(2 if model.startswith("Skip") else 1):
            path = folder / "runs" / f"{seed:03d}" / "checkpoints" / "0000001.safetensors"
            save_digits_checkpoint(path, model, "flow" if number == 2 else "gaussian", seed, **train)
        actual.append(folder)
    return actual


def main(*argv: str | Path) -> int:
    return run(compare_families.main, "compare_families.py", list(map(str, argv)))


def test_every_family_is_compared(folders, tmp_path, capsys):
    argv = "--num-sampling-steps 10 5 --intervals 2 --num-images 12 --device cpu --output-dir".split()
    assert main("--ckpt", *folders, *argv, tmp_path / "out") == 0
    output = capsys.readouterr()
    rows = json.loads((tmp_path / "out" / "families.json").read_text())["rows"]
    assert [(row["name"], row["seed"], row["interval"], row["steps"]) for row in rows] == [
        *(("DiT-digits/2", 0, *setup) for setup in ((1, 10), (1, 5), (2, 10))),
        *(("DyDiT-digits/2, target 0.9", 0, *setup) for setup in ((1, 10), (1, 5))),
        *(("DDT-digits/2", 0, *setup) for setup in ((1, 10), (1, 5), (2, 10))),
        *(("Skip-DiT-digits/2", seed, *setup) for seed in (0, 1) for setup in ((1, 10), (1, 5), (2, 10))),
    ]
    assert output.out.strip() == (tmp_path / "out" / "families.md").read_text().strip()
    assert len([line for line in output.out.splitlines() if line.startswith("|")]) == 2 + 3 + 2 + 3 + 3
    with Image.open(tmp_path / "out" / "families.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_clips_have_a_table_and_a_picture_of_their_own(folders, tmp_path, capsys):
    argv = "--dataset moving-digits --device cpu --num-workers 0 --max-steps 1 --global-batch-size 2 --hidden-size 16"
    for model, process in (("Skip-Latte", "flow"), ("Latte", "gaussian")):
        flags = [*argv.split(), "--model", f"{model}-digits/4", "--process", process]
        assert start(tmp_path / "runs" / model, *flags) == 0
    steps = "--num-sampling-steps 4 3 --intervals 2 --num-images 12 --device cpu --output-dir".split()
    capsys.readouterr()
    assert main("--ckpt", folders[0], tmp_path / "runs", *steps, tmp_path / "out") == 0
    images, clips = (part.splitlines() for part in capsys.readouterr().out.split("\n\n")[:3:2])
    titles = [cell.strip() for cell in clips[0].split("|")[1:-1]]
    assert "direction" in titles and "recall" not in titles and "recall" in images[0]
    cells = [dict(zip(titles, map(str.strip, line.split("|")[1:-1]), strict=True)) for line in clips[2:]]
    assert [(row["network"], row["sampled by"], row["full evaluations"]) for row in cells] == [
        ("Latte-digits/4", "ddim, 4 steps, scale 1.1", "4"),
        ("Latte-digits/4", "ddim, 3 steps, scale 1.1", "3"),
        ("Latte-digits/4", "ddim, 4 steps, scale 1.1, N = 2", "2 of 4"),
        ("Skip-Latte-digits/4, flow", "euler, 4 steps", "4"),
        ("Skip-Latte-digits/4, flow", "euler, 3 steps", "3"),
        ("Skip-Latte-digits/4, flow", "euler, 4 steps, R = 2", "2 of 4"),
    ]
    assert all(float(row["Frechet distance"]) > 2 for row in cells), "untrained"
    for name in ("families.png", "families_of_clips.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_a_routed_network_off_its_target_fails_the_check(folders, tmp_path, capsys):
    argv = "--num-sampling-steps 5 --num-images 4 --device cpu --check --output-dir".split()
    with pytest.raises(SystemExit) as leaving:
        main("--ckpt", folders[1], *argv, tmp_path)
    assert leaving.value.code == 1
    assert "of the blocks' work, not within 0.02 of its target" in capsys.readouterr().err


def result(name: str, seed: int, setup: str, work: float, distance: float, **fields: float | None) -> Result:
    scores = SmallScores(4, 0.9, distance, 5.65, 9.0, 0.9, 0.8, 1.0)
    own = {"target": None, "steps": 50, "interval": 1, "evaluations": 50, "full": 50, "psnr": None, "dense": 4e6}
    return Result(name, seed, setup=setup, macs=work, block_ratio=work / 4e6, scores=scores, **{**own, **fields})


def test_seeds_become_one_row_with_their_spread():
    rows = [
        result("A", 0, "ddim", 4e6, 1.0),
        result("A", 0, "N = 2", 2e6, 3.0, psnr=20.0, full=26),
        result("A", 1, "ddim", 4e6, 2.0),
        result("A", 1, "N = 2", 2e6, 6.0, psnr=30.0, full=26),
        result("B", 0, "ddim", 1e6, 1.5),
    ]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows, KINDS[SmallScores]).splitlines()[2:]
    ]
    assert cells == [
        ["A", "ddim", "50", "4", "1.00 x", "1.000", "0.900", "1.50 (1.00 to 2.00)", "0.800", "1.00", ""],
        ["A", "N = 2", "26 of 50", "2", "2.00 x", "0.500", "0.900", "4.50 (3.00 to 6.00)", "0.800", "1.00",
         "25.0 (20.0 to 30.0)"],
        ["B", "ddim", "50", "1", "4.00 x", "0.250", "0.900", "1.50", "0.800", "1.00", ""],
    ]  # fmt: skip


def test_spread_leaves_out_what_is_not_there():
    assert spread([None, None], ".1f") == ""
    assert spread([None, 2.0], ".1f") == "2.0"
    assert spread([4.0, 2.0], ".1f") == "3.0 (2.0 to 4.0)"


def test_targets_are_compared_at_the_first_setup_only():
    near, far = (result("R", 0, setup, 4e6 * share, 1.0, target=0.5) for setup, share in (("a", 0.515), ("b", 0.6)))
    assert off_target([near, far]) == []
    assert len(off_target([far, near, result("P", 0, "a", 1e6, 1.0)])) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--ckpt nothing", "--ckpt nothing: no checkpoint there"),
        ("--ckpt digits_ddt_out", "--ckpt digits_ddt_out: no checkpoint there; bash scripts/digits_ddt.sh makes some"),
        ("--ckpt PLAIN --intervals 51", "--intervals 51: must lie in 2..50"),
        ("--ckpt PLAIN --intervals 1", "--intervals 1: must lie in 2..50"),
        ("--ckpt PLAIN --device cuda", "--device cuda: PyTorch finds no CUDA device"),
        ("--ckpt PLAIN --num-images 3", "--num-images 3: must be at least 4"),
        ("--ckpt PLAIN --cfg-scale 0.5", "--cfg-scale 0.5: must be at least 1"),
        ("--ckpt PLAIN --num-sampling-steps 50 0", "--num-sampling-steps ddim0"),
        ("--ckpt PLAIN --sampler euler", "--sampler euler: the network was trained under 'gaussian'"),
        ("--ckpt PLAIN --cache-depth 3", "cache_depth 3 must lie in 1..2"),
    ],
)
def test_a_mistake_is_one_line(argv, words, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = [str(folders[0]) if word == "PLAIN" else word for word in argv.split()]
    assert main(*given) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
