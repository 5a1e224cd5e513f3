"""Jobs that are started, killed, damaged and resumed."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data.sample_file import SampleFile
from runtime.errors import UserError

SETTINGS = {"--cfg-scale": 1.5, "--interval": (0, 700), "--ckpt": "ab12"}
CHUNK = 70  # of 600 images: the ninth chunk has 40
IMAGES = np.random.default_rng(0).integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
PADDED = np.concatenate([IMAGES, IMAGES[:50]])


def job(path: Path, rank: int = 0) -> SampleFile:
    return SampleFile(path, IMAGES.shape, CHUNK, rank)


def fill(file: SampleFile, chunks: list[int]) -> None:
    for k in chunks:
        file.write(k, PADDED[k * CHUNK : (k + 1) * CHUNK])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rows_arrive_in_order_whoever_wrote_first(tmp_path):
    for name, order in (("a", range(9)), ("b", reversed(range(9)))):
        file = job(tmp_path / f"{name}.npz")
        assert file.open(SETTINGS) == list(range(9))
        for k in order:
            fill(job(tmp_path / f"{name}.npz", rank=k % 3), [k])
        assert names(tmp_path)[-1] == f"{name}.partial"
        file.finish(np.arange(600))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0", "arr_1"]
        assert np.array_equal(loaded["arr_0"], IMAGES) and loaded["arr_0"].dtype == np.uint8
        assert np.array_equal(loaded["arr_1"], np.arange(600)) and loaded["arr_1"].dtype == np.int64
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert names(tmp_path) == ["a.npz", "b.npz"]


def test_what_is_finished_is_not_made_again(tmp_path):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, [0, 3])
    fill(job(tmp_path / "a.npz", rank=1), [8])
    file.close()
    again = job(tmp_path / "a.npz")
    assert again.open(SETTINGS) == [1, 2, 4, 5, 6, 7]
    fill(again, [1, 2, 4, 5, 6, 7])
    again.finish(np.arange(600))
    with np.load(tmp_path / "a.npz") as loaded:
        assert np.array_equal(loaded["arr_0"], IMAGES)


@pytest.mark.parametrize("damage", ["changed", "cut", "lost"])
def test_a_chunk_that_is_no_longer_what_it_was_is_made_again(tmp_path, damage):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, [0, 4, 8])
    file.close()
    data = file.partial / "samples.npz"
    with data.open("rb+") as raw:
        if damage == "changed":
            raw.seek(-1, 2)
            raw.write(bytes([IMAGES[-1, -1, -1, -1] ^ 1]))
        elif damage == "cut":
            raw.truncate(data.stat().st_size - 10)
    if damage == "lost":
        data.unlink()
    lost = range(9) if damage == "lost" else [1, 2, 3, 5, 6, 7, 8]
    again = job(tmp_path / "a.npz")
    assert again.open(SETTINGS) == list(lost)
    fill(again, list(lost))
    again.finish(np.arange(600))
    with np.load(tmp_path / "a.npz") as loaded:
        assert np.array_equal(loaded["arr_0"], IMAGES)


@pytest.mark.parametrize("torn", ["3 12", "3", "3 x", "99 1", ""])
def test_a_record_that_a_kill_cut_short_counts_for_nothing(tmp_path, torn):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, [2, 3])
    record = file.partial / "finished.0"
    lines = record.read_text().split()
    record.write_text(f"\n{lines[0]} {lines[1]}\n\n{torn}")
    file.close()
    again = job(tmp_path / "a.npz")
    assert again.open(SETTINGS) == [0, 1, 3, 4, 5, 6, 7, 8]
    fill(again, [3])
    again.close()
    assert job(tmp_path / "a.npz").open(SETTINGS) == [0, 1, 4, 5, 6, 7, 8]


def test_a_kill_before_the_settings_were_written_starts_anew(tmp_path):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, [0])
    (file.partial / "settings.json").write_text("{")
    file.close()
    assert job(tmp_path / "a.npz").open(SETTINGS) == list(range(9))


def test_a_kill_while_the_file_is_completed_costs_nothing(tmp_path, monkeypatch):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, list(range(9)))
    monkeypatch.setattr("os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        file.finish(np.arange(600))
    monkeypatch.undo()
    file.close()
    again = job(tmp_path / "a.npz")
    assert again.open(SETTINGS) == []
    again.finish(np.arange(600))
    with np.load(tmp_path / "a.npz") as loaded:
        assert np.array_equal(loaded["arr_0"], IMAGES) and len(loaded["arr_1"]) == 600


def test_other_settings_are_refused_in_words_and_overwrite_forces(tmp_path):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, [0])
    file.close()
    changed = {**SETTINGS, "--cfg-scale": 2.0, "--eta": 0.5}
    with pytest.raises(UserError, match=r"other settings \(--cfg-scale was 1.5, now 2.0; --eta was None, now 0.5\)"):
        job(tmp_path / "a.npz").open(changed)
    for settings, missing in ((SETTINGS, range(1, 9)), (changed, range(9))):  # the same settings resume it
        again = job(tmp_path / "a.npz")
        assert again.open(settings, overwrite=True) == list(missing)
        again.close()
    with pytest.raises(UserError, match="--cfg-scale was 2.0, now 1.5"):
        job(tmp_path / "a.npz").open(SETTINGS)


def test_settings_of_another_format_are_refused_in_few_words(tmp_path):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    file.close()
    with pytest.raises(UserError, match=r"other settings \(those of another version of this code\); --overwrite"):
        job(tmp_path / "a.npz").open({**SETTINGS, "format": 2, "--eta": 0.5})


def test_a_finished_file_is_replaced_on_request_only(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"old")
    with pytest.raises(UserError, match="a.npz exists already; --overwrite replaces it"):
        job(tmp_path / "a.npz").open(SETTINGS)
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS, overwrite=True)
    fill(file, list(range(9)))
    assert (tmp_path / "a.npz").read_bytes() == b"old"
    file.finish(np.arange(600))
    assert len(np.load(tmp_path / "a.npz")["arr_0"]) == 600


def test_two_jobs_do_not_write_one_file(tmp_path):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    with pytest.raises(UserError, match="a.partial: in use by process"):
        job(tmp_path / "a.npz").open(SETTINGS)
    fill(file, list(range(9)))
    file.finish(np.arange(600))


def test_a_job_of_another_process_is_named_and_resumed_after_its_kill(tmp_path):
    ready, started = os.pipe()
    other = os.fork()
    if other == 0:
        file = job(tmp_path / "a.npz")
        file.open(SETTINGS)
        fill(file, [0])
        os.write(started, b"x")
        signal.pause()
    os.read(ready, 1)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"a.partial: in use by process {other} on .*; wait for it, or end it"):
            job(tmp_path / "a.npz").open(SETTINGS, overwrite=overwrite)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    file = job(tmp_path / "a.npz")
    assert file.open(SETTINGS) == list(range(1, 9))
    fill(file, list(range(1, 9)))
    file.finish(np.arange(600))
    assert names(tmp_path) == ["a.npz"]
    os.close(ready)
    os.close(started)


def test_a_disk_too_small_is_noticed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 99})())
    with pytest.raises(UserError, match=r"the images take 28,\d+ bytes, and 99 are free"):
        job(tmp_path / "a.npz").open(SETTINGS)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, [0])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UserError, match="No space left on device.*; the same command resumes the job"):
        fill(file, [1])
    file.close()
    assert job(tmp_path / "a.npz").open(SETTINGS) == list(range(1, 9))


# ----------------------------------------------------------------------------------------------------------------------
# Files that no job wrote

RECORD = {"config": {"job": {"save_png": True}}, "checkpoint": {}}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"a.json": b'{"my": "notes"}'},
        {"a.json": b"no JSON"},
        {"a.json": b"[1]"},
        {"a.partial": b"a file"},
        {"a.partial/thesis.tex": b"words"},
        {"a.partial/samples.npz": b"my samples"},
        {"a.partial/settings.json": b'{"editor.fontSize": 12}'},
        {"a.partial/settings.json": b"// comments", "a.partial/finished.0": b"a"},
        {"a.partial/lock": b"", "a.partial/photo.png": b"p"},
        {"a/holiday.png": b"p"},
        {"a/000001.png": b"p"},
        {"a": b"a file"},
        {"a.json": json.dumps({**RECORD, "config": {"job": {"save_png": False}}}).encode(), "a/000001.png": b"p"},
    ],
    ids=lambda files: "+".join(files),
)
def test_what_no_job_wrote_is_left_as_it_is(tmp_path, files, overwrite):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"a\S*: no sampling job wrote it, so it is not replaced; move it"):
        job(tmp_path / "a.npz").open(SETTINGS, overwrite=overwrite, files=[".png"])
    assert tree(tmp_path) == before


def test_a_user_s_file_in_the_folder_of_a_job_outlives_it(tmp_path, capsys):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    (file.partial / "notes.txt").write_text("words")
    file.close()
    again = job(tmp_path / "a.npz")
    again.open({**SETTINGS, "--eta": 1.0}, overwrite=True)
    fill(again, list(range(9)))
    again.finish(np.arange(600), RECORD)
    assert tree(again.partial) == {"notes.txt": b"words"} and "a.partial is kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text()) == RECORD


def test_an_own_record_and_own_pngs_are_replaced_on_request_only(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORD))
    (tmp_path / "a").mkdir()
    for name in ("000599.png", "photo.png"):
        (tmp_path / "a" / name).write_bytes(b"p")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="a.json exists already; --overwrite replaces it"):
        job(tmp_path / "a.npz").open(SETTINGS, files=[".png"])
    assert {name: data for name, data in tree(tmp_path).items() if "partial" not in name} == before
    assert job(tmp_path / "a.npz").open(SETTINGS, overwrite=True, files=[".png"]) == list(range(9))
    assert names(tmp_path / "a") == ["photo.png"]


def test_a_chunk_without_its_pngs_is_made_again(tmp_path):
    settings = {**SETTINGS, "--save-png": True}
    file = job(tmp_path / "a.npz")
    file.open(settings, files=[".png"])
    for i in range(140):
        file.path_of(i, ".png").touch()
    fill(file, [0, 1])
    file.path_of(75, ".png").unlink()
    (file.folder / ".000080.99999999.tmp.png").touch()
    file.close()
    assert job(tmp_path / "a.npz").open(settings, files=[".png"]) == list(range(1, 9))
    assert not list(file.folder.glob(".*"))


# ----------------------------------------------------------------------------------------------------------------------
# Damage and kills


@pytest.mark.parametrize("text", ["{", "[]", "\x00\xff", '{"--ckpt": 1', "1"])
def test_damaged_settings_are_named_and_the_job_starts_again(tmp_path, text, capsys):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, [0])
    (file.partial / "settings.json").write_bytes(text.encode("latin1"))
    file.close()
    again = job(tmp_path / "a.npz")
    assert again.open(SETTINGS) == list(range(9))
    assert capsys.readouterr().err == f"warning: {again.partial / 'settings.json'} is damaged; the job starts again\n"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe0 1", "\u00b2 \u00b2".encode(), b"9" * 6000 + b" 1", b"0 " + b"9" * 6000]
)
def test_damaged_records_of_chunks_count_for_nothing(tmp_path, content):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, [3])
    (file.partial / "finished.5").write_bytes(content)
    file.close()
    assert job(tmp_path / "a.npz").open(SETTINGS) == [0, 1, 2, 4, 5, 6, 7, 8]


def test_a_damaged_header_is_written_again(tmp_path):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, list(range(9)))
    with (file.partial / "samples.npz").open("rb+") as raw:
        raw.write(bytes(100))
    file.finish(np.arange(600))
    with np.load(tmp_path / "a.npz") as loaded:
        assert np.array_equal(loaded["arr_0"], IMAGES)


@pytest.mark.parametrize("step", ["replace", "record", "remove"])
def test_a_kill_after_any_step_of_the_end_is_repaired_by_the_same_command(tmp_path, step, monkeypatch):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, list(range(9)))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        if step == "remove":
            patch.setattr(SampleFile, "_remove_partial", lambda self: 1 / 0)
        else:
            replace = os.replace
            patch.setattr(
                "os.replace", lambda a, b: 1 / 0 if step == "replace" or b == tmp_path / "a.json" else replace(a, b)
            )
        file.finish(np.arange(600), RECORD)
    file.close()
    (tmp_path / ".a.99999999.tmp.json").touch()
    again = job(tmp_path / "a.npz")
    assert again.open(SETTINGS) == []
    again.finish(np.arange(600), RECORD)
    assert names(tmp_path) == ["a.json", "a.npz"]
    with np.load(tmp_path / "a.npz") as loaded:
        assert np.array_equal(loaded["arr_0"], IMAGES)


def test_a_finished_file_of_another_job_is_not_taken_for_the_lost_one(tmp_path):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, [0])
    (file.partial / "samples.npz").unlink()
    file.close()
    (tmp_path / "a.npz").write_bytes(b"other")
    with pytest.raises(UserError, match="a.npz exists already"):
        job(tmp_path / "a.npz").open(SETTINGS)
    assert (tmp_path / "a.npz").read_bytes() == b"other"


@pytest.mark.parametrize("name", ["lock", "settings.json", "samples.npz"])
def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path, name):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    file.close()
    (file.partial / name).unlink()
    (file.partial / name).mkdir()
    with pytest.raises(UserError, match="a.partial"):
        job(tmp_path / "a.npz").open(SETTINGS)
    assert (file.partial / name).is_dir()


@pytest.mark.parametrize("left", [("lock",), ("lock", "finished.0"), ("lock", "samples.npz")])
def test_a_kill_during_the_removal_leaves_nothing_after_the_same_command(tmp_path, left):
    file = job(tmp_path / "a.npz")
    file.open(SETTINGS)
    fill(file, list(range(9)))
    file.finish(np.arange(600), RECORD)
    file.partial.mkdir()
    for name in left:
        (file.partial / name).touch()
    with pytest.raises(UserError, match="exists already; --overwrite replaces it"):
        job(tmp_path / "a.npz").open(SETTINGS)
    assert names(tmp_path) == ["a.json", "a.npz"]
