"""The documents: a short README, links that resolve, plain words."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ROOT

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ODD_WORDS = re.compile(
    r"\b(houses?|rooms?|doubts?|foretells?|drawn anew|nobody|somebody|vouch\w*|in vain|whose|goes on|go on|settled|"
    r"beside the|lies in|stands in|told|of its own|says why|as if|multiply-adds?)\b"
)


def prose(path: Path) -> str:
    """Text of a document without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.M | re.S)


def links(text: str) -> Iterator[str]:
    for match in re.finditer(r"\]\(([^)\s]+)\)", text):
        if not match[1].startswith(("http://", "https://")):
            yield match[1]


def anchors(path: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", path.read_text(), flags=re.M | re.S)


def test_flags_exist():
    scripts = [*ROOT.glob("*.py"), *(ROOT / "scripts").iterdir()]
    folders = ("models", "diffusion", "data", "evaluator", "runtime", "training", "sampling", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text() for path in (*scripts, *sources) if path.is_file())
    unknown = set()
    for document in DOCUMENTS:
        if document.name == "extending.md":
            continue  # its examples bring flags of their own
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])", document.read_text()):
            field = flag.removeprefix("no-").replace("-", "_")
            if f"--{flag}" not in source and not re.search(rf"\b{field}: ", source):
                unknown.add(f"{document.name}: --{flag}")
    assert unknown == set()


@pytest.mark.parametrize(("document", "block"), [("skip_dit.md", 0), ("sampling.md", 1)])
def test_examples_run(document, block):
    code = code_blocks(ROOT / "docs" / document, "python")[block]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_resolve(document):
    for link in links(prose(document)):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {link}"


def test_readme_links_to_every_document():
    linked = {link.partition("#")[0] for link in links(prose(ROOT / "README.md"))}
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_words_are_plain(document):
    assert [match[0] for match in ODD_WORDS.finditer(prose(document))] == []
