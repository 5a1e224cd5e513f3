"""The counting script against the official table, PyTorch's own counter, and mistakes."""

import json

import pytest

from models import DiT
from runtime.errors import run
from scripts.count_flops import PUBLISHED, main
from tests.golden_data import table

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
    ],
)
def test_mistakes_are_answered_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert count(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"count_flops.py: error: {message}")
