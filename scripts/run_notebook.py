"""Execute docs/quickstart.ipynb from a clean state, without the cells that install or need the network.

    python scripts/run_notebook.py
    python scripts/run_notebook.py --write --set STEPS=900 IMAGES=500

It runs in a temporary folder, on the code of this checkout. --write keeps its outputs in the notebook, without what
belongs to a machine: times, paths, versions.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command_line import parse_config
from runtime.errors import UserError, run
from runtime.files import atomic_path
from runtime.settings import setting

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
LEFT_OUT = {"install", "network"}  # tags of cells
TIMEOUT = 1200  # seconds of a cell
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(frozen=True, kw_only=True)
class NotebookSettings:
    """Settings of run_notebook.py."""

    set: tuple[str, ...] = setting((), "other values of the names in the cell tagged parameters: NAME=NUMBER")
    write: bool = setting(False, "keep the outputs in the notebook")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for text in self.set:
            if not re.fullmatch(r"[A-Z_]+=\d+", text):
                raise ValueError(f"--set {text}: must be NAME=NUMBER, such as STEPS=900")

    @property
    def values(self) -> dict[str, int]:
        """Numbers by name."""
        return {name: int(number) for name, _, number in (text.partition("=") for text in self.set)}


def read_notebook(path: Path = NOTEBOOK) -> NotebookNode:
    """Read a notebook."""
    import nbformat  # an extra

    return nbformat.read(path, as_version=4)


def tags(cell: NotebookNode) -> set[str]:
    """Tags of a cell."""
    return set(cell.metadata.get("tags", ()))


def execute(notebook: NotebookNode, folder: Path, values: Mapping[str, int]) -> None:
    """Execute a notebook's cells in a folder, in place; cells that install or need the network stay as they are.

    Args:
        notebook: The notebook.
        folder: Working directory, in which the code of this checkout is found; train.py and demo are made in it.
        values: Other values of its parameters.

    Raises:
        UserError: For a parameter that the notebook does not have, or a cell that fails.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    cells, sources = [], {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or tags(cell) & LEFT_OUT:
            continue
        sources[number] = cell.source
        if "parameters" in tags(cell):
            for name, value in values.items():
                cell.source, count = re.subn(rf"^{name} = \d+", f"{name} = {value}", cell.source, flags=re.MULTILINE)
                if not count:
                    raise UserError(f"--set {name}: the notebook has no number of this name")
        cells.append(cell)
    (folder / "train.py").touch()  # the cell that looks for the checkout's root finds it here
    (folder / "demo").symlink_to(ROOT / "demo")
    executed = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    try:
        NotebookClient(
            executed, timeout=TIMEOUT, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
        ).execute(env=_variables())
    except CellExecutionError as error:
        failed = next(n for n, cell in enumerate(cells, 1) if any(o.output_type == "error" for o in cell.outputs))
        raise UserError(f"{NOTEBOOK.name}: code cell {failed}: {error.ename}: {error.evalue}") from error
    for number, source in sources.items():
        notebook.cells[number].source = source


def _variables() -> dict[str, str]:
    """Variables of the kernel: it finds this checkout, and shows no progress bars."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def clean(notebook: NotebookNode) -> None:
    """Remove what belongs to a machine from a notebook, in place: times, execution data, versions."""
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {"tags": sorted(tags(cell))} if tags(cell) else {}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if "text" in output:
                output.text = re.sub(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] ", "", output.text)
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def main(argv: Sequence[str]) -> None:
    """Parse flags, execute, keep the outputs if that is asked for."""
    import nbformat

    config = parse_config(NotebookSettings, argv, program="run_notebook.py", doc=__doc__)
    notebook = read_notebook()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder), config.values)
    if config.write:
        clean(notebook)
        with atomic_path(NOTEBOOK) as temporary:
            nbformat.write(notebook, temporary)
    print(f"Executed {NOTEBOOK.name}")


if __name__ == "__main__":
    sys.exit(run(main, "run_notebook.py"))
