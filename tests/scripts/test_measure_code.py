import re
import sys
from pathlib import Path
from types import FrameType

import pytest

from models.loading import load_network
from scripts.measure_code import main, run_calls
from tests.processes import ROOT

# A tree of which every count is known. Training writes a checkpoint, as sampling needs one.
TREE = {
    "train.py": """
from pathlib import Path
from typing import Any
from diffusion.process import losses

class Loss:
    def forward(self) -> Any:
        return losses()

def main(argv):
    import late
    print("training")
    assert argv[-2:] == ["--results-dir", "results"]
    Loss().forward()
    Loss().forward()
    Path("results/000/checkpoints").mkdir(parents=True)
    Path("results/000/checkpoints/0000001.safetensors").touch()
    after()

def after(): ...
""",
    "late.py": "def at_import(): ...\nat_import()\n",
    "sample_ddp.py": """
from threading import Thread
from diffusion.noise import ImageNoise

def main(argv):
    assert argv[-1].endswith("0000001.safetensors")
    before()
    ImageNoise().initial()
    thread = Thread(target=elsewhere)
    thread.start()
    thread.join()
    (lambda: 0)()

def before(): ...
def elsewhere(): ...
""",
    "runtime/errors.py": "def run(main, program, argv):\n    main(argv)\n    return 0\n",
    "diffusion/process.py": "import diffusion.noise\n\ndef losses():\n    inner()\n\ndef inner(): ...\n",
    "diffusion/noise.py": """
from typing import TYPE_CHECKING, Any  # Anything

if TYPE_CHECKING:
    from .process import losses

class ImageNoise:
    def initial(self) -> "Any": return self.rows()
    def rows(self): ...
""",
    "models/__init__.py": "from models.contract import Network\n",
    "models/contract.py": '''
class Other:
    many: int

class Network:
    """Base."""
    config: object
    keeps_state: bool = False
    conditioning = ("y",)
    _hidden = 1
    def forward(self): ...
    @property
    def sample_shape(self): ...
    def _private(self): ...
''',
    "scripts/long.py": "def long():\n"
    + '    """One.\n\n    Two.\n    """\n'
    + 45 * "    ...\n"
    + "def short():\n"
    + 44 * "    ...\n",
    "scripts/all.sh": "true\n",
    "tests/test_all.py": "import Any\n",
    ".venv/lib.py": "import Any\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    return tmp_path / "tree"


def table(out: str) -> dict[str, list[str]]:
    rows = [line.rsplit(maxsplit=1) for line in out.split("\n\n")[0].splitlines()]
    return {row[0].strip(): row[1] for row in rows[1:]}


def test_a_tree_of_known_size(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tree", str(tree), "--list", "to the loss"])
    out = capsys.readouterr().out
    assert [line.removeprefix("tree: ") for line in out.splitlines() if line.startswith("tree: ")] == [
        "runtime/errors.py run",
        "train.py main",
        "train.py Loss.forward",
        "diffusion/process.py losses",
    ]
    lines = sum(len(text.splitlines()) for name, text in TREE.items() if not name.startswith(("tests", ".")))
    assert table(out) == {
        "files, to the loss": "3",
        "functions, to the loss": "4",
        "files, to the .npz": "3",
        "functions, to the .npz": "6",  # run, main, before, initial, rows, the lambda; not what the thread calls
        "files, noise to .npz": "2",
        "functions, noise to .npz": "3",
        "product lines": str(lines),
        "lines with Any": "4",
        "members of Network": "4",
        "import cycles": "1",
        "public functions over 45 lines": "1",
    }


def test_two_trees_side_by_side(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--static", "--tree", str(tree), str(tree)])
    header, *rows = capsys.readouterr().out.strip().splitlines()
    assert header.split() == ["tree", "tree"] and len(rows) == 5
    assert all(row.split()[-1] == row.split()[-2] for row in rows)


def test_a_run_that_computes_no_loss_is_an_error(tree: Path) -> None:
    (tree / "train.py").write_text("def main(argv): ...\n")
    with pytest.raises(SystemExit, match="train.py: exit status 0, or no call of `losses`"):
        main(["--tree", str(tree)])


# ----------------------------------------------------------------------------------------------------------------------
# docs/code.md


def rows(heading: str) -> list[str]:
    """Functions in the table below a heading, as "file name"."""
    section = (ROOT / "docs" / "code.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return [f"{file} {name}" for file, name in re.findall(r"^\| `(\S+)` \| `(\S+)` \|", section, flags=re.M)]


def in_order(functions: list[str], calls: list[str]) -> None:
    assert [function for function in functions if function not in calls] == []
    assert sorted(functions, key=calls.index) == functions


def test_the_page_follows_both_commands() -> None:
    calls = run_calls(ROOT)
    for heading, name in (("From a command to the loss", "to the loss"), ("From noise to a file", "to the .npz")):
        listed = rows(heading)
        assert len(listed) >= 20 and len({function.split()[0] for function in listed}) <= 15
        in_order(listed, calls[name])


def test_the_page_follows_a_checkpoint() -> None:
    calls: dict[str, None] = {}

    def record(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            calls[f"{path.relative_to(ROOT).as_posix()} {frame.f_code.co_qualname}"] = None

    sys.setprofile(record)
    try:
        load_network(ROOT / "demo" / "digits")
    finally:
        sys.setprofile(None)
    in_order(rows("From a checkpoint to a network"), [*calls])


def test_files_that_the_page_names_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "code.md").read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []
