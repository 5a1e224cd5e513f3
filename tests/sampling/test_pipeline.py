"""The pipeline that people use: sampling, encoding and decoding, settings from call to call, and their mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
import sample_ddp
from models import Network, create_model
from runtime.errors import UserError, run
from sampling import pipeline as pipeline_module
from sampling.pipeline import KEPT_RUNS, Pipeline
from tests import format1
from tests.checkpoints import write_network
from tests.golden_data import relative_error
from tests.networks import randomise, small_autoencoder
from tests.toys import TextToy


@pytest.fixture(scope="module")
def pipeline(ckpt: Path) -> Pipeline:
    return Pipeline.from_pretrained(str(ckpt), device="cpu", num_sampling_steps=4)


# ----------------------------------------------------------------------------------------------------------------------
# Images


def test_a_checkpoint_of_the_earlier_format_is_sampled(tmp_path: Path) -> None:
    path = format1.write_checkpoint("dit", tmp_path / "0000002.safetensors")
    images = Pipeline.from_pretrained(path, device="cpu").sample([1, 0], num_sampling_steps=4)
    assert images.shape == (2, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 0


@pytest.mark.parametrize(
    "settings", [{}, {"sampler": "ddim", "eta": 0.5, "cfg_scale": 3.0}, {"precision": "bf16", "weights": "model"}]
)
def test_images_are_those_of_sample_ddp(settings: dict[str, Any], ckpt: Path, tmp_path: Path) -> None:
    """To the bit, for the same seed, labels, settings and batch size."""
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), "--device", "cpu", "--num-sampling-steps", "4"]
    argv += "--balanced-labels --num-fid-samples 7 --per-proc-batch-size 3 --global-seed 5".split()
    argv += [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    pipeline = Pipeline.from_pretrained(ckpt, device="cpu", num_sampling_steps=4, **settings)
    images = pipeline.sample(range(7), seed=5, batch_size=3)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(images, file["arr_0"]) and file["arr_1"].tolist() == [*range(7)]


def test_an_image_depends_on_its_number_seed_and_label(pipeline: Pipeline) -> None:
    images = pipeline.sample([3, 3, 4], seed=1)
    assert len({image.tobytes() for image in images}) == 3
    assert np.array_equal(pipeline.sample(torch.tensor([3, 3, 4]), seed=1), images)
    assert np.array_equal(pipeline.sample(np.array([3, 3, 4]), seed=1, batch_size=8), pipeline.sample([3, 3, 4], 1))
    assert not np.array_equal(pipeline.sample([3, 3, 4], seed=2), images)


def test_a_hook_sees_every_step_and_may_change_it(pipeline: Pipeline) -> None:
    seen = []

    def on_step(i: int, x: Tensor, out: object) -> Tensor | None:
        seen.append(i)
        return torch.full_like(x, 0.5) if i == 3 else None

    assert (pipeline.sample([1, 2], on_step=on_step) == 191).all() and seen == [0, 1, 2, 3]


def test_a_text_network_is_sampled_with_its_conditioning(ckpt: Path, pipeline: Pipeline) -> None:
    network = TextToy((1, 8, 8)).requires_grad_(False)
    made = Pipeline(network, pipeline.info, pipeline.encoder, pipeline._given)
    text, mask = torch.randn(3, 5, 6), torch.ones(3, 5)
    null = {"text": torch.zeros(3, 5, 6), "text_mask": mask}
    images = made.sample(text=text, text_mask=mask, null=null, batch_size=2)
    assert images.shape == (3, 8, 8, 1) and len(network.seen[0][1]["text"]) == 4
    assert made.sample(text=text, text_mask=mask, cfg_scale=1).shape == images.shape
    with pytest.raises(UserError, match="null: unconditional rows of text come from the data"):
        made.sample(text=text, text_mask=mask)
    with pytest.raises(UserError, match="text_mask: missing; conditioning of this network: text, text_mask"):
        made.sample(text=text, null=null)
    with pytest.raises(UserError, match="labels: unknown"):
        made.sample([1, 2], text=text, text_mask=mask, null=null)
    with pytest.raises(UserError, match="must have one row per image"):
        made.sample(text=text, text_mask=mask[:2], null=null)


# ----------------------------------------------------------------------------------------------------------------------
# Settings from call to call


def test_a_changed_setting_prepares_a_run_and_the_network_stays(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, prepare_run = [], pipeline_module.prepare_run
    monkeypatch.setattr(pipeline_module, "prepare_run", lambda *args: prepared.append(args[3]) or prepare_run(*args))  # type: ignore[func-returns-value]
    monkeypatch.setattr(models, "create_model", None)
    network = pipeline.network
    runs = [pipeline.prepare(sampler="ddim", cfg_scale=2 + k) for k in range(KEPT_RUNS)]
    assert len(prepared) == KEPT_RUNS and len({id(each) for each in runs}) == KEPT_RUNS
    assert [pipeline.prepare(sampler="ddim", cfg_scale=2 + k) for k in range(KEPT_RUNS)] == runs
    pipeline.prepare(sampler="ddim", cfg_scale=2.0)  # the one used longest ago is forgotten first
    pipeline.prepare(sampler="ddim", cfg_scale=9)
    assert pipeline.prepare(sampler="ddim", cfg_scale=2) is runs[0] and len(prepared) == KEPT_RUNS + 1
    pipeline.prepare(sampler="ddim", cfg_scale=3)
    assert len(prepared) == KEPT_RUNS + 2 and len(pipeline._runs) == KEPT_RUNS
    assert pipeline.network is network


def test_results_do_not_depend_on_settings_used_before(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sampling.config.can_compile", lambda device_type: True)
    monkeypatch.setattr("sampling.run.COMPILE_BACKEND", "eager")
    others: list[dict[str, Any]] = [
        {"precision": "bf16"}, {"compile": True}, {"cache_interval": 2}, {"guidance_interval": (200, 600)},
        {"sampler": "ddim", "eta": 0.5}, {"num_sampling_steps": 3}, {},
    ]  # fmt: skip

    def opened() -> Pipeline:
        return Pipeline.from_pretrained(ckpt, device="cpu", num_sampling_steps=4, cache_depth=1)

    fresh = [opened().sample([1, 2], **settings) for settings in others]
    used = opened()
    for settings, expected in [*zip(others, fresh, strict=True), *reversed([*zip(others, fresh, strict=True)])]:
        assert np.array_equal(used.sample([1, 2], **settings), expected), settings


def test_settings_of_the_pipeline_are_where_a_run_starts(ckpt: Path) -> None:
    pipeline = Pipeline.from_pretrained(ckpt, device="cpu", sampler="ddim", eta=0.5, num_sampling_steps=3, cfg_scale=2)
    run = pipeline.prepare()
    assert (run.config.sampler, run.sampler.eta, len(run.table), run.table[0].scale) == ("ddim", 0.5, 3, 2.0)  # type: ignore[attr-defined]
    assert pipeline.prepare(sampler="ddim", eta=0.5) is run and pipeline.prepare(cfg_scale=2.0) is run
    assert pipeline.prepare(eta=0).sampler.eta == 0  # type: ignore[attr-defined]
    assert pipeline.prepare(sampler="ddpm").config.sampler == "ddpm", "eta goes with its sampler"


def test_groups_of_settings_are_changed_at_once_and_paths_may_be_strings(ckpt: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(ckpt, device="cpu", cache_depth=1, num_sampling_steps=4)
    caching = pipeline.prepare(sharing="cheapest", sharing_interval=2, sharing_dir=str(tmp_path)).config.caching
    assert (caching.sharing, caching.sharing_interval, caching.sharing_dir) == ("cheapest", 2, tmp_path)
    grid = pipeline.prepare(sampler="unipc", time_grid="trailing", num_sampling_steps="5")
    assert grid.sampler.times == (999, 799, 599, 399, 199), "a flow's sampler has a flag of that name, too"
    run = pipeline.prepare(guidance_interval=[100, 900])
    assert run is pipeline.prepare(guidance_interval=(100.0, 900.0))


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (None, {}, "labels: missing; conditioning of this network: labels"),
        ([], {}, "labels and conditioning: must have one row per image, and at least one"),
        ([3, 10], {}, "labels 10: the model has classes 0 to 9"),
        ([-1], {}, "labels -1: the model has classes 0 to 9"),
        ([1.5], {}, r"labels \[1.5\]: must be whole numbers, one per image"),
        (3, {}, "labels 3: must be whole numbers, one per image"),
        ([1], {"text": torch.zeros(1)}, "text: unknown; conditioning of this network: labels"),
        ([1], {"batch_size": 0}, "batch_size 0: must be at least 1"),
        ([1], {"cfg": 2}, "cfg: unknown setting"),
        ([1], {"cfg_scale": "2"}, "cfg_scale = '2': expected float"),
        ([1], {"cfg_scale": 0.5}, "--cfg-scale 0.5: must be at least 1"),
        ([1], {"time_grid": "odd"}, "time_grid = 'odd': choose from uniform, trailing"),
        ([1], {"sampler": "magic"}, "sampler = 'magic': choose from ddpm, ddim"),
        ([1], {"sampler": "euler"}, "--sampler euler: --ckpt was trained under 'gaussian'; choose from ddpm, ddim"),
        ([1], {"eta": 0.5}, "--eta 0.5: is a setting of the sampler ddim; this run uses ddpm"),
        ([1], {"sampler": "ddim", "eta": 5}, r"--eta 5.0 --num-sampling-steps 4: eta must be in \[0, 1\]"),
        ([1], {"num_sampling_steps": 0}, "--num-sampling-steps 0: step spec '0'"),
        ([1], {"sharing": "cheapest"}, "--sharing cheapest: has no effect without --sharing-interval"),
        ([1], {"cache_interval": 2}, "--cache-interval 2: this network keeps nothing to reuse; give --cache-depth"),
        ([1], {"cuda_graphs": True}, "--cuda-graphs: needs a CUDA device"),
        ([1], {"weights": "model"}, "weights: belongs to the pipeline; give it to Pipeline.from_pretrained"),
        ([1], {"vae_batch_size": 2}, "vae_batch_size: belongs to the pipeline"),
        ([1], {"cache_depth": 1}, "cache_depth: belongs to the pipeline"),
        ([1], {"device": "cpu"}, "device: belongs to the pipeline"),
    ],
)
def test_a_mistake_is_one_line(labels: Any, settings: dict[str, Any], message: str, pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match=f"^{message}") as error:
        pipeline.sample(labels, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("nothing.pt", {}, "--ckpt nothing.pt: no such file"),
        ("DiT-XL-2-265x256", {}, "no such file; released, and close to it: DiT-XL-2-256x256"),
        (None, {"device": "cuda"}, "--device cuda: PyTorch finds no CUDA device"),
        (None, {"vae": "/nowhere"}, "--vae /nowhere: no such folder"),
        (None, {"vae": "ema"}, "--vae ema: the network's channels are 1, those of stabilityai/sd-vae-ft-ema 4"),
        (None, {"cache_depth": 9}, "--cache-depth 9: cache_depth 9 must lie in 1..1, half the depth"),
        (None, {"weights": "ema-0.5"}, "ema-0.5"),
        (None, {"sampler": "heun"}, "--sampler heun: --ckpt was trained under 'gaussian'"),
        (None, {"sample_shape": (1, 9, 9)}, "sample_shape: unknown setting"),
    ],
)
def test_a_checkpoint_that_cannot_be_opened_is_one_line(
    source: str | None, settings: dict[str, Any], message: str, ckpt: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        Pipeline.from_pretrained(source or ckpt, **{"device": "cpu", **settings})
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Encoder


@pytest.fixture(scope="module")
def latent_ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    small_autoencoder(folder / "vae")
    network: Network = randomise(create_model("DiT-debug/2"))
    meta = {"encoder": {"name": str(folder / "vae")}, "data": {"image_shape": [3, 16, 16], "classes": None}}
    return write_network(folder / "a.safetensors", "DiT-debug/2", network, **meta)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_are_decoded_a_few_at_a_time(precision: str, latent_ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.from_pretrained(latent_ckpt, device="cpu", vae_batch_size=2, vae_precision=precision)
    latents, sizes, decode = torch.randn(5, 4, 8, 8), [], pipeline.encoder.decode
    monkeypatch.setattr(pipeline.encoder, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))  # type: ignore[func-returns-value]
    pixels = pipeline.decode(latents)
    assert sizes == [2, 2, 1] and pixels.shape == (5, 3, 16, 16) and pixels.dtype == torch.float32
    whole = torch.cat([decode(latents[:3]), decode(latents[3:])])
    assert relative_error(whole, pixels) < (0.05 if precision == "bf16" else 1e-5)


def test_encoding_samples_the_posterior_by_seed_and_row(latent_ckpt: Path) -> None:
    pipeline = Pipeline.from_pretrained(latent_ckpt, device="cpu")
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    latents = pipeline.encode(pixels)
    assert latents.shape == (3, 4, 8, 8) and torch.equal(pipeline.encode(pixels), latents)
    assert torch.equal(pipeline.encode(pixels / 127.5 - 1), latents)
    assert not torch.equal(pipeline.encode(pixels, seed=1), latents)
    mean, std = pipeline.encoder.encode_pixels(pixels).chunk(2, dim=1)
    noise = (latents - mean * pipeline.encoder.scaling.scaling_factor) / (std * pipeline.encoder.scaling.scaling_factor)
    assert abs(noise.mean()) < 0.1 and 0.9 < noise.std() < 1.1
    start = pipeline.prepare(num_sampling_steps=2)
    seen: list[Tensor] = []
    start.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pipeline.denoise(start, 0, range(3), {"y": torch.arange(3)})
    assert abs((seen[0][:3] * noise).mean()) < 0.1, "not the noise that sampling starts from"
