"""Networks as folders for the hub: saved, loaded, and described."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.pixels import save_png
from models import FAMILIES, Network
from models.loading import resolve_checkpoint
from runtime.errors import UserError
from runtime.groups import save_checkpoint
from runtime.pretrained import pretrained_folder
from sampling.cards.card import read_losses
from sampling.cards.scores import read_scores
from sampling.pipeline import Pipeline
from sampling.protocol import describe_checkpoint
from sampling.provenance import project_version
from sampling.resolution import preset_of
from tests.checkpoints import write_network
from tests.digits_checkpoints import save_digits_checkpoint
from tests.networks import conditioning, debug_name, debug_network, small_autoencoder, unconditional
from tests.runs import DIGITS, checkpoint, last_checkpoint, open_setup, start
from training.state import checkpoint_meta

SETTINGS: dict[str, Any] = {"device": "cpu", "num_sampling_steps": 3, "cfg_scale": 2.0}


def opened(path: Path, **settings: Any) -> Pipeline:
    return Pipeline.from_pretrained(path, **{**SETTINGS, **settings})


def samples(pipeline: Pipeline, network: Network) -> Any:
    rows, null = conditioning(network, [0, 1]), unconditional(network, 2)
    return pipeline.sample(rows.pop("y", None), seed=3, null=null, **rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_the_network_and_samples_as_before(family: str, tmp_path: Path) -> None:
    """To the bit, with another process than the file tells a stranger, and weights in several files."""
    network = debug_network(family)
    process = {"name": "gaussian", "prediction": "v"} if FAMILIES[family].process == "gaussian" else {"name": "flow"}
    path = write_network(tmp_path / "a.safetensors", debug_name(family), network, process=process)
    before = opened(path)
    folder = before.save_pretrained(tmp_path / "saved", shard_size=200_000)
    assert len([*folder.glob("model-*.safetensors")]) > 1 and (folder / "model.safetensors.index.json").is_file()
    for source in (folder, folder / "config.json"):
        after = opened(source)
        assert after.info.weights == "ema-0.9999" and after.info.step == 7 and after.network.config == network.config
    assert np.array_equal(samples(before, network), samples(after, network))
    with pytest.raises(UserError, match="holds no weights under 'model'; it has: ema-0.9999"):
        opened(folder, weights="model")


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_weights_are_half_as_large_and_known_as_such(family: str, tmp_path: Path) -> None:
    """Samples of --precision bf16 keep their bits; of float32 they are those of the rounded weights."""
    network = debug_network(family)
    path = write_network(tmp_path / "a.safetensors", debug_name(family), network)
    before = opened(path)
    whole, half = (before.save_pretrained(tmp_path / dtype, dtype=dtype) for dtype in ("fp32", "bf16"))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, whole)]
    assert sizes[0] < 0.65 * sizes[1]
    low = {"precision": "bf16"}
    assert np.array_equal(samples(opened(path, **low), network), samples(opened(half, **low), network))
    after = opened(half)
    assert {tensor.dtype for tensor in after.network.state_dict().values()} == {torch.float32}
    assert describe_checkpoint(after.info, "")["rounded"] == "bf16"
    again = after.save_pretrained(tmp_path / "again")
    assert np.array_equal(samples(after, network), samples(opened(again), network))
    assert all(
        "| rounded | linear maps of blocks, to bf16" in (each / "README.md").read_text() for each in (half, again)
    )
    assert "rounded" not in (whole / "README.md").read_text()
    with pytest.raises(UserError, match="dtype 'fp16': must be one of fp32, bf16"):
        before.save_pretrained(tmp_path / "none", dtype="fp16")


def test_saved_weights_bring_settings_of_sampling(tmp_path: Path) -> None:
    """They hold where nothing else is given; a preset that was there gives way to what is given, and no further."""
    network = debug_network("DiT")
    torch.save(network.state_dict(), tmp_path / "a.pt")
    pipeline = Pipeline.from_pretrained(tmp_path / "a.pt", device="cpu", vae="none", cfg_scale=3.0)
    own: dict[str, Any] = {"sampler": "unipc", "num_sampling_steps": 4, "cfg_scale": 2.0}
    folder = pipeline.save_pretrained(tmp_path / "saved", sampling=own)
    after = Pipeline.from_pretrained(folder, device="cpu")
    assert np.array_equal(after.sample([1, 2]), pipeline.sample([1, 2], **own))
    preset = preset_of(after.info)
    assert (preset.sampler, preset.steps, preset.cfg_scale, preset.channels) == ("unipc", "4", 2.0, 3)
    again = Pipeline.from_pretrained(
        after.save_pretrained(tmp_path / "again", sampling={"cfg_scale": 1.0}), device="cpu"
    )
    assert preset_of(again.info) == preset._replace(cfg_scale=1.0)
    tabled = Pipeline.from_pretrained(folder, device="cpu", solver_table="DiT-XL/2", num_sampling_steps="10")
    with pytest.raises(UserError, match="sampling: the pipeline has a solver table"):
        tabled.save_pretrained(tmp_path / "none", sampling={"cfg_scale": 2.0})
    for sampling, words in [
        ({"precision": "bf16"}, "sampling: saved weights cannot bring precision, only sampler, "),
        ({"sampler": "euler"}, "--sampler euler: --ckpt was trained under 'gaussian'"),
        ({"num_sampling_steps": "0"}, "0"),
    ]:
        with pytest.raises(UserError, match=words):
            pipeline.save_pretrained(tmp_path / "none", sampling=sampling)
    assert not (tmp_path / "none").exists()


def test_files_of_other_code_keep_their_defaults(tmp_path: Path) -> None:
    """Guidance of three channels, and the process that a flag named."""
    network = debug_network("DiT")
    torch.save(network.state_dict(), tmp_path / "a.pt")
    flags = {"vae": str(small_autoencoder(tmp_path / "vae") and tmp_path / "vae"), "num_sampling_steps": 3}
    before = Pipeline.from_pretrained(tmp_path / "a.pt", device="cpu", model=debug_name("DiT"), **flags)
    folder = before.save_pretrained(tmp_path / "saved")
    after = Pipeline.from_pretrained(folder, device="cpu", num_sampling_steps=3)
    assert after.info.is_foreign and after.prepare().config.guidance.guidance_channels == 3
    assert np.array_equal(before.sample([1, 2]), after.sample([1, 2]))
    assert (folder / "vae/config.json").is_file() and str(tmp_path) not in (folder / "config.json").read_text()
    assert "licence" not in json.loads((folder / "config.json").read_text())["dit_family"]
    assert (
        "These weights: unknown. They are, or were trained from, a.pt (unknown)" in (folder / "README.md").read_text()
    )


def test_one_damaged_number_is_found(tmp_path: Path) -> None:
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2")
    folder = opened(path).save_pretrained(tmp_path / "saved")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="saved: y_embedder.embedding_table.weight does not match its checksum"):
        opened(folder)


@pytest.mark.parametrize(("size", "words"), [("5GB", "no weights"), (1_000_000, "model-00001-of-.*is missing")])
def test_a_folder_without_weights_is_named(size: int | str, words: str, tmp_path: Path) -> None:
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2")
    folder = opened(path).save_pretrained(tmp_path / "saved", shard_size=size)
    min(folder.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=f"--ckpt .*saved: .*{words}"):
        opened(folder)


def test_folders_are_whole_or_absent(tmp_path: Path) -> None:
    pipeline = opened(save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="folder .*full: exists already"):
        pipeline.save_pretrained(tmp_path / "full")
    with pytest.raises(UserError, match="pictures .*no.png: no such file"):
        pipeline.save_pretrained(tmp_path / "b", pictures=(tmp_path / "no.png",))
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "full"}
    assert pretrained_folder(tmp_path) is None and [*(tmp_path / "full").iterdir()] == [tmp_path / "full" / "mine.txt"]


@pytest.mark.parametrize("name", ["other.pt", "DiT-XL-2-256x256.pt"])
def test_fine_tuned_weights_carry_their_origin(name: str, tmp_path: Path) -> None:
    """From a file by another name, or that of a release, through training, a further run, and into the card."""
    torch.save(debug_network("DiT", **DIGITS_FIELDS).state_dict(), tmp_path / name)
    licence = "cc-by-nc-4.0" if name.startswith("DiT-XL") else None
    first = trained(tmp_path, tmp_path / name)
    for path in (first, trained(tmp_path, first)):
        pipeline = opened(path)
        assert pipeline.info.origin is not None and pipeline.info.origin.licence == licence
    folder = pipeline.save_pretrained(tmp_path / "saved")
    again = opened(trained(tmp_path, folder)).info.origin
    assert again is not None and again == opened(first).info.origin  # the folder itself was never published
    assert f"license: {licence}" in (folder / "README.md").read_text() or licence is None
    if licence is not None:
        with pytest.raises(UserError, match="against the licence of the weights.*DiT-XL-2-256x256"):
            pipeline.save_pretrained(tmp_path / "other", licence="mit")


def test_a_resumed_run_keeps_its_origin(tmp_path: Path) -> None:
    torch.save(debug_network("DiT", **DIGITS_FIELDS).state_dict(), tmp_path / "DiT-XL-2-256x256.pt")
    flags = [*DIGITS, "--model", debug_name("DiT"), "--num-classes", 10, "--no-learn-sigma", "--global-batch-size", 4]
    begin = ["--init-from", tmp_path / "DiT-XL-2-256x256.pt", "--max-steps", 1]
    assert start(tmp_path / "runs", *flags, *begin) == 0
    assert start(tmp_path / "runs", *flags, "--max-steps", 2, "--resume", last_checkpoint(tmp_path / "runs")) == 0
    origin = resolve_checkpoint(checkpoint(tmp_path / "runs", 2))[0].origin
    assert origin is not None and origin.licence == "cc-by-nc-4.0"


DIGITS_FIELDS: dict[str, Any] = {"sample_shape": (1, 8, 8), "learn_sigma": False}


def trained(folder: Path, first: Path) -> Path:
    """A checkpoint of a run that starts from these weights."""
    model = ["--model", debug_name("DiT"), "--num-classes", 10, "--no-learn-sigma"]
    setup = open_setup(*DIGITS, *model, "--init-from", first)
    path, weights = folder / f"after-{first.stem}.safetensors", setup.network.state_dict()
    meta = checkpoint_meta(setup, 1)
    save_checkpoint(path, dict.fromkeys(meta["averages"], weights), meta)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Cards


def test_a_card_says_what_is_known(tmp_path: Path) -> None:
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2", lr=0.002)
    for name in ("grid.png", "loss.png"):
        save_png(np.zeros((8, 8, 1), np.uint8), tmp_path / name)
    scores = {"scores": {"fid": 2.27}, "protocol": {"reference": str(tmp_path / "ref.npz"), "count": 50_000}}
    (tmp_path / "a.scores.json").write_text(json.dumps(scores))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n{"step": 2, "loss": 0.25}\n{"st')
    known = {
        "scores": {"a.scores.json": read_scores(tmp_path / "a.scores.json")},
        "losses": read_losses(tmp_path / "metrics.jsonl"),
        "pictures": (tmp_path / "grid.png",),
        "curves": (tmp_path / "loss.png",),
    }
    folder = opened(path).save_pretrained(tmp_path / "saved", licence="apache-2.0", name="me/digits", **known)
    card = (folder / "README.md").read_text()
    for line in [
        "license: apache-2.0", "# digits", 'Pipeline.from_pretrained("me/digits")', "| fid | 2.27 |",
        "| learning rate | 0.002, constant, 0 steps of warm-up |", "from which weights is not recorded",
        '"reference": "ref.npz"', '"count": 50000', "| 1 | 1.5 |", "| 2 | 0.25 |", "![samples](grid.png)",
        "![loss](loss.png)", "one of 10 classes", "725,380 parameters", "| samples | 1,297 |",
        "These weights: apache-2.0.",
    ]:  # fmt: skip
        assert line in card, line
    assert str(tmp_path) not in card and (folder / "grid.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_a_recipe_says_what_decides_the_result_and_hides_what_does_not(tmp_path: Path) -> None:
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2", seed=3)
    card = (opened(path).save_pretrained(tmp_path / "saved") / "README.md").read_text()
    recipe, folded = card[card.index("## Recipe") : card.index("## Data")].split("<details>")
    for line in ["| seed | 3 |", "| precision, device | float32, on cpu |", "| labels dropped, for guidance | 10% |",
                 "prediction epsilon, loss weight constant |", "weight decay 0 |"]:  # fmt: skip
        assert line in recipe, line
    assert re.search(r"\| batch \| 256 samples a step; 256 samples seen, 0.197 epochs \|", recipe)
    for noise in ("num_workers", "dist", "parallel", "route", "None", "gamma", "null"):
        assert noise not in recipe, noise
    assert '"num_workers": 0' in folded
    assert "scikit-learn's 8 x 8 handwritten digits" in card
    digest = resolve_checkpoint(path)[0].meta["data"]["digest"]  # type: ignore[index]
    assert f"| fingerprint | SHA-256 `{digest[:12]}...`" in card
    assert "still holds 100% of the untrained weights after 1 updates" in card
    trained = save_digits_checkpoint(tmp_path / "b.safetensors", "DiT-digits/2", ema_decay=0.01)
    assert "still holds" not in (opened(trained).save_pretrained(tmp_path / "other") / "README.md").read_text()


@pytest.mark.parametrize("for_diffusers", [False, True])
def test_a_card_says_how_to_install_the_code(for_diffusers: bool, tmp_path: Path) -> None:
    pipeline = opened(save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2"))
    known = {"licence": "mit", "name": "me/digits", "for_diffusers": for_diffusers}  # by the former name
    cards = [
        (pipeline.save_pretrained(tmp_path / str(number), code_url=url, **known) / "README.md").read_text()
        for number, url in enumerate(("https://a.org/code.git", None))
    ]
    for card in cards:
        assert f"dit-family {project_version()}" in card and torch.__version__ in card and "Python 3.11" in card
    if for_diffusers:
        assert "pip install torch diffusers\n" in cards[0] and "Arguments: `class_labels`, `seed`" in cards[0]
        assert "hf download me/digits --local-dir p" in cards[0]
    else:
        assert "git clone https://a.org/code.git dit-family && cd dit-family\nbash scripts/setup.sh base &&" in cards[0]
        assert "git clone" not in cards[1] and "no public address" in cards[1]
        assert "python sample.py --ckpt me/digits\n" in cards[0]


def test_a_card_without_scores_says_so(tmp_path: Path) -> None:
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2")
    card = (opened(path).save_pretrained(tmp_path / "saved") / "README.md").read_text()
    assert re.search(r"## Scores\n+None are known", card) and "No record of training was at hand." in card


@pytest.mark.parametrize("content", ["{", "[]", '{"fid": 3}', '{"scores": 3}'])
def test_files_without_scores_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="--scores:? .*a.json"):
        read_scores(tmp_path / "a.json")
