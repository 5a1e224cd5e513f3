"""The page without a browser: which controls there are, their flags and costs, and the samples of sample.py."""

from __future__ import annotations

import importlib.util
import shlex
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

import app
import sample
from data.words import Words
from demo.controls import CONTROLS, Opened, command_line, controls_for, defaults_for, flags_for
from demo.generation import Result, Step, generate, predict
from demo.opening import names_of, open_checkpoint
from demo.page import Page, cost_table
from diffusion import SAMPLERS
from models import FAMILIES, create_model
from runtime.errors import UserError, run
from tests.checkpoints import write_network
from tests.digits_checkpoints import save_digits_checkpoint
from tests.networks import randomise

MODELS = ("DiT-debug/2", "Skip-DiT-debug/2", "DDT-debug/2", "DyDiT-debug/2")
QUICK = {"steps": 6, "class_labels": ["1", "7"]}


def opened(folder: Path, model: str = "DiT-debug/2") -> Opened:
    process = "flow" if model.startswith("DDT") else "gaussian"
    path = save_digits_checkpoint(folder / f"{model.replace('/', '-')}.safetensors", model, process, num_classes=10)
    return open_checkpoint(path, ("--ckpt", str(path), "--device", "cpu"))


def finished(checkpoint: Opened, values: dict[str, Any], folder: Path) -> tuple[list[Step], Result]:
    folder.mkdir()
    *steps, result = generate(checkpoint, values, folder, threading.Event())
    assert isinstance(result, Result)
    return steps, result  # type: ignore[return-value]


def by_command(checkpoint: Opened, values: dict[str, Any], output: Path) -> bytes:
    _, program, *argv = shlex.split(command_line(checkpoint, values, output))
    assert program == "sample.py" and run(sample.main, program, argv) == 0
    return output.read_bytes()


# Values that differ from the defaults of every control that a network may have, but those that exclude each other
CHANGES: dict[str, dict[str, object]] = {
    "DiT-debug/2": {"sampler": "ddim", "forecast": "2,1", "cfg_scale": 2.5, "guidance_interval": "100, 900"},
    "Skip-DiT-debug/2": {"cache_interval": 3, "cache_forecast": "1", "sampler": "dpm++", "more": "--columns 1"},
    "DDT-debug/2": {"sharing_interval": 2, "sampler": "adams", "precision": "fp32"},
    "DyDiT-debug/2": {"sampler": "ddim", "more": "--guidance-schedule 'linear'", "cfg_scale": 3.0},
}


@pytest.mark.parametrize("model", MODELS)
def test_samples_and_command_are_those_of_sample_py(model: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, model)
    plain = defaults_for(checkpoint) | QUICK
    pictures = {}
    for name, values in {"plain": plain, "changed": plain | CHANGES[model] | {"seed": 3}}.items():
        steps, result = finished(checkpoint, values, tmp_path / name)
        pictures[name] = result.files[0].read_bytes()
        assert pictures[name] == by_command(checkpoint, values, tmp_path / f"{name}.png"), name
        assert result.samples == 2 and 0 < len(steps) <= 12 and all(step.total >= step.done for step in steps)
        predicted, _ = predict(checkpoint, values)
        if not FAMILIES[model.split("-debug")[0]].data_dependent:
            assert result.macs == predicted.macs == result.predicted.macs
        else:
            assert result.macs < predicted.macs  # routers leave work out
    assert pictures["plain"] != pictures["changed"]


def test_clips_by_prompts_are_those_of_sample_py(tmp_path: Path) -> None:
    network = randomise(create_model("Skip-LatteT2V-digits/4", text_width=Words.width, depth=4, hidden_size=32))
    path = write_network(tmp_path / "a.safetensors", "Skip-LatteT2V-digits/4", network, text=Words().describe())
    checkpoint = open_checkpoint(path, ("--ckpt", str(path), "--device", "cpu"))
    shown = {control.name for control in controls_for([checkpoint])}
    assert {"prompt", "negative_prompt", "cache_interval"} <= shown and not shown & {"class_labels", "num_samples"}
    values = defaults_for(checkpoint) | {"steps": 4, "cache_interval": 2, "negative_prompt": "a small one"}
    assert values["prompt"] == "a large seven moving up"
    values["prompt"] = "a large seven moving up\n\n a small three moving left "
    _, result = finished(checkpoint, values, tmp_path / "made")
    assert result.samples == 2 and [path.suffix for path in result.files] == [".png", ".gif"]
    assert by_command(checkpoint, values, tmp_path / "b.png") == result.files[0].read_bytes()
    assert (tmp_path / "b.gif").read_bytes() == result.files[1].read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_every_control_of_a_network_changes_its_command(model: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, model)
    shown, values = controls_for([checkpoint]), defaults_for(checkpoint) | QUICK
    before = command_line(checkpoint, values)
    other: dict[str, object] = {
        "class_labels": ["2"], "seed": 5, "sampler": "unipc" if model != "DDT-debug/2" else "heun", "steps": 7,
        "cfg_scale": 1.5, "guidance_interval": "0 500", "cache_interval": 2, "sharing_interval": 2,
        "cache_forecast": "0", "forecast": "3,1", "precision": "bf16", "more": "--columns 1",
    }  # fmt: skip
    assert {control.name for control in shown} <= other.keys()
    for control in shown:
        assert command_line(checkpoint, values | {control.name: other[control.name]}) != before, control.name
    keeps = checkpoint.pipeline.network.keeps_state
    assert ("cache_interval" in {control.name for control in shown}) == keeps
    assert "prompt" not in {control.name for control in shown}
    samplers = {text for control in shown if control.name == "sampler" for text, _ in control.choices(checkpoint)}
    assert samplers == {name for name, row in SAMPLERS.items() if row.process == checkpoint.pipeline.process.name}


def test_costs_are_said_of_the_whole_and_of_each_control(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, "Skip-DiT-debug/2")
    full = sum(checkpoint.pipeline.network.cost().values())
    values = defaults_for(checkpoint) | {"sampler": "ddim", "steps": 10, "cfg_scale": 1.0}
    assert predict(checkpoint, values) == ((10, 10, 10 * full), {})
    cost, factors = predict(checkpoint, values | {"cfg_scale": 2.0})
    assert cost == (10, 20, 20 * full) and factors == {"Guidance scale": 2.0}
    cost, factors = predict(checkpoint, values | {"cfg_scale": 2.0, "cache_interval": 2})
    assert factors["Guidance scale"] == 2.0 and 0.5 < factors["Cache interval"] < 1
    assert cost.macs == pytest.approx(20 * full * factors["Cache interval"])
    table = cost_table([(checkpoint, cost, factors, None)])
    assert "| by cache interval | x 0." in table and "| by guidance scale | x 2.00 |" in table


def test_a_second_checkpoint_gets_the_settings_that_it_takes(tmp_path: Path) -> None:
    both = [opened(tmp_path, model) for model in ("DiT-debug/2", "DDT-debug/2")]
    values = defaults_for(both[0]) | {"sampler": "ddim", "sharing_interval": 3, "steps": 9}
    first, second = (flags_for(own, values) for own in both)
    assert "--sampler" in first and "--sharing-interval" not in first
    assert "--sampler" not in second and second[second.index("--sharing-interval") + 1] == "3"
    page = Page(both)
    try:
        *_, (status, table, *outputs) = page.generate(*(values[control.name] for control in page.controls))
        assert status == "done" and table.count("seconds a sample") == 1 and len(outputs) == 4
        assert Path(str(outputs[0])).read_bytes() == by_command(both[0], values, tmp_path / "a.png")
        assert Path(str(outputs[1])).read_bytes() == by_command(both[1], values, tmp_path / "b.png")
    finally:
        page.close()
    assert not page.folder.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_interval": "5"}, "--guidance-interval 5: must be two timesteps, LOW HIGH"),
        ({"guidance_interval": "900 100"}, "--guidance-interval 900.0 100.0: must be two timesteps, LOW < HIGH"),
        ({"cfg_scale": 0.5}, "--cfg-scale 0.5: must be at least 1"),
        ({"cache_interval": 2, "sharing_interval": 2}, "--sharing-interval 2: has no effect with --cache-interval"),
        ({"more": "--output x.png"}, "further flags: --output chooses files or the network, which the page has opened"),
        ({"more": "--cache-depth=1"}, "further flags: --cache-depth chooses files or the network"),
        ({"more": "--cfg-scale '4"}, "further flags: No closing quotation"),
        ({"more": "--stepz 4"}, "unrecognized arguments: --stepz 4"),
        ({"steps": 0}, "--num-sampling-steps 0"),
    ],
)
def test_mistakes_are_one_line_on_the_page(change: dict[str, object], message: str, tmp_path: Path) -> None:
    page = Page([opened(tmp_path, "Skip-DiT-debug/2")])
    values = defaults_for(page.opened[0]) | QUICK | change
    given = [values[control.name] for control in page.controls]
    described, *commands = page.describe(*given)
    *_, (status, *_) = page.generate(*given)
    page.close()
    assert message in described and described.startswith('<span class="error">') and commands == [""]
    assert message in str(status) and "\n" not in str(status)
    with pytest.raises(UserError):
        predict(page.opened[0], values)


def test_a_run_can_be_stopped_and_only_one_is_under_way(tmp_path: Path) -> None:
    page = Page([opened(tmp_path)])
    values = defaults_for(page.opened[0]) | QUICK | {"steps": 40}
    given = [values[control.name] for control in page.controls]
    running = page.generate(*given)
    next(running)
    assert "another run is under way" in str(next(page.generate(*given))[0])
    page.stop.set()
    statuses = [str(message[0]) for message in running]
    assert statuses[-1] == "stopped" and len(statuses) < 12
    *_, (status, *_) = page.generate(*given)
    page.close()
    assert status == "done"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["r/000-DiT/checkpoints/0000001.safetensors"], ["000-DiT, 0000001"]),
        (["r/0-a/checkpoints/1.safetensors", "r/0-a/checkpoints/2.safetensors"], ["0-a, 1", "0-a, 2"]),
        (["/s/a/0-x/checkpoints/1.safetensors", "/s/b/0-x/checkpoints/1.safetensors"], ["a/0-x, 1", "b/0-x, 1"]),
        (["/s/a.pt", "/t/a.pt"], ["s/a.pt", "t/a.pt"]),
        (["a.pt", "a.pt"], ["a.pt, 1", "a.pt, 2"]),
    ],
)
def test_names_tell_checkpoints_apart(paths: list[str], names: list[str]) -> None:
    assert names_of([Path(path) for path in paths]) == names


def test_controls_have_one_name_each() -> None:
    assert len({control.name for control in CONTROLS}) == len(CONTROLS)


def test_mistakes_of_the_command_line_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for argv, message in (
            ([], "--ckpt: required"),
            (["--ckpt", "x", "--port", "70000"], "--port 70000: must lie in 1..65535"),
            (["--ckpt", "x", "--port", str(port)], f"--host 127.0.0.1 --port {port}: Address already in use"),
            (["--ckpt", str(tmp_path / "x.pt"), "--port", str(port + 1)], "x.pt: no such file"),
        ):
            assert run(app.main, "app.py", argv) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1, error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert run(app.main, "app.py", ["--ckpt", "x"]) == 2
    assert "gradio, which is not installed; bash scripts/setup.sh base demo" in capsys.readouterr().err
