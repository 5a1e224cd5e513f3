"""TensorFlow's own environment: its pins, and that scripts/test.sh runs its tests in a process of their own."""

import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from tests.processes import ROOT

STUB = '#!/usr/bin/env bash\necho "$(basename "$(dirname "$(dirname "$0")")") $*" >> calls\n'


def pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith(" ")]
    return dict(re.split("==", line.split(" ")[0]) for line in lines)


def test_the_layer_meets_pyproject_and_agrees_with_what_lies_below():
    layer, below = pins("requirements-tensorflow.lock"), pins("requirements.lock")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (minimum,) = (re.fullmatch(r"tensorflow-cpu>=(\d+)\.(\d+)", each).groups() for each in extras["tensorflow"])
    assert tuple(map(int, layer["tensorflow-cpu"].split(".")[:2])) >= tuple(map(int, minimum))
    assert layer.keys() & below.keys() == set()
    assert not any(name.startswith(("tensorflow", "keras")) for name in below)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            [],
            [
                ".venv -m pytest -q -n 2",
                ".venv-tensorflow -m pytest -q -m tf and not slow tests/evaluator/tensorflow",
            ],
        ),
        (["-m", "slow"], [".venv -m pytest -q -n 2 -m slow"]),
    ],
)
def test_tensorflow_s_tests_run_in_a_process_of_their_own(tmp_path, argv, expected):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "test.sh", tmp_path / "scripts")
    for name in ("setup.sh", "setup_tensorflow.sh"):
        (tmp_path / "scripts" / name).write_text("exit 0\n")
    for environment in (".venv", ".venv-tensorflow"):
        python = tmp_path / environment / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(STUB)
        python.chmod(0o755)
    done = subprocess.run(["bash", "scripts/test.sh", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == expected


def test_beside_other_tests_those_of_tensorflow_are_left_out():
    argv = ["-m", "pytest", "-q", "--collect-only", "-m", "slow or tf", "-p", "no:cacheprovider"]
    folders = ["tests/evaluator/tensorflow", "tests/evaluator/test_metrics.py"]
    done = subprocess.run([sys.executable, *argv, *folders], cwd=ROOT, capture_output=True, text=True)
    listed = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0 and listed and all("test_metrics.py" in line for line in listed), done.stdout
