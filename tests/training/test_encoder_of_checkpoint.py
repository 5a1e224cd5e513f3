"""A checkpoint and the autoencoder that it was trained with."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from runtime.checkpoint import read_checkpoint
from runtime.errors import UserError
from sampling.pipeline import Pipeline
from tests import runs
from tests.networks import small_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    small_autoencoder(folder / "vae")
    (folder / "images/a").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(folder / f"images/a/{i}.png")
    assert runs.start(folder / "runs", *argv(folder), "--max-steps", 2, "--ckpt-every", 1) == 0
    return folder


def argv(folder: Path) -> list[str]:
    line = f"--data-path {folder}/images --vae {folder}/vae --image-size 16 --model DiT-debug/2 --num-classes 1"
    return [*line.split(), *"--global-batch-size 2 --device cpu --num-workers 0".split()]


@pytest.fixture(params=["encoder", "scale", "decoder"])
def changed(request: pytest.FixtureRequest, trained: Path) -> tuple[Path, str]:
    """The folder, in which the autoencoder was replaced after the training."""
    original = shutil.copytree(trained / "vae", trained / "original", dirs_exist_ok=True)
    request.addfinalizer(lambda: shutil.copytree(original, trained / "vae", dirs_exist_ok=True))
    weights = load_file(trained / "vae" / WEIGHTS)
    key = {"encoder": "quant_conv.bias", "decoder": "decoder.conv_in.bias"}.get(request.param)
    if key is not None:
        save_file({**weights, key: weights[key] + 1}, trained / "vae" / WEIGHTS, metadata={"format": "pt"})
    else:
        config = trained / "vae/config.json"
        config.write_text(config.read_text().replace("0.25", "0.5"))
    return trained, request.param


def test_another_autoencoder_is_refused_where_nobody_asked_for_it(changed: tuple[Path, str]) -> None:
    folder, part = changed
    ckpt = runs.checkpoint(folder / "runs", 2)
    if part == "decoder":  # of which there may be several
        for precision in ("fp32", "bf16"):
            with pytest.warns(UserWarning, match=f"--vae .*vae: its decoder has changed since {ckpt} was trained"):
                Pipeline.from_pretrained(ckpt, device="cpu", vae_precision=precision)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Pipeline.from_pretrained(ckpt, device="cpu", vae=folder / "vae")
        return
    words = rf"{ckpt}: was trained with another autoencoder \(the autoencoder .*vae' (is not the one|has LatentScaling)"
    with pytest.raises(UserError, match=words) as error:
        Pipeline.from_pretrained(ckpt, device="cpu")
    assert f"give its own by --vae, or --vae {folder / 'vae'} to decode with this one" in str(error.value)
    with pytest.warns(UserWarning, match="was trained with another autoencoder"):
        Pipeline.from_pretrained(ckpt, device="cpu", vae=folder / "vae")


def test_training_is_not_resumed_with_another_autoencoder(
    changed: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, part = changed
    shutil.copytree(folder / "runs", tmp_path / "runs")
    runs.checkpoint(tmp_path / "runs", 2).unlink()
    status = runs.start(tmp_path / "runs", *argv(folder), "--max-steps", 2, "--ckpt-every", 1, "--resume", "auto")
    if part == "decoder":
        assert status == 0
    else:
        assert status == 2 and "was trained with another autoencoder: the autoencoder" in runs.the_error(capsys)


def test_a_start_from_weights_of_another_autoencoder_is_said(changed: tuple[Path, str], tmp_path: Path) -> None:
    folder, part = changed
    ckpt = runs.checkpoint(folder / "runs", 2)
    assert runs.start(tmp_path, *argv(folder), "--max-steps", 1, "--init-from", ckpt) == 0
    assert ("trained with another autoencoder: the autoencoder" in runs.log(tmp_path)) == (part != "decoder")


def test_its_own_autoencoder_may_move_and_be_rounded(trained: Path, tmp_path: Path) -> None:
    ckpt = runs.checkpoint(trained / "runs", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline.from_pretrained(ckpt, device="cpu", vae_precision="bf16")
        Pipeline.from_pretrained(ckpt, device="cpu", vae=shutil.copytree(trained / "vae", tmp_path / "moved"))


def test_a_run_with_images_encoded_in_bf16_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*argv(trained), "--log-every", 1, "--max-steps", 4, "--lr", 0.01]
    assert runs.start(tmp_path / "exact", *flags) == 0
    assert runs.start(tmp_path / "lower", *flags, "--vae-precision", "bf16") == 0
    exact, lower = (read_checkpoint(runs.checkpoint(tmp_path / name, 4)).meta for name in ("exact", "lower"))
    assert exact is not None and lower is not None
    assert lower["autoencoder"] == {**exact["autoencoder"], "precision": "bf16"}
    assert runs.losses(tmp_path / "lower") != runs.losses(tmp_path / "exact")
    for step, loss in runs.losses(tmp_path / "exact").items():
        assert runs.losses(tmp_path / "lower")[step] == pytest.approx(loss, rel=0.01)
    capsys.readouterr()
    assert runs.start(tmp_path / "lower", *flags, "--resume", "auto") == 2
    assert "--vae-precision (bf16, fp32)" in runs.the_error(capsys)
    Pipeline.from_pretrained(runs.checkpoint(tmp_path / "lower", 4), device="cpu")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--vae-precision bf16: has no effect, because these data are not encoded"),
        ("--device mps", "--vae-precision bf16: not with --device mps"),
    ],
)
def test_a_precision_without_an_encoder_is_one_line(
    flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"--dataset digits --model DiT-digits/2 --vae-precision bf16 --device cpu {flags}"
    assert runs.start(tmp_path, *line.split()) == 2
    assert words in runs.the_error(capsys) and not list(tmp_path.iterdir())
