"""Prompts from flags, files and encoded ones to samples, jobs and pictures."""

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import sample
import sample_ddp
from data.words import Words
from models import create_model
from models.contract import Conditioning
from models.loading import load_network
from runtime.errors import UserError, run
from sampling.pipeline import Pipeline
from sampling.prompts import TextSettings, encode_prompts
from tests import captions
from tests.captions import NAME, CaptionNetwork
from tests.checkpoints import write_network
from tests.networks import randomise
from tests.processes import run_ranks
from tests.text_encoders import WIDTH, save_t5

PROMPTS = ["a small seven moving right", "a large two moving up", "a three"]
JOB = "--num-sampling-steps 3 --per-proc-batch-size 2 --device cpu --cfg-scale 3".split()
REGISTER = "from tests import captions; captions.kept = captions.registered(); captions.kept.__enter__()"


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    with captions.registered():
        yield


def network_of(width: int = Words.width, length: int = Words.length) -> CaptionNetwork:
    torch.manual_seed(0)
    network = randomise(create_model(NAME, text_width=width, text_length=length))
    assert isinstance(network, CaptionNetwork)
    return network


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    meta = {"text": Words().describe(), "process": {"name": "flow"}}
    return write_network(folder / "0000001.safetensors", NAME, network_of(), **meta)


@pytest.fixture(scope="module")
def pipeline(ckpt: Path) -> Pipeline:
    return Pipeline.from_pretrained(ckpt, device="cpu", num_sampling_steps=3, cfg_scale=3.0)


def draw(ckpt: Path, output: Path, *argv: object) -> Any:
    options = ["--ckpt", str(ckpt), "--output", str(output), *JOB, *map(str, argv)]
    assert run(sample_ddp.main, "sample_ddp.py", options) == 0
    with np.load(output, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def the_error(capsys: pytest.CaptureFixture[str], program: str = "sample.py") -> str:
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: error: ") and error.count("\n") == 1, error
    return error


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def test_prompts_of_a_job_are_those_of_the_pipeline(ckpt: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    drawn = draw(ckpt, tmp_path / "a.npz", "--prompt", *PROMPTS, "--num-fid-samples", 5)["arr_0"]
    taken = [PROMPTS[i % 3] for i in range(5)]
    rows, null = pipeline.encode_prompts(taken)
    samples = pipeline.sample(text=rows["text"], text_mask=rows["text_mask"], null=null, batch_size=2)
    assert samples.shape == (5, 4, 14, 14, 1) and np.array_equal(samples, drawn)
    assert (tmp_path / "a.txt").read_text().splitlines() == taken
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["text"]["prompts"] == PROMPTS and record["text"]["encoder"]["name"] == "words"


def test_a_sample_depends_on_its_own_prompt_alone(pipeline: Pipeline) -> None:
    def sampled(prompts: list[str], negative: str = "") -> np.ndarray:
        rows, null = pipeline.encode_prompts(prompts, negative)
        return pipeline.sample(null=null, **rows)

    three = sampled(PROMPTS)
    other = sampled(["a nine", PROMPTS[1]])
    assert not np.array_equal(other[0], three[0]) and np.abs(other[1].astype(int) - three[1]).max() <= 1
    assert not np.array_equal(sampled(PROMPTS, "a nine"), three)


def test_guidance_leads_from_the_negative_prompt_by_the_formula(pipeline: Pipeline) -> None:
    rows, null = pipeline.encode_prompts(PROMPTS, "a nine moving left")

    def first_output(scale: float, cond: Conditioning, null: Conditioning | None = None) -> Tensor:
        seen: list[Tensor] = []
        run_ = pipeline.prepare(cfg_scale=scale)
        pipeline.denoise(run_, 0, [0, 1, 2], cond, null=null, on_step=lambda i, x, out: seen.append(out.sample))
        return seen[0]

    cond, uncond = first_output(1.0, rows), first_output(1.0, null)
    assert not torch.allclose(cond, uncond)
    torch.testing.assert_close(first_output(3.0, rows, null), uncond + 3 * (cond - uncond))


def test_bytes_do_not_depend_on_processes_and_a_job_resumes(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--prompt", *PROMPTS, "--num-fid-samples", "7", "--negative-prompt", "a nine"]
    draw(ckpt, tmp_path / "one.npz", *argv)
    options = ["--ckpt", str(ckpt), "--output", str(tmp_path / "many.npz"), *JOB, *argv]
    done = run_ranks("sample_ddp.py", *options, ranks=3, folder=tmp_path, fault=REGISTER)
    assert done.returncode == 0, done.stderr
    denoise, calls = Pipeline.denoise, []

    def failing(self: Pipeline, *args: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise MemoryError
        return denoise(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Pipeline, "denoise", failing)
        draw(ckpt, tmp_path / "resumed.npz", *argv)
    draw(ckpt, tmp_path / "resumed.npz", *argv)
    for name in ("many", "resumed"):
        for suffix in (".npz", ".txt"):
            assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"{name}{suffix}").read_bytes(), name


def test_other_prompts_do_not_continue_a_job(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: Any, **options: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Pipeline, "denoise", failing)
        draw(ckpt, tmp_path / "a.npz", "--prompt", *PROMPTS)
    for argv, flag in (
        (["--prompt", *PROMPTS[:2], "a four"], "--prompt was"),
        (["--prompt", *PROMPTS, "--negative-prompt", "a nine"], "--negative-prompt was '', now 'a nine'"),
    ):
        options = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), *JOB, *argv]
        assert run(sample_ddp.main, "sample_ddp.py", options) == 2
        assert flag in the_error(capsys, "sample_ddp.py")


def test_a_text_file_of_others_is_not_replaced(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("notes\n")
    options = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.npz"), *JOB, "--prompt", *PROMPTS]
    assert run(sample_ddp.main, "sample_ddp.py", options) == 2
    assert "a.txt exists already, with other text" in the_error(capsys, "sample_ddp.py")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "notes\n"


def test_prompt_flags_add_up_and_files_have_one_a_line(ckpt: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa small seven moving right\r\n\r\n  a large two moving up\na three")
    twice = ["--prompt", PROMPTS[0], "--prompt", *PROMPTS[1:]]
    first = draw(ckpt, tmp_path / "a.npz", *twice)["arr_0"]
    second = draw(ckpt, tmp_path / "b.npz", "--prompt-file", file)["arr_0"]
    assert len(first) == 3 and np.array_equal(first, second)
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b.txt").read_text()


def test_encoded_prompts_make_the_same_samples(ckpt: Path, tmp_path: Path) -> None:
    rows, null = Words().encode(PROMPTS), Words().encode(["a nine"])
    path = tmp_path / "prompts.safetensors"
    save_file({**rows, **{f"null_{name}": leaf for name, leaf in null.items()}}, path)
    prompts = draw(ckpt, tmp_path / "a.npz", "--prompt", *PROMPTS, "--negative-prompt", "a nine")["arr_0"]
    embeds = draw(ckpt, tmp_path / "b.npz", "--prompt-embeds", path)["arr_0"]
    assert np.array_equal(prompts, embeds) and not (tmp_path / "b.txt").exists()
    assert json.loads((tmp_path / "b.json").read_text())["text"].keys() == {"embeds"}


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_sheets_have_their_prompts_underneath(ckpt: Path, tmp_path: Path) -> None:
    def size(*argv: str) -> tuple[int, int]:
        options = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.png"), *JOB[:2], "--device", "cpu", *argv]
        assert run(sample.main, "sample.py", options) == 0
        return Image.open(tmp_path / "a.png").size

    clips = size("--prompt", *PROMPTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.png"]
    side = 14 * (sample.SMALLEST // 14)
    assert clips[0] == 4 * side + 10 and clips[1] > 3 * (side + 12)
    pictures = size("--prompt", *PROMPTS, "--num-frames", "1", "--num-samples", "4", "--columns", "2", "--overwrite")
    assert pictures[0] == 2 * side + 6 and pictures[1] > 2 * (side + 24), "a narrow tile needs several lines"


def test_one_frame_makes_pictures(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = draw(ckpt, tmp_path / "a.npz", "--prompt", *PROMPTS, "--num-frames", 1, "--save-png")["arr_0"]
    assert drawn.shape == (3, 14, 14, 1) and len(list((tmp_path / "a").iterdir())) == 3
    still = Pipeline.from_pretrained(ckpt, device="cpu", num_frames=1, num_sampling_steps=3, cfg_scale=3.0)
    assert still.image_shape == (1, 14, 14)
    rows, null = still.encode_prompts(PROMPTS)
    assert np.array_equal(still.sample(null=null, batch_size=2, **rows), drawn)
    assert still.encode(torch.zeros(2, 1, 14, 14)).shape == (2, 1, 1, 14, 14)
    options = ["--ckpt", str(ckpt), *JOB, "--prompt", "a one", "--num-frames", "1", "--save-gif"]
    assert run(sample_ddp.main, "sample_ddp.py", [*options, "--output", str(tmp_path / "b.npz")]) == 2
    assert "--save-gif: is a setting of clips" in the_error(capsys, "sample_ddp.py")


# ----------------------------------------------------------------------------------------------------------------------
# Encoders


def test_t5_is_opened_by_the_checkpoint_and_compared_with_its_record(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = save_t5(tmp_path / "t5")
    from data.text_encoders import open_text_encoder

    meta = {"text": open_text_encoder(str(folder), 6).describe(), "process": {"name": "flow"}}
    ckpt = write_network(tmp_path / "1.safetensors", NAME, network_of(WIDTH, 6), **meta)
    pipeline = Pipeline.from_pretrained(ckpt, device="cpu", num_sampling_steps=2)
    rows, null = pipeline.encode_prompts(["A dog", "the cat"])
    assert rows["text"].shape == (2, 6, WIDTH) and null["text_mask"][0].tolist() == [1, 0, 0, 0, 0, 0]
    assert pipeline.sample(null=null, **rows).shape == (2, 4, 14, 14, 1)
    save_t5(folder, seed=1)
    with pytest.raises(UserError, match=r"--text-encoder .*t5: is not the text encoder that --ckpt .*; give its own"):
        pipeline.encode_prompts(["a dog"])
    chosen = Pipeline.from_pretrained(ckpt, device="cpu", text_encoder=str(folder))
    with pytest.warns(UserWarning, match="is not the text encoder"):
        chosen.encode_prompts(["a dog"])


def test_networks_of_other_code_see_both_texts_up_to_the_length_of_the_prompt(ckpt: Path) -> None:
    """As the published pipeline does with one prompt; pads of the empty text are seen there."""
    network, info = load_network(ckpt)
    foreign = type(info)(**{**vars(info), "meta": None})
    settings = TextSettings(prompt=("a three", "a small one"), text_encoder="words")
    own, published = (
        encode_prompts(settings, network, each, torch.device("cpu"), settings.prompt) for each in (info, foreign)
    )
    assert torch.equal(own.rows["text_mask"], published.rows["text_mask"])
    assert own.null is not None and published.null is not None
    assert own.null["text_mask"].sum(1).tolist() == [1, 1] and published.null["text_mask"].sum(1).tolist() == [3, 4]
    x = torch.randn(1, *network.sample_shape)
    cut = network(x, 0.5, text=published.null["text"][:1, :3])
    masked = network(x, 0.5, **{name: leaf[:1] for name, leaf in published.null.items()})
    torch.testing.assert_close(cut.sample, masked.sample)


def test_long_prompts_are_cut_with_a_warning(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = pipeline.encode_prompts(["a small seven on the left on the right"])
    assert torch.equal(rows["text"], pipeline.encode_prompts(["a small seven on the left on"])[0]["text"])
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == (
        "warning: --prompt a small seven on the left on the right: longer than 8 tokens; it is read up to "
        "'a small seven on the left on'"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--prompt: needed, because the network of --ckpt takes text; or --prompt-file, --prompt-embeds"),
        (["--prompt", "a purple one"], "--prompt a purple one: unknown word 'purple'; known: zero one"),
        (["--prompt", "a one", "--negative-prompt", "blue"], "--negative-prompt blue: unknown word 'blue'"),
        (["--prompt", "a one", "--prompt-file", "x"], "--prompt and --prompt-file: give one of them"),
        (["--prompt-file", "{tmp}/none.txt"], "none.txt: cannot be read (No such file or directory)"),
        (["--prompt-file", "{tmp}/empty.txt"], "empty.txt: no prompts in it; it needs one a line"),
        (["--prompt-file", "{tmp}/binary.txt"], "binary.txt: not text in UTF-8"),
        (["--prompt", "a one", "--class-labels", "3"], "--class-labels"),
        (["--prompt-embeds", "{tmp}/empty.txt"], "empty.txt: cannot be read as safetensors"),
        (["--prompt-embeds", "{tmp}/e", "--negative-prompt", "a"], "has no effect with --prompt-embeds"),
        (
            ["--prompt", "a one", "--negative-prompt", "a two", "--cfg-scale", "1"],
            "has no effect without unconditional rows",
        ),
        pytest.param(
            ["--prompt", "a one", "--text-encoder", "{tmp}/none"],
            "none: cannot load text_encoder and tokenizer",
            marks=pytest.mark.skipif(find_spec("transformers") is None, reason="the extra text is not installed"),
        ),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], words: str, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    before = sorted(os.listdir(tmp_path))
    options = [word.format(tmp=tmp_path) for word in argv]
    output = ["--output", str(tmp_path / "a.png"), "--device", "cpu"]
    assert run(sample.main, "sample.py", ["--ckpt", str(ckpt), *output, *options]) == 2
    assert words in the_error(capsys) and sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": torch.zeros(2, 8, 5)}, "text is 5 numbers wide, and the network takes 32"),
        ({"text": torch.zeros(2, 9, 32)}, "takes 8; scripts/encode_prompts.py makes a file for this --ckpt"),
        ({"text_mask": torch.ones(2, 7)}, "text_mask is (2, 7), and the text (2, 8, 32)"),
        ({"text_mask": None}, "lacks text_mask; it has null_text, null_text_mask, text"),
        ({"null_text_mask": None}, "lacks null_text_mask"),
        ({"null_text": torch.zeros(3, 8, 32), "null_text_mask": torch.ones(3, 8)}, "null_text has 3 rows"),
        ({"null_text": None, "null_text_mask": None}, "has no null_text, which guidance needs; give --cfg-scale 1"),
    ],
)
def test_encoded_prompts_that_do_not_fit_are_one_line(
    change: dict[str, Tensor | None], words: str, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good: dict[str, Tensor | None] = {"text": torch.zeros(2, 8, 32), "text_mask": torch.ones(2, 8)}
    good |= {"null_text": torch.zeros(1, 8, 32), "null_text_mask": torch.ones(1, 8)}
    save_file({k: v for k, v in {**good, **change}.items() if v is not None}, tmp_path / "e.safetensors")
    options = ["--prompt-embeds", str(tmp_path / "e.safetensors"), "--output", str(tmp_path / "a.npz"), *JOB]
    assert run(sample_ddp.main, "sample_ddp.py", ["--ckpt", str(ckpt), *options]) == 2
    assert words in the_error(capsys, "sample_ddp.py") and not (tmp_path / "a.partial").exists()


def test_networks_with_labels_take_no_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = randomise(create_model("DiT-digits/2", depth=1, hidden_size=32))
    ckpt = write_network(tmp_path / "1.safetensors", "DiT-digits/2", network)
    for argv in (["--prompt", "a one"], ["--prompt-embeds", "x"], ["--text-encoder", "words"]):
        options = ["--ckpt", str(ckpt), "--output", str(tmp_path / "a.png"), "--device", "cpu", *argv]
        assert run(sample.main, "sample.py", options) == 2
        assert f"{argv[0]} " in (error := the_error(capsys)) and "takes labels; give --class-labels" in error
