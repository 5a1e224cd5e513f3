"""Publishing to a stand-in of the hub, by the hub's own client, and loading from there in another process."""

import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
import sample_ddp
from runtime.errors import run
from runtime.groups import read_groups, save_checkpoint
from sampling.cards.loading import renamed_card
from sampling.pipeline import Pipeline
from scripts import digits_report, publish
from tests.digits_checkpoints import save_digits_checkpoint
from tests.hub_server import PUBLISHING, SAMPLING, TOKEN, Repository, in_process, serving

LICENSE = ["--license", "apache-2.0"]
OURS = b'{"dit_family": {"model": {"name": "DiT-digits/2"}}}'


def test_weights_go_to_the_hub_and_come_back_elsewhere(tmp_path: Path) -> None:
    """Also mistakes: each is one line, and changes nothing there."""
    path = save_digits_checkpoint(tmp_path / "run/checkpoints/0000001.safetensors", "DiT-digits/2")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n{"step": 2, "loss": 0.25}\n')
    ckpt, token = ["--ckpt", str(path)], {"HF_TOKEN": TOKEN}
    with serving() as hub:
        calls: list[tuple[list[str], dict[str, str]]] = [
            ([*ckpt, "--repo", "me/new", *LICENSE], {}),
            ([*ckpt, "--repo", "me/new", *LICENSE], {"HF_TOKEN": "another"}),
            ([*ckpt, "--repo", "digits", *LICENSE], token),
            ([*ckpt, "--repo", "me/new"], token),
            ([*ckpt, "--repo", "me/digits", "--private", *LICENSE], token),
            ([*ckpt, "--repo", "me/digits", *LICENSE], token),
            ([*ckpt, "--repo", "me/other", "--update", *LICENSE], token),
            ([*ckpt, "--repo", "me/digits", "--update", "--license", "mit", "--shard-size", "1MB"], token),
            ([*ckpt, "--repo", "me/notes", "--update", "--license", "mit", "--card", "new"], token),
            ([*ckpt, "--repo", "you/digits", *LICENSE], token),
            ([*ckpt, "--repo", "me/read", *LICENSE], {"HF_TOKEN": "hf_of_a_reader"}),
        ]
        hub.repositories["me/other"] = Repository()
        hub.repositories["me/other"].files["thesis.pdf"] = b"pages"
        hub.repositories["me/notes"] = Repository()
        hub.repositories["me/notes"].files |= {"notes.txt": b"mine", "model-7.safetensors": b"", "config.json": OURS}
        published = in_process(hub, tmp_path / "home", PUBLISHING, json.dumps(calls))
        assert "statuses [2, 2, 2, 2, 0, 2, 2, 0, 0, 2, 2]" in published.stdout, published.stderr
        errors = [line for line in published.stderr.splitlines() if line.startswith("publish.py: error: ")]
        for error, words in zip(errors, [
            "--repo me/new: no token; set HF_TOKEN, or run: hf auth login",
            "--repo me/new: the server refuses the token (401)",
            "--repo digits: must be owner/name",
            "--license: needed",
            "--repo me/digits: exists, with weights of this code (config.json, ...); give --update",
            "--repo me/other: exists, with other content (thesis.pdf); choose another name",
            "--repo you/digits: the token may publish for me or lab alone",
            "--repo me/read: the server refuses it (403); may the token read or write there?",
        ], strict=True):  # fmt: skip
            assert words in error
        assert hub.repositories.keys() == {"me/digits", "me/other", "me/notes"}
        repository = hub.repositories["me/digits"]
        assert repository.private and repository.commits == 2
        assert {"README.md", "config.json", "model.safetensors.index.json", "loss.png"} < repository.files.keys()
        assert "model.safetensors" not in repository.files, "of the first one"
        assert {"notes.txt", "model.safetensors"} < hub.repositories["me/notes"].files.keys()
        assert "model-7.safetensors" not in hub.repositories["me/notes"].files
        card = repository.files["README.md"].decode()
        assert "license: mit" in card and "| 2 | 0.25 |" in card and str(tmp_path) not in card

        first = str([*repository.former][-1])
        (digest,) = {str(json.loads(repository.at(each)["config.json"])["dit_family"]["licence"]) for each in [first]}
        assert digest == "apache-2.0" and f"me/digits@{repository.sha}" in published.stdout
        sources = ["me/digits", "me/digits", f"me/digits@{first}", "me/digits@none", "me/other"]
        reads = [
            (source, str(tmp_path / f"{number}.npy"), token if number else {}) for number, source in enumerate(sources)
        ]
        loaded = in_process(hub, tmp_path / "another", SAMPLING, json.dumps(reads))
        lines = [line for line in loaded.stdout.splitlines() if line.startswith(("sampled", "refused"))]
        for line, words in zip(lines, [
            "--ckpt me/digits: no such file or folder, and no such repository on the hub, or a private one",
            f"sampled me/digits me/digits@{repository.sha}",
            f"sampled me/digits@{first} me/digits@{first}",
            "--ckpt me/digits@none: the repository has no such revision",
            "--ckpt me/other: no weights of this code or of diffusers in this repository",
        ], strict=True):  # fmt: skip
            assert words in line, loaded.stderr
    before = Pipeline.from_pretrained(path, device="cpu", num_sampling_steps=4).sample([1, 2], seed=3)
    for name in ("1.npy", "2.npy"):  # the latest commit, and the one before
        assert np.array_equal(np.load(tmp_path / name), before)


@pytest.mark.slow
def test_without_network_the_cache_is_used_and_an_error_is_one_line(tmp_path: Path) -> None:
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2")
    calls = [([*"--repo me/digits --license mit --ckpt".split(), str(path)], {"HF_TOKEN": TOKEN})]
    home = tmp_path / "home"
    reads = json.dumps([(source, str(tmp_path / "a.npy"), {}) for source in ("me/digits", "me/none")])
    with serving() as hub:
        assert "statuses [0]" in in_process(hub, home, PUBLISHING, json.dumps(calls)).stdout
        first, second = (in_process(hub, home, SAMPLING, reads) for _ in range(2))
        assert "Fetching" in first.stderr and "Fetching" not in second.stderr
        assert "--ckpt me/none: no such file or folder, and no such repository on the hub" in second.stdout
        hub.refuses = 503
        assert "sampled me/digits" in in_process(hub, home, SAMPLING, reads).stdout
    calls[0][0][1] = "me/new"
    unreachable = f"the hub at {hub.url} cannot be reached ("
    for variables, reason in (({}, unreachable), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        loaded = in_process(hub, home, SAMPLING, reads, **variables)
        assert "sampled me/digits" in loaded.stdout, loaded.stderr
        assert f"refused --ckpt me/none: not in the cache, and {reason}" in loaded.stdout
        assert "; load it once with a network, or give a folder\n" in loaded.stdout
        failed = in_process(hub, home, PUBLISHING, json.dumps(calls), **variables)
        assert f"error: --repo me/new: {reason}" in failed.stderr and "statuses [2]" in failed.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--output, --repo: give one of them"),
        (["--output", "a", "--repo", "me/a"], "--output, --repo: give one of them"),
        (["--output", "a", "--private"], "--private: has no effect without --repo"),
        (["--output", "a", "--pictures", "no.png"], "--pictures no.png: no such file"),
        (["--output", "a", "--pictures", "notes.md"], "--pictures notes.md: no picture by its name"),
        (["--output", "a", "--pictures", "loss.png"], "--pictures loss.png: the card has a curve of this name"),
        (["--output", "a", "--pictures", "text.png"], "--pictures text.png: cannot be read as a picture"),
        (["--output", "a", "--scores", "no.json"], "--scores no.json: no such file"),
        (["--output", "a", "--ckpt", "no.safetensors"], "--ckpt no.safetensors: no such file"),
        (["--output", "a", "--license", "My licence"], "--license My licence: not an identifier that the hub knows"),
        (["--output", "full"], "--output full: exists already"),
        (
            ["--output", "a", "--license", "apache2"],
            "--license apache2: not an identifier that the hub knows; did you mean ",
        ),
        (["--output", "a", "--dtype", "fp16"], "--dtype: invalid choice: 'fp16' (choose from"),
        (["--output", "a", "--sampler", "euler"], "--sampler euler: --ckpt was trained under 'gaussian'; choose from"),
        (["--output", "a", "--num-sampling-steps", "0"], "--num-sampling-steps 0"),
        (["--output", "a", "--shard-size", "5"], "--shard-size 5: give a size with its unit"),
        (["--output", "a", "--ckpt", "digitz"], "--ckpt digitz: no such file or folder, and no released checkpoint"),
        (["--ckpt", "a", "--folder", "full", "--repo", "me/a"], "--ckpt, --folder: give one of them"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2")
    (tmp_path / "full").mkdir()
    for name in ("full/mine.txt", "notes.md", "loss.png", "text.png"):
        (tmp_path / name).write_text("kept")
    argv = flags if "--ckpt" in flags else [*flags, "--ckpt", "a.safetensors"]
    assert run(publish.main, "publish.py", argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists() and [*(tmp_path / "full").iterdir()] == [tmp_path / "full/mine.txt"]


def test_a_folder_is_saved_with_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_digits_checkpoint(tmp_path / "run/checkpoints/0000001.safetensors", "DiT-digits/2")
    (tmp_path / "a.scores.json").write_text(json.dumps({"format": 1, "scores": {"fid": 3.5}}))
    argv = ["--ckpt", str(path), "--output", str(tmp_path / "saved"), "--scores", str(tmp_path / "a.scores.json")]
    assert run(publish.main, "publish.py", argv) == 0
    assert capsys.readouterr().out == (
        "--license: not given, so that the card says unknown, and others may not use the weights\n"
        f"Wrote {tmp_path / 'saved'}\n"
    )
    card = (tmp_path / "saved/README.md").read_text()
    assert "| fid | 3.5 |" in card and "These weights: unknown." in card


# ----------------------------------------------------------------------------------------------------------------------
# Real scores, from the samples to the card


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and scores of its samples, by the commands of the documentation."""
    folder = tmp_path_factory.mktemp("scored")
    path = save_digits_checkpoint(folder / "run/checkpoints/0000001.safetensors", "DiT-digits/2", ema_decay=0.5)
    groups, meta = read_groups(path, list)
    assert meta is not None
    save_checkpoint(path, {**groups, "model": {name: -tensor for name, tensor in groups["ema-0.5"].items()}}, meta)
    sampling = "--num-fid-samples 20 --sampler ddim --num-sampling-steps 3 --cfg-scale 1.25 --global-seed 7".split()
    output = ["--output", str(folder / "samples.npz"), "--guidance-interval", "100", "900", "--balanced-labels"]
    assert run(sample_ddp.main, "sample_ddp.py", ["--ckpt", str(path), "--device", "cpu", *sampling, *output]) == 0
    report = ["--samples", str(folder / "samples.npz"), "--output-dir", str(folder / "report")]
    assert run(digits_report.main, "digits_report.py", report) == 0
    return path, folder / "report" / "scores.json"


def cells(card: str) -> dict[str, str]:
    """Cells of the tables of a card by the first of their line."""
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {line[0]: line[1] for line in lines if len(line) > 1}


def test_a_card_has_every_score_and_setting_of_the_samples(
    scored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, scores = scored
    argv = ["--ckpt", str(path), "--output", str(tmp_path / "a"), *LICENSE, "--scores", str(scores)]
    assert run(publish.main, "publish.py", argv) == 0
    err = capsys.readouterr().err
    assert err == (
        "publish.py: warning: at --ema-decay 0.5 the average still holds 50% of the untrained weights after 1 updates; "
        "--weights model has others\n"
    )
    card, document = (tmp_path / "a/README.md").read_text(), json.loads(scores.read_text())
    shown, config, checkpoint = cells(card), document["protocol"]["config"], document["protocol"]["checkpoint"]
    assert {name: shown[name] for name in document["scores"]} == {
        name: f"{value:.6g}" for name, value in document["scores"].items()
    }
    reference, samples = document["reference"], document["samples"]
    assert shown["samples"].startswith(f"{samples['images']} images, 8 x 8") and "1,297 images" in shown["reference"]
    assert reference["sha256"][:12] in shown["its digest"] and reference["sha256"][:12] in shown["fingerprint"]
    for part in (checkpoint["sha256"][:12], "step 1", "ema-0.5", "0000001.safetensors"):
        assert part in card[card.index("## Scores") :].partition("| weights | ")[2].partition("\n")[0]
    assert checkpoint["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert shown["sampler"].startswith(config["sampler"]["name"]) and shown["steps"] == config["num_sampling_steps"]
    assert float(shown["guidance scale"]) == config["guidance"]["cfg_scale"] == 1.25
    assert shown["guidance interval"] == "timesteps 100 900" and config["guidance"]["guidance_interval"] == [100, 900]
    assert shown["labels"] == "every class equally often" and config["job"]["balanced_labels"]
    assert shown["seed of noise and labels"] == str(config["job"]["global_seed"]) == "7"
    assert shown["precision of sampling"] == "float32, on cpu"
    assert document["network"]["weights_sha256"][:12] in shown["evaluator's network"]
    assert "> **Warning:** 20 samples are too few" in card
    whole = card[card.index("The whole document") :].partition("```json\n")[2].partition("\n```")[0]
    assert json.loads(whole)["scores"] == document["scores"] and str(path.parent) not in card


def test_scores_follow_weights_through_folders_and_no_further(
    scored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the published folder as of the checkpoint; not of other weights, or another set in the same file."""
    path, scores = scored
    given = [*LICENSE, "--scores", str(scores)]
    assert run(publish.main, "publish.py", ["--ckpt", str(path), "--output", str(tmp_path / "a"), *LICENSE]) == 0
    copied = ["--ckpt", str(tmp_path / "a"), "--output", str(tmp_path / "b"), *given]
    assert run(publish.main, "publish.py", copied) == 0
    sampling = "--num-fid-samples 20 --num-sampling-steps 2 --device cpu --output".split()
    again = ["--ckpt", str(tmp_path / "a"), *sampling, str(tmp_path / "again.npz")]
    assert run(sample_ddp.main, "sample_ddp.py", again) == 0
    report = ["--samples", str(tmp_path / "again.npz"), "--output-dir", str(tmp_path)]
    assert run(digits_report.main, "digits_report.py", report) == 0
    later = [*LICENSE, "--scores", str(tmp_path / "scores.json")]
    assert run(publish.main, "publish.py", ["--ckpt", str(path), "--output", str(tmp_path / "c"), *later]) == 0
    other = save_digits_checkpoint(tmp_path / "other.safetensors", "DiT-digits/2", seed=5)
    capsys.readouterr()
    for argv, own in ((["--ckpt", str(other)], ""), (["--ckpt", str(path), "--weights", "model"], " (model)")):
        assert run(publish.main, "publish.py", [*argv, "--output", str(tmp_path / "d"), *given]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            "publish.py: error: --scores scores.json: of 0000001.safetensors (DiT-digits/2, ema-0.5), not of these "
            f"weights{own}"
        )
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("DiT", "--num-sampling-steps 3"),
        ("DiT", "--sampler ddim --eta 0.5 --num-sampling-steps 4 --cfg-scale 1.1 --seed 11 --class-labels 3 1 4 "
         "--columns 2 --guidance-interval 100 900 --guidance-channels 1 --batch-size 2 --clip-denoised"),
        ("DiT", "--num-sampling-steps 3 --cfg-scale 2 --guidance-schedule linear --forecast 2,1 --precision fp32"),
        ("Skip-DiT", "--num-sampling-steps 3"),
        ("Skip-DiT", "--num-sampling-steps 6 --cache-interval 2 --cache-depth 2"),
    ],
)  # fmt: skip
def test_the_caption_of_a_picture_makes_it_again(
    model: str, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the published folder, to the bit."""
    monkeypatch.chdir(tmp_path)
    path = save_digits_checkpoint(tmp_path / "run/checkpoints/0000001.safetensors", f"{model}-digits/2")
    argv = ["--ckpt", str(path), *flags.split(), "--output", "grid.png", "--device", "cpu"]
    assert run(sample.main, "sample.py", argv) == 0
    argv = ["--ckpt", str(path), "--output", "saved", *LICENSE, "--pictures", "grid.png"]
    assert run(publish.main, "publish.py", argv) == 0
    card = Path("saved/README.md").read_text()
    python, script, *command = shlex.split(card.partition("Made by `")[2].partition("`")[0])
    assert (python, script) == ("python", "sample.py") and command[:2] == ["--ckpt", "saved"]
    assert "`python sample.py --ckpt me/digits --" in renamed_card(card, "saved", "me/digits")
    assert str(path.parent) not in card + Path("grid.png").read_bytes().decode(errors="ignore")
    assert run(sample.main, "sample.py", [*command, "--output", "again.png", "--device", "cpu"]) == 0
    with Image.open("saved/grid.png") as first, Image.open("again.png") as again:
        assert np.array_equal(np.asarray(first), np.asarray(again)) and len(np.unique(np.asarray(first))) > 10
    assert ("the default of `Pipeline.sample` and sample_ddp.py is 1.5" in card) and "--cfg-scale" in command
