import json

import pytest

from runtime.errors import UserError
from runtime.run_log import RunLog, create_run_folder


def test_runs_are_numbered_past_the_highest(tmp_path):
    names = [create_run_folder(tmp_path / "r", "DiT-debug-2").name for _ in range(3)]
    assert names == ["000-DiT-debug-2", "001-DiT-debug-2", "002-DiT-debug-2"]
    (tmp_path / "r" / names[0]).rmdir()
    assert create_run_folder(tmp_path / "r", "x").name == "003-x"


def test_unwritable_results_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--results-dir"):
        create_run_folder(tmp_path / "file" / "r", "x")


def test_lines_and_metrics_reach_their_files(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.line("(step=0000100) Train Loss: 0.1234")
    log.metrics(step=100, loss=0.1234)
    text = (tmp_path / "log.txt").read_text()
    assert text.endswith("] (step=0000100) Train Loss: 0.1234\n") and "\033" not in text
    assert "Train Loss: 0.1234" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 100, "loss": 0.1234}


def test_other_ranks_say_nothing(capsys):
    log = RunLog(None)
    log.line("x")
    log.metrics(step=1)
    assert capsys.readouterr().out == ""
