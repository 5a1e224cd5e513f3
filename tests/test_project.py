"""The files around the code: one source of dependencies, nothing private in the tree."""

import re
import subprocess
import tomllib
from typing import Any

import pytest
import yaml

from tests.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


LOCKS = ("requirements.lock", "requirements-tensorflow.lock")
HASH = r" \\\n    --hash=sha256:[0-9a-f]{64}"


def lock(name: str = LOCKS[0]) -> list[str]:
    """Pins of a lock file, without their hashes."""
    return re.sub(HASH, "", (ROOT / name).read_text()).splitlines()


def test_readme_states_the_systems_and_versions_of_the_project():
    readme = " ".join((ROOT / "README.md").read_text().split())
    systems = readme[readme.index("**Systems**") : readme.index("**Disk**")]
    for named in ("Linux", "macOS", "Windows", "--device mps"):
        assert named in systems
    versions = dict(re.findall(r"(Python|PyTorch) (\d+\.\d+) or newer", systems))
    (torch,) = (line.partition(">=")[2] for line in PROJECT["dependencies"] if line.startswith("torch>="))
    assert versions == {"Python": PROJECT["requires-python"].removeprefix(">="), "PyTorch": torch}
    (pinned,) = (line.removeprefix("torch==") for line in lock() if line.startswith("torch=="))
    assert f"({'.'.join(pinned.split('.')[:2])} pinned)" in systems


def test_environment_yml_states_nothing_of_its_own():
    text = (ROOT / "environment.yml").read_text()
    minimum = re.fullmatch(r">=(\d+\.\d+)", PROJECT["requires-python"])
    assert minimum and f"  - python={minimum[1]}\n" in text
    assert f"name: {PROJECT['name']}\n" in text
    dependencies = [line.strip()[2:] for line in text.split("dependencies:")[1].splitlines() if line.strip()]
    editable = re.fullmatch(r"-e \.\[([\w,-]+)\]", dependencies[-1])
    assert dependencies[:-1] == [f"python={minimum[1]}", "pip", "pip:"] and editable
    assert set(editable[1].split(",")) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("name", LOCKS)
def test_lock_files_pin_exactly_with_hashes_and_name_no_address(name):
    text = (ROOT / name).read_text()
    assert re.fullmatch(rf"([a-z0-9._-]+==[^\s;\\]+( ; [^\\\n]+)?({HASH})+\n)+", text)
    assert not re.search(r"https?:|file:|--index|--find-links|--trusted", text)


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_both_environments_are_installed_with_hashes_and_the_project_without_dependencies(installer, tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "scripts/setup_tensorflow.sh", *LOCKS, "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in "bash dirname cat cksum mkdir chmod cp".split():
        (tools / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    stub = '#!/bin/bash\necho "$@" >> calls\n[[ " $* " == *" venv "* ]] || exit 0\n'
    stub += 'mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"\n'
    for name in ("python3", "uv") if installer == "uv" else ("python3",):
        (tools / name).write_text(stub)
        (tools / name).chmod(0o755)
    for _ in range(2):  # the second finds all done
        done = subprocess.run(
            ["bash", "scripts/setup_tensorflow.sh"],
            cwd=tmp_path,
            env={"PATH": str(tools)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
    installs = [line for line in (tmp_path / "calls").read_text().splitlines() if " install " in line]
    assert len(installs) == 3 and all("pip install" in line for line in installs)
    assert installs[0].endswith("--require-hashes -r requirements.lock") and "--no-deps" not in installs[0]
    assert installs[1].endswith("--no-deps --no-build-isolation -e .")
    assert installs[2].endswith("--no-deps --require-hashes -r requirements-tensorflow.lock")


def test_lock_files_are_made_by_a_command(tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/lock.sh", *LOCKS):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    bash, script = subprocess.check_output(["which", "bash"], text=True).strip(), "scripts/lock.sh"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    (tmp_path / "uv").write_text('#!/bin/bash\nprintf "%s " "$@" >> calls; echo >> calls\n')
    (tmp_path / "uv").chmod(0o755)
    assert subprocess.run([bash, script, "--upgrade"], cwd=tmp_path, env=environment).returncode == 0
    base, layer = (tmp_path / "calls").read_text().splitlines()
    for line, name, extra in ((base, LOCKS[0], "dev"), (layer, LOCKS[1], "tensorflow")):
        assert "--universal" in line and "--generate-hashes" in line and f"--extra {extra}" in line
        assert f"--output-file {name}" in line and line.endswith("--upgrade ")
    assert "--constraint requirements.lock" in layer and "--no-emit-package torch " in layer


LOCKED = [each for extra in ("dev", "stores", "text", "video") for each in PROJECT["optional-dependencies"][extra]]


@pytest.mark.parametrize("requirement", PROJECT["dependencies"] + LOCKED)
def test_lock_file_meets_every_requirement(requirement):
    name, minimum = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()
    pins = [line for line in lock() if line.startswith(f"{name.replace('_', '-')}==")]
    assert pins
    for pin in pins:
        version = pin.split("==")[1].split()[0]
        assert [int(n) for n in version.split(".")[:2]] >= [int(n) for n in minimum.split(".")[:2]]


def tracked() -> list[str]:
    """Files of the project; in a checkout those that git knows, elsewhere all but what tools left behind."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return listed.stdout.splitlines()
    files = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
    return [str(f) for f in files if not f.parts[0].startswith((".venv", "quickstart_out", "results"))]


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
    for name in ("ruff-check", "ruff-format"):
        assert hooks[name]["additional_dependencies"] == [line for line in lock() if line.startswith("ruff==")]
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
