"""Lock files, extras, environment.yml and the scripts that install from them say the same."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.lock_files import EXTRAS, HASH, PROJECT, pins
from tests.processes import ROOT

ALL, TENSORFLOW, BASE = "requirements.lock", "requirements-tensorflow.lock", "locks/base.lock"
LAYERS = {name: f"locks/{name}.lock" for name in EXTRAS}
LOCKS = (ALL, TENSORFLOW, BASE, *LAYERS.values())


def test_environment_yml_states_nothing_of_its_own() -> None:
    text = (ROOT / "environment.yml").read_text()
    minimum = re.fullmatch(r">=(\d+\.\d+)", PROJECT["requires-python"])
    assert minimum and f"  - python={minimum[1]}\n" in text
    assert f"name: {PROJECT['name']}\n" in text
    dependencies = [line.strip()[2:] for line in text.split("dependencies:")[1].splitlines() if line.strip()]
    editable = re.fullmatch(r"-e \.\[([\w,-]+)\]", dependencies[-1])
    assert dependencies[:-1] == [f"python={minimum[1]}", "pip", "pip:"] and editable
    assert editable[1].split(",") == ["dev", *sorted(EXTRAS.keys() - {"tensorboard"})]  # dev has that one


@pytest.mark.parametrize("name", LOCKS)
def test_lock_files_pin_exactly_with_hashes_and_name_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    assert re.fullmatch(rf"([a-z0-9._-]+==[^\s;\\]+( ; [^\\\n]+)?({HASH})+\n)+", text)
    assert not re.search(r"https?:|file:|--index|--find-links|--trusted", text)


def test_every_extra_has_a_lock_file_and_every_lock_file_an_extra() -> None:
    assert {path.name for path in (ROOT / "locks").iterdir()} == {f"{name}.lock" for name in (*EXTRAS, "base")}


def test_all_lock_files_have_the_same_version_of_a_package() -> None:
    """So any extra can be installed beside any other."""
    known = {(pin.name, pin.version) for pin in pins(ALL)}
    for name in (BASE, *LAYERS.values()):
        assert {(pin.name, pin.version) for pin in pins(name)} <= known, name
    for layer in LAYERS.values():
        assert not {pin.name for pin in pins(layer)} & {pin.name for pin in pins(BASE)}, layer
    assert not {pin.name for pin in pins(TENSORFLOW)} & {pin.name for pin in pins(ALL)}


def of(wanted: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Owner and text of requirements."""
    return [(owner, text) for owner, texts in wanted.items() for text in texts]


@pytest.mark.parametrize(("extra", "text"), of({"base": PROJECT["dependencies"]} | PROJECT["optional-dependencies"]))
def test_lock_files_meet_every_requirement(extra: str, text: str) -> None:
    requirement, files = Requirement(text), {"base": [BASE], "dev": [ALL], "tensorflow": [TENSORFLOW]}
    for choice in [files.get(extra, [BASE, LAYERS.get(extra, "")]), [TENSORFLOW if extra == "tensorflow" else ALL]]:
        found = [pin for name in choice for pin in pins(name, canonicalize_name(requirement.name))]
        assert found and all(requirement.specifier.contains(pin.version) for pin in found), choice


class Sandbox:
    """A copy of the scripts that install, in which uv, pip and venv only write down their arguments."""

    def __init__(self, folder: Path, installer: str) -> None:
        self.folder, self.tools = folder, folder / "bin"
        for name in ("scripts/setup.sh", "scripts/setup_tensorflow.sh", *LOCKS, "pyproject.toml"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
        self.tools.mkdir()
        for name in "bash dirname cat cksum mkdir chmod cp sed".split():
            (self.tools / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
        stub = '#!/bin/bash\necho "$@" >> calls\n[[ " $* " == *" venv "* ]] || exit 0\n'
        stub += 'mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"\n'
        for name in ("python3", "uv") if installer == "uv" else ("python3",):
            (self.tools / name).write_text(stub)
            (self.tools / name).chmod(0o755)

    def run(self, script: str, *argv: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", f"scripts/{script}", *argv]
        return subprocess.run(command, cwd=self.folder, env={"PATH": str(self.tools)}, capture_output=True, text=True)

    def installs(self) -> list[str]:
        """Arguments of the installations so far."""
        return [line for line in (self.folder / "calls").read_text().splitlines() if "pip install" in line]


def test_the_environment_of_another_checkout_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = Sandbox(tmp_path / "one", "uv"), Sandbox(tmp_path / "two", "uv")
    assert one.run("setup.sh").returncode == 0
    (two.folder / ".venv").symlink_to(one.folder / ".venv")
    assert two.run("setup.sh").returncode == 0  # the same pins
    (two.folder / "pyproject.toml").write_text("other")
    done = two.run("setup.sh")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f".venv is that of {one.folder.resolve()}, " in done.stderr and not (two.folder / "calls").exists()
    (two.folder / ".venv").unlink()
    (tmp_path / "disk").mkdir()
    (two.folder / ".venv").symlink_to(tmp_path / "disk")  # on a larger disk
    assert two.run("setup.sh").returncode == 0 and two.installs()


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_both_environments_are_installed_with_hashes_and_the_project_without_dependencies(
    installer: str, tmp_path: Path
) -> None:
    sandbox = Sandbox(tmp_path, installer)
    for _ in range(2):  # the second finds all done
        done = sandbox.run("setup_tensorflow.sh")
        assert (done.returncode, done.stderr) == (0, "")
    first, project, layer = sandbox.installs()
    made = next(line for line in (tmp_path / "calls").read_text().splitlines() if f" {line} ".count(" venv "))
    assert made.endswith(" .venv") and ("--seed" in made.split()) == (installer == "uv")  # venv has pip by itself
    assert first.endswith(f"--require-hashes -r {ALL}") and "--no-deps" not in first
    assert project.endswith("--no-deps --no-build-isolation -e .")
    assert layer.endswith(f"--no-deps --require-hashes -r {TENSORFLOW}")


def test_the_base_is_installed_alone_or_with_extras_and_stays_so(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path, "uv")
    for argv, expected in (
        (["base"], [BASE]),
        ([], []),
        (["base", "video", "demo"], [BASE, LAYERS["video"], LAYERS["demo"]]),
        ([], []),
        (["all"], [ALL]),
    ):
        before = len(sandbox.installs()) if (tmp_path / "calls").exists() else 0
        assert sandbox.run("setup.sh", *argv).returncode == 0
        new = sandbox.installs()[before:]
        assert [line.split("--require-hashes ")[1] for line in new[:1]] == [
            " ".join(f"-r {name}" for name in chosen) for chosen in ([expected] if expected else [])
        ]
    done = sandbox.run("setup.sh", "base", "vidio")
    assert done.returncode == 2
    assert done.stderr == "setup: vidio: no such extra; there are demo finetune stores tensorboard text track video\n"
    assert sandbox.run("setup.sh", "video").returncode == 2  # base is said, too
    assert "bash scripts/setup.sh base [EXTRA ...]" in sandbox.run("setup.sh", "--help").stdout


def test_lock_files_are_made_by_a_command(tmp_path: Path) -> None:
    for name in ("scripts/lock.sh", *LOCKS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    bash, script = subprocess.check_output(["which", "bash"], text=True).strip(), "scripts/lock.sh"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    (tmp_path / "uv").write_text('#!/bin/bash\nprintf "%s " "$@" >> calls; echo >> calls\n')
    (tmp_path / "uv").chmod(0o755)
    assert subprocess.run([bash, script, "--upgrade"], cwd=tmp_path, env=environment).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    for line, name in itertools.zip_longest(calls, (ALL, TENSORFLOW, BASE, *sorted(LAYERS.values()))):
        assert "--universal" in line and "--generate-hashes" in line and line.endswith("--upgrade ")
        assert f"--output-file {name}" in line and (name == ALL or "--constraint requirements.lock" in line)
        assert name in (ALL, BASE) or "--no-emit-package torch " in line
    for extra in (*EXTRAS, "dev"):
        assert f"--extra {extra} " in calls[0]
