"""What a source file speaks of, its documentation aside."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator


def identifiers(source: str) -> Iterator[str]:
    """Names of variables, attributes, arguments, functions, classes and modules."""
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def strings(source: str) -> Iterator[str]:
    """String constants that are not docstrings."""
    tree = ast.parse(source)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def families_named(words: Iterable[str], families: Iterable[str]) -> set[str]:
    """Families that occur in some word: as `Skip-DiT`, `SkipDiT`, `SkipDiTBlock` or `skip_dit`."""
    found, words = set(), list(words)
    for family in families:
        lower = family.lower().replace("-", "[-_]?")
        pattern = rf"{family}|{family.replace('-', '')}|(?<![a-z]){lower}(?![a-z])"
        if any(re.search(pattern, word) for word in words):
            found.add(family)
    return found
