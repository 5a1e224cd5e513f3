"""Which checkpoint, encoder and sizes settings open, and what decides how it is sampled."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from models import Network, create_model
from runtime import releases
from runtime.errors import UserError
from runtime.releases import Preset, Release
from sampling.config import SAMPLERS
from sampling.pipeline import Pipeline
from sampling.run import PreparedRun
from tests.file_server import serving
from tests.networks import randomise, small_autoencoder


def pipeline(source: str | Path, **settings: Any) -> Pipeline:
    return Pipeline.from_pretrained(source, device="cpu", **settings)


def latents(made: Pipeline, run: PreparedRun) -> torch.Tensor:
    return made.denoise(run, 0, range(2), {"y": torch.tensor([1, 2])})


def test_our_checkpoint_and_the_defaults_decide_everything(ckpt: Path) -> None:
    made = pipeline(ckpt)
    config = made.prepare().config
    assert (config.model, config.encoder.vae, config.sampler, config.num_sampling_steps) == (
        "DiT-digits/2", "none", "ddpm", "250",
    )  # fmt: skip
    guidance = config.guidance
    assert (guidance.cfg_scale, guidance.guidance_channels, guidance.guidance_interval) == (1.5, None, None)
    assert (made.image_shape, made.num_classes, made.info.step) == ((1, 8, 8), 10, 7)


@pytest.mark.parametrize(
    ("sampler", "steps", "evaluations"), [("ddpm", "250", 250), ("ddim", "ddim50", 50), ("dpm++", "20", 20)]
)
def test_a_sampler_has_a_number_of_steps(ckpt: Path, sampler: str, steps: str, evaluations: int) -> None:
    run = pipeline(ckpt).prepare(sampler=sampler)
    assert run.config.num_sampling_steps == steps and len(run.sampler.times) == evaluations


def test_a_sampler_of_another_process_is_refused(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "ddim", SAMPLERS["ddim"]._replace(process="other"))
    with pytest.raises(UserError, match=r"trained under 'gaussian'; choose from ddpm, dpm\+\+, unipc, deis, edm$"):
        pipeline(ckpt, sampler="ddim")


# ----------------------------------------------------------------------------------------------------------------------
# Files of other code


def official_file(path: Path, **fields: object) -> Network:
    """A training checkpoint as the official train.py writes it, of a small network."""
    network = randomise(create_model("DiT-debug/2", **fields))
    flags = argparse.Namespace(model="DiT-debug/2", global_seed=0)
    state = {"model": {}, "ema": network.state_dict(), "opt": {"state": {}}, "args": flags}
    torch.save(state, path)
    return network


def test_an_official_training_checkpoint_is_sampled_without_further_flags(tmp_path: Path) -> None:
    path = tmp_path / "0050000.pt"
    network = official_file(path, sample_shape=(3, 12, 12), num_classes=7, learn_sigma=False)
    made = pipeline(str(path), vae="none", num_sampling_steps=2)
    assert (made.info.model, made.num_classes, made.image_shape) == ("DiT-debug/2", 7, (3, 12, 12))
    assert made.network.cost() == network.cost()
    run = made.prepare()
    assert run.config.guidance.guidance_channels == 3 and latents(made, run).shape == (2, 3, 12, 12)


@pytest.mark.parametrize("size", [{}, {"image_size": 16}])
def test_its_images_are_as_many_times_larger_as_the_autoencoder_says(size: dict[str, int], tmp_path: Path) -> None:
    small_autoencoder(tmp_path / "vae")
    official_file(tmp_path / "a.pt")
    made = pipeline(tmp_path / "a.pt", vae=tmp_path / "vae", num_sampling_steps=2, **size)
    assert made.image_shape == (3, 16, 16) and made.sample([1, 2]).shape == (2, 16, 16, 3)
    assert made.encode(torch.zeros(2, 3, 16, 16)).shape == (2, 4, 8, 8)


def test_a_size_that_the_weights_do_not_have_is_refused(tmp_path: Path) -> None:
    official_file(tmp_path / "a.pt", sample_shape=(3, 8, 8))
    with pytest.raises(UserError, match=rf"--ckpt {tmp_path}/a.pt.*pos_embed"):
        pipeline(tmp_path / "a.pt", vae="none", image_size=12)
    with pytest.raises(UserError, match="multiples of patch_size 2; nearest"):
        pipeline(tmp_path / "a.pt", vae="none", image_size=9)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """A release in the table, and its file among the downloads."""
    preset = Preset("ddim", "ddim5", 3.0, channels=2, interval=(100, 900), vae="none", options={"eta": 0.5})
    row = Release("tiny.pt", "DiT", "DiT-debug/2", 8, "ema", "http://127.0.0.1:1", None, None, preset)
    monkeypatch.setattr(releases, "RELEASES", (*releases.RELEASES, row))
    (tmp_path / "pretrained").mkdir()
    official_file(tmp_path / "pretrained" / row.file, sample_shape=(3, 8, 8))
    return row


@pytest.mark.parametrize("how", ["tiny", "tiny.pt", "a path"])
def test_a_release_brings_its_preset(how: str, release: Release, tmp_path: Path) -> None:
    folder = tmp_path / "pretrained"
    made = pipeline(folder / "tiny.pt" if how == "a path" else how, pretrained_dir=folder)
    run = made.prepare()
    config, guidance = run.config, run.config.guidance
    assert made.info.path == folder / "tiny.pt" and made.info.release == release
    assert (config.sampler, config.num_sampling_steps, config.encoder.vae) == ("ddim", "ddim5", "none")
    assert (guidance.cfg_scale, guidance.guidance_channels, guidance.guidance_interval) == (3.0, 2, (100, 900))
    assert run.sampler.eta == 0.5  # type: ignore[attr-defined]


def test_flags_override_a_preset_and_its_interval_belongs_to_its_scale(release: Release, tmp_path: Path) -> None:
    made = pipeline("tiny", pretrained_dir=str(tmp_path / "pretrained"))
    other = made.prepare(cfg_scale=2.0, guidance_channels=3, num_sampling_steps=7).config
    guidance = other.guidance
    assert (guidance.cfg_scale, guidance.guidance_channels, guidance.guidance_interval) == (2.0, 3, None)
    assert (other.sampler, other.num_sampling_steps) == ("ddim", "7")
    assert made.prepare(sampler="dpm++").config.num_sampling_steps == "20", "the preset's steps are its sampler's"
    assert made.prepare(guidance_interval=(0.0, 500.0)).config.guidance.guidance_interval == (0.0, 500.0)
    assert made.prepare(eta=0.0).sampler.eta == 0.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "DiT-XL/2"}, "--model DiT-XL/2: --ckpt tiny was trained with DiT-debug/2"),
        ({"image_size": 16}, "--image-size 16: --ckpt .*tiny.pt was trained with 8"),
    ],
)
def test_flags_that_contradict_a_release_are_refused(
    settings: dict[str, Any], message: str, release: Release, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline("tiny", pretrained_dir=tmp_path / "pretrained", **settings)


def test_an_autoencoder_that_makes_other_sizes_is_refused(release: Release, tmp_path: Path) -> None:
    official_file(tmp_path / "pretrained" / "tiny.pt")
    small_autoencoder(tmp_path / "vae")
    with pytest.raises(UserError, match=r"decodes to images \(3, 16, 16\); the network was trained on \(3, 8, 8\)"):
        pipeline("tiny", pretrained_dir=tmp_path / "pretrained", vae=tmp_path / "vae")


def test_a_release_is_downloaded_by_its_name_and_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    official_file(tmp_path / "there.pt", sample_shape=(3, 8, 8))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serving() as server:
        server.content, server.cut = (tmp_path / "there.pt").read_bytes(), [1000]  # the connection breaks off once
        preset = Preset("dpm++", "3", 2.0, channels=3, vae="none")
        row = Release("tiny.pt", "DiT", "DiT-debug/2", 8, "training", server.url, None, None, preset)
        monkeypatch.setattr(releases, "RELEASES", (row,))
        for _ in range(2):
            made = pipeline("tiny", pretrained_dir=tmp_path / "pretrained")
            run = made.prepare()
            assert latents(made, run).shape == (2, 3, 8, 8) and run.config.sampler == "dpm++"
        assert server.ranges == ["", "bytes=1000-"], "downloaded once, and resumed"
    assert capsys.readouterr().out.startswith(f"Downloading {server.url}/tiny.pt")
