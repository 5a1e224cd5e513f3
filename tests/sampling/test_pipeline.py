"""What decides when no flag does, what is computed once, and what precision and speed change."""

import argparse
import copy
from pathlib import Path

import pytest
import torch

from diffusion import guided
from models import Network, create_model
from models.acceleration import GraphedNetwork
from models.layers import TimestepEmbedder
from runtime import releases
from runtime.checkpoint import save_checkpoint
from runtime.errors import UserError
from runtime.releases import Preset, Release
from sampling import config as sampling_config
from sampling import pipeline
from sampling.config import SamplingConfig
from sampling.pipeline import Pipeline
from tests.file_server import serving
from tests.golden_data import relative_error
from tests.networks import randomise, small_autoencoder
from tests.test_sampling_scripts import write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "0000001.safetensors")


def make(ckpt: Path, **settings: object) -> Pipeline[SamplingConfig]:
    defaults = {"num_sampling_steps": "4", "cfg_scale": 2.0}
    return Pipeline(SamplingConfig(ckpt=ckpt, **{**defaults, **settings}), CPU)  # type: ignore[arg-type]


def draw(made: Pipeline[SamplingConfig], rows: int = 2) -> torch.Tensor:
    return made.denoise(0, range(rows), torch.arange(rows))


# ----------------------------------------------------------------------------------------------------------------------
# What decides


def test_our_checkpoint_and_the_defaults_decide_everything(ckpt: Path) -> None:
    config = Pipeline(SamplingConfig(ckpt=ckpt), CPU).config
    assert (config.model, config.vae, config.sampler, config.num_sampling_steps) == (
        "DiT-digits/2", "none", "ddpm", "250",
    )  # fmt: skip
    assert (config.cfg_scale, config.guidance_channels, config.guidance_interval) == (1.5, None, None)
    assert (config.image_size, config.num_classes, config.clip_denoised) == (8, 10, True)


@pytest.mark.parametrize(
    ("sampler", "steps", "evaluations"), [("ddpm", "250", 250), ("ddim", "ddim50", 50), ("dpm++", "20", 20)]
)
def test_a_sampler_has_its_own_number_of_steps(ckpt: Path, sampler: str, steps: str, evaluations: int) -> None:
    made = make(ckpt, sampler=sampler, num_sampling_steps=None)
    assert made.config.num_sampling_steps == steps and len(made.sampler.times) == evaluations


def official_file(path: Path, **fields: object) -> Network:
    """A training checkpoint as the official train.py writes it, of a small network."""
    network = randomise(create_model("DiT-debug/2", **fields))
    flags = argparse.Namespace(model="DiT-debug/2", global_seed=0)
    state = {"model": {}, "ema": network.state_dict(), "opt": {"state": {}}, "args": flags}
    torch.save(state, path)
    return network


def test_an_official_training_checkpoint_is_sampled_without_further_flags(tmp_path: Path) -> None:
    path = tmp_path / "0050000.pt"
    network = official_file(path, in_channels=3, num_classes=7, input_size=12, learn_sigma=False)
    made = Pipeline(SamplingConfig(ckpt=path, vae="none", num_sampling_steps="2"), CPU)
    assert (made.config.model, made.num_classes, made.image_shape) == ("DiT-debug/2", 7, (12, 12, 3))
    assert made.config.guidance_channels == 3 and made.multiply_adds == sum(network.multiply_adds().values())
    assert draw(made).shape == (2, 3, 12, 12)


def test_its_images_are_as_many_times_larger_as_the_autoencoder_says(tmp_path: Path) -> None:
    small_autoencoder(tmp_path / "vae")
    official_file(tmp_path / "a.pt")
    settings = SamplingConfig(ckpt=tmp_path / "a.pt", vae=str(tmp_path / "vae"), image_size=16, num_sampling_steps="2")
    made = Pipeline(settings, CPU)
    assert made.image_shape == (16, 16, 3) and made.decode(draw(made)).shape == (2, 3, 16, 16)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """A release in the table, and its file where downloads lie."""
    preset = Preset("ddim", "ddim5", 3.0, channels=2, interval=(100, 900), vae="none")
    row = Release("tiny.pt", "DiT", "DiT-debug/2", 8, "ema", "http://127.0.0.1:1", None, None, preset)
    monkeypatch.setattr(releases, "RELEASES", (*releases.RELEASES, row))
    (tmp_path / "pretrained").mkdir()
    official_file(tmp_path / "pretrained" / row.file, in_channels=3)
    return row


@pytest.mark.parametrize("how", ["tiny", "tiny.pt", "a path", "the model alone"])
def test_a_release_brings_its_preset(how: str, release: Release, tmp_path: Path) -> None:
    folder = tmp_path / "pretrained"
    settings: dict[str, object] = {"ckpt": folder / "tiny.pt" if how == "a path" else Path(how)}
    if how == "the model alone":
        settings = {"model": "DiT-debug/2", "image_size": 8}
    made = Pipeline(SamplingConfig(pretrained_dir=folder, **settings), CPU)  # type: ignore[arg-type]
    config = made.config
    assert made.path == folder / "tiny.pt" and made.release == release
    assert (config.sampler, config.num_sampling_steps, config.vae) == ("ddim", "ddim5", "none")
    assert (config.cfg_scale, config.guidance_channels, config.guidance_interval) == (3.0, 2, (100, 900))


def test_a_release_is_downloaded_by_its_name_and_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    official_file(tmp_path / "there.pt", in_channels=3)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with serving() as server:
        server.content, server.cut = (tmp_path / "there.pt").read_bytes(), [1000]  # the connection breaks off once
        preset = Preset("dpm++", "3", 2.0, channels=3, vae="none")
        row = Release("tiny.pt", "DiT", "DiT-debug/2", 8, "training", server.url, None, None, preset)
        monkeypatch.setattr(releases, "RELEASES", (row,))
        config = SamplingConfig(ckpt=Path("tiny"), pretrained_dir=tmp_path / "pretrained")
        for _ in range(2):
            made = Pipeline(config, CPU)
            assert draw(made).shape == (2, 3, 8, 8) and made.config.sampler == "dpm++"
        assert server.ranges == ["", "bytes=1000-"], "downloaded once, and gone on with"
    assert capsys.readouterr().out.startswith(f"Downloading {server.url}/tiny.pt")


def test_flags_outdo_a_preset_and_its_interval_belongs_to_its_scale(release: Release, tmp_path: Path) -> None:
    def resolved(**settings: object) -> SamplingConfig:
        config = SamplingConfig(ckpt=Path("tiny"), pretrained_dir=tmp_path / "pretrained", **settings)  # type: ignore[arg-type]
        return Pipeline(config, CPU).config

    other = resolved(cfg_scale=2.0, guidance_channels=3, num_sampling_steps="7")
    assert (other.cfg_scale, other.guidance_channels, other.guidance_interval) == (2.0, 3, None)
    assert (other.sampler, other.num_sampling_steps) == ("ddim", "7")
    assert resolved(sampler="dpm++").num_sampling_steps == "20", "the preset's steps are its sampler's"
    assert resolved(guidance_interval=(0.0, 500.0)).guidance_interval == (0.0, 500.0)


def test_flags_that_contradict_a_release_are_refused(release: Release, tmp_path: Path) -> None:
    config = SamplingConfig(ckpt=Path("tiny"), pretrained_dir=tmp_path / "pretrained", model="DiT-XL/2")
    with pytest.raises(UserError, match="--model DiT-XL/2: --ckpt tiny was trained with DiT-debug/2"):
        Pipeline(config, CPU)


def test_a_sampler_of_another_process_is_refused(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = sampling_config.SAMPLERS["ddpm"]._replace(process="other")
    monkeypatch.setitem(sampling_config.SAMPLERS, "elsewhere", row)
    monkeypatch.setitem(sampling_config.PROCESSES, "other", sampling_config.PROCESSES["gaussian"])
    with pytest.raises(UserError, match=r"trained under 'gaussian'; choose from ddpm, ddim, dpm\+\+$"):
        make(ckpt, sampler="elsewhere")


# ----------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_timesteps_are_embedded_in_one_call_for_all_runs(
    ckpt: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [], TimestepEmbedder.forward
    monkeypatch.setattr(TimestepEmbedder, "forward", lambda self, t: calls.append(t) or forward(self, t))  # type: ignore[func-returns-value]
    made = make(ckpt, sampler=sampler, num_sampling_steps="6")
    for _ in range(2):
        draw(made)
    assert [len(t) for t in calls] == [6]


def test_an_interval_evaluates_both_halves_only_where_guidance_acts(ckpt: Path) -> None:
    made, rows = make(ckpt, num_sampling_steps="ddim10", guidance_interval=(250.0, 650.0)), []
    evaluate = made._evaluate
    made._evaluate = lambda x, t, y, state: rows.append((t, len(x))) or evaluate(x, t, y, state)  # type: ignore[func-returns-value]
    draw(made)
    assert rows == [(t, 4 if 250 < t < 650 else 2) for t in range(900, -1, -100)]


@pytest.mark.parametrize(("convention", "bounds"), [("index", (0, 700)), ("unit", (0.3, 1.0))])
def test_an_interval_is_told_to_a_network_in_its_units(convention: str, bounds: tuple[float, float]) -> None:
    assert pipeline._in_network_time((0, 700), convention) == pytest.approx(bounds)  # type: ignore[arg-type]


def test_guidance_gets_what_the_settings_say(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(pipeline, "guided", lambda *args: asked.append(args[2:]) or guided(*args))  # type: ignore[func-returns-value]
    made = make(ckpt, guidance_channels=1, guidance_interval=(0.0, 500.0))
    draw(made)
    assert asked == [(10, 2.0, 1, (0, 500), made.sampler.times, None)]


def test_bf16_is_float32_within_its_precision(ckpt: Path) -> None:
    made = make(ckpt, precision="bf16")
    plain, half = draw(make(ckpt)), draw(made)
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().mean() < 0.05 * plain.abs().mean()
    out = made._evaluate(torch.randn(1, 1, 8, 8), made.sampler.times[0], torch.tensor([0]), None)
    assert out.sample.dtype == torch.bfloat16


def test_compiled_blocks_are_asked_for_by_a_flag(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_blocks, compiled = Network.compile_blocks, []
    monkeypatch.setattr(
        Network,
        "compile_blocks",
        lambda self, backend: compiled.append(len(self.blocks)) or compile_blocks(self, "eager"),
    )
    assert relative_error(draw(make(ckpt, compile=True)), draw(make(ckpt))) < 1e-5
    assert compiled == [1]


def test_compiling_without_a_compiler_is_refused(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"--compile: on a CPU it needs a C\+\+ compiler"):
        SamplingConfig(ckpt=ckpt, compile=True, device="cpu")


def test_recordings_are_asked_for_by_a_flag(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.models.test_acceleration import rerun

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pipeline, "GraphedNetwork", lambda evaluate: GraphedNetwork(evaluate, rerun))
    graphed, plain = make(ckpt, cuda_graphs=True), make(ckpt)
    assert torch.equal(draw(graphed), draw(plain)) and torch.equal(draw(graphed), draw(plain))
    assert graphed._evaluate.recordings == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_are_decoded_a_few_at_a_time(precision: str, tmp_path: Path) -> None:
    small_autoencoder(tmp_path / "vae")
    network = randomise(create_model("DiT-debug/2"))
    meta = {
        "model": {"name": "DiT-debug/2", "num_classes": 10},
        "process": {"name": "gaussian"},
        "data": {"vae": str(tmp_path / "vae"), "image_shape": [3, 16, 16]},
    }
    save_checkpoint(tmp_path / "a.safetensors", {"ema": network.state_dict()}, meta)
    made = make(tmp_path / "a.safetensors", vae_batch_size=2, vae_precision=precision)
    latents, sizes, decode = torch.randn(5, 4, 8, 8), [], copy.copy(made._autoencoder.decode)
    made._autoencoder.decode = lambda latents: sizes.append(len(latents)) or decode(latents)  # type: ignore[method-assign,func-returns-value]
    pixels = made.decode(latents)
    assert sizes == [2, 2, 1] and pixels.shape == (5, 3, 16, 16) and pixels.dtype == torch.float32
    assert relative_error(torch.cat([decode(latents[:3]), decode(latents[3:])]), pixels) < (
        0.05 if precision == "bf16" else 1e-5
    )
