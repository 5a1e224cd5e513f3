"""Folders with what a person added to them, on a stand-in of the hub; and training that starts from there."""

import json
from pathlib import Path

import numpy as np

from data.pixels import save_png
from runtime.licences import Origin
from sampling.pipeline import Pipeline
from tests.digits_checkpoints import save_digits_checkpoint
from tests.hub_server import PUBLISHING, TOKEN, in_process, serving

LICENSE = ["--license", "apache-2.0"]


def edit(folder: Path, old: str, new: str) -> None:
    """Replace text of a folder's card, which has it once."""
    card = (folder / "README.md").read_text()
    assert card.count(old) == 1
    (folder / "README.md").write_text(card.replace(old, new))


def test_a_folder_is_uploaded_with_what_was_added_to_it(tmp_path: Path) -> None:
    """Also other names, of the folder and of the repository; it is no origin of itself."""
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2")
    save_png(np.zeros((8, 8, 1), np.uint8), tmp_path / "grid.png")
    pipeline = Pipeline.from_pretrained(path, device="cpu")
    saved = pipeline.save_pretrained(
        tmp_path / "digits", license="apache-2.0", pictures=(tmp_path / "grid.png",), code_url="https://a.org/code"
    )
    (saved / "notes.txt").write_text("mine")
    (saved / ".DS_Store").write_text("no")
    edit(saved, "## Data\n", "## My notes\n\nOf digits.\n\n## Data\n")
    pipeline.save_pretrained(tmp_path / "bare")
    unknown = Pipeline.from_pretrained(saved, device="cpu").save_pretrained(tmp_path / "again")
    assert "license: apache-2.0" in (unknown / "README.md").read_text()
    (saved / "notes.txt").rename(tmp_path / "digits/more.txt")
    saved = saved.rename(tmp_path / "other")
    token, folder = {"HF_TOKEN": TOKEN}, ["--folder", str(saved)]
    with serving() as hub:
        calls: list[tuple[list[str], dict[str, str]]] = [
            ([*folder, "--repo", "me/sixteen"], token),
            (["--ckpt", str(saved), "--repo", "lab/copy"], token),
            (["--folder", str(tmp_path / "bare"), "--repo", "me/bare"], token),
            (["--folder", str(tmp_path), "--repo", "me/bare"], token),
            ([*folder, "--repo", "me/bare", *LICENSE], token),
        ]
        done = in_process(hub, tmp_path / "home", PUBLISHING, json.dumps(calls))
        assert "statuses [0, 0, 2, 2, 2]" in done.stdout, done.stderr
        assert f"--ckpt {saved}: its README.md is written anew; --folder {saved} uploads the folder" in done.stdout
        for words in (
            "bare: no licence in its README.md; write one, such as license: apache-2.0, into its first lines",
            f"--folder {tmp_path}: no folder that publish.py --output wrote",
            "--license: has no effect with --folder",
        ):
            assert words in done.stderr
        repository = hub.repositories["me/sixteen"]
        assert {"more.txt", "grid.png"} < repository.files.keys() and ".DS_Store" not in repository.files
        card = repository.files["README.md"].decode()
        for line in (
            "\n# sixteen\n",
            'from_pretrained("me/sixteen")',
            "--ckpt me/sixteen\n",
            "## My notes\n\nOf digits.",
        ):
            assert line in card, line
        copied = hub.repositories["lab/copy"].files["README.md"].decode()
        for text in (card, copied):
            assert "trained from" not in text and "base_model" not in text and "license: apache-2.0" in text

        # Edited on the hub, then weights anew; the former picture goes with the card that showed it
        repository.files["README.md"] += b"Edited there.\n"
        update = ["--ckpt", str(path), "--repo", "me/sixteen", "--update", *LICENSE]
        calls = [
            (update, token),
            ([*update, "--card", "keep"], token),
            ([*update, "--card", "new"], token),
            (update, token),
        ]
        done = in_process(hub, tmp_path / "home", PUBLISHING, json.dumps(calls))
        assert "statuses [2, 0, 0, 0]" in done.stdout, done.stderr
        assert "me/sixteen: its README.md was edited there; give --card keep to leave it as it is" in done.stderr
        kept = repository.at([*repository.former][-2])
        assert kept is not None and kept["README.md"].endswith(b"Edited there.\n") and "grid.png" in kept
        assert b"Edited there" not in repository.files["README.md"] and "grid.png" not in repository.files
        assert "more.txt" in repository.files


TRAINING = """
import json, sys
from runtime.errors import run
import train

print("statuses", [run(train.main, "train.py", argv) for argv in json.loads(sys.argv[1])])
"""


CLIENT = """
import os, sys
from huggingface_hub.cli.hf import main

os.environ["HF_TOKEN"] = sys.argv.pop(1)
main()
"""


def test_the_stand_in_answers_the_command_line_of_the_hub(tmp_path: Path) -> None:
    """And to a folder that it downloaded, training and publishing give the name of the repository."""
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2")
    home, token = tmp_path / "home", {"HF_TOKEN": TOKEN}
    with serving() as hub:
        calls = [(["--ckpt", str(path), "--repo", "me/digits", "--private", *LICENSE], token)]
        assert "statuses [0]" in in_process(hub, home, PUBLISHING, json.dumps(calls)).stdout
        who = in_process(hub, home, CLIENT, TOKEN, "auth", "whoami")
        assert who.returncode == 0 and "me" in who.stdout and "lab" in who.stdout, who.stderr
        download = ["download", "me/digits", "--local-dir", str(tmp_path / "renamed")]
        refused = in_process(hub, home, CLIENT, "hf_of_another", *download)
        assert refused.returncode != 0 and not (tmp_path / "renamed/config.json").exists()
        done = in_process(hub, home, CLIENT, TOKEN, *download)
        assert done.returncode == 0, done.stderr
        calls = [(["--folder", str(tmp_path / "renamed"), "--repo", name], token) for name in ("me/again", "lab/copy")]
        done = in_process(hub, home, PUBLISHING, json.dumps(calls))
        assert "statuses [0, 0]" in done.stdout, done.stderr
        own, other = (hub.repositories[name].files for name in ("me/again", "lab/copy"))
        assert b"base_model" not in own["README.md"] and b'"origin": null' in own["config.json"]
        assert b"\nbase_model: me/digits\n---\n" in other["README.md"]
        assert b"These weights are those of me/digits." in other["README.md"]
        assert json.loads(other["config.json"])["dit_family"]["origin"]["name"] == "me/digits"
    copy = Pipeline.from_pretrained(tmp_path / "renamed", device="cpu")
    assert copy.info.origin == Origin("me/digits", "apache-2.0")
    card = (copy.save_pretrained(tmp_path / "you", name="you/digits") / "README.md").read_text()
    assert "base_model: me/digits\n" in card and "They are, or were trained from, me/digits (apache-2.0)" in card


def test_training_starts_from_a_repository_which_is_its_origin(tmp_path: Path) -> None:
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2")
    flags = "--dataset digits --model DiT-digits/2 --max-steps 1 --global-batch-size 4 --device cpu".split()
    token, results = {"HF_TOKEN": TOKEN}, ["--results-dir", str(tmp_path / "runs")]
    with serving() as hub:
        home = tmp_path / "home"
        calls = [(["--ckpt", str(path), "--repo", "me/digits", *LICENSE], token)]
        assert "statuses [0]" in in_process(hub, home, PUBLISHING, json.dumps(calls)).stdout
        sources = f"me/digits@{hub.repositories['me/digits'].sha}", "me/none"
        starts = [[*flags, *results, "--init-from", source] for source in sources]
        done = in_process(hub, home, TRAINING, json.dumps(starts))
        assert "statuses [0, 2]" in done.stdout, done.stderr
        assert "--init-from: DiT-digits/2, process gaussian" in done.stdout + done.stderr
        assert "--init-from me/none: no such file or folder, and no such repository on the hub" in done.stderr
        (trained,) = (tmp_path / "runs").glob("*/checkpoints/*.safetensors")
        folder = Pipeline.from_pretrained(trained, device="cpu").save_pretrained(tmp_path / "more", license="mit")
    card = (folder / "README.md").read_text()
    assert "base_model: me/digits\n" in card and "They were trained from me/digits@" in card
