"""One self-contained module from definitions of several: what a few names need, in an order in which it can run.

    source = flatten(["models.dit.DiT", "models.dit.DiTConfig"])

Each definition is text of the module that has it. Imports of this code are resolved, others are kept; tables, functions
and classes that nothing needs are left out. Used by sampling/bundle.py, for folders that run where this code is not
installed.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "diffusion", "data", "runtime", "sampling")
FUTURE = "from __future__ import annotations"


class Name(NamedTuple):
    """A name at the top of a module."""

    module: str
    name: str


class Module:
    """A module's source by statement.

    Attributes:
        statements: Statements that define names, or change what a name stands for, in their order.
        defined: Name -> numbers of the statements that define or change it.
        ours: Name -> definition in another module of ours, or the module itself if its name is empty.
        external: Name -> import of another package.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name, self.lines = name, source.splitlines()
        self.statements: list[ast.stmt] = []
        self.defined: dict[str, list[int]] = {}
        self.ours: dict[str, Name] = {}
        self.external: dict[str, str] = {}
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._add_import(node)
            else:
                names = list(_bound(node))
                for bound in names:
                    self.defined.setdefault(bound, []).append(len(self.statements))
                self.statements += [node] if names else []

    def _add_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            bound = alias.asname or alias.name.partition(".")[0]
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                inner = f"{node.module}.{alias.name}"
                self.ours[bound] = Name(inner, "") if _path(inner) is not None else Name(str(node.module), alias.name)
            elif not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
                single = ast.Import([alias])
                if isinstance(node, ast.ImportFrom):
                    single = ast.ImportFrom(node.module, [alias], 0)  # type: ignore[assignment]
                self.external[bound] = ast.unparse(single)

    def text(self, number: int) -> str:
        """Text of a statement with the comments right above it; names in modules of ours without the module."""
        node = self.statements[number]
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))]) - 1
        while first and self.lines[first - 1].startswith("# ") and not self.lines[first - 1].startswith("# ---"):
            first -= 1
        lines = [line.encode() for line in self.lines[: node.end_lineno]]
        inner = [each for each in ast.walk(node) if isinstance(each, ast.Attribute) and self.member(each) is not None]
        for each in sorted(inner, key=lambda each: (-each.lineno, -each.col_offset)):
            row = each.lineno - 1
            lines[row] = lines[row][: each.col_offset] + each.attr.encode() + lines[row][each.end_col_offset :]
        return b"\n".join(lines[first:]).decode()

    def member(self, node: ast.Attribute) -> Name | None:
        """The definition that an attribute of a module of ours is."""
        target = self.ours.get(node.value.id) if isinstance(node.value, ast.Name) else None
        return None if target is None or target.name else Name(target.module, node.attr)

    def uses(self, number: int) -> Iterator[Name | str]:
        """Definitions of ours and imports of others that a statement refers to, in any place."""
        for node in ast.walk(self.statements[number]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                raise ValueError(f"{self.name}: imports {node.module} in a function, which cannot be flattened")
            if isinstance(node, ast.Attribute) and (member := self.member(node)) is not None:
                yield member
            elif isinstance(node, ast.Name):
                target = self.ours.get(node.id)
                if node.id in self.defined:
                    yield Name(self.name, node.id)
                elif target is not None and target.name:
                    if target.name != node.id:
                        raise ValueError(f"{self.name}: {target.name} is imported by another name, {node.id}")
                    yield target
                elif node.id in self.external:
                    yield self.external[node.id]


def flatten(names: Iterable[str], title: str = "") -> str:
    """Write one module with these definitions and all that they need.

    Args:
        names: Full names, such as "models.dit.DiT".
        title: First line of its docstring.

    Raises:
        ValueError: If two definitions have one name, or an import cannot be resolved.
    """
    chosen: dict[str, set[int]] = {}  # module -> numbers of statements
    external: set[str] = set()
    owners: dict[str, str] = {}
    order: list[str] = []
    queue = [_origin(Name(*full.rpartition(".")[::2])) for full in names]
    while queue:
        module, name = queue.pop()
        if owners.setdefault(name, module) != module:
            raise ValueError(f"{name} is defined in {owners[name]} and in {module}; rename one")
        for number in set(read_module(module).defined[name]) - chosen.setdefault(module, set()):
            chosen[module].add(number)
            for use in read_module(module).uses(number):
                if isinstance(use, str):
                    external.add(use)
                else:
                    queue.append(_origin(use))
    for module in sorted(chosen):
        _add_in_order(module, order)
    parts = [read_module(module).text(number) for module in order for number in sorted(chosen.get(module, ()))]
    head = [f'"""{title}"""', "", FUTURE, "", *sorted(external, key=lambda line: (line.startswith("from"), line))]
    return "\n".join(head) + "\n\n\n" + "\n\n\n".join(parts) + "\n"


@functools.cache
def read_module(name: str) -> Module:
    """Read a module of ours.

    Raises:
        ValueError: If there is none of this name.
    """
    path = _path(name)
    if path is None:
        raise ValueError(f"no module {name}")
    return Module(name, path.read_text())


def _path(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _origin(name: Name) -> Name:
    """The module that defines a name which others may only import."""
    module = read_module(name.module)
    if name.name in module.defined:
        return name
    if name.name not in module.ours:
        raise ValueError(f"{name.module} has no {name.name}")
    return _origin(module.ours[name.name])


def _add_in_order(module: str, order: list[str]) -> None:
    """Append a module after all that it imports."""
    if module not in order:
        for target in read_module(module).ours.values():
            if target.module != module:
                _add_in_order(target.module, order)
        order.append(module)


def _bound(node: ast.stmt) -> Iterator[str]:
    """Names that a statement at the top of a module defines or changes."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # such as TABLE.update(...)
        yield next(each.id for each in ast.walk(node.value.func) if isinstance(each, ast.Name))
