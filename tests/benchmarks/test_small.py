"""Which ways of sampling a network for the digits has, and what comes of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import small
from benchmarks.costs import reused_cost
from benchmarks.small import (
    examine,
    find_checkpoints,
    newest,
    open_model,
    psnr,
    sample_images,
    sampling_setups,
)
from evaluator.small import FASHION
from models import create_model
from models.loading import resolve_checkpoint
from runtime.errors import UserError
from tests.digits_checkpoints import save_digits_checkpoint


def saved(folder: Path, model: str, process: str = "gaussian", **train: object) -> Path:
    return save_digits_checkpoint(folder / "0000001.safetensors", model, process, **train)


@pytest.mark.parametrize(
    ("model", "process", "train", "name", "reuse", "cache_depth"),
    [
        ("DiT-digits/2", "gaussian", {}, "DiT-digits/2", True, 1),
        ("DiT-digits/2", "flow", {}, "DiT-digits/2, flow", True, 1),
        ("DyDiT-digits/2", "gaussian", {"flops_target": 0.7}, "DyDiT-digits/2, target 0.7", False, None),
        ("DDT-digits/2", "flow", {}, "DDT-digits/2", True, None),
        ("DDT-digits/2", "gaussian", {}, "DDT-digits/2, gaussian", True, None),
        ("IDiT-digits/2", "flow", {}, "IDiT-digits/2", False, None),
        ("Skip-DiT-digits/2", "gaussian", {}, "Skip-DiT-digits/2", True, 2),
    ],
)
def test_a_model_is_named_by_what_distinguishes_it(model, process, train, name, reuse, cache_depth, tmp_path):
    opened = open_model(saved(tmp_path, model, process, **train))
    network = opened.pipeline.network
    assert (opened.name, opened.pipeline.info.process, network.keeps_state) == (name, process, reuse)
    assert getattr(network.config, "cache_depth", None) == cache_depth
    assert opened.target == train.get("flops_target")


def test_other_checkpoints_and_too_many_kept_blocks_are_refused(tmp_path):
    torch.save(create_model("DiT-digits/2").state_dict(), tmp_path / "official.pt")
    with pytest.raises(UserError, match="not a checkpoint that train.py trained on the digits"):
        open_model(tmp_path / "official.pt")
    plain = saved(tmp_path, "DiT-digits/2")
    assert open_model(plain, 2).pipeline.network.config.cache_depth == 2
    with pytest.raises(UserError, match="cache_depth 3 must lie in 1..2"):
        open_model(plain, 3)


def test_of_folders_the_last_checkpoint_of_every_run_is_taken(tmp_path):
    for place in ("a/runs/000/checkpoints/0000001", "a/runs/000/checkpoints/0000020", "a/x/001/checkpoints/0000003"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{place}.safetensors").touch()
    (tmp_path / "a" / "other.safetensors").touch()
    actual = list(find_checkpoints([tmp_path / "a", tmp_path / "given.safetensors"]))
    assert [path.relative_to(tmp_path).as_posix() for path in actual] == [
        "a/runs/000/checkpoints/0000020.safetensors",
        "a/x/001/checkpoints/0000003.safetensors",
        "given.safetensors",
    ]


def test_of_runs_that_were_repeated_the_newest_counts_and_seeds_stay_together(tmp_path):
    order = [("DiT-digits/2", 0), ("DDT-digits/2", 0), ("DiT-digits/2", 1), ("DiT-digits/2", 0)]
    opened = [
        open_model(save_digits_checkpoint(tmp_path / str(i) / "1.safetensors", model, seed=seed))
        for i, (model, seed) in enumerate(order)
    ]
    kept = newest(opened)
    assert [(model.name, model.seed, model.path.parent.name) for model in kept] == [
        ("DiT-digits/2", 0, "3"),
        ("DiT-digits/2", 1, "2"),
        ("DDT-digits/2, gaussian", 0, "1"),
    ]


def test_every_model_takes_fewer_steps_and_those_that_can_reuse_state(tmp_path):
    plain = open_model(saved(tmp_path / "a", "DiT-digits/2"))
    assert [setup.label for setup in sampling_setups(plain, (50, 10), (2, 3))] == [
        "ddim, 50 steps, scale 1.1",
        "ddim, 10 steps, scale 1.1",
        "ddim, 50 steps, scale 1.1, N = 2",
        "ddim, 50 steps, scale 1.1, N = 3",
    ]
    flow = open_model(saved(tmp_path / "b", "DDT-digits/2", "flow"))
    assert [setup.label for setup in sampling_setups(flow, (8,), (2,))] == ["euler, 8 steps", "euler, 8 steps, R = 2"]
    routed = open_model(saved(tmp_path / "c", "DyDiT-digits/2"))
    actual = sampling_setups(routed, (8,), (2,), sampler="ddpm", cfg_scale=2.0)
    assert [setup.label for setup in actual] == ["ddpm, 8 steps, scale 2"]
    with pytest.raises(UserError, match="--cfg-scale 0.5"):
        sampling_setups(routed, (8,), (2,), cfg_scale=0.5)


def test_work_is_counted_and_compared_with_the_first_way(tmp_path):
    model = open_model(saved(tmp_path, "Skip-DiT-digits/2"))
    flags = {"cfg_scale": 1.0, "sharing_dir": tmp_path}
    whole, fewer, cached = examine(model, sampling_setups(model, (8, 4), (2,), **flags), count=12, seed=0)
    network = create_model("Skip-DiT-digits/2", cache_depth=2)
    full, reused = (sum(parts.values()) for parts in (network.cost(), reused_cost(network)))
    assert [r.macs for r in (whole, fewer)] == [8 * full, 4 * full] == [whole.dense, fewer.dense]
    assert cached.macs == cached.full * full + (8 - cached.full) * reused and 1 < cached.full < 8
    assert whole.block_ratio == fewer.block_ratio == 1 > cached.block_ratio
    assert whole.psnr is None and fewer.psnr is not None and cached.psnr is not None
    assert {r.scores.num_samples for r in (whole, fewer, cached)} == {12}


def test_samples_do_not_depend_on_batches(tmp_path, monkeypatch):
    pipeline = open_model(saved(tmp_path, "DiT-digits/2")).pipeline
    run = pipeline.prepare(sampler="ddim", num_sampling_steps="ddim5")
    sampled = []
    for batch in (250, 2):
        monkeypatch.setattr(small, "BATCH", batch)
        sampled.append(sample_images(pipeline, run, np.arange(5), seed=1)[0].astype(int))
    assert abs(sampled[0] - sampled[1]).max() <= 1 and sampled[0].shape == (5, 8, 8, 1)


def test_psnr_of_a_known_error():
    zeros = np.zeros((2, 8, 8, 1), np.uint8)
    assert psnr(zeros, zeros) is None
    assert psnr(zeros + np.uint8(255), zeros) == 0
    assert psnr(zeros, zeros + np.uint8(51)) == pytest.approx(20 * np.log10(5))


def test_fashion_mnist_is_known_by_the_digest_of_its_training_images(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "open_scorer", lambda images, path: (images.name, path))
    info, _ = resolve_checkpoint(saved(tmp_path, "DiT-digits/2"))
    assert small.find_scorer(info) == ("digits", None)
    train = {"data": {"data_path": "clothes"}}
    for digest, scorer in ((FASHION.digest, ("fashion", Path("clothes"))), ("0" * 64, None), (None, None)):
        meta = {**info.meta, "train": train, "data": {"digest": digest}}
        assert small.find_scorer(replace(info, meta=meta, image_shape=(1, 28, 28))) == scorer
    assert small.find_scorer(replace(info, meta={"train": {}}, image_shape=(3, 8, 8))) is None
