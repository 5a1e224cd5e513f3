import importlib.util
import json
import subprocess
import sys

import pytest
from runtime.run_log import RunLog

import train
from runtime.errors import run


def test_metrics_go_to_json_lines_and_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, tensorboard=True)
    log.metrics(step=3, loss=0.5, lr=1e-3)
    log.metrics(step=4, loss=0.25, lr=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "loss": 0.5, "lr": 1e-3}, {"step": 4, "loss": 0.25, "lr": 1e-3}]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.5), (4, 0.25)]
    assert events.Tags()["scalars"] == ["loss", "lr"]


def test_without_a_folder_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, tensorboard=True)
    log.metrics(step=1, loss=0.5)
    log.line("hello")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_the_writer_does_without_tensorflow(tmp_path):
    """Where TensorFlow is installed, TensorBoard would load it beside Triton, which can abort the process."""
    fake = tmp_path / "tensorflow"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pathlib import Path\n"
        "from runtime.run_log import RunLog\n"
        f"RunLog(Path({str(tmp_path)!r}), tensorboard=True).metrics(step=1, loss=0.5)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["--tensorboard", "--profile"])
def test_extras_of_a_run_change_nothing_but_its_folder(flag, tmp_path):
    base = "--dataset digits --model DiT-digits/2 --device cpu --num-workers 0 --global-batch-size 4 --log-every 1"
    for name, extra in {"plain": [], "extra": [flag]}.items():
        argv = [*base.split(), "--max-steps", "16", "--results-dir", str(tmp_path / name), *extra]
        assert run(train.main, "train.py", argv) == 0
    plain, extra = (tmp_path / name / "000-DiT-digits-2" for name in ("plain", "extra"))
    added = {p.name for p in extra.iterdir()} - {p.name for p in plain.iterdir()}
    assert added == {flag.removeprefix("--")}
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").open()] for f in (plain, extra)]
    assert losses[0] == losses[1]


def test_a_profile_shows_the_steps_and_their_operations(tmp_path):
    argv = "--dataset digits --model DiT-digits/2 --device cpu --num-workers 0 --global-batch-size 4 --max-steps 16"
    assert run(train.main, "train.py", [*argv.split(), "--profile", "--results-dir", str(tmp_path)]) == 0
    folder = tmp_path / "000-DiT-digits-2" / "profile"
    names = {event.get("name", "") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {f"ProfilerStep#{step}" for step in range(10, 15)} <= names
    assert "aten::addmm" in (folder / "operations.txt").read_text()


def test_tensorboard_is_an_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    argv = ["--dataset", "digits", "--model", "DiT-digits/2", "--tensorboard", "--results-dir", str(tmp_path)]
    assert run(train.main, "train.py", argv) == 2
    assert "--tensorboard: the package is not installed; pip install tensorboard" in capsys.readouterr().err
