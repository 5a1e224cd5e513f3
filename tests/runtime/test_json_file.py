"""Documents and their checksums."""

import json
import random
from pathlib import Path

import pytest

from runtime.json_file import KEY, is_intact, read_json, write_json

DOCUMENT = {"b": [1, 2.5, None], "a": {"z": "\udcff name", "y": True}, "n": 1e-7, "t": (1, 2)}
READ = json.loads(json.dumps(DOCUMENT))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_document_comes_back(indent: int | None, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", DOCUMENT, indent=indent)
    assert read_json(tmp_path / "a.json") == READ
    written = json.loads((tmp_path / "a.json").read_text())
    assert written.keys() == {*DOCUMENT, KEY} and is_intact(written)
    write_json(tmp_path / "b.json", written, indent=indent)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    (tmp_path / "a.json").write_text(json.dumps(dict(reversed(written.items())), indent=4))
    assert read_json(tmp_path / "a.json") == READ, "the layout of the text does not matter"


def test_no_flipped_bit_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, DOCUMENT)
    whole, seen = path.read_bytes(), 0
    for position in random.Random(0).sample(range(8 * len(whole)), 300):
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            assert READ.items() <= read_json(path).items()  # with one more where the key of the checksum was hit
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            seen += 1
    assert seen > 200


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, DOCUMENT)
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(ValueError, match=r"a.json: edited or damaged, it does not match its checksum; delete it$"):
        read_json(path, "delete it")
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"a.json: not a JSON object$"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a.json: not JSON \(it is nested too deeply\)$"):
        read_json(path)
    path.write_text('{"a": 1, "b": {"lr": 0.1, "x": 2, "lr": 0.2}}')
    with pytest.raises(ValueError, match=r"a.json: not JSON \(it names 'lr' twice\)$"):
        read_json(path)
    path.write_text('{"of": "an earlier version"}')
    assert read_json(path) == {"of": "an earlier version"}
