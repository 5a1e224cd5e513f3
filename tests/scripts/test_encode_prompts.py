"""Encoded prompts in a file against the prompts themselves, by samples to the last bit; mistakes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import sample_ddp
from data.text_encoders import open_text_encoder
from data.words import Words
from models import create_model
from runtime.errors import run
from scripts.encode_prompts import main
from tests import captions
from tests.captions import NAME
from tests.checkpoints import write_network
from tests.networks import randomise
from tests.text_encoders import WIDTH, save_t5

PROMPTS = ["a dog in the sun", "the cat sleeps", "a dog in the sun"]
JOB = "--num-sampling-steps 3 --device cpu --cfg-scale 3".split()


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    with captions.registered():
        yield


def encode(*argv: object) -> int:
    return run(main, "encode_prompts.py", ["--device", "cpu", *map(str, argv)])


def draw(ckpt: Path, output: Path, *argv: object) -> bytes:
    options = ["--ckpt", str(ckpt), "--output", str(output), *JOB, *map(str, argv)]
    assert run(sample_ddp.main, "sample_ddp.py", options) == 0
    with np.load(output, allow_pickle=False) as file:
        samples: bytes = file["arr_0"].tobytes()
    return samples


def words_checkpoint(folder: Path) -> Path:
    network = randomise(create_model(NAME, text_width=Words.width, text_length=Words.length))
    return write_network(folder / "w.safetensors", NAME, network, text=Words().describe(), process={"name": "flow"})


@pytest.mark.parametrize("foreign", [False, True])
def test_samples_of_the_file_are_those_of_the_prompts(foreign: bool, tmp_path: Path) -> None:
    """With a T5 of random weights; networks of other code have a mask of unconditional rows for every prompt."""
    pytest.importorskip("transformers")
    folder = save_t5(tmp_path / "t5")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    meta = {"foreign": True} if foreign else {"text": open_text_encoder(str(folder), 6).describe()}
    network = randomise(create_model(NAME, text_width=WIDTH, text_length=6))
    ckpt = write_network(tmp_path / "1.safetensors", NAME, network, process={"name": "flow"}, **meta)
    flags = ["--prompt-file", tmp_path / "prompts.txt", "--negative-prompt", "runs"]
    flags += ["--text-encoder", folder] if foreign else []
    assert encode("--ckpt", ckpt, *flags, "--output", tmp_path / "e.safetensors") == 0
    assert {name: len(leaf) for name, leaf in load_file(tmp_path / "e.safetensors").items()} == {
        "text": 3, "text_mask": 3, "null_text": 3 if foreign else 1, "null_text_mask": 3 if foreign else 1,
    }  # fmt: skip
    embeds = draw(ckpt, tmp_path / "b.npz", "--prompt-embeds", tmp_path / "e.safetensors")
    assert embeds == draw(ckpt, tmp_path / "a.npz", *flags)


def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt, output = words_checkpoint(tmp_path), tmp_path / "e.safetensors"
    labels = write_network(tmp_path / "l.safetensors", "DiT-digits/2", create_model("DiT-digits/2"))
    (tmp_path / "empty.txt").write_text(" \n")
    for argv, words in (
        (["--prompt", "a one"], "--ckpt: required"),
        (["--ckpt", ckpt], "--prompt: needed, because the network of --ckpt takes text"),
        (["--ckpt", ckpt, "--prompt-embeds", "x"], "--prompt-embeds x: is encoded; give --prompt or --prompt-file"),
        (["--ckpt", ckpt, "--prompt-file", tmp_path / "empty.txt"], "empty.txt: no prompts in it"),
        (["--ckpt", ckpt, "--prompt", "a purple one"], "--prompt a purple one: unknown word 'purple'"),
        (["--ckpt", labels, "--prompt", "a one"], f"--ckpt {labels}: its network takes no text"),
        (["--ckpt", ckpt, "--prompt", "a one", "--output", tmp_path / "e.pt"], "must end in .safetensors"),
    ):
        assert encode("--output", output, *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("encode_prompts.py: error: ") and error.count("\n") == 1 and words in error, error
        assert not output.exists()
    output.write_bytes(b"notes")
    assert encode("--ckpt", ckpt, "--prompt", "a one", "--output", output) == 2
    assert "is there already; --overwrite replaces it" in capsys.readouterr().err and output.read_bytes() == b"notes"
    assert encode("--ckpt", ckpt, "--prompt", "a one", "--output", output, "--overwrite") == 0
    assert load_file(output)["text"].shape == (1, Words.length, Words.width)
