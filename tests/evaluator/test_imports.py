"""TensorFlow is imported in one place, when asked for; the evaluator stays clear of what must not meet it."""

import subprocess
import sys

from tests.processes import ROOT
from tests.test_architecture import imports, project

HEAVY = {"torchvision", "timm", "diffusers", "tensorflow", "triton", "sklearn", "matplotlib"}
MODULES = (
    "evaluator, evaluator.__main__, evaluator.evaluator, evaluator.evaluation, evaluator.inception.tensorflow_backend"
)


def test_importing_the_evaluator_loads_nothing_heavy():
    program = f"import sys, {MODULES}; print(*(sys.modules.keys() & {HEAVY}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_tensorflow_is_imported_in_one_place_only_and_never_at_the_top():
    found = {
        (name, each.top_level)
        for name, source in project().items()
        for each in imports(name, source)
        if each.target.split(".")[0] in ("tensorflow", "keras")
    }
    assert found == {("evaluator.inception.tensorflow_backend", False)}
