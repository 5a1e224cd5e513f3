import json
from pathlib import Path

import pytest

from benchmarks.counting import BLOCK_PARTS
from models import create_model
from runtime.errors import run
from scripts.count_sampling import main, summary_table
from tests.digits_checkpoints import save_digits_checkpoint


def count(*argv: str) -> int:
    return run(main, "count_sampling.py", argv)


@pytest.fixture
def routed_checkpoint(tmp_path: Path) -> Path:
    """A DyDiT for the digits with gates of both kinds, as train.py writes it."""
    return save_digits_checkpoint(tmp_path / "0000001.safetensors", "DyDiT-digits/2")


def test_a_checkpoints_sampling_is_counted_as_it_went(
    routed_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--ckpt", str(routed_checkpoint), *"--num-sampling-steps 5 --num-images 6 --sampler ddim".split()]
    assert count(*argv, "--json") == 0
    actual = json.loads(capsys.readouterr().out)
    assert (actual["model"], actual["images"], actual["evaluations_per_image"]) == ("DyDiT-digits/2", 6, 10)  # guided
    dense = create_model("DyDiT-digits/2").cost()
    assert actual["dense_parts"] == dense and actual["dense_macs"] == sum(dense.values())
    blocks = [sum(actual[key][part] for part in BLOCK_PARTS) for key in ("parts", "dense_parts")]
    assert actual["block_ratio"] == pytest.approx(blocks[0] / blocks[1]) and 0.2 < actual["block_ratio"] < 0.9
    assert actual["macs_per_image"] == pytest.approx(10 * sum(actual["parts"].values()))
    assert count(*argv) == 0
    text = capsys.readouterr().out
    assert f"share of the blocks' work: {actual['block_ratio']:.3f}" in text and "routers" in text


@pytest.mark.parametrize(("dense", "letter"), [(118.6e9, "G"), (3e6, "M")])
def test_columns_are_as_wide_as_their_names_in_a_unit_that_shows_the_numbers(dense: float, letter: str) -> None:
    parts = {"blocks": dense, "a_part_with_quite_a_long_name": dense / 1000}
    actual = {
        "model": "DiT-digits/2", "images": 2, "evaluations_per_image": 4.0, "block_ratio": 0.5,
        "parts": {part: number / 2 for part, number in parts.items()}, "macs": dense / 2,
        "dense_parts": parts, "dense_macs": dense, "macs_per_image": 2 * dense,
    }  # fmt: skip
    text = summary_table(actual)
    lines = text.split("\n\n")[1].splitlines()
    assert len({len(line) for line in lines}) == 1 and len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["50.0%"] * 3
    assert f"{letter} MACs" in lines[0] and " 0.0000 " not in text


def test_parts_of_a_divided_network_count_as_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = save_digits_checkpoint(tmp_path / "0000001.safetensors", "DDT-digits/2", "flow")
    shares = []
    for reuse in ([], ["--sharing-interval", "4"]):
        argv = ["--ckpt", str(ckpt), *"--num-sampling-steps 8 --num-images 2 --cfg-scale 1 --json".split(), *reuse]
        assert count(*argv) == 0
        shares.append(json.loads(capsys.readouterr().out)["block_ratio"])
    network = create_model("DDT-digits/2")
    encoder, decoder = network.config.encoder_depth, network.config.depth - network.config.encoder_depth
    assert shares == [1, pytest.approx((2 * encoder + 8 * decoder) / (8 * (encoder + decoder)))]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ckpt", "nothing.pt"], "--ckpt nothing.pt: no such file"),
        (["--ckpt", "nothing.pt", "--cfg-scale", "0"], "--cfg-scale 0.0: must be at least 1"),
        (["--ckpt", "nothing.pt", "--num-images", "0"], "--num-images 0: must be at least 1"),
    ],
)
def test_mistakes_are_answered_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert count(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
