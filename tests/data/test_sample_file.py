"""Jobs that are started, killed, damaged and resumed."""

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
    with pytest.raises(UserError, match="another process is writing it"):
        job(tmp_path / "a.npz").open(SETTINGS)
    fill(file, list(range(9)))
    file.finish(np.arange(600))


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
