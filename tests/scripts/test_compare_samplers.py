"""The tables and the picture of all samplers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import samplers
from diffusion import SAMPLERS, FlowMatching, make_sampler
from diffusion.gaussian import GaussianSettings
from evaluator.small import SmallScorer, SmallScores
from runtime.errors import run
from scripts import compare_samplers, search_solver
from tests.digits_checkpoints import save_digits_checkpoint
from tests.runs import CAPTIONED_DIGITS, start

FEW = "--evaluations 3 4 --forecasts 2,1 --num-images 4 --reference-evaluations 100 --device cpu --output-dir".split()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for process, model in {"gaussian": "DiT-digits/2", "flow": "DDT-digits/2"}.items():
        save_digits_checkpoint(folder / f"{process}.safetensors", model, process, 0)
    return {process: folder / f"{process}.safetensors" for process in ("gaussian", "flow")}


def main(*argv: str | Path) -> int:
    return run(compare_samplers.main, "compare_samplers.py", list(map(str, argv)))


def test_every_solver_of_the_registry_is_compared(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(samplers.SPACINGS, "gaussian", [{"time_grid": grid} for grid in ("uniform", "trailing")])
    monkeypatch.setattr(SmallScorer, "score", lambda *_: SmallScores(4, 0.9, 2.5, 5.65, 9.0, 0.9, 0.8, 1.0))
    assert main("--ckpt", checkpoints["flow"], checkpoints["gaussian"], "--seeds", "0", "1", *FEW, tmp_path) == 0
    rows = json.loads((tmp_path / "samplers.json").read_text())["rows"]
    assert {row["solver"].split()[0] for row in rows} == set(SAMPLERS)
    for row in rows:
        stochastic = row["solver"].split()[0] == "ddpm" or "sde" in row["solver"]
        assert (row["rmse"] is None) == stochastic
        forecast = "forecasts" in row["solver"]
        assert row["evaluations"] == (26 if forecast else 3) or row["evaluations"] == 4
    text = (tmp_path / "samplers.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip() and "±" in text and "**Frechet distance**" in text
    with Image.open(tmp_path / "samplers.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize("process", [GaussianSettings().make(False), FlowMatching()], ids=lambda each: each.name)
def test_own_spacings_are_those_of_the_samplers(process):
    for setup in samplers.solvers(process.name, 9):
        name, order = setup.settings["sampler"], setup.settings.get("solver_order")
        chosen = {} if order is None else {"order": order}
        shift = {"shift": setup.settings["time_shift"]} if "time_shift" in setup.settings else {}
        settings = SAMPLERS[name].settings(**chosen)
        same = SAMPLERS[name].settings(grid=setup.settings["time_grid"], **chosen, **shift)
        spec = setup.settings["num_sampling_steps"]
        times = [make_sampler(name, process, spec, each).times for each in (settings, same)]
        assert setup.default == (times[0] == times[1]), setup


def test_own_grids_leave_out_the_others_alone(checkpoints):
    """Every solver and forecast stays, once for each number of evaluations."""
    planned = {}
    for grids in ("all", "own"):
        config = compare_samplers.SamplersSettings(ckpt=(checkpoints["gaussian"],), grids=grids, device="cpu")
        planned[grids] = [setup for _, setups in compare_samplers.plan(config) for setup in setups]
    assert planned["own"] == [setup for setup in planned["all"] if setup.default]
    assert len(planned["own"]) < len(planned["all"]) / 3
    for name in {setup.solver for setup in planned["all"]}:
        assert sum(setup.solver == name for setup in planned["own"]) == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--evaluations", "2"], "--evaluations 2: must be at least 3"),
        (["--num-images", "3"], "--num-images 3"),
        (["--ckpt", "none"], "--ckpt none: no checkpoint there"),
        (["--forecasts", "5"], "--forecast 5: must be N,O"),
    ],
)
def test_mistakes_are_one_line(checkpoints, tmp_path, capsys, argv, message):
    assert main("--ckpt", checkpoints["gaussian"], "--device", "cpu", "--output-dir", tmp_path / "out", *argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_networks_for_text_are_refused_in_one_line(tmp_path, capsys):
    argv = [*CAPTIONED_DIGITS, *"--model LatteT2V-debug/2 --process flow --max-steps 1 --global-batch-size 2".split()]
    assert start(tmp_path, *argv) == 0
    (path,) = tmp_path.glob("*/checkpoints/*")
    for script, more in ((compare_samplers, []), (search_solver, ["--output", str(tmp_path / "table.json")])):
        assert run(script.main, "script", ["--ckpt", str(path), *more]) == 2
        assert f"script: error: --ckpt {path}: takes text, and samples of labels" in capsys.readouterr().err
