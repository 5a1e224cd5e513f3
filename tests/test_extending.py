"""docs/extending.md, followed literally: its code runs in a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

TEXT = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, flags=re.S)
ROWS = {"models/__init__.py", "training/losses/__init__.py", "diffusion/registry.py", "data/__init__.py"}
ADDED = {"evaluator/scores.py", "training/optimization.py"}
USE = """
import torch
import sample, train
from evaluator.scores import ImageSet, compute_scores
from evaluator.statistics import Statistics
from runtime.errors import run

argv = "--dataset stripes --in-channels 3 --vae average --model tiny --num-classes 2 --hidden-size 8 --optimizer adam"
argv += " --adam-eps 1e-7 --energy-weight 0.5 --process flow --max-steps 3 --global-batch-size 8 --log-every 1"
assert run(train.main, "train.py", [*argv.split(), "--device", "cpu", "--precision", "fp32"]) == 0
argv = "--ckpt results/000-tiny/checkpoints/0000003.safetensors --sampler midpoint --midpoint 0.75 --cfg-scale 2"
assert run(sample.main, "sample.py", [*argv.split(), "--num-sampling-steps", "3", "--device", "cpu"]) == 0
means = [torch.full((2,), k, dtype=torch.float64) for k in (0, 3)]
sets = [ImageSet(None, Statistics(mean, torch.eye(2).double(), 9), None, lambda rows: rows) for mean in means]
assert compute_scores(["offset"], *sets, "float32") == {"Offset": torch.full((2,), 3.0).double().norm().item()}
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all of the page's code."""
    folder = tmp_path_factory.mktemp("extended") / "project"
    left_out = shutil.ignore_patterns(".*", "golden", "results", "samples", "*_out", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=left_out)
    (folder / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
    for name, code in BLOCKS:
        path = folder / name
        assert path.exists() == (name in ROWS | ADDED), f"{name}: rows and functions go into files that exist"
        with path.open("a") as file:
            file.write(("\n\n" if name in ROWS | ADDED else "") + code)
    return folder


def test_every_example_is_short_and_every_registry_has_one():
    assert all(code.count("\n") <= 40 for _, code in BLOCKS)
    assert {name for name, _ in BLOCKS} >= ROWS | ADDED


def test_an_extension_is_one_file_and_one_row():
    """Edits of existing files: a sampler with a setting needs a file and a row, an encoder a file and its import."""
    edits = [name for name, _ in BLOCKS]
    assert edits.count("diffusion/registry.py") == edits.count("models/__init__.py") == 1
    assert edits.count("training/optimization.py") == edits.count("evaluator/scores.py") == 1


def test_the_examples_train_sample_and_score(extended: Path):
    done = subprocess.run([sys.executable, "-c", USE], cwd=extended, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "energy:" in done.stdout
    assert (extended / "sample.png").exists()


def test_the_examples_keep_the_invariants(extended: Path):
    tests = ["tests/test_invariants.py", "tests/test_composition.py", "tests/test_architecture.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", *tests]
    chosen = "Tiny or (midpoint and Tiny) or (midpoint and DDT) or import"
    done = subprocess.run([*command, "-k", chosen], cwd=extended, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 20
