"""Clips from sample.py, sample_ddp.py and the pipeline, of a small family that only this test registers."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import models
import sample
import sample_ddp
from data.pixels import enlarge, grid, to_picture
from data.words import Words
from models import create_model
from runtime.errors import UserError, run
from sampling.pipeline import Pipeline
from sampling.plan import COUNTS, JobSettings, plan_job
from tests import clips
from tests.checkpoints import write_network
from tests.clips import CHANNELS, FRAMES, HEIGHT, WIDTH, ClipConfig, write_clips
from tests.golden_data import relative_error
from tests.jobs import fail_after
from tests.networks import debug_name, debug_network, labelled, randomise, small_autoencoder
from tests.processes import run_ranks

FACTOR = sample.SMALLEST // HEIGHT
JOB = "--num-fid-samples 7 --num-sampling-steps 3 --per-proc-batch-size 2 --device cpu".split()


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    clips.register(monkeypatch.setitem)


@pytest.fixture
def clip_ckpt(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return write_clips(folder / "0000001.safetensors")


def draw(ckpt: Path, output: Path, *argv: str) -> Any:
    assert run(sample_ddp.main, "sample_ddp.py", ["--ckpt", str(ckpt), "--output", str(output), *JOB, *argv]) == 0
    with np.load(output, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline


def test_clips_of_the_pipeline_are_those_of_sample_ddp(clip_ckpt: Path, tmp_path: Path) -> None:
    drawn = draw(clip_ckpt, tmp_path / "a.npz", "--balanced-labels", "--global-seed", "5")
    pipeline = Pipeline.from_pretrained(clip_ckpt, device="cpu", num_sampling_steps=3)
    assert pipeline.image_shape == (FRAMES, CHANNELS, HEIGHT, WIDTH)
    samples = pipeline.sample(range(7), seed=5, batch_size=2)
    assert samples.shape == (7, FRAMES, HEIGHT, WIDTH, CHANNELS) and samples.dtype == np.uint8
    assert np.array_equal(samples, drawn["arr_0"]) and drawn["arr_1"].tolist() == [*range(7)]
    latents = pipeline.denoise(pipeline.prepare(), 5, [0, 1], {"y": torch.arange(2)})
    assert np.array_equal(to_picture(pipeline.decode(latents)).numpy(), samples[:2])
    assert json.loads((tmp_path / "a.json").read_text())["run"]["clips"] == 7


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "edm"])
def test_a_clip_depends_on_its_number_seed_and_label_alone(sampler: str, clip_ckpt: Path) -> None:
    pipeline = Pipeline.from_pretrained(clip_ckpt, device="cpu", num_sampling_steps=3, sampler=sampler)
    samples = pipeline.sample([3, 3, 4], seed=1)
    assert len({clip.tobytes() for clip in samples}) == 3
    assert all(len({frame.tobytes() for frame in clip}) == FRAMES for clip in samples)
    assert np.array_equal(pipeline.sample([3, 3, 4], seed=1, batch_size=1), samples)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_frames_are_decoded_so_many_at_a_time(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_autoencoder(tmp_path / "vae")
    config = ClipConfig(sample_shape=(3, 4, 4, 6))
    meta = {"encoder": {"name": str(tmp_path / "vae")}, "data": {"image_shape": [3, 3, 8, 12], "classes": None}}
    ckpt = write_clips(tmp_path / "a.safetensors", config, **meta)
    pipeline = Pipeline.from_pretrained(ckpt, device="cpu", vae_batch_size=rows)
    assert pipeline.image_shape == (3, 3, 8, 12)
    latents, sizes, decode_rows = torch.randn(3, 3, 4, 4, 6), [], pipeline.encoder.decode_rows

    def counted(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return decode_rows(z)

    monkeypatch.setattr(pipeline.encoder, "decode_rows", counted)
    pixels = pipeline.decode(latents)
    assert sizes == {1: [1] * 9, 4: [4, 4, 1], 100: [9]}[rows] and pixels.shape == (3, 3, 3, 8, 12)
    for clip, frame in ((0, 0), (1, 2), (2, 1)):
        (alone,) = pipeline.encoder.decode(latents[clip, frame][None])
        assert relative_error(alone, pixels[clip, frame]) < 1e-5
    assert pipeline.sample([1], num_sampling_steps=2).shape == (1, 3, 8, 12, 3)


def test_a_release_tells_the_size_of_frames_but_not_their_number(tmp_path: Path) -> None:
    meta = {"data": {"image_shape": [CHANNELS, HEIGHT, WIDTH], "classes": None}}
    pipeline = Pipeline.from_pretrained(write_clips(tmp_path / "a.safetensors", **meta), device="cpu")
    assert pipeline.image_shape == (FRAMES, CHANNELS, HEIGHT, WIDTH)


def latte(path: Path, frames: int, **fields: Any) -> Path:
    """A small Latte whose positions of frames are its own, and everything else random."""
    network = create_model("Latte-debug/2", sample_shape=(frames, 4, 8, 8), **fields)
    positions = network.temp_embed.clone()
    with torch.no_grad():
        randomise(network).temp_embed.copy_(positions)
    return write_network(path, "Latte-debug/2", network)


@pytest.mark.parametrize("how", ["interpolate", "extend"])
def test_weights_sample_another_number_of_frames_where_told_how(how: str, tmp_path: Path) -> None:
    ckpt = latte(tmp_path / "a.safetensors", 4, class_dropout_prob=0.0)
    settings = {"device": "cpu", "num_sampling_steps": 2, "cfg_scale": 1.0}
    plain = Pipeline.from_pretrained(ckpt, **settings)
    other = Pipeline.from_pretrained(ckpt, num_frames=7, frame_positions=how, **settings)
    assert other.image_shape == (7, 4, 8, 8) and other.sample([1, 2], seed=3).shape == (2, 7, 8, 8, 4)
    rows = slice(0, 7, 2) if how == "interpolate" else slice(0, 4)
    torch.testing.assert_close(other.network.temp_embed[:, rows], plain.network.temp_embed)
    same = Pipeline.from_pretrained(ckpt, num_frames=4, **settings)
    assert np.array_equal(same.sample([1], seed=3), plain.sample([1], seed=3))


def test_a_weaker_network_takes_as_many_frames(tmp_path: Path) -> None:
    ckpt, guide = (latte(tmp_path / f"{i}.safetensors", frames) for i, frames in enumerate((4, 5)))
    settings = {"device": "cpu", "num_sampling_steps": 2, "guidance": "autoguidance", "cfg_scale": 2.0}
    more = {"num_frames": 6, "frame_positions": "interpolate"}
    assert Pipeline.from_pretrained(ckpt, guide_ckpt=guide, **settings, **more).sample([1]).shape[1] == 6
    with pytest.raises(UserError, match=r"--guide-ckpt .*: its shape of latents is \(5, 4, 8, 8\)"):
        Pipeline.from_pretrained(ckpt, guide_ckpt=guide, **settings)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--num-frames 7", "--ckpt {ckpt}: made for 4 frames, not 7; give --frame-positions interpolate"),
        (
            "--num-frames 4 --frame-positions extend",
            "--frame-positions extend: has no effect, because the weights have",
        ),
        ("--frame-positions extend", "--frame-positions extend: has no effect without --num-frames"),
        ("--num-frames 0", "--num-frames 0: must be at least 1"),
    ],
)
def test_another_number_of_frames_is_named(
    argv: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = latte(tmp_path / "a.safetensors", 4)
    output = ["--output", str(tmp_path / "a.png"), "--device", "cpu"]
    assert run(sample.main, "sample.py", ["--ckpt", str(ckpt), *argv.split(), *output]) == 2
    assert words.format(ckpt=ckpt) in capsys.readouterr().err and names(tmp_path) == ["a.safetensors"]


def test_networks_of_images_have_no_frames(ckpt: Path) -> None:
    with pytest.raises(UserError, match=r"--num-frames 7: is a setting of clips; the network of .* makes images"):
        Pipeline.from_pretrained(ckpt, num_frames=7, device="cpu")


# ----------------------------------------------------------------------------------------------------------------------
# Jobs

FAMILIES = [name for name in models.FAMILIES if len(models.model_config(debug_name(name)).sample_shape) == 4]
PROMPTS = ["--prompt", "a small seven moving right", "a two", "--negative-prompt", "a large one"]


@pytest.mark.parametrize("name", FAMILIES)
def test_clips_of_every_family_do_not_depend_on_processes_and_interruptions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided, with reused state and an autoencoder; chunks of two clips are decoded five frames at a time.

    Files of clips, and jobs that are continued, are those of the first family alone: they know no network.
    """
    small_autoencoder(tmp_path / "vae")
    text = {} if labelled(name) else Words().describe()
    fields = {f"text_{field}": text[field] for field in ("width", "length") if text}
    network = debug_network(name, **fields)
    shape = network.sample_shape
    image = [*shape[:-3], 3, 2 * shape[-2], 2 * shape[-1]]
    meta = {"encoder": {"name": str(tmp_path / "vae")}, "data": {"image_shape": image, "classes": None}}
    meta |= {"text": text} if text else {}
    ckpt = write_network(tmp_path / "1.safetensors", debug_name(name), network, **meta)
    argv, first = [*"--vae-batch-size 5 --cache-interval 2 --cfg-scale 2".split()], name == FAMILIES[0]
    argv += PROMPTS if text else []
    argv += ["--save-gif", "--save-png", "--fps", "10"] if first else []
    argv += ["--save-mp4"] if first and find_spec("av") else []
    argv += [] if network.keeps_state else ["--cache-depth", "1"]
    drawn = draw(ckpt, tmp_path / "one.npz", *argv)["arr_0"]
    assert drawn.shape == (7, shape[0], image[-2], image[-1], 3) and len({clip.tobytes() for clip in drawn}) == 7
    options = ["--ckpt", str(ckpt), "--output", str(tmp_path / "many.npz"), *JOB, *argv]
    done = run_ranks("sample_ddp.py", *options, ranks=3, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    if first:
        interrupted(ckpt, tmp_path / "resumed.npz", monkeypatch, *argv)
        draw(ckpt, tmp_path / "resumed.npz", *argv)
    for other in ("many", "resumed") if first else ("many",):
        assert (tmp_path / "one.npz").read_bytes() == (tmp_path / f"{other}.npz").read_bytes(), other
        if not first:
            continue
        assert len(names(tmp_path / "one")) % 7 == 0 and names(tmp_path / "one") == names(tmp_path / other)
        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / other / path.name).read_bytes(), (other, path.name)


def interrupted(ckpt: Path, path: Path, monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    """A job that fails in the last of its four chunks."""
    fail_after(3, lambda: draw(ckpt, path, *argv), monkeypatch)


def test_an_interrupted_job_continues_and_misses_no_file(
    clip_ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(clip_ckpt, tmp_path / "whole.npz", "--save-gif")
    interrupted(clip_ckpt, tmp_path / "a.npz", monkeypatch, "--save-gif")
    (tmp_path / "a" / "000001.gif").unlink()  # of the first chunk
    made, denoise = [], Pipeline.denoise
    monkeypatch.setattr(
        Pipeline, "denoise", lambda self, *args, **more: made.append(args[2][0] // 2) or denoise(self, *args)
    )  # type: ignore[func-returns-value]
    draw(clip_ckpt, tmp_path / "a.npz", "--save-gif")
    assert "2 of 4 chunks are there" in capsys.readouterr().out and made == [0, 3]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert names(tmp_path / "a") == [f"{k:06d}.gif" for k in range(7)]


def test_other_files_do_not_continue_a_job(
    clip_ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(clip_ckpt, tmp_path / "a.npz", monkeypatch, "--save-gif", "--fps", "10")
    for argv, words in (
        (["--save-gif"], "--fps was 10, now None"),
        (["--fps", "10"], "--save-gif was True, now None"),
    ):
        options = ["--ckpt", str(clip_ckpt), "--output", str(tmp_path / "a.npz"), *JOB, *argv]
        assert run(sample_ddp.main, "sample_ddp.py", options) == 2
        assert f"started with other settings ({words});" in capsys.readouterr().err


def test_single_clips_are_written_as_files(clip_ckpt: Path, tmp_path: Path) -> None:
    samples = draw(clip_ckpt, tmp_path / "a.npz", "--save-png", "--save-gif")["arr_0"]
    with Image.open(tmp_path / "a" / "000004.png") as row, Image.open(tmp_path / "a" / "000004.gif") as shown:
        assert np.array_equal(np.asarray(row), np.concatenate([*samples[4]], axis=1))
        assert shown.n_frames == FRAMES and shown.size == (WIDTH, HEIGHT)  # type: ignore[attr-defined]
    settings = json.loads((tmp_path / "a.json").read_text())["config"]
    assert settings["clips"] == {"fps": None, "save_mp4": False, "save_gif": True}
    argv = ["--config", str(tmp_path / "a.json"), "--output", str(tmp_path / "a.npz"), "--overwrite"]
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0, "its own files are replaced"


def test_files_of_clips_that_no_job_wrote_are_not_replaced(
    clip_ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "000001.gif").write_text("mine")
    argv = ["--ckpt", str(clip_ckpt), "--output", str(tmp_path / "a.npz"), *JOB, "--save-gif", "--overwrite"]
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 2
    assert f"{tmp_path / 'a'}: no sampling job wrote it" in capsys.readouterr().err
    assert (tmp_path / "a" / "000001.gif").read_text() == "mine"


def test_the_number_of_clips_is_that_of_the_video_distance_where_none_is_given() -> None:
    assert len(plan_job(JobSettings(), 10, COUNTS["clip"]).noise) == 2_048


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def show(ckpt: Path, output: Path, *argv: str) -> int:
    options = ["--ckpt", str(ckpt), "--output", str(output), *"--num-sampling-steps 3 --device cpu".split()]
    return run(sample.main, "sample.py", [*options, *argv])


def test_sample_writes_a_contact_sheet_and_an_animation(
    clip_ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(clip_ckpt, tmp_path / "a.png", "--class-labels", "1", "2", "3", "--columns", "2") == 0
    assert f"Saved 3 clips to {tmp_path / 'a.png'}, {tmp_path / 'a.gif'}" in capsys.readouterr().out
    pipeline = Pipeline.from_pretrained(clip_ckpt, device="cpu", num_sampling_steps=3, cfg_scale=4.0)
    samples = enlarge(pipeline.sample([1, 2, 3]), FACTOR)
    with Image.open(tmp_path / "a.png") as sheet:
        assert np.array_equal(np.asarray(sheet), grid(samples, FRAMES)[0])
    with Image.open(tmp_path / "a.gif") as shown:
        assert shown.n_frames == FRAMES  # type: ignore[attr-defined]
        assert shown.size == (2 * (FACTOR * WIDTH + 2) + 2, 2 * (FACTOR * HEIGHT + 2) + 2)
        for k in range(FRAMES):
            shown.seek(k)
            error = np.asarray(shown.convert("RGB")).astype(int) - grid(samples[:, k], 2)[0]
            assert np.abs(error).mean() < 8, "256 colours"
    assert names(tmp_path) == ["a.gif", "a.png", "run"]


def test_sample_writes_a_video_on_request(clip_ckpt: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    assert show(clip_ckpt, tmp_path / "a.png", "--class-labels", "1", "--save-mp4", "--fps", "4") == 0
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.average_rate, stream.frames) == (4, FRAMES)
        assert all(side % 2 == 0 for side in (stream.width, stream.height))
    assert show(clip_ckpt, tmp_path / "a.png", "--class-labels", "1", "--save-mp4") == 0, "its own is replaced"


def test_a_trajectory_of_clips_has_a_row_a_moment(clip_ckpt: Path, tmp_path: Path) -> None:
    argv = ["--class-labels", "1", "2", "--trajectory-frames", "2", "--trajectory"]
    assert show(clip_ckpt, tmp_path / "a.png", *argv, str(tmp_path / "steps.png")) == 0
    with Image.open(tmp_path / "a.png") as whole, Image.open(tmp_path / "steps.png") as shown:
        last, strip, side = np.asarray(whole), np.asarray(shown), FACTOR * HEIGHT + 2
        assert strip.shape == (4 * side + 2, *last.shape[1:])
        assert np.array_equal(strip[3 * side : 4 * side + 2], last[side:])
        assert np.array_equal(strip[side : 2 * side + 2], last[: side + 2])
    assert show(clip_ckpt, tmp_path / "a.png", *argv, str(tmp_path / "steps.gif")) == 0


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_an_animation_of_another_origin_is_kept(
    suffix: str, clip_ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--save-mp4"] if suffix == "mp4" else []
    if flags:
        pytest.importorskip("av")
    (tmp_path / f"a.{suffix}").write_text("mine")
    assert show(clip_ckpt, tmp_path / "a.png", *flags) == 2
    assert f"--output {tmp_path}/a.{suffix}: exists, and is no picture of sample.py" in capsys.readouterr().err
    assert (tmp_path / f"a.{suffix}").read_text() == "mine" and not (tmp_path / "a.png").exists()
    assert show(clip_ckpt, tmp_path / "a.png", *flags, "--overwrite", "--class-labels", "1") == 0


# ----------------------------------------------------------------------------------------------------------------------
# Networks without labels


def test_an_unconditional_network_makes_as_many_clips_as_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = write_clips(tmp_path / "1.safetensors", ClipConfig(num_classes=0))
    drawn = draw(ckpt, tmp_path / "a.npz")
    assert json.loads((tmp_path / "a.json").read_text())["config"]["guidance"]["cfg_scale"] == 1
    assert [*drawn] == ["arr_0"] and drawn["arr_0"].shape == (7, FRAMES, HEIGHT, WIDTH, CHANNELS)
    pipeline = Pipeline.from_pretrained(ckpt, device="cpu", num_sampling_steps=3)
    assert pipeline.num_classes == 0
    assert np.array_equal(pipeline.sample(count=7, batch_size=2), drawn["arr_0"])
    assert show(ckpt, tmp_path / "a.png", "--num-samples", "1") == 0
    assert "Saved 1 clip to" in capsys.readouterr().out
    assert show(ckpt, tmp_path / "b.png", "--cfg-scale", "1") == 0
    assert "Saved 8 clips" in capsys.readouterr().out
    for options, message in (
        ({}, "count None: must be"),
        ({"count": 0}, "count 0: must be at least 1"),
        ({"labels": [1]}, "labels: unknown; conditioning of this network: none; give count"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline.sample(**options)  # type: ignore[arg-type]


def test_a_weaker_network_guides_an_unconditional_one(tmp_path: Path) -> None:
    ckpt = write_clips(tmp_path / "1.safetensors", ClipConfig(num_classes=0))
    pipeline = Pipeline.from_pretrained(
        ckpt, device="cpu", num_sampling_steps=3, guidance="autoguidance", guide_ckpt=ckpt
    )
    assert pipeline.prepare().config.guidance.cfg_scale == 1.5 and pipeline.sample(count=2).shape[0] == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--class-labels 1", "--class-labels 1: has no effect: the network of --ckpt takes no labels"),
        ("--cfg-scale 2", "--cfg-scale 2.0: this network takes no labels"),
    ],
)
@pytest.mark.parametrize("script", [sample, sample_ddp])
def test_labels_of_an_unconditional_network_are_refused(
    script: Any, argv: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = write_clips(tmp_path / "1.safetensors", ClipConfig(num_classes=0))
    options = ["--ckpt", str(ckpt), "--device", "cpu", "--num-sampling-steps", "2", *argv.split()]
    options += ["--output", str(tmp_path / ("a.png" if script is sample else "a.npz"))]
    assert run(script.main, f"{script.__name__}.py", options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and names(tmp_path) == ["1.safetensors"]


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--fps 0", "--fps 0: must lie in 1..50"),
        ("--fps 51", "--fps 51: must lie in 1..50"),
        ("--fps 2.5", "argument --fps: invalid"),
        ("--save-mp4", "--save-mp4: needs PyAV, which is not installed (pip install av); GIF needs no package"),
        ("--class-labels 10", "--class-labels 10: the model has classes 0 to 9"),
    ],
)
@pytest.mark.parametrize("script", [sample, sample_ddp])
def test_a_mistake_is_one_line_and_status_2(
    script: Any,
    argv: str,
    words: str,
    clip_ckpt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sampling.clips.find_spec", lambda name: None)
    options = ["--ckpt", str(clip_ckpt), "--device", "cpu", "--num-sampling-steps", "2", *argv.split()]
    options += ["--output", str(tmp_path / ("a.png" if script is sample else "a.npz"))]
    assert run(script.main, f"{script.__name__}.py", options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and names(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--init-image {folder}/x.png", "x.png: is an image, and the network of --ckpt makes clips"),
        ("--trajectory {folder}/a.gif", "a.gif: is written with --output {folder}/a.png; give another name"),
        ("--num-samples 3", "--num-samples 3: the network takes labels; give --class-labels"),
        ("--num-samples 0", "--num-samples 0: must be at least 1"),
    ],
)
def test_a_mistake_about_pictures_is_refused_before_sampling(
    argv: str, words: str, clip_ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "x.png")
    assert show(clip_ckpt, tmp_path / "a.png", *argv.format(folder=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert words.format(folder=tmp_path) in error and error.count("\n") == 1
    assert names(tmp_path) == ["run", "x.png"]


@pytest.mark.parametrize(("argv", "script"), [
    ("--fps 12", sample), ("--save-mp4", sample), ("--fps 12", sample_ddp), ("--save-gif", sample_ddp),
])  # fmt: skip
def test_settings_of_clips_are_refused_for_images(
    argv: str, script: Any, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("sampling.clips.find_spec", lambda name: object())
    output = tmp_path / ("a.png" if script is sample else "a.npz")
    options = ["--ckpt", str(ckpt), "--output", str(output), "--device", "cpu", *argv.split()]
    assert run(script.main, f"{script.__name__}.py", options) == 2
    error = capsys.readouterr().err
    assert f"error: {argv}: is a setting of clips; the network of --ckpt {ckpt} makes images" in error
    assert names(tmp_path) == []
