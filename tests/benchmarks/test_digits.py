"""Which ways of sampling a network for the digits has, and what comes of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import digits
from benchmarks.digits import draw, examine, find_checkpoints, newest, open_subject, psnr, ways
from models import create_model
from runtime.errors import UserError
from sampling.config import SamplingConfig
from tests.digits_checkpoints import save_digits_checkpoint


def saved(folder: Path, model: str, process: str = "gaussian", **train: object) -> Path:
    return save_digits_checkpoint(folder / "0000001.safetensors", model, process, **train)


@pytest.mark.parametrize(
    ("model", "process", "train", "name", "reuse"),
    [
        ("DiT-digits/2", "gaussian", {}, "DiT-digits/2", {"cache_depth": 1}),
        ("DiT-digits/2", "flow", {}, "DiT-digits/2, flow", {"cache_depth": 1}),
        ("DyDiT-digits/2", "gaussian", {"flops_target": 0.7}, "DyDiT-digits/2, target 0.7", None),
        ("DDT-digits/2", "flow", {}, "DDT-digits/2", {}),
        ("DDT-digits/2", "gaussian", {}, "DDT-digits/2, gaussian", {}),
        ("IDiT-digits/2", "flow", {}, "IDiT-digits/2", None),
        ("Skip-DiT-digits/2", "gaussian", {}, "Skip-DiT-digits/2", {"cache_depth": 2}),
    ],
)
def test_a_subject_says_what_sets_it_apart(model, process, train, name, reuse, tmp_path):
    subject = open_subject(saved(tmp_path, model, process, **train))
    assert (subject.name, subject.process, subject.reuse) == (name, process, reuse)
    assert subject.target == train.get("flops_target")


def test_other_checkpoints_and_too_many_kept_blocks_are_refused(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "official.pt")
    with pytest.raises(UserError, match="not a checkpoint of train.py that was trained on the digits"):
        open_subject(tmp_path / "official.pt")
    plain = saved(tmp_path, "DiT-digits/2")
    assert open_subject(plain, 2).reuse == {"cache_depth": 2}
    with pytest.raises(UserError, match="cache_depth 3 must lie in 1..2"):
        open_subject(plain, 3)


def test_of_folders_the_last_checkpoint_of_every_run_is_taken(tmp_path):
    for place in ("a/runs/000/checkpoints/0000001", "a/runs/000/checkpoints/0000020", "a/x/001/checkpoints/0000003"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{place}.safetensors").touch()
    (tmp_path / "a" / "other.safetensors").touch()
    found = list(find_checkpoints([tmp_path / "a", tmp_path / "given.safetensors"]))
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "a/runs/000/checkpoints/0000020.safetensors",
        "a/x/001/checkpoints/0000003.safetensors",
        "given.safetensors",
    ]


def test_of_runs_that_were_repeated_the_newest_counts_and_seeds_stay_together(tmp_path):
    order = [("DiT-digits/2", 0), ("DDT-digits/2", 0), ("DiT-digits/2", 1), ("DiT-digits/2", 0)]
    subjects = [
        open_subject(save_digits_checkpoint(tmp_path / str(i) / "1.safetensors", model, seed=seed))
        for i, (model, seed) in enumerate(order)
    ]
    kept = newest(subjects)
    assert [(subject.name, subject.seed, subject.path.parent.name) for subject in kept] == [
        ("DiT-digits/2", 0, "3"),
        ("DiT-digits/2", 1, "2"),
        ("DDT-digits/2, gaussian", 0, "1"),
    ]


def test_every_subject_takes_fewer_steps_and_those_that_can_reuse_state(tmp_path):
    plain = open_subject(saved(tmp_path / "a", "DiT-digits/2"))
    assert [way.label for way in ways(plain, (50, 10), (2, 3))] == [
        "ddim, 50 steps, scale 1.1",
        "ddim, 10 steps, scale 1.1",
        "ddim, 50 steps, scale 1.1, N = 2",
        "ddim, 50 steps, scale 1.1, N = 3",
    ]
    flow = open_subject(saved(tmp_path / "b", "DDT-digits/2", "flow"))
    assert [way.label for way in ways(flow, (8,), (2,))] == ["euler, 8 steps", "euler, 8 steps, R = 2"]
    routed = open_subject(saved(tmp_path / "c", "DyDiT-digits/2"))
    found = ways(routed, (8,), (2,), sampler="ddpm", cfg_scale=2.0, device="cpu")
    assert [way.label for way in found] == ["ddpm, 8 steps, scale 2"]
    with pytest.raises(ValueError, match="--cfg-scale 0.5"):
        ways(routed, (8,), (2,), cfg_scale=0.5)


def test_work_is_counted_and_compared_with_the_first_way(tmp_path):
    subject = open_subject(saved(tmp_path, "Skip-DiT-digits/2"))
    flags = {"cfg_scale": 1.0, "sharing_dir": tmp_path, "device": "cpu"}
    whole, fewer, cached = examine(subject, ways(subject, (8, 4), (2,), **flags), count=12, seed=0)
    network = create_model("Skip-DiT-digits/2", cache_depth=2)
    full, reused = (sum(f().values()) for f in (network.multiply_adds, network.multiply_adds_with_state))
    assert [r.multiply_adds for r in (whole, fewer)] == [8 * full, 4 * full] == [whole.dense, fewer.dense]
    assert cached.multiply_adds == cached.full * full + (8 - cached.full) * reused and 1 < cached.full < 8
    assert whole.block_ratio == fewer.block_ratio == 1 > cached.block_ratio
    assert whole.psnr is None and fewer.psnr is not None and cached.psnr is not None
    assert {r.scores.num_samples for r in (whole, fewer, cached)} == {12}


def test_samples_do_not_depend_on_batches(tmp_path, monkeypatch):
    config = SamplingConfig(ckpt=saved(tmp_path, "DiT-digits/2"), sampler="ddim", num_sampling_steps="ddim5")
    drawn = []
    for batch in (250, 2):
        monkeypatch.setattr(digits, "BATCH", batch)
        drawn.append(draw(config, 5, seed=1)[0].astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 1 and drawn[0].shape == (5, 8, 8, 1)


def test_psnr_of_a_known_error():
    zeros = np.zeros((2, 8, 8, 1), np.uint8)
    assert psnr(zeros, zeros) is None
    assert psnr(zeros + np.uint8(255), zeros) == 0
    assert psnr(zeros, zeros + np.uint8(51)) == pytest.approx(20 * np.log10(5))
