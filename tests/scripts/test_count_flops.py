"""The counting script against the official table, PyTorch's own counter, and mistakes."""

import json

import pytest

from models import DiT
from runtime.errors import run
from scripts import count_flops
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
        assert row["macs"] == sum(row["parts"].values()) == official["macs"]
        assert (row["parameters"], row["trainable"]) == (official["params_total"], official["params_trainable"])
        with_norms = (row["macs"] + row["layer_norm_elements"]) / 1e9
        assert round(with_norms, 4) == official["gmacs_plus_1_per_layernorm_element"]


def test_table_shows_every_row_with_its_three_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert count() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(PUBLISHED)
    assert len({len(line) for line in lines}) == 1  # aligned
    (row,) = (line.replace("|", "").split() for line in lines if line.startswith("| DiT-XL/2 ") and " 32 " in line)
    assert row == ["DiT-XL/2", "32", "675,129,632", "674,834,720", "118.6214", "118.6382", "118.6887"]


def test_a_single_model_is_shown_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--model", "DiT-XL/2", "--input-size", "64") == 0
    out = capsys.readouterr().out
    assert "524.5383" in out and "524.6055" in out
    shares = [float(line.split()[-2].rstrip("%")) for line in out.splitlines() if line.endswith("% |")]
    assert len(shares) == 7 and sum(shares) == pytest.approx(100, abs=0.05)


@pytest.mark.parametrize(
    "argv",
    [
        ["DiT-S/2"],
        ["DiT-B/4", "DiT-XL/2"],
        ["DiT-XL/2", "--input-size", "64"],
        ["Skip-DiT-S/4", "Skip-DiT-XL/2"],
        ["DiT-S/2", "Skip-DiT-S/2", "--cache-depth", "2"],
    ],
)
def test_pytorchs_own_counter_agrees_exactly(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--check", "--json", "--model", *argv) == 0
    for row in json.loads(capsys.readouterr().out):
        assert row["torch_macs"] == row["macs"]
        assert row.get("torch_macs_with_state") == row.get("macs_with_state")
        keeps_state = "Skip" in row["model"] or "--cache-depth" in argv
        assert row.get("macs_with_state", row["macs"]) <= row["macs"] - keeps_state


def test_runs_with_skip_cache_cost_what_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "Skip-DiT-XL/2", "--cache-interval", *"23456"]
    published = table("skip_dit/official_xl2_skip_keys")["schedule_cost"]
    for steps in ("250", "50"):
        assert count(*argv, "--num-sampling-steps", steps, "--json") == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert [r["interval"] for r in row["runs"]] == [2, 3, 4, 5, 6]
        for cached in row["runs"]:
            official = published[f"{steps}_N{cached['interval']}"]
            assert (cached["full"], cached["cached"]) == (official["full"], official["cached"])
            assert cached["macs"] == round(official["total_TMACs"] * 1e12)
            assert cached["speedup"] == pytest.approx(official["theoretical_speedup_vs_skip"])
    assert count(*argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5].replace("|", "").split() == ["Skip-DiT-XL/2", "2", "128", "122", "20,869.1601", "1.535", "x"]


@pytest.mark.parametrize("steps", ["250", "50"])
def test_runs_of_clips_have_the_bounds_and_speed_ups_of_their_family(
    steps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", "Skip-Latte-XL/2", "--cache-interval", *"23456", "--num-sampling-steps", steps, "--json"]
    assert count(*argv) == 0
    (row,) = json.loads(capsys.readouterr().out)
    published = table("latte/official_latte_xl2_skip_ucf101_keys")["schedule_cost"]
    for cached in row["runs"]:
        official = published[f"{steps}_N{cached['interval']}"]
        assert (cached["full"], cached["cached"]) == (official["full"], official["cached"])
        # of slightly less work, since modulation is computed once a clip
        assert cached["speedup"] == pytest.approx(official["theoretical_speedup_vs_skip"], rel=1e-3)


def test_runs_from_text_have_the_published_speed_ups(capsys: pytest.CaptureFixture[str]) -> None:
    """Published are 17,808 and 1,274 G MACs; keys and values of texts are made once a clip here, not once a frame."""
    argv = ["--model", "Skip-LatteT2V-XL/2", "--cache-interval", *"23456", "--num-sampling-steps", "ddim50", "--json"]
    assert count(*argv) == 0
    (row,) = json.loads(capsys.readouterr().out)
    once = 15 * 2 * 120 * 1152**2 / 1e9
    assert round(row["macs"] / 1e9 + 28 * once) == 17_808 and round(row["macs_with_state"] / 1e9 + 2 * once) == 1_274
    runs = [(each["full"], each["cached"], round(each["speedup"], 2)) for each in row["runs"]]
    assert runs == [(33, 17, 1.46), (28, 22, 1.69), (25, 25, 1.87), (24, 26, 1.93), (22, 28, 2.08)]


def test_a_plain_network_can_be_cached_at_the_same_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--json", "--model", "DiT-XL/2", "--cache-depth", "4", "--cache-interval", "2") == 0
    (row,) = json.loads(capsys.readouterr().out)
    (cached,) = row["runs"]
    assert cached["macs"] == 128 * row["macs"] + 122 * row["macs_with_state"]


def test_routers_are_counted_and_without_them_it_is_the_plain_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--json", "--model", "DyDiT-XL/2", "DyDiT-B/2", "DyDiT-S/2") == 0
    for row, published in zip(json.loads(capsys.readouterr().out), (118.69, 23.02, 6.07), strict=True):
        bare = row["macs"] - row["parts"]["routers"] + 4 * row["layer_norm_elements"]
        assert round(bare / 1e9, 2) == published
        assert bare - 4 * row["layer_norm_elements"] == OFFICIAL[row["model"].removeprefix("Dy")]["macs"]


@pytest.mark.parametrize("name", ["DyDiT-S/2", "DyDiT-B/8"])
def test_pytorchs_own_counter_agrees_with_routers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert count("--check", "--json", "--model", name) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["torch_macs"] == row["macs"]


def test_shares_that_are_on_scale_the_blocks_parts_alone(capsys: pytest.CaptureFixture[str]) -> None:
    parts = []
    for keep in ([], ["--keep", "0.5", "0.25", "0.8"]):
        assert count("--json", "--model", "DyDiT-S/2", *keep) == 0
        parts.append(json.loads(capsys.readouterr().out)[0]["parts"])
    dense, kept = parts
    shares = {"attention_linear": 0.5, "attention_products": 0.5, "mlp": 0.25 * 0.8}
    assert kept == {part: round(number * shares.get(part, 1)) for part, number in dense.items()}


def test_a_wrong_formula_is_found_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = DiT.cost
    monkeypatch.setattr(DiT, "cost", lambda self: {**right(self), "modulation": 1})
    with pytest.raises(SystemExit) as leaving:
        count("--check", "--model", "DiT-S/8")
    assert leaving.value.code == 1
    assert "DiT-S/8 at 32: 347,062,273 stated, 357,974,016 counted by PyTorch" in capsys.readouterr().err


def test_a_wrong_formula_with_state_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(count_flops, "reused_cost", lambda network: {"all": 7})
    with pytest.raises(SystemExit) as leaving:
        count("--check", "--model", "Skip-DiT-S/8")
    assert leaving.value.code == 1
    assert " and 7 with state stated, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "DiT-XL/3"], "--model DiT-XL/3: unknown model 'DiT-XL/3'; close to it: DiT-XL/"),
        (
            ["--model", "DiT-XL/2", "--input-size", "33"],
            "--model DiT-XL/2 --input-size 33: sample_shape (4, 33, 33): height and width must be multiples of "
            "patch_size 2; nearest: (4, 32, 32) or (4, 34, 34)",
        ),
        (["--input-size", "64"], "--input-size 64: needs --model; the published rows have their own sizes"),
        (["--input-size", "large", "--model", "DiT-S/2"], "argument --input-size: invalid int value: 'large'"),
        (
            ["--model", "DiT-XL/2", "--cache-interval", "2"],
            "--model DiT-XL/2 --cache-interval 2: this network keeps nothing to reuse; give --cache-depth B",
        ),
        (
            ["--model", "DyDiT-XL/2", "--cache-interval", "2"],
            "--model DyDiT-XL/2 --cache-interval 2: this network keeps nothing to reuse; no setting makes it",
        ),
        (["--model", "DDT-XL/2", "--cache-depth", "3"], "--cache-depth 3: has no effect on DDT-XL/2; leave it out"),
        (
            ["--model", "Skip-DiT-XL/2", "--cache-interval", "2", "0"],
            "--model Skip-DiT-XL/2 --cache-interval 2 0: the refresh interval must be at least 1, not 0",
        ),
        (
            ["--model", "Skip-DiT-XL/2", "--cache-depth", "15"],
            "--model Skip-DiT-XL/2 --cache-depth 15: cache_depth 15 must lie in 1..14, half the depth",
        ),
        (["--num-sampling-steps", "50"], "--num-sampling-steps 50: has no effect without --cache-interval"),
        (["--models", "DiT-S/2"], "unrecognized arguments: --models DiT-S/2"),
        (["--model", "DyDiT-S/2", "--keep", "1", "1", "1.5"], "--keep 1.0 1.0 1.5: shares lie in [0, 1]"),
        (["--keep", "1", "1", "1"], "--keep: needs --model"),
        (["--model", "DiT-S/2", "--keep", "1", "1", "1"], "--model DiT-S/2: has no routers; --keep is for DyDiT"),
    ],
)
def test_mistakes_are_answered_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert count(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"count_flops.py: error: {message}")
