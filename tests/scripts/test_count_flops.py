"""The counting script against the official table, PyTorch's own counter, and mistakes."""

import dataclasses
import json
from pathlib import Path

import pytest

from models import DiT, create_model
from runtime.checkpoint import save_checkpoint
from runtime.errors import run
from scripts.count_flops import BLOCK_PARTS, PUBLISHED, main
from tests.golden_data import table
from tests.networks import randomise

OFFICIAL = table("dit/official_model_table")["models"]


def count(*argv: str) -> int:
    return run(main, "count_flops.py", argv)


def test_all_published_rows_equal_the_official_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--json") == 0
    rows = json.loads(capsys.readouterr().out)
    names = [row["model"] if row["input_size"] == 32 else f"{row['model']}@512" for row in rows]
    assert sorted(names) == sorted(OFFICIAL) and len(names) == 13
    for name, row in zip(names, rows, strict=True):
        official = OFFICIAL[name]
        assert row["multiply_adds"] == sum(row["parts"].values()) == official["macs"]
        assert (row["parameters"], row["trainable"]) == (official["params_total"], official["params_trainable"])
        with_norms = (row["multiply_adds"] + row["layer_norm_elements"]) / 1e9
        assert round(with_norms, 4) == official["gmacs_plus_1_per_layernorm_element"]


def test_table_shows_every_row_with_its_three_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert count() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(PUBLISHED)
    assert len({len(line) for line in lines}) == 1  # aligned
    (row,) = (line.split() for line in lines if line.startswith("DiT-XL/2 ") and " 32 " in line)
    assert row == ["DiT-XL/2", "32", "675,129,632", "674,834,720", "118.6214", "118.6382", "118.6887"]


def test_a_single_model_is_shown_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--model", "DiT-XL/2", "--input-size", "64") == 0
    out = capsys.readouterr().out
    assert "524.5383" in out and "524.6055" in out
    shares = [float(line.split()[-1].rstrip("%")) for line in out.splitlines() if line.endswith("%")]
    assert len(shares) == 7 and sum(shares) == pytest.approx(100, abs=0.05)


@pytest.mark.parametrize("argv", [["DiT-S/2"], ["DiT-B/4", "DiT-XL/2"], ["DiT-XL/2", "--input-size", "64"]])
def test_pytorchs_own_counter_agrees_exactly(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--check", "--json", "--model", *argv) == 0
    for row in json.loads(capsys.readouterr().out):
        assert row["torch_multiply_adds"] == row["multiply_adds"]


def test_routers_are_counted_and_without_them_it_is_the_plain_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--json", "--model", "DyDiT-XL/2", "DyDiT-B/2", "DyDiT-S/2") == 0
    for row, published in zip(json.loads(capsys.readouterr().out), (118.69, 23.02, 6.07), strict=True):
        bare = row["multiply_adds"] - row["parts"]["routers"] + 4 * row["layer_norm_elements"]
        assert round(bare / 1e9, 2) == published
        assert bare - 4 * row["layer_norm_elements"] == OFFICIAL[row["model"].removeprefix("Dy")]["macs"]


@pytest.mark.parametrize("name", ["DyDiT-S/2", "DyDiT-B/8"])
def test_pytorchs_own_counter_agrees_with_routers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--check", "--json", "--model", name) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["torch_multiply_adds"] == row["multiply_adds"]


def test_shares_that_are_on_scale_the_blocks_parts_alone(capsys: pytest.CaptureFixture[str]) -> None:
    parts = []
    for keep in ([], ["--keep", "0.5", "0.25", "0.8"]):
        assert count("--json", "--model", "DyDiT-S/2", *keep) == 0
        parts.append(json.loads(capsys.readouterr().out)[0]["parts"])
    dense, kept = parts
    shares = {"attention_linear": 0.5, "attention_products": 0.5, "mlp": 0.25 * 0.8}
    assert kept == {part: round(number * shares.get(part, 1)) for part, number in dense.items()}


@pytest.fixture
def routed_checkpoint(tmp_path: Path) -> Path:
    """A DyDiT for the digits with gates of both kinds, as train.py writes it."""
    network = randomise(create_model("DyDiT-digits/2"))
    meta = {
        "model": {"name": "DyDiT-digits/2", **dataclasses.asdict(network.config)},
        "process": {"name": "gaussian", "noise_schedule": "linear", "predict_xstart": False, "learn_sigma": False},
        "data": {"vae": "none", "image_shape": [1, 8, 8]},
    }
    save_checkpoint(tmp_path / "0000001.safetensors", {"ema": network.state_dict()}, meta)
    return tmp_path / "0000001.safetensors"


def test_a_checkpoints_sampling_is_counted_as_it_went(
    routed_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--ckpt", str(routed_checkpoint), *"--num-sampling-steps 5 --images 6 --sampler ddim".split()]
    assert count(*argv, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["images"], found["evaluations_per_image"]) == ("DyDiT-digits/2", 6, 10)  # guided
    dense = create_model("DyDiT-digits/2").multiply_adds()
    assert found["dense_parts"] == dense and found["dense_multiply_adds"] == sum(dense.values())
    blocks = [sum(found[key][part] for part in BLOCK_PARTS) for key in ("parts", "dense_parts")]
    assert found["block_ratio"] == pytest.approx(blocks[0] / blocks[1]) and 0.2 < found["block_ratio"] < 0.9
    assert found["multiply_adds_per_image"] == pytest.approx(10 * sum(found["parts"].values()))
    assert count(*argv) == 0
    text = capsys.readouterr().out
    assert f"share of the blocks' work: {found['block_ratio']:.3f}" in text and "routers" in text


def test_a_wrong_formula_is_found_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = DiT.multiply_adds
    monkeypatch.setattr(DiT, "multiply_adds", lambda self: {**right(self), "modulation": 1})
    with pytest.raises(SystemExit) as leaving:
        count("--check", "--model", "DiT-S/8")
    assert leaving.value.code == 1
    assert "DiT-S/8 at 32: 347,062,273 stated, 357,974,016 counted by PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "DiT-XL/3"], "--model DiT-XL/3: unknown model 'DiT-XL/3'; known: DiT-S/2"),
        (
            ["--model", "DiT-XL/2", "--input-size", "33"],
            "--model DiT-XL/2 --input-size 33: input_size 33 is not a multiple of patch_size 2",
        ),
        (["--input-size", "64"], "--input-size 64: needs --model; the published rows have their own sizes"),
        (["--input-size", "large", "--model", "DiT-S/2"], "argument --input-size: invalid int value: 'large'"),
        (["--models", "DiT-S/2"], "unrecognized arguments: --models DiT-S/2"),
        (["--model", "DyDiT-S/2", "--keep", "1", "1", "1.5"], "--keep 1.0 1.0 1.5: shares lie in [0, 1]"),
        (["--keep", "1", "1", "1"], "--keep: needs --model"),
        (["--model", "DiT-S/2", "--keep", "1", "1", "1"], "--model DiT-S/2: has no routers; --keep is for DyDiT"),
        (["--ckpt", "nothing.pt"], "--ckpt nothing.pt: no such file"),
        (["--ckpt", "nothing.pt", "--check"], "--check: has no effect with --ckpt"),
        (["--ckpt", "nothing.pt", "--sampler", "euler"], "--sampler euler: choose from ddpm, ddim"),
        (["--ckpt", "nothing.pt", "--cfg-scale", "0"], "--cfg-scale 0.0: must be at least 1"),
        (["--ckpt", "a.pt", "--model", "DiT-S/2", "DiT-B/2"], "--model DiT-S/2 DiT-B/2: a checkpoint is of one model"),
        (["--images", "0"], "--images 0: must be at least 1"),
    ],
)
def test_mistakes_are_answered_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert count(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"count_flops.py: error: {message}")
