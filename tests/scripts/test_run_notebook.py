"""The notebook: it runs from a clean state, and holds nothing of a machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from runtime.errors import UserError, run
from scripts import run_notebook
from scripts.run_notebook import LEFT_OUT, METADATA, NOTEBOOK, clean, execute, read_notebook, tags
from tests.processes import ROOT


def text_of(notebook: object) -> str:
    """What all cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]  # type: ignore[attr-defined]
    return "\n".join(output.get("text", "") for output in outputs)


def run_here(folder: Path, **values: int) -> object:
    notebook = read_notebook()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    execute(notebook, folder, values)
    return notebook


def test_it_runs_from_a_clean_state(tmp_path: Path) -> None:
    notebook = run_here(tmp_path, STEPS=6, IMAGES=20)
    pictures = [
        output.data["image/png"]
        for cell in notebook.cells  # type: ignore[attr-defined]
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    printed = text_of(notebook)
    assert len(pictures) == 3 and "Done!" in printed
    for name, calls in (("DDIM, 50 steps", 50), ("UniPC, 10 steps", 10), ("DDIM, 50 steps, forecast 3,1", 18)):
        assert re.search(rf"{re.escape(name)} +{calls} evaluations, recognised [01]\.\d+, distance", printed), printed
    assert {path.name for path in (tmp_path / "notebook_out").iterdir()} == {"runs", "curves.png"}
    left_out = [cell for cell in notebook.cells if tags(cell) & LEFT_OUT]  # type: ignore[attr-defined]
    assert len(left_out) == 2 and not any(cell.outputs for cell in left_out)


@pytest.mark.slow
def test_its_digits_are_recognised(tmp_path: Path) -> None:
    printed = text_of(run_here(tmp_path))
    scores = re.findall(r"recognised (\d\.\d+), distance +([\d.]+)", printed)
    assert len(scores) == 4 and float(scores[0][0]) > 0.9, printed


def test_it_holds_nothing_of_a_machine() -> None:
    nbformat.validate(notebook := read_notebook())
    assert notebook.metadata == METADATA
    content = NOTEBOOK.read_text()
    places = r"/(root|home|Users|tmp|work|usr|opt)/|\.venv"
    assert not re.search(rf"{places}|\d{{4}}-\d\d-\d\d \d\d:\d\d|torch \d|Python \d\.\d", content)
    assert NOTEBOOK.stat().st_size < 500_000
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"tags"} and cell.get("execution_count") is None
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert tags(first) == {"install"} and "git clone" in first.source and "pip install" in first.source


def test_its_code_has_the_style_of_the_project() -> None:
    """Lines no longer than the project's, and the links of its text lead to documents."""
    for cell in read_notebook().cells:
        if cell.cell_type == "code":
            assert max(map(len, cell.source.splitlines())) <= 120
        for link in re.findall(r"\]\(([^)]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            assert (ROOT / "docs" / link).exists(), link


def test_outputs_of_a_machine_are_removed() -> None:
    stream = nbformat.v4.new_output("stream", name="stdout", text="[2026-01-02 03:04:05] Done!\n")
    warning = nbformat.v4.new_output("stream", name="stderr", text="in /home/me\n")
    result = nbformat.v4.new_output("execute_result", {"text/plain": "4"}, execution_count=3)
    cell = nbformat.v4.new_code_cell("2 + 2", outputs=[stream, warning, result], execution_count=3)
    cell.metadata["execution"] = {"iopub.execute_input": "2026"}
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11.7"}}
    )
    clean(notebook)
    assert notebook.metadata == METADATA and cell.metadata == {} and cell.execution_count is None
    assert [output.get("text") for output in cell.outputs] == ["Done!\n", None] and "2026" not in json.dumps(notebook)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(run_notebook.main, "run_notebook.py", ["--set", "STEPS=many"]) == 2
    assert "--set STEPS=many: must be NAME=NUMBER" in capsys.readouterr().err
    with pytest.raises(UserError, match="--set STEP: the notebook has no number of this name"):
        execute(read_notebook(), tmp_path, {"STEP": 3})


def test_a_cell_that_fails_is_named(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell("x / 0")]
    with pytest.raises(UserError, match=r"code cell 2: ZeroDivisionError: division by zero"):
        execute(nbformat.v4.new_notebook(cells=cells), tmp_path, {})
