"""The report of captioned digits, on a network that knows nothing."""

from pathlib import Path

import pytest
from PIL import Image

from models import create_model
from runtime.errors import run
from scripts import text_report
from tests.checkpoints import write_network
from tests.networks import randomise


def report(*argv: object) -> int:
    return run(text_report.main, "text_report.py", [*map(str, argv)])


def meta(dataset: str) -> dict[str, object]:
    from data.words import Words

    return {"text": Words().describe(), "process": {"name": "flow"}, "train": {"data": {"dataset": dataset}}}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = randomise(create_model("Skip-LatteT2V-digits/4", depth=4, hidden_size=16))
    folder = tmp_path_factory.mktemp("runs") / "000-x" / "checkpoints"
    folder.mkdir(parents=True)
    return write_network(folder / "1.safetensors", "Skip-LatteT2V-digits/4", network, **meta("captioned-digits"))


def test_table_and_sheets_are_written(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--ckpt", ckpt.parents[2], "--output-dir", tmp_path, "--num-samples", 10, "--num-sampling-steps", 1]
    assert report(*argv) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.gif", "clips.png", "pictures.png", "text.md"]
    lines = (tmp_path / "text.md").read_text().splitlines()
    assert len(lines) == 12 and lines == capsys.readouterr().out.splitlines()
    assert lines[6].startswith("| clips, real") and float(lines[6].split("|")[3]) > 0.96
    share = lines[4].split("|")
    assert share[1].strip() == "clips, empty prompt: share of a digit" and float(share[3]) == 0.1
    assert Image.open(tmp_path / "clips.png").size[0] == 8 * 66 + 2


def test_all_digits_sizes_and_directions_are_asked_for() -> None:
    contents = text_report.contents_in_turn(160)
    assert len(set(contents)) == 40 and len({content[1:] for content in contents}) == 8


def test_other_checkpoints_are_refused(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = create_model("DiT-digits/2", depth=1, hidden_size=32)
    other = write_network(tmp_path / "1.safetensors", "DiT-digits/2", network, **meta("digits"))
    assert report("--ckpt", other) == 2
    assert "not a checkpoint of train.py --dataset captioned-digits" in capsys.readouterr().err
    assert report("--ckpt", tmp_path / "empty") == 2 and report("--num-samples", 3) == 2
