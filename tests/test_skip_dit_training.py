"""Skip-DiT through train.py: from fresh weights under its official name's model, and from a plain DiT's."""

from pathlib import Path

import pytest
import torch

from runtime.checkpoint import read_checkpoint
from tests import runs
from tests.runs import last_checkpoint, start


def trained(model: str, folder: Path, *argv: str | Path) -> tuple[Path, str]:
    """Checkpoint and log of one step on the digits."""
    given = "--no-learn-sigma --max-steps 1 --global-batch-size 4".split()
    assert start(folder, *runs.DIGITS, "--model", model, *given, *argv) == 0
    return last_checkpoint(folder), runs.log(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained("DiT-digits-deep/2", tmp_path_factory.mktemp("plain"))[0]


def test_a_plain_network_starts_a_skip_dit_and_the_log_names_what_is_new(plain: Path, tmp_path: Path) -> None:
    path, log = trained("Skip-DiT-digits/2", tmp_path, "--init-from", plain, "--lr", "1e-12")
    assert (
        "--init-from: initialised afresh, because the weights have none: skip_norms.0..3.weight, skip_norms.0..3.bias"
        in log
    )
    started, source = read_checkpoint(path, "model").weights, read_checkpoint(plain).weights
    assert {name for name in started if name not in source} == {name for name in started if name.startswith("skip_")}
    for name, value in source.items():
        torch.testing.assert_close(started[name], value, rtol=0, atol=1e-9)


def test_a_skip_dit_does_not_start_a_plain_network(plain: Path, tmp_path: Path, capsys) -> None:
    path, _ = trained("Skip-DiT-digits/2", tmp_path)
    argv = f"--model DiT-digits-deep/2 --no-learn-sigma --init-from {path}".split()
    assert start(tmp_path / "none", *runs.DIGITS, *argv) == 2
    error = runs.the_error(capsys)
    assert "do not fit the model in 16 places" in error and "unexpected skip_linears.0.linear.bias" in error


def test_the_official_name_is_the_large_model(tmp_path: Path, capsys) -> None:
    assert start(tmp_path, *runs.DIGITS, "--model", "DiT-skip") == 2
    assert "--model Skip-DiT-XL/2: made for 1000 classes, but the data has 10" in runs.the_error(capsys)


def test_a_cached_name_means_nothing_in_training(tmp_path: Path, capsys) -> None:
    assert start(tmp_path, *runs.DIGITS, "--model", "DiT-cache-2") == 2
    words = "--model DiT-cache-2: means --cache-interval 2, which has no effect here; use Skip-DiT-XL/2"
    assert words in runs.the_error(capsys)
