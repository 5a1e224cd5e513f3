import errno
import gc
import hashlib
import json
import os
import pickle
import random
import shutil
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data import GlobalBatches, encoder_for, open_dataset
from data.dataset import read_batches
from data.encoders import LatentScaling
from data.image_folder import is_flipped
from data.latent_files import ArrayFile, Encoded, finished_shard, is_finite, write_index, write_json, write_shard
from data.latents import LatentShards
from runtime.errors import UserError
from runtime.migrate import latent_index

COUNTS = (4, 0, 5, 1)
SHAPE = (2, 6, 4, 4)  # flips, 2 C, h, w
SCALING = {"scaling_factor": 0.5, "shift_factor": 0.25, "latents_mean": [1.0, 2.0, 3.0], "latents_std": [1.0, 2.0, 4.0]}
ENCODER = {"name": "ema", "class": "AutoencoderKL", "sha256": "0", "stochastic": True, **SCALING}
MANIFEST = {"format": 2, "classes": ["ant", "cat"], "image_shape": [3, 8, 8], "encoder": ENCODER}
FORMAT_1 = {
    "format": 1, "classes": ["ant", "cat"], "image_shape": [3, 8, 8], "vae": "ema", "encoder_sha256": "0",
    "scale": 0.5, "moments_shape": list(SHAPE), "batch_size": 32,
}  # fmt: skip


def store(folder, raw, counts=COUNTS, **changes):
    """Write rows (n, flips, *raw shape) as shards of the given counts, each in parts of two rows."""
    folder.mkdir()
    manifest = {**MANIFEST, "row_shape": list(raw.shape[1:]), **changes}
    write_json(folder / "manifest.json", manifest)
    row = 0
    for number, count in enumerate(counts):
        parts = []
        for start in range(row, row + count, 2):
            rows = range(start, min(start + 2, row + count))
            names = [f"{'cat' if i % 2 else 'ant'}/{i}.png" for i in rows]
            parts.append(Encoded(raw[list(rows)], [i % 2 for i in rows], names, []))
        write_shard(folder, number, manifest["row_shape"], parts)
        row += count
    return write_index(folder, len(counts))


@pytest.fixture
def raw():
    return np.random.default_rng(0).standard_normal((sum(COUNTS), *SHAPE)).astype(np.float16)


@pytest.fixture
def folder(tmp_path, raw):
    store(tmp_path / "latents", raw)
    return tmp_path / "latents"


def test_the_digest_is_of_the_encoder_and_of_all_paths_in_their_order(folder):
    lines = "".join(f"{'cat' if i % 2 else 'ant'}/{i}.png\n" for i in range(10))
    assert LatentShards(folder).digest() == hashlib.sha256(f"{ENCODER['sha256']}{lines}".encode()).hexdigest()


def test_a_description_is_read_once(folder, monkeypatch):
    read, seen = type(folder).read_bytes, []
    monkeypatch.setattr(type(folder), "read_bytes", lambda path: seen.append(path.name) or read(path))
    monkeypatch.setattr("data.latent_files.sha256_of", None)  # which would read it again
    LatentShards(folder)
    assert seen == [*(f"0000{number}.json" for number in range(4)), "labels.npy"]


def without_labels(folder):
    """Make a store one of before labels.npy: its labels and paths are in the descriptions alone."""
    index = json.loads((folder / "index.json").read_text())
    kept = {name: value for name, value in index.items() if name not in ("labels", "digest", "crc32")}
    write_json(folder / "index.json", kept)
    (folder / "labels.npy").unlink()


def test_opening_parses_no_description_and_finds_what_it_says(folder, monkeypatch):
    now = LatentShards(folder)
    monkeypatch.setattr("data.latents.parse_labels", None)
    assert LatentShards(folder).digest() == now.digest()
    monkeypatch.undo()
    without_labels(folder)
    before = LatentShards(folder)
    keys = [(0, index) for index in (9, 0, 4)]
    assert before.digest() == now.digest() and before.path(5) == now.path(5)
    assert before.gather(keys)[1].tolist() == now.gather(keys)[1].tolist() == [1, 0, 0]


def test_rows_come_back_in_order_from_whatever_shard(folder, raw):
    data = LatentShards(folder, flip=False)
    assert len(data) == 10 and data.classes == ["ant", "cat"] and data.image_shape == (3, 8, 8)
    assert data.raw_shape == (6, 4, 4) and data.vae == "ema"
    for index in range(10):
        row, label, place = data[7, index]
        assert row.dtype == torch.float16 and np.array_equal(row.numpy(), raw[index, 0])
        assert (label, place) == (index % 2, index)
        assert data.path(index) == f"{'cat' if index % 2 else 'ant'}/{index}.png"


def test_a_gathered_batch_is_its_items(folder):
    data = LatentShards(folder, seed=3)
    keys = [(epoch, index) for epoch in (0, 5) for index in (9, 0, 4, 4, 3, 8)]
    rows, labels, indices = data.gather(keys)
    assert rows.shape == (12, 6, 4, 4) and labels.dtype == indices.dtype == torch.int64
    for key, *gathered in zip(keys, rows, labels, indices, strict=True):
        for ours, theirs in zip(gathered, data[key], strict=True):
            assert torch.equal(ours, torch.as_tensor(theirs))
    assert [len(part) for part in data.gather([])] == [0, 0, 0]
    for index in (-1, 10):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            data.gather([(0, index)])


def test_flips_are_those_of_images(folder, raw):
    data = LatentShards(folder, seed=5)
    flips = []
    for key in ((epoch, index) for epoch in range(20) for index in range(10)):
        flips.append(is_flipped(key, 5))
        assert np.array_equal(data[key][0].numpy(), raw[key[1], int(flips[-1])])
    assert 70 < sum(flips) < 130


def test_one_stored_flip_is_never_mirrored(tmp_path, raw):
    store(tmp_path / "plain", raw[:, :1])
    data = LatentShards(tmp_path / "plain")
    for epoch in range(8):
        assert np.array_equal(data[epoch, 4][0].numpy(), raw[4, 0])
    with pytest.raises(ValueError, match=r"index\.json: holds no mirrored images; extract with --both-flips"):
        LatentShards(tmp_path / "plain", flip=True)


def test_files_are_opened_anew_in_a_worker_and_closed(folder):
    gc.collect()  # what other tests have left
    count = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    data = LatentShards(folder)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[1, 8][0], data[1, 8][0])
    assert not {"shards", "_files"} & data.__getstate__().keys()
    assert all(type(shard) is np.memmap and shard.mode == "r" for shard in data.shards)
    del data, copy
    gc.collect()
    assert count is None or len(os.listdir("/proc/self/fd")) == count


def test_a_batch_reads_its_rows_and_no_other_bytes(folder, raw, monkeypatch):
    read, advise, size, calls = os.preadv, os.posix_fadvise, raw[0, 0].nbytes, []

    def preadv(descriptor, buffers, offset):
        calls.append(("read", offset, sum(len(buffer) for buffer in buffers)))
        return read(descriptor, buffers, offset)

    def posix_fadvise(descriptor, offset, length, advice):
        calls.append(("prefetch", offset, length))
        return advise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    data = LatentShards(folder, flip=False)
    data.gather([(0, i) for i in range(10)])  # checksums are compared
    calls.clear()
    rows = [9, 2, 2, 5]  # the first of its shard, the third, the second
    assert np.array_equal(data.gather([(0, i) for i in rows])[0].numpy(), raw[rows, 0])
    places = [128 + 2 * size * place for place in (0, 2, 2, 1)]
    assert calls == [(name, place, size) for name in ("prefetch", "read") for place in places]


@pytest.mark.parametrize("missing", [["posix_fadvise"], ["preadv", "posix_fadvise"]])
def test_systems_without_these_calls_read_the_same(missing, folder, monkeypatch):
    keys = [(epoch, index) for epoch in range(3) for index in (9, 0, 4, 4, 3, 8)]
    expected = LatentShards(folder).gather(keys)
    for name in missing:
        monkeypatch.delattr(os, name)
    assert all(torch.equal(*pair) for pair in zip(LatentShards(folder).gather(keys), expected, strict=True))


def test_arrays_in_columns_are_read_by_rows(raw, tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(raw))
    file, row = ArrayFile(tmp_path / "x.npy", raw.shape), np.empty(SHAPE[1:], np.float16)
    file.prefetch(7, row.nbytes)
    file.read_into(7, row)
    assert np.array_equal(row, raw[3, 1])


def test_reads_that_return_less_are_continued(folder, raw, monkeypatch):
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: read(file, [buffers[0][:50]], offset))
    rows = LatentShards(folder, flip=False).gather([(0, i) for i in range(10)])[0]
    assert np.array_equal(rows.numpy(), raw[:, 0])


def test_a_file_that_fails_after_it_was_opened_is_one_line(folder, monkeypatch):
    data = LatentShards(folder, flip=False)
    data.gather([(0, 4), (0, 8)])
    os.truncate(folder / "00002.npy", (folder / "00002.npy").stat().st_size - 1000)
    data.gather([(0, 4)])
    with pytest.raises(ValueError, match="^.*00002.npy: cut short while in use; delete it and run [^\n]*$"):
        data.gather([(0, 8)])

    def broken(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ValueError, match="^.*00002.npy: cannot be read .Input/output error.$"):
        data.gather([(0, 4)])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_serves_global_batches(folder, workers):
    data = LatentShards(folder, seed=1)
    keys = list(GlobalBatches(10, 6, rank=0, world=1, seed=1, steps=range(4)))
    loader = DataLoader(data, batch_sampler=keys, num_workers=workers)
    for wanted, (rows, labels, indices) in zip(keys, loader, strict=True):
        expected = data.gather(wanted)
        assert all(torch.equal(*pair) for pair in zip((rows, labels, indices), expected, strict=True))


def test_latents_are_scaled_samples_of_the_stored_posterior(folder):
    data = LatentShards(folder)
    encoder = encoder_for(data, data.vae)
    assert encoder.stochastic and encoder.weight_bytes == 0
    assert encoder.raw_shape((3, 8, 8)) == data.raw_shape and encoder.latent_shape((3, 8, 8)) == (3, 4, 4)
    rows, noise = data.gather([(0, 1), (0, 6)])[0], torch.randn(2, 3, 4, 4)
    latents = encoder.to_latents(encoder.encode_pixels(rows), noise)
    assert latents.dtype == torch.float32
    mean, std = (torch.tensor(SCALING[name]).view(3, 1, 1) for name in ("latents_mean", "latents_std"))
    z = rows[:, :3].float() + rows[:, 3:].float() * noise
    torch.testing.assert_close(latents, (z - 0.25 - mean) * 0.5 / std)


def test_a_store_of_a_deterministic_encoder_needs_no_noise(tmp_path, raw):
    trivial = {"stochastic": False, "shift_factor": 0.0, "latents_mean": [], "latents_std": []}
    store(tmp_path / "plain", raw, encoder={**ENCODER, "class": "AutoencoderDC", **trivial})
    data = LatentShards(tmp_path / "plain")
    encoder, rows = encoder_for(data, data.vae), data.gather([(0, 1)])[0]
    assert encoder.latent_shape((3, 8, 8)) == (6, 4, 4)
    assert torch.equal(encoder.to_latents(encoder.encode_pixels(rows)), rows.float() * 0.5)


def test_clips_are_rows_of_frames(tmp_path):
    raw = np.random.default_rng(0).standard_normal((10, 1, 5, 6, 2, 4)).astype(np.float16)
    store(tmp_path / "clips", raw, image_shape=[5, 3, 4, 8])
    data = open_dataset("latents", tmp_path / "clips", (4, 8), 3)
    encoder, rows = encoder_for(data, data.vae), data.gather([(0, 1), (0, 6)])[0]
    assert encoder.latent_shape((5, 3, 4, 8)) == (5, 3, 2, 4)
    assert encoder.to_latents(rows, torch.zeros(2, 5, 3, 2, 4)).shape == (2, 5, 3, 2, 4)


def test_an_encoder_that_does_not_fit_is_refused(folder):
    data = LatentShards(folder)
    with pytest.raises(ValueError, match="holds latents of the autoencoder 'ema'; give that one"):
        encoder_for(data, "none")
    with pytest.raises(ValueError, match=r"of images \(3, 8, 8\), not \(3, 16, 16\)"):
        encoder_for(data, "ema").latent_shape((3, 16, 16))
    with pytest.raises(ValueError, match=r"takes stored latents \(6, 4, 4\), not \(3, 8, 8\)"):
        encoder_for(data, "ema").encode_pixels(torch.zeros(2, 3, 8, 8))


def test_a_store_of_format_1_trains_as_before(tmp_path, raw):
    store(tmp_path / "new", raw)
    store(tmp_path / "old", raw)
    index = json.loads((tmp_path / "old/index.json").read_text())
    (tmp_path / "old/index.json").write_text(
        json.dumps({**FORMAT_1, **{name: index[name] for name in ("count", "skipped", "shards")}})
    )
    old, new = (LatentShards(tmp_path / name, seed=3) for name in ("old", "new"))
    assert (old.classes, old.vae, old.raw_shape, old.image_shape) == (new.classes, "ema", new.raw_shape, (3, 8, 8))
    keys, noise = [(epoch, index) for epoch in range(2) for index in range(10)], torch.randn(20, 3, 4, 4)
    rows = old.gather(keys)[0]
    assert torch.equal(rows, new.gather(keys)[0])
    latents = encoder_for(old, old.vae).to_latents(rows, noise)
    assert torch.equal(latents, (rows[:, :3].float() + rows[:, 3:].float() * noise) * 0.5)


def test_format_1_becomes_format_2():
    migrated = latent_index(FORMAT_1)
    assert migrated["format"] == 2 and migrated["row_shape"] == list(SHAPE) and migrated["batch_size"] == 32
    assert migrated["encoder"].keys() == ENCODER.keys()
    assert LatentScaling.from_config(migrated["encoder"], 3) == LatentScaling(0.5)
    assert not {"vae", "scale", "moments_shape", "encoder_sha256"} & migrated.keys()
    assert latent_index(migrated) == migrated and latent_index({"format": 7}) == {"format": 7}


def test_open_dataset_checks_what_the_flags_say(folder):
    assert isinstance(open_dataset("latents", folder, None, 3), LatentShards)
    assert len(open_dataset("latents", folder, 8, 3, flip=False)) == 10
    with pytest.raises(ValueError, match=r"of images \(3, 8, 8\), not \(3, 16, 16\); check size"):
        open_dataset("latents", folder, 16, 3)
    with pytest.raises(ValueError, match=r"not \(1, 8, 8\)"):
        open_dataset("latents", folder, None, 1)
    with pytest.raises(ValueError, match="a folder of latents needs --data-path"):
        open_dataset("latents", None, None, 3)


def test_a_digest_is_that_of_the_images_and_the_encoder(folder, tmp_path, raw):
    digest = LatentShards(folder).digest()
    store(tmp_path / "other", raw + 1, (5, 5))
    assert LatentShards(tmp_path / "other").digest() == digest, "neither of the shards nor of rounding"
    store(tmp_path / "encoder", raw, encoder={**ENCODER, "sha256": "1"})
    store(tmp_path / "fewer", raw[:9], (9,))
    for other in ("encoder", "fewer"):
        assert LatentShards(tmp_path / other).digest() != digest


def test_checksums_are_those_of_the_files(folder):
    index = json.loads((folder / "index.json").read_text())
    assert index["count"] == 10 and [shard["count"] for shard in index["shards"]] == list(COUNTS)
    for shard in index["shards"]:
        for name, facts in shard["files"].items():
            data = (folder / name).read_bytes()
            assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    LatentShards(folder).verify()


def edit_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_description(folder, text):
    without_labels(folder)
    (folder / "00000.json").write_text(text)


DAMAGES = {
    "no folder": (lambda f: f.rename(f.with_name("moved")), "latents: no such folder"),
    "no index": (lambda f: (f / "index.json").unlink(), "index.json: missing; .* run scripts/extract_latents.py again"),
    "half an index": (lambda f: (f / "index.json").write_text("{"), "index.json: not JSON .* run scripts"),
    "old index": (
        lambda f: edit_index(f, format=0),
        "index.json: not an index of latents in format 2 or 1; .*--overwrite",
    ),
    "a list": (lambda f: (f / "index.json").write_text("[]"), "index.json: not an index"),
    "index without classes": (lambda f: (f / "index.json").write_text('{"format": 1}'), "index.json: lacks classes, "),
    "index without encoder": (lambda f: edit_index(f, encoder={"name": "ema"}), "index.json: lacks sha256, stochastic"),
    "no images": (lambda f: edit_index(f, count=0), "index.json: no images; none could be read"),
    "no shard": (lambda f: (f / "00002.npy").unlink(), "00002.npy: missing; run scripts"),
    "no description": (lambda f: (f / "00003.json").unlink(), "00003.json: missing; run scripts"),
    "cut short": (
        lambda f: (f / "00002.npy").write_bytes((f / "00002.npy").read_bytes()[:-7]),
        "00002.npy: 2,041 bytes instead of 2,048; delete it and run",
    ),
    "other shape": (
        lambda f: edit_index(f, row_shape=[2, 8, 4, 4]),
        r"00000.npy: float16 \(4, 2, 6, 4, 4\) instead of float16 \(4, 2, 8, 4, 4\); it is of another extraction",
    ),
    "not an array": (
        lambda f: (f / "00000.npy").write_bytes(bytes((f / "00000.npy").stat().st_size)),
        "00000.npy: not a NumPy array .* delete it",
    ),
    "not a description": (
        lambda f: replace_description(f, "[" + " " * ((f / "00000.json").stat().st_size - 2) + "]"),
        "00000.json: not the description of a shard; delete it",
    ),
    "other labels": (
        lambda f: replace_description(f, (f / "00000.json").read_text().replace("[0, 1, 0, 1]", "[0, 1, 0   ]")),
        "00000.json: 3 labels instead of 4; delete it",
    ),
    "no labels": (lambda f: (f / "labels.npy").unlink(), r"labels.npy: not what was written \(sha256\); delete it and"),
    "a bit of the labels": (lambda f: flip_bit(f / "labels.npy"), "labels.npy: not what was written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_at_opening(damage, folder):
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(ValueError, match=message) as error:
        LatentShards(folder)
    assert "\n" not in str(error.value)


def flip_bit(path, at=0.9):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def age(*paths, seconds=3600):
    for path in paths:
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_in_a_shard_is_found_at_its_first_use(workers, folder):
    flip_bit(folder / "00002.npy")
    data = LatentShards(folder)
    assert len(data.gather([(0, 0), (0, 3)])[0]) == 2, "shard 0 is intact"
    loader = DataLoader(data, batch_sampler=[[(0, 0), (0, 1)], [(0, 2), (0, 4)]], num_workers=workers)
    batches = read_batches(loader, "--data-path x")
    next(batches)
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(error.value).startswith(
        f"--data-path x: {folder / '00002.npy'}: not what was written (sha256); delete it"
    )
    assert "\n" not in str(error.value)


def test_a_shard_is_read_whole_once_for_all_workers(folder, monkeypatch):
    data, hashed = LatentShards(folder), []
    monkeypatch.setattr("data.latents.check_sha256", lambda path, shard: hashed.append(path.name))
    for _ in range(2):
        data.gather([(0, i) for i in range(10)])
    assert sorted(hashed) == ["00000.npy", "00002.npy", "00003.npy"], "the empty shard is never read"
    data = LatentShards(folder)
    hashed.clear()
    list(DataLoader(data, batch_sampler=[[(0, 0)], [(0, 4)]], num_workers=1))
    data.gather([(0, 1), (0, 5)])
    assert hashed == [], "its worker has compared them"


@pytest.mark.parametrize("copied", [False, True])
def test_trusted_stamps_skip_the_checksum_of_shards_that_are_older_than_the_index(copied, folder, tmp_path):
    if copied:  # no stamp of the original is needed
        folder = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    flip_bit(folder / "00002.npy")
    with pytest.raises(ValueError, match="00002.npy: not what was written"):  # newer than the index
        LatentShards(folder, trust_stamps=True).gather([(0, 4)])
    age(folder / "00002.npy")
    assert open_dataset("latents", folder, None, 3, trust_stamps=True)[0, 4]
    with pytest.raises(ValueError, match="00002.npy: not what was written"):
        LatentShards(folder).gather([(0, 4)])
    (folder / "00003.npy").write_bytes(b"")
    age(folder / "00003.npy")
    with pytest.raises(ValueError, match=r"00003.npy: 0 bytes instead of 5"):
        LatentShards(folder, trust_stamps=True)


def test_a_changed_description_is_found_at_opening(folder):
    path = folder / "00000.json"
    path.write_text(path.read_text().replace('"labels": [0, 1, 0, 1]', '"labels": [0, 1, 1, 1]'))
    age(path)
    for trust in (False, True):  # labels are always compared
        with pytest.raises(ValueError, match=r"00000.json: not what was written \(sha256\); delete it and run"):
            LatentShards(folder, trust_stamps=trust)


def test_an_edited_index_is_found_at_opening(folder):
    path = folder / "index.json"
    whole = path.read_text()
    path.write_text(whole.replace('"scaling_factor": 0.5', '"scaling_factor": 0.7'))
    with pytest.raises(ValueError, match=r"index.json: edited or damaged, it does not match its checksum; run scr"):
        LatentShards(folder)
    path.write_text(whole.replace('"files"', '"filez"'))  # not even read
    with pytest.raises(ValueError, match=r"index.json: edited or damaged"):
        LatentShards(folder)


@pytest.mark.parametrize(
    ("name", "bits"), [("index.json", None), ("00002.json", None), ("00002.npy", None), ("00002.npy", range(590, 680))]
)
def test_a_flipped_bit_is_never_silent(name, bits, folder):
    def content():
        data = LatentShards(folder)
        return (
            data.classes,
            data.vae,
            data.path(5),
            [part.tolist() for part in data.gather([(0, i) for i in range(10)])],
        )

    expected, whole, silent = content(), (folder / name).read_bytes(), []
    for position in bits or random.Random(0).sample(range(8 * len(whole)), 80):  # the bits of a header, too
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        (folder / name).write_bytes(data)
        try:
            silent += [position] if content() != expected else []
        except ValueError as error:
            assert "\n" not in str(error)
    assert silent == []


def test_all_arrays_are_compared_on_demand(folder):
    flip_bit(folder / "00003.npy")
    with pytest.raises(ValueError, match=r"00003.npy: not what was written \(sha256\); delete it and run"):
        LatentShards(folder).verify()


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_named_before_they_reach_a_network(value, tmp_path, raw):
    raw[6, 1, 2, 3, 1] = value
    store(tmp_path / "latents", raw)
    data = LatentShards(tmp_path / "latents", seed=0)
    epoch = next(e for e in range(20) if is_flipped((e, 6), 0))
    data.gather([(epoch, 5), (epoch, 7)])
    with pytest.raises(ValueError, match="00002.npy: the latents of ant/6.png are not finite; delete the file and run"):
        data.gather([(epoch, 5), (epoch, 6)])
    with pytest.raises(ValueError, match="00002.npy: holds NaN or infinity"):
        data.verify()


def test_finite_is_what_numpy_calls_finite():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert [is_finite(every[i : i + 1]) for i in range(2**16)] == np.isfinite(every).tolist()


def test_a_shard_is_finished_by_its_description(folder):
    assert finished_shard(folder, 2)["count"] == 5 and finished_shard(folder, 4) is None
    (folder / "00002.json").write_text("{")
    assert finished_shard(folder, 2) is None
    with pytest.raises(ValueError, match=r"00002\.npy: not finished; run scripts"):
        write_index(folder, 4)


def test_an_interrupted_shard_is_not_there(folder, raw):
    def broken():
        yield Encoded(raw[:2], [0, 0], ["a", "b"], [])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(folder, 7, SHAPE, broken())
    assert not list(folder.glob("*00007*")) and not list(folder.glob(".*"))
