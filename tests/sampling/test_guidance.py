"""Kinds of guidance, from flags to latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sample_ddp
from models import create_model
from runtime.errors import UserError, run
from sampling.pipeline import Pipeline
from tests.checkpoints import write_network
from tests.networks import randomise


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Networks of one shape, and of others."""
    folder = tmp_path_factory.mktemp("guides")
    gaussian, flow = {"name": "gaussian"}, {"name": "flow"}
    made: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "large": ({"depth": 2, "hidden_size": 32}, gaussian),
        "small": ({"depth": 1, "hidden_size": 24}, gaussian),
        "classes": ({"depth": 1, "hidden_size": 24, "num_classes": 4}, gaussian),
        "shape": ({"depth": 1, "hidden_size": 24, "sample_shape": (1, 4, 4)}, gaussian),
        "flow": ({"depth": 1, "hidden_size": 24, "learn_sigma": False}, flow),
        "x flow": ({"depth": 1, "hidden_size": 24, "learn_sigma": False}, {**flow, "prediction": "x_start"}),
    }
    for name, (config, process) in made.items():
        network = randomise(create_model("DiT-digits/2", **config))
        write_network(folder / f"{name}.safetensors", "DiT-digits/2", network, process=process)
    return {name: folder / f"{name}.safetensors" for name in made}


def opened(path: Path, **settings: Any) -> Pipeline:
    return Pipeline.from_pretrained(path, device="cpu", **{"num_sampling_steps": 4, "cfg_scale": 2.0, **settings})


def sampled(pipeline: Pipeline, **settings: Any) -> Tensor:
    return pipeline.denoise(pipeline.prepare(**settings), 0, range(2), {"y": torch.tensor([1, 2])})


def test_autoguidance_by_the_network_itself_is_no_guidance(files: dict[str, Path]) -> None:
    pipeline = opened(files["large"], guidance="autoguidance", guide_ckpt=files["large"])
    plain = sampled(opened(files["large"]), cfg_scale=1.0, sampler="ddim")
    assert torch.allclose(sampled(pipeline, sampler="ddim", cfg_scale=3.0), plain, atol=1e-5)


def test_a_weaker_network_guides_with_every_accelerator(files: dict[str, Path]) -> None:
    pipeline = opened(files["large"], guidance="autoguidance", guide_ckpt=files["small"])
    plain = sampled(opened(files["large"]), cfg_scale=1.0, sampler="ddim")
    reference = sampled(pipeline, sampler="ddim")
    assert not torch.allclose(reference, plain, atol=1e-3)
    inside = sampled(pipeline, sampler="ddim", guidance_interval=(-1.0, 1001.0))
    assert torch.equal(inside, reference), "an interval of all times"
    for settings in ({"guidance_interval": (200.0, 800.0)}, {"precision": "bf16"}, {"forecast": "2,1"}):
        out = sampled(pipeline, sampler="ddim", **settings)
        assert out.isfinite().all() and not torch.equal(out, reference)
    for kind in ("linear", "cosine"):
        assert not torch.equal(sampled(pipeline, sampler="ddim", guidance_schedule=kind), reference)


def test_cfg_zero_star_is_for_flows_that_predict_the_velocity(files: dict[str, Path]) -> None:
    pipeline = opened(files["flow"])
    steps = {"num_sampling_steps": 25}
    star = sampled(pipeline, guidance="cfg-zero-star", **steps)
    assert star.isfinite().all() and not torch.allclose(star, sampled(pipeline, **steps))
    for name in ("large", "x flow"):
        with pytest.raises(UserError, match="--guidance cfg-zero-star: needs a flow, and a network that predicts the"):
            sampled(opened(files[name]), guidance="cfg-zero-star")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--guidance autoguidance", "--guidance autoguidance: needs a weaker network, --guide-ckpt"),
        ("--guide-ckpt {small}", "has no effect without --guidance autoguidance"),
        ("--guidance autoguidance --guide-ckpt {classes}", "its number of classes is 4, that of --ckpt 10"),
        ("--guidance autoguidance --guide-ckpt {shape}", "its shape of latents is (1, 4, 4), that of --ckpt (1, 8, 8)"),
        ("--guidance autoguidance --guide-ckpt {flow}", "its process is flow, that of --ckpt gaussian"),
        ("--guidance autoguidance --guide-ckpt none.pt", "--guide-ckpt none.pt"),
        ("--guidance-schedule linear --cfg-scale 1", "--guidance-schedule linear: has no effect with --cfg-scale 1"),
        ("--guidance-interval 5 2", "must be two timesteps, LOW < HIGH"),
        ("--guidance-interval 1000 1001", "holds no timestep"),
    ],
)
def test_mistakes_are_one_line(files: dict[str, Path], tmp_path: Path, capsys: Any, argv: str, message: str) -> None:
    given = ["--ckpt", "{large}", "--device", "cpu", "--output", str(tmp_path / "a.npz"), *argv.split()]
    assert run(sample_ddp.main, "sample_ddp.py", [part.format(**files) for part in given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_job_records_the_guide_by_its_content(files: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    argv = f"--ckpt {files['large']} --device cpu --num-fid-samples 2 --num-sampling-steps 2".split()
    argv += f"--guidance autoguidance --guide-ckpt {files['small']} --output {tmp_path / 'a.npz'}".split()
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    assert str(files["small"]) in (tmp_path / "a.json").read_text()
