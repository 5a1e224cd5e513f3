"""The shell scripts and the code on macOS: bash 3.2, BSD tools, no Linux-only calls."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.processes import ROOT

SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])
LINUX_ONLY = {"slurm_train.sh"}
# What BSD's tools or bash 3.2 do not have.
FOREIGN = {
    r"(?<![-\w])(realpath|readlink|timeout|nproc|tac|shuf|seq|numfmt|sha256sum|md5sum|free)\b": "not on macOS",
    r"\b(sed -i|sed -r|date -d|date --|stat -c|stat --|grep -P|xargs -r|sort -V|cp -a --|mktemp -p|du -b|ls --)": "GNU",
    r"-(printf|regextype|readable)\b": "GNU find",
    r"\b(mapfile|readarray|coproc)\b|\b(declare|local|typeset) -[AngI]": "bash 4",
    r"\$\{\w+(\[[^]]*\])?(,,?|\^\^?|@[A-Za-z])\}": "bash 4",
    r"&>>|\|&|;;&|;&|\bwait -n\b|\[-1\]|printf '%\(": "bash 4",
    r"^\s*(shopt -s (globstar|lastpipe))": "bash 4",
    r"sed [^|]*[^;{ ]\}'": "BSD's sed wants a semicolon before the brace",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_use_only_what_macos_has(script: Path) -> None:
    lines = [line.split(" #")[0] for line in script.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    for pattern, reason in FOREIGN.items():
        found = re.search(pattern, text, re.MULTILINE)
        assert found is None or script.name in LINUX_ONLY, f"{script.name}: {found and found[0]!r}: {reason}"
    for name in re.findall(r"(\w+)=\(\)", text):  # expanding an empty array ends bash 3.2 under `set -u`
        uses = [use for use in re.findall(rf'.{{0,20}}"\$\{{{name}\[@\]\}}"', text) if f"{{{name}[@]+" not in use]
        assert not uses or f"{name}+=(" in text, f"{script.name}: {name} may be empty"


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ('out=$(realpath -m "$1")', True),
        ("sed -n '2,9{s/a/b/;p}' x", True),
        ("sed -n '2,9{s/a/b/;p;}' x", False),
        ("declare -A table", True),
        ('echo "${name,,}"', True),
        ('echo "${value:-1}" "${@:3}"', False),
        ("mapfile -t lines", True),
    ],
)
def test_the_scan_finds_what_it_is_for(line: str, is_found: bool) -> None:
    assert any(re.search(pattern, line, re.MULTILINE) for pattern in FOREIGN) is is_found


# A name in `os` (or `signal`, `resource`, ...) that macOS lacks.
MISSING = {
    "fdatasync", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "memfd_create",
    "copy_file_range", "pidfd_open", "pidfd_send_signal", "O_DIRECT", "O_TMPFILE", "sendfile", "splice", "prlimit",
    "getrandom", "eventfd", "pipe2", "sigtimedwait", "SIGRTMIN", "process_cpu_count",
}  # fmt: skip


def test_the_code_calls_nothing_that_only_linux_has() -> None:
    folders = "models diffusion data runtime evaluator training sampling scripts benchmarks".split()
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in [*files, *ROOT.glob("*.py")]:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & MISSING, f"{path.relative_to(ROOT)}: {names & MISSING}"


def test_recipes_run_with_the_tools_of_a_bare_system(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in "bash dirname basename sed sort find head tail mkdir cat rm".split():
        (tools / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    for name in ("torchrun", "python"):
        (tools / name).write_text('#!/bin/bash\nprintf "%s " "$@" >> "$RECORDED"\n')
        (tools / name).chmod(0o755)
    place = tmp_path / "a b"
    (place / "data").mkdir(parents=True)
    (place / "ref.npz").touch()
    settings = {"PATH": str(tools), "RECORDED": str(tmp_path / "recorded"), "DIGITS_PYTHON": str(tools / "python")}
    settings |= {"DIGITS_DIT": "start.safetensors", "SAMPLES": str(tmp_path / "none.npz")}
    commands = {
        "train_dit_xl2_256.sh": ["data"],
        "sample_dydit.sh": ["new_dydit0.5", "ref.npz"],
        "digits_ddt.sh": ["out"],
        "digits_dydit.sh": [],
    }
    bash = os.environ.get("BASH32", "bash")  # an old one, to try these by hand
    for script, argv in commands.items():
        if not argv:
            argv = [str(place / "second")]
        command = [bash, str(ROOT / "scripts" / script), *argv]
        done = subprocess.run(command, cwd=place, env=settings, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script
        help_text = subprocess.run([*command[:2], "--help"], cwd=place, env=settings, capture_output=True, text=True)
        assert f"bash scripts/{script}" in help_text.stdout and help_text.stderr == ""
    started = (tmp_path / "recorded").read_text()
    assert f"--data-path {place}/data " in started and f"evaluator/evaluator.py {place}/ref.npz" in started
    assert f"--results-dir {place}/out/runs" in started and (place / "out").is_dir() and (place / "second").is_dir()
