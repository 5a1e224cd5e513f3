"""The field's words: no identifier, docstring, comment or message in the code's former language of its own."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.source_words import identifiers

FORMER_NAMES = {
    "blame", "doubts", "remarks", "Facts", "find_facts", "_Traces", "take_up", "begun", "Resumable", "find_resumable",
    "FREE_ON_RESUME", "by_main", "PATIENCE", "fail_together", "PeerLost", "decides_by_input", "Zones", "in_tail",
    "refresh_rate", "StepMean", "halves", "Rehearsal", "multiply_adds",
}  # fmt: skip
ODD_WORDS = re.compile(
    r"\b(house|rooms?|doubts?|foretells?|drawn anew|nobody|somebody|vouch\w*|in vain|whose|twins?|goes on|go on|"
    r"take_up|begun|settled|decides_by_input|of the job|beside the|lies in|stands in|told|waits for it|of its own|"
    r"says why|as if|multiply-adds?)\b"
)
QUESTION = re.compile(r"(What|Whether|How|Whose|Who|Refuses what)\b")


def product() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    paths = [ROOT / name for name in names] or list(ROOT.rglob("*.py"))
    return [path for path in paths if path.exists() and path.relative_to(ROOT).parts[0] not in ("tests", ".venv")]


def prose(source: str) -> str:
    """Comments and strings, which are docstrings, messages and help."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return " ".join(token.string for token in tokens if token.type in kinds)


@pytest.mark.parametrize("path", product(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_are_the_fields(path: Path) -> None:
    source = path.read_text()
    assert FORMER_NAMES & set(identifiers(source)) == set()
    text = re.sub(r"\s+", " ", prose(source))
    assert [match[0] for match in ODD_WORDS.finditer(text)] == []
    docstrings = (
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert [text for text in docstrings if text and QUESTION.match(text)] == []
