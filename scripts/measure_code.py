"""Measure the size of the code: functions that two short runs call, lines, `Any`, members of Network, import cycles.

    python scripts/measure_code.py
    python scripts/measure_code.py --tree ../older-checkout . --list "to the loss"

The product is *.py and *.sh outside tests/. The functions of a run are the distinct pairs (file, qualified name) that
the main thread calls, from `run(main)` on: lambdas, comprehensions and generator expressions among them, but not module
and class bodies, calls during an import, and generated methods. Python 3.12 and later inline comprehensions, so compare
trees under one version. Three counts:
- to the loss: train.py on the digits, until a function `losses` of diffusion/ or training/losses/ is called;
- to the .npz: sample_ddp.py on the checkpoint of that run, from its command line to its end;
- noise to .npz: the part of it from the first call of `ImageNoise.initial` on.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType

RUNS = {
    "train": "--dataset digits --model DiT-digits/2 --max-steps 1 --results-dir results",
    "sample_ddp": "--num-fid-samples 4 --per-proc-batch-size 4 --num-sampling-steps 4 --sample-dir samples",
}
LONG = 45  # lines of a function without its docstring
Calls = dict[str, list[str]]  # name of a count -> functions as "file qualified.name"


def product_files(tree: Path) -> list[Path]:
    """Files of the product, relative to its root."""
    files = (path.relative_to(tree) for suffix in ("py", "sh") for path in tree.rglob(f"*.{suffix}"))
    return sorted(file for file in files if not any(part == "tests" or part[0] == "." for part in file.parts))


def record_calls(tree: Path, script: str, *argv: str) -> Calls:
    """Run a script of the tree in this process and record its function calls."""
    sys.path[0] = str(tree)
    names = {str(tree / file): file.as_posix() for file in product_files(tree)}
    program, run = importlib.import_module(script), importlib.import_module("runtime.errors").run
    counts: dict[str, dict[str, None]] = {"to the loss" if script == "train" else "to the .npz": {}}

    def record(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        file = names.get(code.co_filename, "")
        # Functions are optimised code; module and class bodies are not.
        if event != "call" or not file or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        if any("<frozen importlib" in caller.f_code.co_filename for caller, _ in traceback.walk_stack(frame)):
            return
        if code.co_qualname == "ImageNoise.initial":
            counts.setdefault("noise to .npz", {})
        for functions in counts.values():
            functions[f"{file} {code.co_qualname}"] = None
        if code.co_name == "losses" and file.startswith(("diffusion/", "training/losses/")):
            sys.setprofile(None)

    sys.setprofile(record)
    status = run(program.main, f"{script}.py", [*argv])
    if status or (sys.getprofile() and len(counts) == 1):
        raise SystemExit(f"{script}.py: exit status {status}, or no call of `losses` or `ImageNoise.initial`")
    sys.setprofile(None)
    return {name: [*functions] for name, functions in counts.items()}


def run_calls(tree: Path) -> Calls:
    """Train and sample with the tree's scripts, each in a fresh process, and return the functions they called."""
    environment, calls = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, Calls()
    with tempfile.TemporaryDirectory() as folder:
        for script, flags in RUNS.items():
            command = [sys.executable, os.path.abspath(__file__), f"--tree={tree}", "--record", script, *flags.split()]
            command += [f"--ckpt={path}" for path in Path(folder).glob("results/*/checkpoints/*.safetensors")]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{script}.py in {tree} failed:\n{done.stderr}")
            calls |= json.loads(done.stdout.splitlines()[-1])
    return calls


def imported_modules(name: str, source: ast.Module, modules: Collection[str]) -> Iterator[str]:
    """Modules of the product that a module names in its imports, those for type checking included."""
    for node in ast.walk(source):
        base = ""
        if isinstance(node, ast.ImportFrom):
            parent = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *filter(None, [node.module])])
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else []:
            full = f"{base}.{alias.name}".strip(".")
            candidates = (full, f"{full}.__init__", base, f"{base}.__init__")
            yield from [module for module in candidates if module in modules][:1]


def import_cycles(sources: dict[str, ast.Module]) -> set[frozenset[str]]:
    """Groups of modules that import each other."""
    graph = {name: {*imported_modules(name, source, sources)} - {name} for name, source in sources.items()}
    for middle, name in itertools.product(graph, graph):  # Warshall's transitive closure
        if middle in graph[name]:
            graph[name] |= graph[middle]
    return {frozenset(b for b in graph if b in graph[a] and a in graph[b]) for a in graph if a in graph[a]}


def network_members(contract: ast.Module) -> set[str]:
    """Public attributes and methods that the class Network adds to nn.Module's."""
    body = next(node.body for node in contract.body if isinstance(node, ast.ClassDef) and node.name == "Network")
    targets = [target for node in body for target in getattr(node, "targets", [getattr(node, "target", node)])]
    names = {getattr(target, "id", getattr(target, "name", "_")) for target in targets}
    return {name for name in names if not name.startswith("_") and name != "forward"}


def long_functions(source: ast.Module) -> list[str]:
    """Public functions and methods of more than LONG lines, docstrings not counted."""
    found = []
    for node in ast.walk(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            docstring = ast.get_docstring(node, clean=False)
            lines = (node.end_lineno or 0) - node.lineno - (docstring.count("\n") if docstring is not None else -1)
            found += [node.name] * (lines > LONG)
    return found


def figures(tree: Path, calls: Calls) -> dict[str, int]:
    """The table's rows for one tree."""
    rows = {f"files, {name}": len({function.split()[0] for function in called}) for name, called in calls.items()}
    rows |= {f"functions, {name}": len(called) for name, called in calls.items()}
    texts = {file: (tree / file).read_text() for file in product_files(tree)}
    code = {file: text for file, text in texts.items() if file.suffix == ".py"}
    sources = {".".join(file.with_suffix("").parts): ast.parse(text) for file, text in code.items()}
    return rows | {
        "product lines": sum(len(text.splitlines()) for text in texts.values()),
        "lines with Any": sum(len(re.findall(r"(?m)^.*\bAny\b", text)) for text in code.values()),
        "members of Network": len(network_members(sources["models.contract"])),
        "import cycles": len(import_cycles(sources)),
        f"public functions over {LONG} lines": sum(len(long_functions(source)) for source in sources.values()),
    }


def main(argv: Sequence[str]) -> None:
    """Measure each tree and print a table with a column for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, nargs="+", default=[Path(__file__).parents[1]], help="default: this one")
    parser.add_argument("--static", action="store_true", help="leave out the two runs")
    parser.add_argument("--list", metavar="COUNT", help='also print the functions of a count, such as "to the loss"')
    parser.add_argument("--record", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # for `run_calls`
    options = parser.parse_args(argv)
    trees = [tree.resolve() for tree in options.tree]
    if options.record:
        print(json.dumps(record_calls(trees[0], *options.record)))
        return
    calls = [{} if options.static else run_calls(tree) for tree in trees]
    columns = [figures(*one) for one in zip(trees, calls, strict=True)]
    print(f"{'':32}" + "".join(f"{tree.name:>12}" for tree in trees))
    for name in columns[0]:
        print(f"{name:32}" + "".join(f"{column[name]:12,}" for column in columns))
    for tree, found in zip(trees, calls, strict=True):
        print(*(f"\n{tree.name}: {function}" for function in found.get(options.list, [])), sep="", end="")


if __name__ == "__main__":
    main(sys.argv[1:])
