"""Image-to-image and inpainting, with every sampler."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from data.pixels import from_uint8
from diffusion import SAMPLERS
from models import create_model
from runtime.errors import UserError, run
from sampling.editing import Edit, level, noised
from sampling.pipeline import Pipeline
from tests.checkpoints import write_network
from tests.networks import randomise


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    folder, made = tmp_path_factory.mktemp("edit"), {}
    for process in ("gaussian", "flow"):
        network = randomise(create_model("DiT-digits/2", depth=1, hidden_size=24, learn_sigma=False))
        path = write_network(folder / f"{process}.safetensors", "DiT-digits/2", network, process={"name": process})
        made[process] = Pipeline.from_pretrained(path, device="cpu", num_sampling_steps=8, cfg_scale=1.0)
    return made


CLEAN = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_is_the_share_of_steps_and_starts_at_their_noise(pipelines: Any, sampler: str) -> None:
    pipeline = pipelines[SAMPLERS[sampler].process]
    whole, half = (pipeline.prepare(share, sampler=sampler) for share in (1.0, 0.5))
    assert half.sampler.times == whole.sampler.times[-len(half.sampler.times) :]
    steps = [len(dict.fromkeys(run.sampler.times)) for run in (whole, half)]
    assert steps == [8, 4]
    alpha, sigma = level(half.sampler, 0)
    assert 0 < alpha < 1 and 0 < sigma < 1 and alpha > level(whole.sampler, 0)[0]
    noise = torch.randn(2, 1, 8, 8)
    assert torch.allclose(Edit(CLEAN).start(half.sampler, noise), alpha * CLEAN + sigma * noise)
    little = pipeline.prepare(0.01, sampler=sampler)
    assert len(little.sampler.times) == 1
    labels = {"y": torch.tensor([1, 2])}
    out = pipeline.denoise(half, 0, range(2), labels, edit=Edit(CLEAN))
    assert out.shape == (2, 1, 8, 8) and out.isfinite().all()
    assert not torch.equal(out, pipeline.denoise(half, 1, range(2), labels, edit=Edit(CLEAN)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_mask_keeps_is_kept_bit_by_bit(pipelines: Any, sampler: str) -> None:
    pipeline, mask = pipelines[SAMPLERS[sampler].process], torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    seen: list[torch.Tensor] = []
    out = pipeline.denoise(
        pipeline.prepare(sampler=sampler),
        0,
        range(2),
        {"y": torch.tensor([1, 2])},
        on_step=lambda i, x, _: seen.append(x),
        edit=Edit(CLEAN, mask),
    )
    assert torch.equal(out[..., :4], CLEAN[..., :4].expand(2, 1, 8, 4)) and torch.equal(seen[-1], out)
    assert not torch.allclose(out[..., 4:], CLEAN[..., 4:].expand(2, 1, 8, 4), atol=0.1)


def test_a_table_has_levels_of_its_own_and_no_strength(pipelines: Any, tmp_path: Path) -> None:
    pipeline = pipelines["flow"]
    run_ = pipeline.prepare(solver_table="SiT-XL/2", num_sampling_steps=5)
    noise = torch.randn(1, 1, 8, 8)
    assert torch.allclose(noised(run_.sampler, 0, CLEAN, noise), noise)
    with pytest.raises(UserError, match="followed from its first step; --strength 0.5 needs a --sampler"):
        pipeline.prepare(0.5, solver_table="SiT-XL/2", num_sampling_steps=5)


@pytest.fixture
def files(pipelines: Any, tmp_path: Path) -> dict[str, Path]:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "photo.png")
    hole = np.zeros((8, 8), np.uint8)
    hole[:, 4:] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    (tmp_path / "text.png").write_text("text")
    return {"ckpt": pipelines["gaussian"].info.path, **{p.stem: p for p in tmp_path.glob("*.png")}}


def picture(files: dict[str, Path], folder: Path, *argv: str) -> Any:
    given = f"--ckpt {files['ckpt']} --num-sampling-steps 4 --device cpu --output {folder / 'a.png'} --cfg-scale 1"
    assert run(sample.main, "sample.py", [*given.split(), "--overwrite", *argv]) == 0
    with Image.open(folder / "a.png") as made:
        return np.asarray(made).copy()


def test_batches_make_the_same_picture(files: dict[str, Path], tmp_path: Path) -> None:
    labels = ["--class-labels", "1", "2", "3", "4", "5"]
    whole = picture(files, tmp_path, *labels)
    strip = ["--trajectory", str(tmp_path / "steps.png")]
    for size in ("1", "2", "5", "9"):
        parts = picture(files, tmp_path, *labels, *strip, "--batch-size", size)
        assert np.abs(parts.astype(int) - whole).max() <= 1  # rounding of other batches


def test_flags_start_from_an_image_and_keep_a_part(files: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    edits: list[Edit | None] = []
    denoise = Pipeline.denoise
    monkeypatch.setattr(
        Pipeline, "denoise", lambda self, *args, **k: edits.append(k["edit"]) or denoise(self, *args, **k)
    )
    plain = picture(files, tmp_path, "--class-labels", "3")
    varied = picture(files, tmp_path, "--class-labels", "3", "--init-image", str(files["photo"]), "--strength", "0.5")
    masked = ["--init-image", str(files["photo"]), "--mask", str(files["hole"])]
    kept = picture(files, tmp_path, "--class-labels", "3", *masked)
    assert not np.array_equal(plain, varied) and not np.array_equal(varied, kept)
    assert edits[0] is None and edits[1] is not None and edits[2] is not None and edits[1].mask is None
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) * 4
    assert torch.equal(edits[1].clean, from_uint8(pixels))
    assert edits[2].mask is not None and edits[2].mask[0, 0, 0].tolist() == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--strength 0.5", "--strength 0.5: has no effect without --init-image"),
        ("--mask {hole}", "has no effect without --init-image"),
        ("--init-image {photo} --strength 0", "--strength 0.0: must be in (0, 1]"),
        ("--init-image {photo} --strength 1.5", "--strength 1.5: must be in (0, 1]"),
        ("--init-image {text}", "text.png: cannot be read: not an image of a known format"),
        ("--init-image none.png", "--init-image none.png: No such file"),
        ("--init-image {photo} --mask none.png", "--mask none.png: No such file"),
        ("--batch-size 0", "--batch-size 0: must be at least 1"),
    ],
)
def test_mistakes_are_one_line(files: dict[str, Path], tmp_path: Path, capsys: Any, argv: str, message: str) -> None:
    given = f"--ckpt {files['ckpt']} --device cpu --output {tmp_path / 'b.png'} {argv}".format(**files).split()
    assert run(sample.main, "sample.py", given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "b.png").exists()
