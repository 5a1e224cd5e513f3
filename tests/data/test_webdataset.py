import random
import tarfile
import warnings
from pathlib import Path

import pytest

from data import open_dataset
from data.columns import ColumnSettings
from data.webdataset import expand_braces, read_shard, shard_paths
from tests.image_sources import encoded, write_tar

PNG = encoded()
TWO = [("a/0.png", PNG), ("a/0.cls", b"1"), ("a/1.png", PNG), ("a/1.cls", b"0\n")]


def opened(path, label=None, **columns):
    settings = ColumnSettings(label_column=label, **columns)
    return open_dataset("webdataset", path, 8, 3, columns=settings)


def test_images_are_in_the_order_of_shards_and_files(tmp_path):
    write_tar(tmp_path / "1.tar", [("9.cls", b"2"), ("9.JPEG", PNG), ("8.jpg", PNG), ("8.cls", b"0")])
    write_tar(tmp_path / "0.tar", TWO)
    data = opened(tmp_path)
    assert [data.path(i) for i in range(4)] == ["0.tar/a/0.png", "0.tar/a/1.png", "1.tar/9.jpeg", "1.tar/8.jpg"]
    assert [data[0, i][1] for i in range(4)] == [1, 0, 2, 0] and data.classes == ["0", "1", "2"]
    assert [*data.sizes()] == [len(PNG)] * 4 and data.content(2) == PNG


def test_one_shard_and_patterns_are_named_by_their_place(tmp_path):
    for folder in "ab":
        write_tar(tmp_path / folder / "00.tar", TWO)
    assert len(opened(tmp_path / "a/00.tar")) == 2 and opened(tmp_path / "a/00.tar").path(1) == "00.tar/a/1.png"
    both = opened(tmp_path / "{b,a}/{00..00}.tar")
    assert [both.path(i)[:2] for i in range(4)] == ["b/", "b/", "a/", "a/"]


def test_braces_are_those_of_a_shell():
    assert expand_braces("x-{08..10}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar"]
    assert expand_braces("{3..1}") == ["3", "2", "1"] and expand_braces("{9..10}") == ["9", "10"]
    assert expand_braces("{a,b}{000..1}") == ["a000", "a001", "b000", "b001"]
    assert expand_braces("a{b}c{}") == ["a{b}c{}"] and expand_braces("plain.tar") == ["plain.tar"]
    for pattern in ("{0..99999999}", "{0..9999}{0..9999}"):
        with pytest.raises(ValueError, match="99?,?9?99?,?|100,000,000 files; at most 1,000,000 are opened"):
            expand_braces(pattern)


def test_names_are_split_at_their_first_dot(tmp_path):
    members = [("v1.5/0.png", PNG), ("v1.5/0.seg.png", PNG), ("v1.5/0.json", b'{"label": 3, "id": "x"}')]
    data = opened(write_tar(tmp_path / "0.tar", members))
    assert len(data) == 1 and data.path(0) == "0.tar/v1.5/0.png" and data[0, 0][1] == 3


def test_labels_of_json_are_numbers_or_names(tmp_path):
    members = [(f"{i}.{kind}", c) for i, k in enumerate("ba") for kind, c in (("png", PNG), ("cls", k.encode()))]
    assert opened(write_tar(tmp_path / "0.tar", members)).classes == ["a", "b"]
    members = [("0.png", PNG), ("0.cls", b"7"), ("0.json", b'{"label": 1, "fine": "cat"}')]
    shard = write_tar(tmp_path / "1.tar", members)
    assert opened(shard)[0, 0][1] == 7 and opened(shard, "label")[0, 0][1] == 1
    assert opened(shard, "fine").classes == ["cat"]
    unlabelled = opened(shard, "none")
    assert unlabelled.classes == [] and unlabelled[0, 0][1] == {} and unlabelled.label(0) == 0


def test_what_holds_no_image_is_left_out(tmp_path):
    more = [("README", b""), ("._0.png", PNG), ("__MACOSX/0.png", PNG), ("b/0.cls", b"0"), (".hidden/1.png", PNG)]
    shard = write_tar(tmp_path / "0.tar", [*TWO, *more])
    with tarfile.open(shard, "a") as archive:
        for kind, name in ((tarfile.DIRTYPE, "a/2.png"), (tarfile.SYMTYPE, "a/3.png"), (tarfile.FIFOTYPE, "a/4.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    with pytest.warns(UserWarning, match="left out samples: 1 without an image; JPEG, PNG"):
        assert len(opened(shard)) == 2


def test_images_of_other_formats_are_left_out_with_a_word(tmp_path):
    more = [("a/2.tga", b""), ("a/2.cls", b"1"), ("a/3.JXL", b""), ("a/4.cls", b"0")]
    with pytest.warns(UserWarning, match=r"left out samples: 1 \.jxl, 1 \.tga, 1 without an image; JPEG, PNG"):
        assert len(opened(write_tar(tmp_path / "0.tar", [*TWO, *more]))) == 2


def test_numbers_as_names_of_classes_are_said_to_sort_as_text(tmp_path):
    members = [m for i in (1, 2, 10) for m in ((f"{i}.png", PNG), (f"{i}.json", b'{"label": "%d"}' % i))]
    with pytest.warns(UserWarning, match="sorted as text: 1, 10, 2, ..."):
        assert opened(write_tar(tmp_path / "0.tar", members)).classes == ["1", "10", "2"]


@pytest.mark.parametrize(
    ("members", "label", "message"),
    [
        ([("0.png", PNG)], None, "the sample 0 has neither a .cls nor a .json with its label; --label-column none"),
        ([("0.png", PNG), ("0.cls", b"0")], "x", "the sample 0 has no .json with its label"),
        (
            [("0.png", PNG), ("0.json", b'{"a": 1}')],
            None,
            r"0.json has no 'label'; --label-column names another .* \(a\)",
        ),
        ([("0.png", PNG), ("0.json", b"[1]")], None, r"0.json has no 'label'; .* \(no names\)"),
        ([("0.png", PNG), ("0.json", b"{")], None, "0.json is not JSON"),
        ([("0.png", PNG), ("0.json", b"[" * 100_000)], None, "nested too deeply"),
        ([("0.png", PNG), ("0.json", b'{"label": 0.5}')], None, "the label of image 0 is 0.5"),
        ([("0.png", PNG), ("0.cls", b"-1")], None, "is -1; test splits often have no labels"),
        ([("0.png", PNG), ("0.jpg", PNG), ("0.cls", b"0")], None, "the sample 0 has 2 images: jpg, png"),
        ([("0.png", PNG), ("0.png", PNG), ("0.cls", b"0")], None, "holds 0.png twice"),
        ([("0.txt", b"")], None, "its shards hold no images; members of samples are named"),
        (
            [("0.tga", b""), ("1.AVIF", b""), ("2.tga", b""), ("2.cls", b"0")],
            None,
            r"hold no images that are read, but 1 \.avif, 2 \.tga; JPEG, PNG, .* are read; convert other images",
        ),
    ],
)
def test_other_content_is_one_line(members, label, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        opened(write_tar(tmp_path / "0.tar", members), label)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_and_compressed_shards_are_named(tmp_path):
    for path, message in (
        (tmp_path / "nowhere", "nowhere: no such file or folder"),
        (tmp_path, "holds no .tar files"),
        (tmp_path / "{0..1}.tar", "1.tar: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(path)
        write_tar(tmp_path / "sub/0.tar", TWO).rename(tmp_path / "0.tar")
        (tmp_path / "0.tar").rename(tmp_path / ("0.tar" if message.startswith("holds") else "x"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/0.tar.gz").touch()
    for path in (tmp_path / "packed", tmp_path / "packed/0.tar.gz"):
        with pytest.raises(ValueError, match="0.tar.gz: compressed, so images in it have no places; unpack it"):
            opened(path)


def test_settings_of_tables_have_no_effect(tmp_path):
    for columns in ({"split": "train"}, {"image_column": "png"}):
        with pytest.raises(ValueError, match="has no effect on shards"):
            opened(write_tar(tmp_path / "0.tar", TWO), **columns)


def test_a_shard_that_is_cut_short_is_never_silent(tmp_path):
    """Wherever it ends; tarfile alone ends without a word at the border of a file."""
    whole = write_tar(tmp_path / "0.tar", TWO).read_bytes()
    end = 512 * 8
    for length in [*range(0, end, 256), end]:
        (tmp_path / "0.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="0.tar: (not a tar file, |cut short in |damaged or cut short)"):
            opened(tmp_path)
    (tmp_path / "0.tar").write_bytes(whole[: end + 512])
    assert len(opened(tmp_path)) == 2


def test_a_second_archive_and_a_hole_are_not_left_out_in_silence(tmp_path):
    whole = write_tar(tmp_path / "0.tar", TWO).read_bytes()
    for content in (whole + whole, bytes(1024) + whole, whole[:2048] + bytes(512) + whole[2560:]):
        (tmp_path / "0.tar").write_bytes(content)
        with pytest.raises(ValueError, match="0.tar: damaged or cut short: no end mark follows its last file"):
            opened(tmp_path)


def test_damaged_headers_end_in_one_line(tmp_path):
    """Bytes changed at random, sizes below zero among them, which older versions of tarfile follow in a circle."""
    whole, draws = write_tar(tmp_path / "0.tar", TWO).read_bytes(), random.Random(0)
    negative = bytearray(whole)
    negative[124:136] = b"\xff" * 10 + b"\xfe\x00"
    negative[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(negative[:512]))[0]
    variants = [bytes(negative)]
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draws.choice((1, 3, 30))):
            damaged[draws.choice((0, 1024, 2048)) + draws.randrange(512)] = draws.randrange(256)
        variants.append(bytes(damaged))
    failed = 0
    for content in variants:
        (tmp_path / "0.tar").write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opened(tmp_path)
        except ValueError as error:
            failed += "\n" not in str(error)
    assert failed > 100


def test_a_shard_that_is_gone_ends_the_work(tmp_path):
    data = opened(write_tar(tmp_path / "0.tar", TWO))
    (tmp_path / "0.tar").unlink()
    with pytest.raises(FileNotFoundError, match="0.tar"):
        data[0, 0]
    assert data.unreadable == []


def test_shards_of_a_folder_are_sorted_and_hidden_ones_left_out(tmp_path):
    for name in ("10.tar", "9.tar", "._9.tar", "index.json"):
        (tmp_path / name).touch()
    assert [path.name for path in shard_paths(tmp_path)] == ["10.tar", "9.tar"]


def test_the_table_of_a_shard_has_places_of_whole_files(tmp_path):
    path = write_tar(tmp_path / "0.tar", TWO)
    shard = read_shard(Path(path), None)
    content = path.read_bytes()
    assert [content[offset : offset + size] for offset, size in shard.places.tolist()] == [PNG, PNG]
