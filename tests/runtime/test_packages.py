"""Modules of other code that hide this project's packages are reported in one line."""

import ast
import os
import subprocess
import sys

import pytest

from tests.processes import ROOT


def run_python(folder, *argv, path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_script_reports_a_foreign_package_in_one_line(tmp_path):
    (tmp_path / "models.py").touch()
    done = run_python(tmp_path, str(ROOT / "sample.py"), "--help", path=[tmp_path, ROOT])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"sample.py: error: `import models` finds {tmp_path}/models.py, not {ROOT}/models; rename it, or put {ROOT} "
        "first on PYTHONPATH\n"
    )


@pytest.mark.parametrize("script", ["sample.py", "sample_ddp.py", "train.py", "evaluator/__main__.py"])
def test_every_script_imports_the_check_before_other_packages(script):
    imports = [
        node for node in ast.parse((ROOT / script).read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    ours = [name for name in names if (ROOT / name.split(".")[0]).is_dir()]
    assert ours[0] == "runtime" and len(ours) > 3


@pytest.mark.parametrize("module", ["sampling.pipeline", "training.setup"])
def test_a_program_with_a_package_of_the_same_name_gets_an_import_error(module, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").touch()
    done = run_python(tmp_path, "-c", f"import {module}", path=[tmp_path, ROOT])
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: `import data` finds {tmp_path}/data/__init__.py, not")


def test_folders_that_are_no_packages_hide_nothing(tmp_path):
    (tmp_path / "models").mkdir()
    assert run_python(tmp_path, "-c", "import runtime", path=[tmp_path, ROOT]).returncode == 0
