"""Imports point downward: entry points; training and sampling; models, diffusion, data, evaluator; runtime."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import models
from tests.source_words import families_named, identifiers

ROOT = Path(__file__).parent.parent
LOWER = {"models", "diffusion", "data", "evaluator"}
UPPER = {"training", "sampling"}
PACKAGES = LOWER | UPPER | {"runtime", "scripts"}
HEAVY = {"diffusers", "timm", "torchvision", "sklearn", "matplotlib", "tensorflow", "huggingface_hub"}
LIGHT = {"models", "diffusion", "runtime"}


class Import(NamedTuple):
    """One module that a module imports.

    Attributes:
        target: full name, such as "models.contract".
        top_level: runs when the importing module is imported.
    """

    target: str
    top_level: bool


def imports(name: str, source: str) -> Iterator[Import]:
    """All imports of a module, those of functions and of type checkers too."""

    def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        base = name.split(".")[: -node.level] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        # `from diffusion import sampling` imports a module; `from diffusion import guided` does not. Either is named.
        return [f"{module}.{alias.name}" for alias in node.names]

    def visit(node: ast.AST, top_level: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (Import(target, top_level) for target in targets(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            top_level = False
        guard = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, top_level and not (guard and field == "body"))

    yield from visit(ast.parse(source), True)


def cycles(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle; those of type checkers count."""
    graph = {name: set() for name in sources}
    for name, source in sources.items():
        for target, _ in imports(name, source):
            module = target if target in sources else target.rpartition(".")[0]
            graph[name] |= {module} & sources.keys() - {name}
    while removable := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in removable:
            del graph[name]
    importers = {name for targets in graph.values() for name in targets}
    return sorted(graph.keys() & importers)


def is_entry_point(name: str, source: str) -> bool:
    """Scripts, files of the root, and modules that define `main`."""
    defines_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(source).body)
    return name.split(".")[0] not in LOWER | UPPER | {"runtime"} or defines_main


def violations(sources: dict[str, str]) -> list[str]:
    """What breaks the import rule among modules, given as name -> source."""
    entry_points = {name for name, source in sources.items() if is_entry_point(name, source)}
    broken = []
    for name in sorted(sources.keys() - entry_points):
        package = name.split(".")[0]
        for target, top_level in imports(name, sources[name]):
            other = target.split(".")[0]
            contract = package == "diffusion" and target.startswith("models.contract.")  # which imports nothing of ours
            if package in LOWER and other in LOWER - {package} and not contract:
                broken.append(f"{name} imports {target}: packages do not import each other")
            if other in UPPER - {package}:
                broken.append(f"{name} imports {target}: only entry points do")
            if package == "runtime" and other in LOWER:
                broken.append(f"{name} imports {target}: runtime imports no other package")
            if any(target == entry or target.startswith(f"{entry}.") for entry in entry_points):
                broken.append(f"{name} imports {target}: nothing imports an entry point")
            if package in LIGHT and other in HEAVY and top_level:
                broken.append(f"{name} imports {target} at its top: heavy packages are imported where they are used")
    return broken


def project() -> dict[str, str]:
    """Every module of the project, by name; the root's files are entry points by their own name."""
    paths = [*ROOT.glob("*.py"), *(path for package in sorted(PACKAGES) for path in (ROOT / package).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path.read_text() for path, name in names.items()}


def test_the_project_keeps_the_import_rule() -> None:
    sources = project()
    assert {"models.dit", "diffusion.sampling", "runtime.seeds", "data.digits", "training.setup"} <= sources.keys()
    assert violations(sources) == []


def test_the_contract_imports_nothing_of_ours() -> None:
    sources = project()
    packages = {name.split(".")[0] for name in sources}
    assert {
        target.split(".")[0] for target, _ in imports("models.contract", sources["models.contract"])
    } & packages == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycles(project()) == []
    circle = {
        "a": "from b import c",
        "b": "if TYPE_CHECKING:\n    import d",
        "d": "def f():\n    import a.x",
        "e": "import a",
    }
    assert cycles(circle) == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("models.dit", "import diffusion", "models.dit imports diffusion: packages"),
        ("models.dit", "from diffusion.sampling import guided", "imports diffusion.sampling.guided: packages"),
        ("models.dit", "def f():\n    import evaluator.adm", "imports evaluator.adm: packages"),
        ("diffusion.sampling", "from models.dit import DiT", "imports models.dit.DiT: packages"),
        (
            "diffusion.sampling",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from models import DiT",
            "imports models.DiT: packages",
        ),
        ("diffusion.sampling", "if TYPE_CHECKING:\n    pass\nelse:\n    from models.dit import DiT", "packages"),
        ("runtime.seeds", "from data.digits import load_digits", "runtime imports no other package"),
        ("data.digits", "from train import main", "imports train.main: nothing imports an entry point"),
        ("data.digits", "import scripts.tool", "imports scripts.tool: nothing imports an entry point"),
        ("evaluator.adm", "from evaluator.cli import main", "nothing imports an entry point"),
        ("evaluator.adm", "from .cli import main", "imports evaluator.cli.main: nothing imports an entry point"),
        ("data.digits", "from training.setup import set_up", "imports training.setup.set_up: only entry points do"),
        ("sampling.pipeline", "import training.trainer", "imports training.trainer: only entry points do"),
        ("training.trainer", "if TYPE_CHECKING:\n    from train import main", "nothing imports an entry point"),
        ("models.dit", "import timm.models", "models.dit imports timm.models at its top"),
        ("runtime.log", "try:\n    from diffusers import AutoencoderKL\nexcept ImportError: pass", "at its top"),
        ("runtime.log", "class A:\n    import matplotlib.pyplot as plt", "at its top"),
    ],
)
def test_what_breaks_the_rule_is_found(name: str, source: str, message: str) -> None:
    others = {"train": "", "scripts.tool": "", "evaluator.cli": "def main(argv): pass"}
    (found,) = violations({**others, name: source})
    assert message in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("models.dit", "import torch\nfrom models.layers import Mlp\nfrom runtime import seeds\nfrom . import layers"),
        ("diffusion.sampling", "from models.contract import Network"),
        ("diffusion.sampling", "def f():\n    import diffusers"),
        ("data.vae", "import diffusers"),
        ("evaluator.cli", "import data, train\ndef main(argv): pass"),
        ("train", "import data, models, diffusion.sampling, evaluator.cli, runtime"),
        ("scripts.tool", "import train, training.setup, sampling.pipeline"),
        ("training.setup", "import data, models, diffusion, training.config, evaluator.metrics"),
    ],
)
def test_what_keeps_the_rule_is_let_be(name: str, source: str) -> None:
    others = {"train": "", "evaluator.cli": "def main(argv): pass"}
    assert violations({**others, name: source}) == []


@pytest.mark.parametrize("package", ["diffusion", "runtime"])
def test_no_identifier_names_a_family(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert families_named(identifiers(path.read_text()), models.FAMILIES) == set(), path.name


def test_importing_models_and_diffusion_loads_nothing_heavy() -> None:
    """Nor does building a network to be filled from a file; PyTorch's compiler alone takes seconds."""
    build = "import sys, models, diffusion; from models.blank import blank_model; blank_model('DDT-debug/2')"
    program = f"{build}; print(*(sys.modules.keys() & {HEAVY | {'sympy', 'torch._dynamo'}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
