"""A run's folder, log, metrics, profile, and the signals that stop it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from runtime.errors import UserError
from tests.runs import DIGITS, losses, run_folder, start
from training.interruption import stop_on_signal
from training.log import RunLog
from training.run import create_run_folder, cut_metrics

SHORT = [*DIGITS, *"--model DiT-digits/2 --global-batch-size 4 --max-steps 16".split()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without extras."""
    results = tmp_path_factory.mktemp("plain")
    assert start(results, *SHORT) == 0
    return results


def test_metrics_go_to_json_lines(tmp_path):
    log = RunLog(tmp_path)
    log.metrics(step=3, loss=0.5, lr=1e-3)
    log.metrics(step=4, loss=0.25, lr=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "loss": 0.5, "lr": 1e-3}, {"step": 4, "loss": 0.25, "lr": 1e-3}]


def test_without_a_folder_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None)
    log.metrics(step=1, loss=0.5)
    log.line("hello")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_the_writer_does_without_tensorflow(tmp_path):
    """Where TensorFlow is installed, TensorBoard would load it; with Triton it can abort the process."""
    fake = tmp_path / "tensorflow"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from pathlib import Path\n"
        "from training.tracking import TensorBoard, TrackedRun\n"
        f"TensorBoard(TrackedRun(Path({str(tmp_path)!r}), '', '', {{}}, 0)).metrics(1, {{'loss': 0.5}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flag", "made"), [("--track tensorboard", {"tensorboard", "tracking.json"}), ("--profile", {"profile"})]
)
def test_extras_of_a_run_change_nothing_but_its_folder(flag, made, plain, tmp_path):
    assert start(tmp_path, *SHORT, *flag.split()) == 0
    added = {p.name for p in run_folder(tmp_path).iterdir()} - {p.name for p in run_folder(plain).iterdir()}
    assert added == made
    assert losses(tmp_path) == losses(plain)
    if flag == "--profile":
        folder = run_folder(tmp_path) / "profile"
        names = {event.get("name", "") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
        assert {f"ProfilerStep#{step}" for step in range(10, 15)} <= names
        assert "aten::addmm" in (folder / "operations.txt").read_text()


def test_run_folders_are_numbered_above_the_highest(tmp_path):
    assert create_run_folder(tmp_path / "results", "a").name == "000-a"
    (tmp_path / "results" / "007-b").mkdir()
    (tmp_path / "results" / "notes").mkdir()
    assert create_run_folder(tmp_path / "results", "a").name == "008-a"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--results-dir .*file/results: cannot write there"):
        create_run_folder(tmp_path / "file" / "results", "a")


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    cut_metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:2]
    cut_metrics(tmp_path / "nowhere", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_first_signal_is_a_request_and_a_second_one_acts(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with stop_on_signal() as request:
            assert not request.received
            os.kill(os.getpid(), number)
            assert request.received and acted == []
            os.kill(os.getpid(), number)
            assert acted == [number]
        os.kill(os.getpid(), number)
        assert acted == [number, number], "the old handler is back"
    finally:
        signal.signal(number, before)
