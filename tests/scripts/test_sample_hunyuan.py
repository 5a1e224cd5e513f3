"""sample_hunyuan.py, with a tiny random pipeline in a folder."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import run
from scripts import sample_hunyuan

SIZE = "--image-size 64 96 --num-sampling-steps 12".split()


def main(*argv: str) -> int:
    return run(sample_hunyuan.main, "sample_hunyuan.py", ["--device", "cpu", *argv])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tests.diffusers_pipelines import tiny_hunyuan_pipeline

    folder = tmp_path_factory.mktemp("hunyuan")
    tiny_hunyuan_pipeline().save_pretrained(folder)
    return folder


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_prompt_becomes_a_picture_with_and_without_cache(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--pipeline", str(folder), "--prompt", "a red fox", *SIZE]
    plain, cached = tmp_path / "plain.png", tmp_path / "cached.png"
    assert main(*argv, "--output", str(plain)) == 0
    assert main(*argv, "--output", str(cached), "--cache", "N2-700-50", "--cache-depth", "2") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"Saved 1 picture to {plain}; evaluations: 12 whole, 0 cached"
    assert printed[1] == f"Saved 1 picture to {cached}; evaluations: 7 whole, 5 cached"
    assert picture(plain).shape == (64, 96, 3) and (picture(plain) != picture(cached)).any()


def test_pictures_do_not_depend_on_the_batch(folder: Path, tmp_path: Path) -> None:
    argv = ["--pipeline", str(folder), "--prompt", "a dog", "--num-samples", "3", "--cache", "N3-700-50", *SIZE]
    for size in (1, 2, 3):
        assert main(*argv, "--batch-size", str(size), "--output", str(tmp_path / f"{size}.png")) == 0
    first, *others = (picture(tmp_path / f"{size}.png") for size in (1, 2, 3))
    assert first.shape[1] > 3 * 96 and len({first[2:66, x : x + 96].tobytes() for x in (2, 100, 198)}) == 3
    for other in others:
        assert abs(first - other).max() <= 1  # another batch rounds otherwise


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", " "], "--prompt: required, a text of at least one word"),
        (["--image-size", "64", "100"], "--image-size 64 100: must be multiples of 16"),
        (["--num-sampling-steps", "0"], "--num-sampling-steps 0: must be at least 1"),
        (["--cfg-scale", "0.5"], "--cfg-scale 0.5: must be at least 1"),
        (["--cfg-scale", "1", "--negative-prompt", "fog"], "--negative-prompt: has no effect with --cfg-scale 1"),
        (["--cache", "2"], "--cache: '2' must be N-HIGH-LOW: an interval and two timesteps, such as N2-700-50"),
        (["--cache", "N0-700-50"], "--cache: the refresh interval must be at least 1, not 0"),
        (["--cache-depth", "2"], "--cache-depth 2: has no effect without --cache"),
        (["--output", "a.jpg"], "--output a.jpg: must end in .png"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--prompt", "a fox", *argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_the_extra_one_line_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else present(name))
    assert main("--prompt", "a fox", "--pipeline", "here", "--output", str(tmp_path / "a.png")) == 2
    error = capsys.readouterr().err
    assert error.endswith("--pipeline here: needs the package transformers; pip install '.[text]'\n")


def test_folders_and_numbers_that_do_not_fit_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.diffusers_pipelines import tiny_dit_pipeline

    other, text = tmp_path / "dit", tmp_path / "text.png"
    tiny_dit_pipeline().save_pretrained(other)
    text.write_text("not a picture of ours")
    (tmp_path / "empty").mkdir()
    for argv, message in (
        (["--pipeline", str(other)], "is a DiTPipeline, not a HunyuanDiTPipeline"),
        (["--pipeline", str(tmp_path / "empty")], "empty: cannot be loaded ("),
        (["--pipeline", str(folder), "--cache", "N2-700-50", "--cache-depth", "3"], "--cache-depth 3: depth 3 must"),
        (["--pipeline", str(folder), "--output", str(text)], "text.png: exists, and is no picture of"),
    ):
        output = [] if "--output" in argv else ["--output", str(tmp_path / "out.png")]
        assert main("--prompt", "a fox", *argv, *output) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("sample_hunyuan.py: error: ")]
        assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out.png").exists()
