"""Encoded captions in latent stores: extraction, resuming, damage, and training from them."""

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import copy, copytree

import numpy as np
import pytest
import torch
from PIL import Image

from data import open_dataset
from data.caption_files import finished_text, text_paths
from data.latents import LatentShards
from data.words import Words
from runtime.checkpoint import read_checkpoint
from runtime.errors import run
from scripts import extract_latents
from tests import captions
from tests.captions import NAME
from tests.networks import small_autoencoder
from tests.processes import run_ranks
from tests.runs import CPU, last_checkpoint, open_setup, start, the_error
from training.trainer import batches

SAID = ["a small one", "a large two", "three", "a four moving up", "a five on the right"]


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    with captions.registered():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, their captions, and an autoencoder."""
    folder, rng = tmp_path_factory.mktemp("store"), np.random.default_rng(0)
    small_autoencoder(folder / "vae")
    for i in range(5):
        path = folder / "images" / ("ant" if i < 3 else "cat") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(SAID[i])
    rows = {f"{'ant' if i < 3 else 'cat'}/{i}.png": SAID[i] for i in range(5)}
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    argv = f"--data-path {folder}/images --vae {folder}/vae --output {output} --image-size 16 --batch-size 2"
    return [*argv.split(), *"--shard-size 2 --num-workers 0 --device cpu".split(), *more]


CAPTIONS = "--text-encoder words --captions".split()


def extract(folder: Path, output: Path, *more: str) -> int:
    return run(extract_latents.main, "extract_latents.py", flags(folder, output, *more))


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    assert extract(folder, folder / "latents", *CAPTIONS, str(folder / "captions.json")) == 0
    return folder / "latents"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_items_have_their_captions_and_the_empty_one_is_null(store: Path) -> None:
    data, words = open_dataset("latents", store, 16, 3, flip=False), Words()
    assert isinstance(data, LatentShards) and data.text == words.describe() and data.classes == []
    expected, null = words.encode(SAID), words.encode([""])
    items = [data[0, index] for index in range(5)]
    for index, (_, text, _) in enumerate(items):
        assert isinstance(text, dict) and all(torch.equal(text[name], expected[name][index]) for name in expected)
    assert all(torch.equal(leaf, null[name][0]) for name, leaf in data.null_conditioning.items())
    data.verify()


def test_a_txt_beside_each_file_and_several_processes_make_the_same_bytes(
    folder: Path, store: Path, tmp_path: Path
) -> None:
    assert extract(folder, tmp_path / "b", *CAPTIONS, "txt") == 0
    argv = flags(folder, tmp_path / "c", *CAPTIONS, "txt")
    done = run_ranks("scripts/extract_latents.py", *argv, ranks=2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(store) == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_pictures_may_be_in_the_folder_itself(folder: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for path in sorted((folder / "images").rglob("*.*")):
        copy(path, tmp_path / "images")
    (tmp_path / "vae").symlink_to(folder / "vae")
    assert extract(tmp_path, tmp_path / "latents", *CAPTIONS, "txt") == 0
    flat, nested = (LatentShards(path) for path in (tmp_path / "latents", store))
    keys = [(0, index) for index in range(5)]
    assert torch.equal(flat.gather(keys)[0], nested.gather(keys)[0]) and flat.path(4) == "4.png"
    assert all(torch.equal(flat[key][1]["text"], nested[key][1]["text"]) for key in keys)
    assert extract(tmp_path, tmp_path / "plain") == 2, "labels need folders"


def test_captions_can_be_added_to_latents_and_only_what_is_missing_is_made(
    folder: Path, store: Path, tmp_path: Path
) -> None:
    output = tmp_path / "latents"
    assert extract(folder, output) == 0
    assert "text" not in json.loads((output / "index.json").read_text())
    before = (output / "00001.npy").stat().st_mtime_ns
    assert extract(folder, output, *CAPTIONS, "txt") == 0
    assert contents(output) == contents(store) and (output / "00001.npy").stat().st_mtime_ns == before
    made = text_paths(output, "00000")[0].stat().st_mtime_ns
    text_paths(output, "00002")[1].unlink()
    assert finished_text(output, "00002") is None and extract(folder, output, *CAPTIONS, "txt") == 0
    assert contents(output) == contents(store) and text_paths(output, "00000")[0].stat().st_mtime_ns == made


def test_other_captions_are_another_extraction(folder: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "other.json").write_text((folder / "captions.json").read_text().replace("small", "large"))
    before = contents(store)
    for argv in ([*CAPTIONS, str(folder / "other.json")], []):
        assert extract(folder, store, *argv) == 2
        assert "--captions: " in (error := capsys.readouterr().err) and "started with other settings" in error
    assert contents(store) == before


@pytest.mark.parametrize("name", ["00001.text.npy", "00001.text.json", "null.text.npy"])
def test_damaged_captions_are_named(name: str, store: Path, tmp_path: Path) -> None:
    copy = copytree(store, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not what was written"):
        data = open_dataset("latents", copy, 16, 3)
        for index in range(5):
            data[0, index]
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        open_dataset("latents", copy, 16, 3)


def test_text_networks_train_from_stored_captions(store: Path, tmp_path: Path) -> None:
    argv = ["--dataset", "latents", "--data-path", store, "--model", NAME, "--device", "cpu", "--global-batch-size", 2]
    argv += "--num-workers 0 --max-steps 2 --process flow --log-every 1 --caption-dropout-prob 0.3".split()
    with pytest.raises(Exception, match="takes clips, and these data are images"):
        open_setup(*argv)
    one_frame = open_setup(*argv, "--num-frames", 1)
    (batch, _), *_ = next(batches(one_frame, CPU, 0))[1]
    assert batch.x_start.shape == (2, 1, 4, 8, 8) and one_frame.network.sample_shape == (1, 4, 8, 8)
    assert start(tmp_path / "clips", *argv, "--num-frames", 1) == 0, "pictures are clips of one frame"
    with captions.registered(frames=False):
        setup = open_setup(*argv)
        (batch, _), *_ = next(batches(setup, CPU, 0))[1]
        assert batch.conditioning["text"].shape == (2, 8, 32) and batch.null is not None
        assert start(tmp_path, *argv) == 0
        meta = read_checkpoint(last_checkpoint(tmp_path)).meta
    assert meta is not None and meta["text"] == Words().describe()


def test_networks_with_labels_do_not(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dataset", "latents", "--data-path", store, "--model", "DiT-debug/2", "--device", "cpu"]
    assert start(tmp_path, *argv) == 2
    assert f"takes labels, and {store} has captions" in the_error(capsys)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--captions", "txt"], "--captions txt: needs --text-encoder"),
        (["--text-encoder", "words"], "--text-encoder words: needs --captions"),
        ([*CAPTIONS, "none.json", "--vae", "none/vae"], "error: --captions none.json: cannot be read"),
        ([*CAPTIONS, "txt", "--data-path", "none", "--vae", "none/vae"], "error: --data-path none: no such folder"),
        ([*CAPTIONS, "txt", "--text-length", "9"], "--text-length 9: words has 8 tokens; leave it out"),
        (["--captions", "txt", "--text-encoder", "{folder}/vae"], "vae has no folder text_encoder; give a folder of"),
        ([*CAPTIONS, "{folder}/unknown.json"], "unknown word 'purple'"),
        ([*CAPTIONS, "{folder}/few.json"], "no caption of ant/1.png, nor have 3 others"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    argv: list[str], words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "unknown.json").write_text((folder / "captions.json").read_text().replace("small", "purple"))
    (folder / "few.json").write_text('{"ant/0.png": "a small one"}')
    assert extract(folder, tmp_path / "out", *(word.format(folder=folder) for word in argv)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
