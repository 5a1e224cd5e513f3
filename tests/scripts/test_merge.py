"""Jobs cut by --shard and merged: the bytes of one job, and one line for parts that do not belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sample_ddp
from data.latents import LatentShards
from data.words import Words
from models import create_model
from runtime.errors import run
from scripts import extract_latents, merge
from tests import captions, clips
from tests.captions import NAME
from tests.checkpoints import write_network
from tests.clips import write_clips
from tests.jobs import fail_after
from tests.networks import debug_name, debug_network, randomise, small_autoencoder
from tests.processes import run_ranks

JOB = "--num-fid-samples 13 --num-sampling-steps 2 --per-proc-batch-size 2 --device cpu".split()
SHARDS = ("1/3", "2/3", "3/3")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "0000001.safetensors"
    return write_network(path, debug_name("DiT"), randomise(debug_network("DiT")))


def sample(ckpt: Path, output: Path, *argv: str, status: int = 0) -> Path:
    options = ["--ckpt", str(ckpt), "--output", str(output), *JOB, *argv]
    assert run(sample_ddp.main, "sample_ddp.py", options) == status
    return output


def merged(parts: list[Path], output: Path, status: int = 0) -> Path:
    assert run(merge.main, "merge.py", [*map(str, parts), "--output", str(output)]) == status
    return output


def parts_of(output: Path, count: int = 3) -> list[Path]:
    """Parts, in another order than that of their numbers."""
    return [output.with_name(f"{output.stem}.{i}-of-{count}{output.suffix}") for i in range(count, 0, -1)]


def record(path: Path) -> Any:
    """The JSON of a job, without times and its name."""
    document = json.loads(path.with_suffix(".json").read_text())
    document["config"]["job"].pop("output")
    return {name: value for name, value in document.items() if name != "run"}


def the_error(capsys: pytest.CaptureFixture[str], program: str = "merge.py") -> str:
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: error: ") and error.count("\n") == 1, error
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# Samples


@pytest.fixture(scope="module")
def parts(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three finished parts of a job."""
    output = tmp_path_factory.mktemp("parts") / "a.npz"
    for shard in SHARDS:
        sample(ckpt, output, "--shard", shard)
    return parts_of(output)


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_merged_images_are_those_of_one_job(ckpt: Path, tmp_path: Path, shards: int) -> None:
    whole = sample(ckpt, tmp_path / "whole.npz", "--save-png")
    for i in range(1, shards + 1):
        sample(ckpt, tmp_path / "a.npz", "--save-png", "--shard", f"{i}/{shards}")
    before = contents(tmp_path)
    made = merged(parts_of(tmp_path / "a.npz", shards), tmp_path / "a.npz")
    assert made.read_bytes() == whole.read_bytes()
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")
    assert record(made) == record(whole)
    assert len(json.loads(made.with_suffix(".json").read_text())["run"]["shards"]) == shards
    assert {name: contents(tmp_path)[name] for name in before} == before, "parts are left as they are"
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_a_killed_shard_resumes_on_another_number_of_processes(
    ckpt: Path, tmp_path: Path, parts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), *JOB, "--shard", "3/3"]
    fail_after(1, lambda: sample_ddp.main(argv), monkeypatch)
    assert (tmp_path / "a.3-of-3.partial").is_dir()
    done = run_ranks("sample_ddp.py", *argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 3 chunks are there" in done.stdout
    assert (tmp_path / "a.3-of-3.npz").read_bytes() == parts[0].read_bytes()


def test_merged_clips_are_those_of_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips.register(monkeypatch.setitem)
    ckpt = write_clips(tmp_path / "0000001.safetensors")
    whole = sample(ckpt, tmp_path / "whole.npz", "--save-gif")
    for shard in SHARDS:
        sample(ckpt, tmp_path / "a.npz", "--save-gif", "--shard", shard)
    made = merged(parts_of(tmp_path / "a.npz"), tmp_path / "a.npz")
    assert made.read_bytes() == whole.read_bytes() and record(made) == record(whole)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


@pytest.fixture
def text_family() -> Iterator[None]:
    with captions.registered():
        yield


def test_merged_samples_of_prompts_are_those_of_one_job(tmp_path: Path, text_family: None) -> None:
    network = randomise(create_model(NAME, text_width=Words.width, text_length=Words.length))
    meta = {"text": Words().describe(), "process": {"name": "flow"}}
    ckpt = write_network(tmp_path / "0000001.safetensors", NAME, network, **meta)
    prompts = "--prompt;a small seven moving right;a large two moving up;a three;--cfg-scale;3".split(";")
    whole = sample(ckpt, tmp_path / "whole.npz", *prompts)
    for shard in SHARDS:
        sample(ckpt, tmp_path / "a.npz", *prompts, "--shard", shard)
    made = merged(parts_of(tmp_path / "a.npz"), tmp_path / "a.npz")
    assert made.read_bytes() == whole.read_bytes() and record(made) == record(whole)
    assert made.with_suffix(".txt").read_text() == whole.with_suffix(".txt").read_text()


def test_a_merged_job_s_settings_make_it_again(ckpt: Path, parts: list[Path], tmp_path: Path) -> None:
    made = merged(parts, tmp_path / "a.npz")
    argv = ["--config", str(tmp_path / "a.json"), "--ckpt", str(ckpt), "--output", str(tmp_path / "again.npz")]
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    assert (tmp_path / "again.npz").read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("0/3", "--shard 0/3: the first number must be from 1 to the second one"),
        ("4/3", "--shard 4/3: the first number"),
        ("1/0", "--shard 1/0: the first number"),
        ("a/b", "--shard a/b: must be i/n, such as 1/3"),
        ("2", "--shard 2: must be i/n"),
        ("1/8", "--shard 1/8: the job has 7 chunks of 2 (--per-proc-batch-size); give at most 7 shards"),
    ],
)
def test_a_shard_that_cannot_be_is_one_line(
    ckpt: Path, tmp_path: Path, shard: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(ckpt, tmp_path / "a.npz", "--shard", shard, status=2)
    assert words in the_error(capsys, "sample_ddp.py")
    assert not [path for path in tmp_path.iterdir()]


def test_parts_that_do_not_belong_together_are_one_line(
    ckpt: Path, parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    third, second, first = parts
    other, output = tmp_path / "b.npz", tmp_path / "a.npz"
    sample(ckpt, other, "--shard", "2/3", "--global-seed", "1")
    sample(ckpt, other, "--shard", "1/2")
    capsys.readouterr()
    for given, words in (
        ([first, tmp_path / "b.2-of-3.npz", third], "b.2-of-3.npz: of another job: --global-seed is 1, in"),
        ([first, tmp_path / "b.1-of-2.npz"], "is shard 1/2, but"),
        ([first, third], "shards 2/3 of this job are missing"),
        ([first, second, third, second], "is shard 2/3, as"),
        ([first, second, tmp_path / "none.npz"], "none.npz: no such file"),
        ([first, second, tmp_path], "is no folder of latents"),
    ):
        merged(given, output, status=2)
        assert words in the_error(capsys)
        assert not output.exists()


def test_damaged_and_unfinished_parts_and_outputs_that_exist_are_one_line(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in parts[0].parent.iterdir():
        shutil.copy(path, tmp_path)
    copies, output = [tmp_path / path.name for path in parts], tmp_path / "a.npz"
    output.write_bytes(b"mine")
    merged(copies, output, status=2)
    assert "a.npz: exists already" in the_error(capsys) and output.read_bytes() == b"mine"
    output.unlink()
    (tmp_path / "a.json").write_text("mine")
    merged(copies, output, status=2)
    assert "a.json: exists already" in the_error(capsys)
    (tmp_path / "a.json").unlink()
    content = bytearray(copies[1].read_bytes())
    content[200] ^= 1
    copies[1].write_bytes(content)
    merged(copies, output, status=2)
    assert "a.2-of-3.npz: damaged, it does not match its checksum" in the_error(capsys)
    copies[1].with_suffix(".partial").mkdir()
    merged(copies, output, status=2)
    assert "a.2-of-3.npz: not finished; run the command of this shard again" in the_error(capsys)
    shutil.copy(copies[2], tmp_path / "plain.npz")
    merged([tmp_path / "plain.npz"], output, status=2)
    assert "plain.npz: no part of a sampling job" in the_error(capsys)
    assert not output.exists() and not any(path.name.startswith(".") for path in tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Latents


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in two classes, one that cannot be read, their captions, and an autoencoder."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    small_autoencoder(folder / "vae")
    for i in range(9):
        path = folder / "images" / ("ant" if i < 5 else "cat") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 18, 3), dtype=np.uint8)).save(path)
    (folder / "images/ant/2.png").write_bytes(b"damaged")
    words = "one two three four five six seven eight nine".split()
    rows = {f"{'ant' if i < 5 else 'cat'}/{i}.png": word for i, word in enumerate(words)}
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def argv_of(folder: Path, output: Path, *more: str) -> list[str]:
    argv = f"--data-path {folder}/images --vae {folder}/vae --output {output} --image-size 16 --shard-size 2"
    return [*argv.split(), *"--batch-size 2 --num-workers 0 --device cpu".split(), *more]


def extract(folder: Path, output: Path, *more: str, status: int = 0) -> Path:
    assert run(extract_latents.main, "extract_latents.py", argv_of(folder, output, *more)) == status
    return output


@pytest.mark.parametrize("text", [False, True])
def test_merged_latents_are_those_of_one_extraction(images: Path, tmp_path: Path, text: bool) -> None:
    more = ["--captions", str(images / "captions.json"), *"--text-encoder words".split()] * text
    whole = extract(images, tmp_path / "whole", *more)
    for shard in SHARDS[:2]:
        extract(images, tmp_path / "latents", *more, "--shard", shard)
    done = run_ranks(
        "scripts/extract_latents.py",
        *argv_of(images, tmp_path / "latents", *more, "--shard", "3/3"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    before = [contents(part) for part in parts_of(tmp_path / "latents")]
    made = merged(parts_of(tmp_path / "latents"), tmp_path / "latents")
    assert contents(made) == contents(whole)
    assert [contents(part) for part in parts_of(made)] == before, "parts are left as they are"
    latents = LatentShards(made)
    latents.verify()
    assert len(latents) == 8
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir() if "rank" not in path.name)


def test_parts_of_other_extractions_and_unfinished_ones_are_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (extract(images, tmp_path / "a", "--shard", s) for s in ("1/2", "2/2"))
    extract(images, tmp_path / "b", "--shard", "2/2", "--batch-size", "1")
    first, second = parts_of(tmp_path / "a", 2)[::-1]
    output = tmp_path / "merged"
    extract(images, tmp_path / "c", "--shard", "1/6", status=2)
    assert "--shard 1/6: the job has 5 files of 2 (--shard-size); give at most 5 shards" in capsys.readouterr().err
    with pytest.raises(ValueError, match="part of a store; scripts/merge.py puts all parts together"):
        LatentShards(first)
    for given, words in (
        ([first, tmp_path / "b.2-of-2"], "of another job: --batch-size (batch_size) is 1, in"),
        ([first], "shards 2/2 of this job are missing"),
        ([first, second, first], "is shard 1/2, as"),
        ([first, tmp_path], "no part of a latent store (no part.json)"),
    ):
        merged(given, output, status=2)
        assert words in the_error(capsys)
    (second / "00003.npy").write_bytes((second / "00004.npy").read_bytes())
    merged([first, second], output, status=2)
    assert "damaged" in the_error(capsys)
    (second / "part.json").unlink()
    merged([first, second], output, status=2)
    assert "a.2-of-2: not finished; run the command of this shard again" in the_error(capsys)
    assert not output.exists() and not any(path.name.startswith(".") for path in tmp_path.iterdir())
    extract(images, tmp_path / "a", "--shard", "2/2")  # makes what is missing
    merged([first, second], first, status=2)
    assert "exists already" in the_error(capsys)
