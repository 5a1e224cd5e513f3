"""The files around the code: one source of dependencies, nothing private in the tree."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lock_files import PROJECT, pins
from tests.processes import ROOT, clean_environment


def test_readme_states_the_systems_and_versions_of_the_project():
    readme = " ".join((ROOT / "README.md").read_text().split())
    systems = readme[readme.index("**Systems**") : readme.index("**Disk**")]
    for named in ("Linux", "macOS", "Windows", "--device mps"):
        assert named in systems
    versions = dict(re.findall(r"(Python|PyTorch) (\d+\.\d+) or newer", systems))
    (torch,) = (line.partition(">=")[2] for line in PROJECT["dependencies"] if line.startswith("torch>="))
    assert versions == {"Python": PROJECT["requires-python"].removeprefix(">="), "PyTorch": torch}
    (pinned,) = {version for _, version, _ in pins("requirements.lock", "torch")}
    assert f"({'.'.join(pinned.split('.')[:2])} pinned)" in systems


def tracked() -> list[str]:
    """Files of the project; in a checkout those that git knows, elsewhere all but what tools left behind."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return listed.stdout.splitlines()
    files = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
    return [str(f) for f in files if not f.parts[0].startswith((".venv", "quickstart_out", "results"))]


BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_and_module_is_in_a_wheel():
    product = [Path(name) for name in tracked() if name.endswith(".py") and not name.startswith(("tests/", "scripts/"))]
    assert sorted(BUILD["packages"]) == sorted({str(path.parent).replace("/", ".") for path in product} - {"."})
    assert BUILD["py-modules"] == sorted(path.stem for path in product if path.parent == Path("."))
    data = {path.rpartition("/")[0].replace("/", ".") for path in tracked() if path.endswith((".safetensors", ".json"))}
    assert {name for name in data if name.split(".")[0] in BUILD["packages"]} - {"benchmarks.results"} <= {
        f"{package}.{pattern.rpartition('/')[0]}".rstrip(".")
        for package, patterns in BUILD["package-data"].items()
        for pattern in patterns
    }


@pytest.mark.slow
def test_a_wheel_works_outside_of_the_checkout(tmp_path):
    source = tmp_path / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    names = [*BUILD["py-modules"], *BUILD["packages"]]
    code = f"""
import sys, app, sample, sample_ddp, train, benchmarks.curves, demo.page
from data import load_digits
from evaluator.small import SmallScorer
SmallScorer(load_digits("train"), load_digits("test"))
assert list(benchmarks.curves.EXPECTED.glob("*.json"))
print(*(module.__file__ for name, module in sys.modules.items() if name in {names!r}), sep="\\n")
"""
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    places = {Path(line).relative_to(tmp_path / "installed").parts[0] for line in done.stdout.splitlines()}
    assert {"train.py", "training", "demo", "models", "benchmarks"} <= places


def test_no_file_is_over_five_megabytes():
    assert [f for f in tracked() if (ROOT / f).is_file() and (ROOT / f).stat().st_size > 5_000_000] == []


def test_scripts_are_valid_bash_and_stop_on_errors():
    scripts = [f for f in tracked() if f.endswith(".sh")] + [".ci/run"]
    for script in scripts:
        assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0, script
        assert "set -euo pipefail" in (ROOT / script).read_text(), script


def document(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_hooks_run_the_versions_of_the_lock_file():
    (repository,) = document(".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert repository["repo"] == "local" and hooks.keys() == {"ruff-check", "ruff-format", "mypy"}
    (ruff,) = pins("requirements.lock", "ruff")
    for name in ("ruff-check", "ruff-format"):
        assert hooks[name]["additional_dependencies"] == [f"ruff=={ruff.version}"]
    assert hooks["mypy"]["entry"] == ".venv/bin/mypy"  # installed from the lock file


def test_hosted_workflow_runs_the_checks_of_this_repository():
    job = document(".github/workflows/ci.yml")["jobs"]["checks"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert job["timeout-minutes"] <= 90 and job["env"]["CUDA_VISIBLE_DEVICES"] == ""
    minimum = PROJECT["requires-python"].removeprefix(">=")
    assert min(job["strategy"]["matrix"]["python"], key=lambda v: [int(n) for n in v.split(".")]) == minimum


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.stem)
def test_issue_forms_are_valid(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    fields = [item for item in content["body"] if item["type"] != "markdown"]
    identifiers = [item["id"] for item in fields]
    assert len(set(identifiers)) == len(identifiers) and all(item["attributes"]["label"] for item in fields)
    assert {item["type"] for item in content["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def test_reproduction_form_asks_for_the_protocol():
    fields = {item.get("id") for item in document(".github/ISSUE_TEMPLATE/cannot_reproduce.yml")["body"]}
    assert fields >= {"command", "config", "versions", "evaluator", "reference", "samples", "sampling"}
