"""Captions on disk, in every form that is taken, and what is wrong with others."""

import json
from pathlib import Path

import pytest

from data.captions import read_captions

PATHS = ["ant/0.png", "cat/a#0", "cat/a#6", "cat/b.mp4#0"]
SAID = ["an ant", "two cats, one asleep", "two cats, one asleep", 'a "cat"']


def table(folder: Path, kind: str) -> str:
    """Write the captions in one form, and return what --captions takes."""
    files = dict(zip([path.partition("#")[0] for path in PATHS], SAID, strict=True))
    if kind == "txt":
        for file, caption in files.items():
            path = folder / "data" / (Path(file).with_suffix(".txt") if "png" in file else f"{file}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"\ufeff{caption}\n")
        return "txt"
    path = folder / f"captions.{kind.split()[0]}"
    if kind == "csv":
        lines = ['"' + caption.replace('"', '""') + f'",{file}' for file, caption in files.items()]
        path.write_text("\n".join(["caption,file_name", *lines]))
    else:
        rows = [{"video": file, "text": caption, "more": 1} for file, caption in files.items()]
        path.write_text(json.dumps(files if kind == "json" else rows))
    return str(path)


@pytest.mark.parametrize("kind", ["json", "json list", "csv", "txt"])
def test_captions_are_found_by_path(kind: str, tmp_path: Path) -> None:
    assert read_captions(table(tmp_path, kind), tmp_path / "data", PATHS) == SAID


@pytest.mark.parametrize("kind", ["json", "txt"])
def test_an_image_without_a_caption_is_named(kind: str, tmp_path: Path) -> None:
    source = table(tmp_path, kind)
    where = "dog/1.png has no .txt" if kind == "txt" else "no caption of dog/1.png"
    with pytest.raises(ValueError, match=f"{where}, nor have 1 others"):
        read_captions(source, tmp_path / "data", [*PATHS, "dog/1.png", "dog/2.png"])
    with pytest.raises(ValueError, match=f"{where}$"):
        read_captions(source, tmp_path / "data", ["dog/1.png"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[1]", "must be an object of path -> caption, or a list of objects with both"),
        ("a.json", b'{"a": 1}', "must be an object of path -> caption"),
        (
            "a.json",
            b'[{"path": "a", "caption": "x"}, {"path": "b"}]',
            "entry 2 needs a path and a caption; it has path",
        ),
        ("a.csv", b"name,caption\na,b\n", "entry 1 needs a path and a caption; it has name, caption"),
        ("a.json", b"\xff", "not text in UTF-8"),
        ("a.yaml", b"", "must end in .json or .csv, or be txt for a .txt next to each file"),
        ("none.csv", None, r"cannot be read \(No such file"),
    ],
)
def test_other_files_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(str(tmp_path / name), tmp_path, ["a"])
