"""Training in stages: added parts alone, then all; updates that are dropped, which nothing follows."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import create_model
from runtime.checkpoint import read_checkpoint
from tests import runs
from tests.networks import randomise
from tests.runs import CAPTIONED_DIGITS, assert_same, checkpoint, metrics, start, state
from training.optimization import FiniteGuard

SKIP = ["--model", "Skip-LatteT2V-debug/2", "--global-batch-size", 4, "--precision", "fp32"]
RUN = [*CAPTIONED_DIGITS, *SKIP, "--lr", 1e-3, "--ckpt-every", 2]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the network without skip units."""
    path = tmp_path_factory.mktemp("plain") / "plain.pt"
    torch.save(plain_weights(), path)
    return path


def plain_weights() -> dict[str, Tensor]:
    fields: dict[str, Any] = {"depth": 8, "text_width": 32, "text_length": 8, "sample_shape": (4, 1, 16, 16)}
    return randomise(create_model("LatteT2V-debug/2", **fields)).state_dict()


def group(path: Path, name: str) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in state(path).items() if key.startswith(prefix)}


def test_only_added_parts_train_then_all_and_a_run_resumes_bit_by_bit(plain: Path, tmp_path: Path) -> None:
    first = [*RUN, "--init-from", plain, "--train-only", "added"]
    assert start(tmp_path / "whole", *first, "--max-steps", 4) == 0
    whole, before = checkpoint(tmp_path / "whole", 4), plain_weights()
    for name in ("model", "ema-0.9999"):
        weights = group(whole, name)
        assert [key for key, value in before.items() if not torch.equal(weights[key], value)] == []
    added = {name for name in group(whole, "model") if name.startswith("skip_")}
    assert {name.rsplit("/", 1)[0] for name in group(whole, "optimizer")} == added and len(added) == 8
    fresh = group(checkpoint(tmp_path / "whole", 2), "model")
    assert all(not torch.equal(fresh[name], group(whole, "model")[name]) for name in added)
    assert "initialised afresh, because the weights have none: skip_norms.0..1.weight" in runs.log(tmp_path / "whole")

    assert start(tmp_path / "cut", *first, "--max-steps", 2) == 0
    assert start(tmp_path / "cut", *first, "--max-steps", 4, "--resume", "auto") == 0
    assert_same(state(whole), state(checkpoint(tmp_path / "cut", 4)))

    assert start(tmp_path / "second", *RUN, "--init-from", whole, "--max-steps", 2) == 0
    second = group(checkpoint(tmp_path / "second", 2), "model")
    assert not any(torch.equal(second[key], value) for key, value in before.items() if "attn1.to_q.weight" in key)


def test_dropped_updates_move_neither_weights_nor_average_nor_learning_rate(plain: Path, tmp_path: Path) -> None:
    argv = [*RUN, "--init-from", plain, "--lr-schedule", "linear", "--lr-warmup-steps", 2, "--max-steps", 6]
    assert start(tmp_path / "probe", *argv, "--skip-updates-above", 1e-9) == 0
    limit = sorted(line["grad_norm"] for line in metrics(tmp_path / "probe"))[3]
    argv += ["--skip-updates-above", limit]
    assert start(tmp_path / "whole", *argv) == 0
    lines, updates = metrics(tmp_path / "whole"), 0
    for line in lines:
        rate = 1e-3 * (updates / 2 if updates < 2 else 1 - (updates - 2) / 4)
        assert line["lr"] == pytest.approx(rate)
        updates += line["grad_norm"] <= limit
        assert (line["updates"], line["updates_dropped"]) == (updates, line["grad_norm"] > limit)
    assert 0 < updates < 6 and "updates dropped: 1" in runs.log(tmp_path / "whole")
    meta = read_checkpoint(checkpoint(tmp_path / "whole", 6)).meta
    assert meta is not None and (meta["step"], meta["updates"]) == (6, updates)
    for before, after, line in zip((2, 4), (4, 6), (lines[2:4], lines[4:6]), strict=True):
        states = [state(checkpoint(tmp_path / "whole", step)) for step in (before, after)]
        same = all(torch.equal(states[0][name], value) for name, value in states[1].items())
        assert same == all(each["updates_dropped"] for each in line)

    expected = state(checkpoint(tmp_path / "whole", 6))
    assert start(tmp_path / "whole", *argv, "--resume", checkpoint(tmp_path / "whole", 4)) == 0
    assert_same(expected, state(checkpoint(tmp_path / "whole", 6)))
    assert [line["updates"] for line in metrics(tmp_path / "whole")] == [line["updates"] for line in lines]


def test_a_run_that_drops_all_updates_ends_with_the_weights_that_it_began_with(plain: Path, tmp_path: Path) -> None:
    argv = [*RUN, "--init-from", plain, "--max-steps", 2, "--skip-updates-above", 1e-9]
    assert start(tmp_path, *argv) == 0
    assert [line["updates"] for line in metrics(tmp_path)] == [0, 0]
    weights, average = (group(checkpoint(tmp_path, 2), name) for name in ("model", "ema-0.9999"))
    assert all(torch.equal(weights[name], value) for name, value in plain_weights().items())
    assert all(torch.equal(weights[name], average[name]) for name in weights)
    assert group(checkpoint(tmp_path, 2), "optimizer") == {}


def test_norms_above_the_limit_and_those_that_are_no_numbers_are_dropped() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True)
    guard, norms = FiniteGuard(optimizer, torch.device("cpu"), 0.5), (0.5, 0.50001, math.nan, math.inf, 0.1)
    assert [guard.drops(torch.tensor(norm)) for norm in norms] == [False, True, True, True, False]
    assert (guard.count_dropped(), guard.count_dropped()) == (3, 0)
    assert not any(FiniteGuard(optimizer, torch.device("cpu")).drops(torch.tensor(norm)) for norm in norms)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train-only", "added"], "--train-only added: the other parts would stay random; give --init-from"),
        (
            ["--model", "LatteT2V-debug/2", "--train-only", "added"],
            "--model LatteT2V-debug/2 adds no parts",
        ),
        (["--skip-updates-above", 0], "--skip-updates-above 0.0: must be positive"),
        (["--skip-updates-above", 1, "--grad-norm-mode", "skip", "--grad-clip", 1], "give it or --skip-updates-above"),
    ],
)
def test_what_has_no_meaning_is_refused(
    argv: list[Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, *RUN, "--max-steps", 1, *argv) == 2
    assert words in runs.the_error(capsys) and not list(tmp_path.iterdir())
