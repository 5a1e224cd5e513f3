"""The Dockerfile, without Docker: what it copies exists, its commands install from lock files, and its command runs."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.lock_files import EXTRAS
from tests.processes import ROOT, clean_environment

TEXT = (ROOT / "Dockerfile").read_text()


class Instruction(NamedTuple):
    """A line of a Dockerfile, with its continuations joined."""

    name: str
    rest: str


def instructions() -> list[Instruction]:
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [Instruction(*line.split(" ", 1)) for line in joined.splitlines()]


def of(name: str) -> list[str]:
    return [own.rest for own in instructions() if own.name == name]


def ignored(path: str) -> bool:
    """True for a path that .dockerignore keeps out of the image."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    parts = path.split("/")
    heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        fnmatch.fnmatch(head, pattern) or (pattern.startswith("**/") and fnmatch.fnmatch(part, pattern[3:]))
        for pattern in patterns
        for head, part in zip(heads, parts, strict=True)
    )


def test_instructions_are_known_ones_in_a_sound_order() -> None:
    names = [own.name for own in instructions()]
    assert set(names) == {"FROM", "RUN", "USER", "WORKDIR", "ARG", "COPY", "ENV", "CMD"} and names[0] == "FROM"
    assert names[-1] == "CMD" and of("USER") == ["user"] and of("WORKDIR") == ["/app"]
    place = names.index("USER")
    for number, own in enumerate(instructions()):
        if own.name == "RUN":  # what needs root comes before the user, what is the project's after
            assert ("apt-get" in own.rest or "useradd" in own.rest) == (number < place), own.rest
    (version,) = re.findall(r"^FROM python:(3\.\d+)-slim$", TEXT, re.M)
    assert 11 <= int(version.partition(".")[2]) <= 13
    assert not re.search(r"https?:|--index-url|--trusted|TOKEN|PASSWORD", TEXT)


def test_what_is_copied_is_there_and_what_a_clone_lacks_is_not() -> None:
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for rest in of("COPY"):
        *sources, _ = [word for word in rest.split() if not word.startswith("--")]
        assert all((ROOT / source).exists() for source in sources), rest
    kept = [path for path in tracked if not ignored(path)]
    packages = {path.split("/")[0] for path in kept if "/" in path}
    assert {"models", "diffusion", "data", "runtime", "training", "sampling", "evaluator", "locks"} <= packages
    assert {path for path in tracked if "/" not in path} <= {*kept}
    assert {path.split("/")[0] for path in tracked} - {path.split("/")[0] for path in kept} == {"tests"}
    for path in (".git/config", ".venv/bin/python", ".venv-tensorflow/x", "models/__pycache__/x.pyc", "results/000/x"):
        assert ignored(path), path


@pytest.mark.parametrize("extras", ["", *EXTRAS, "video demo"])
def test_commands_install_the_lock_files_with_hashes_and_then_the_project(extras: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    stub = '#!/bin/sh\necho "$(basename "$0") $*" >> calls\n'
    stub += 'case "$*" in *venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/pip;; esac\n'
    (tmp_path / "bin" / "python").write_text(stub)
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "EXTRAS": extras}
    for rest in of("RUN"):
        if ".venv" in rest:
            subprocess.run(["sh", "-ec", rest], cwd=tmp_path, env=environment, check=True)
    made, locked, project = (tmp_path / "calls").read_text().splitlines()
    assert made == "python -m venv .venv"
    files = [f"locks/{name}.lock" for name in ("base", *extras.split())]
    assert all((ROOT / name).exists() for name in files)
    wanted = "".join(f" --requirement {name}" for name in files)
    assert locked == f"pip install --no-cache-dir --require-hashes{wanted}"
    assert project == "pip install --no-cache-dir --no-deps --no-build-isolation --editable ."


def test_its_command_and_those_of_its_header_run() -> None:
    (command,) = of("CMD")
    header = re.sub(r"\\\n# *", "", TEXT.split("FROM")[0])
    commands = [json.loads(command)]
    commands += [shlex.split(line) for line in re.findall(r"dit-family\s+((?:python|torchrun) .*)", header)]
    assert [words[0] for words in commands] == ["python", "python", "torchrun"]
    for program, *words in commands:
        argv = words[words.index("train.py") :]
        if program == "torchrun":  # its data is not here
            assert argv[1:] == ["--data-path", "/data/imagenet/train", "--model", "DiT-XL/2"]
            continue
        argv += [] if "--help" in argv else ["--dry-run"]
        done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=clean_environment(), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
