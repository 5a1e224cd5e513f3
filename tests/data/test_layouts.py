"""Folders that are given in the place of others."""

import pytest

from data import open_dataset
from data.layouts import describe_layout

LAYOUTS = {
    "fast-DiT": ["imagenet256_features/0.npy", "imagenet256_labels/0.npy"],
    "fast-DiT (one": ["0.npy", "1.npy"],  # the inner folder
    "LightningDiT": ["latents_rank00_shard000.safetensors", "latents_stats.pt"],
    "REPA": ["images/00000/img00000000.png", "vae-sd/00000/img-mean-std-00000000.npy", "vae-sd/dataset.json"],
    "EDM2": ["00000/img-mean-std-00000000.npy", "dataset.json"],
    "DDT": ["n01440764/n01440764_18.JPEG.pt", "n01443537/n01443537_2.JPEG.pt"],
    "MAR": ["n01440764/n01440764_18.npz"],
}


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("dataset", ["latents", "imagefolder"])
@pytest.mark.parametrize("project", LAYOUTS)
def test_latents_of_other_projects_are_named(project, dataset, tmp_path):
    make(tmp_path, *LAYOUTS[project])
    if dataset == "imagefolder" and project == "REPA":
        return  # its images are an image folder
    with pytest.raises(ValueError, match="encode the images again by scripts/extract_latents.py$") as error:
        open_dataset(dataset, tmp_path, None, 3)
    assert str(error.value).startswith(f"{tmp_path}: holds latents in the format of ") and project in str(error.value)


@pytest.mark.parametrize("names", [["a/0.png", "b/1.jpg"], ["0.JPEG"], ["train/a/0.webp"]])
def test_images_are_no_latents(names, tmp_path):
    with pytest.raises(ValueError, match=r"holds images, not latents; give --dataset imagefolder, or encode them by"):
        open_dataset("latents", make(tmp_path, *names), None, 3)


@pytest.mark.parametrize("dataset", ["latents", "imagefolder"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("0.tar", "tar files; give --dataset webdataset"), ("data/0.parquet", "tables; give --dataset huggingface")],
)
def test_shards_and_tables_are_neither(name, words, dataset, tmp_path):
    with pytest.raises(ValueError, match=f"holds {words}$"):
        open_dataset(dataset, make(tmp_path, name), None, 3)


@pytest.mark.parametrize("dataset", ["latents", "imagefolder"])
def test_videos_are_neither(dataset, tmp_path):
    with pytest.raises(ValueError, match="holds videos; give --dataset videofolder"):
        open_dataset(dataset, make(tmp_path, "a/0.mp4", "b/1.AVI"), None, 3)


def test_latents_are_no_images(tmp_path):
    make(tmp_path, "index.json", "manifest.json", "00000.npy", "00000.json")
    with pytest.raises(ValueError, match=r"holds latents of scripts/extract_latents.py; .* by --dataset latents"):
        open_dataset("imagefolder", tmp_path, None, 3)


@pytest.mark.parametrize("dataset", ["latents", "imagefolder"])
def test_latents_in_a_subfolder_are_named(dataset, tmp_path):
    make(tmp_path, *(f"store/{name}" for name in ("index.json", "manifest.json", "00000.npy", "00000.json")))
    with pytest.raises(ValueError, match="of scripts/extract_latents.py in its subfolder store; give that one"):
        open_dataset(dataset, tmp_path, None, 3)


def test_an_unfinished_extraction_is_to_be_continued(tmp_path):
    make(tmp_path, "manifest.json", "00000.npy")
    with pytest.raises(ValueError, match="index.json: missing; the extraction is not finished, run scripts/extract_la"):
        open_dataset("latents", tmp_path, None, 3)


def test_anything_else_is_not_guessed(tmp_path):
    make(tmp_path, "notes.txt", ".cache/0.png")
    assert describe_layout(tmp_path) is None
    with pytest.raises(ValueError, match=r"holds no latents of scripts/extract_latents.py \(no index.json\); give its"):
        open_dataset("latents", tmp_path, None, 3)
    with pytest.raises(ValueError, match="notes.txt: not a folder"):
        open_dataset("latents", tmp_path / "notes.txt", None, 3)
