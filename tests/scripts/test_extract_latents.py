import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data import encoder_for, open_dataset, open_encoder
from data.autoencoders import KLAutoencoder
from data.image_folder import ImageFolder
from data.latent_manifest import check_ranks
from data.latents import LatentShards
from data.pixels import from_uint8
from runtime import distributed
from runtime.errors import UserError, run
from runtime.json_file import read_json, write_json
from runtime.locks import locked
from scripts import extract_latents
from scripts.extract_latents import ExtractConfig
from tests.networks import small_autoencoder
from tests.processes import folder_by_rank, run_ranks, run_script

IMAGE = (3, 16, 16)
COUNT = 8  # shards of 3, 3 and 2 images
MADE = sorted(
    ["index.json", "labels.npy", "manifest.json", *(f"{n:05d}.{end}" for n in range(3) for end in ("npy", "json"))]
)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    small_autoencoder(folder)
    return folder


def make_images(root):
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = root / ("ant" if i < 5 else "cat") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 18, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def flags(images, vae, output):
    argv = f"--data-path {images} --vae {vae} --output {output} --image-size 16 --batch-size 2 --shard-size 3"
    return [*argv.split(), *"--num-workers 0 --device cpu".split()]


def extract(*argv):
    return run(extract_latents.main, "extract_latents.py", argv)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="module")
def extracted(images, vae, tmp_path_factory):
    output = tmp_path_factory.mktemp("extracted") / "latents"
    assert extract(*flags(images, vae, output)) == 0
    return output


@pytest.fixture
def copy(extracted, tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    for name, data in files(extracted).items():
        (folder / name).write_bytes(data)
        os.utime(folder / name, ns=(1, 1))
    return folder


def test_stored_latents_are_those_of_the_images(extracted, images, vae):
    stored, folder = LatentShards(extracted, seed=4), ImageFolder(images, 16, seed=4)
    assert sorted(files(extracted)) == MADE and len(stored) == len(folder) == COUNT
    assert stored.classes == folder.classes and stored.image_shape == folder.image_shape
    stored.verify()
    direct, reader = open_encoder(str(vae), IMAGE), encoder_for(stored, stored.vae)
    assert reader.latent_shape((3, 16, 16)) == direct.latent_shape((3, 16, 16)) == (4, 8, 8)
    mirrored = 0
    for key in ((epoch, index) for epoch in range(3) for index in range(COUNT)):
        noise = torch.randn(1, 4, 8, 8)
        (image, *facts), (raw, *stored_facts) = folder[key], stored[key]
        assert facts == stored_facts and stored.path(key[1]) == folder.path(key[1])
        expected = direct.to_latents(direct.encode_pixels(from_uint8(image[None])), noise)
        assert torch.equal(direct.to_latents(direct.encode_pixels(image[None]), noise), expected)
        latents = reader.to_latents(reader.encode_pixels(raw[None]), noise)
        assert (latents - expected).abs().max() <= 2**-10 * expected.abs().max()
        mirrored += not torch.equal(image, folder.read(key[1]))
    assert 4 < mirrored < 20


def test_both_flips_are_encoded_and_not_mirrored_afterwards(extracted, images, vae):
    direct, folder = open_encoder(str(vae), IMAGE), ImageFolder(images, 16)
    rows = np.concatenate([np.asarray(shard) for shard in LatentShards(extracted).shards])
    assert rows.shape == (COUNT, 2, 8, 8, 8) and rows.dtype == np.float16
    for index, (plain, mirrored) in enumerate(rows):
        pixels = folder.read(index)[None]
        for row, view in ((plain, pixels), (mirrored, pixels.flip(-1))):
            assert np.allclose(row, direct.encode_pixels(view)[0], rtol=2**-10, atol=1e-4)
        assert np.abs(plain.astype(float) - mirrored).max() > 0.1
        assert np.abs(plain[..., ::-1].astype(float) - mirrored).max() > 0.01


def test_decoding_goes_through_the_same_autoencoder(extracted, vae, tmp_path):
    stored, direct = LatentShards(extracted), open_encoder(str(vae), IMAGE)
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(encoder_for(stored, stored.vae).decode(latents), direct.decode(latents))
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(vae)
    other.decoder.conv_out.bias.data += 1  # the official pair differs in the decoder alone
    other.save_pretrained(tmp_path / "decoder")
    assert encoder_for(stored, str(tmp_path / "decoder")).decode(latents).shape == (2, 3, 16, 16)
    other.encoder.conv_out.bias.data += 1
    other.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="encoder' is not the one that made these latents"):
        encoder_for(stored, str(tmp_path / "encoder")).decode(latents)


def test_latents_in_bf16_say_so_and_are_not_mixed_with_others(extracted, images, vae, tmp_path, capsys):
    output = tmp_path / "latents"
    argv = flags(images, vae, output)
    assert extract(*argv, "--vae-precision", "bf16") == 0
    lower, exact = LatentShards(output), LatentShards(extracted)
    for own, other in zip(lower.shards, exact.shards, strict=True):
        error = np.linalg.norm(own.astype(float) - other) / np.linalg.norm(other.astype(float))
        assert 1e-4 < error < 0.01
    for name in ("index.json", "manifest.json"):
        own, other = (read_json(folder / name)["encoder"] for folder in (output, extracted))
        assert own == {**other, "precision": "bf16"}
    assert encoder_for(lower, lower.vae).decode(torch.randn(1, 4, 8, 8)).shape == (1, *IMAGE)
    before = files(output)
    (output / "00001.npy").unlink()
    capsys.readouterr()
    assert extract(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("extract_latents.py: error: --vae: ") and error.count("\n") == 1
    assert "encodes in fp32 (--vae-precision), and these latents were encoded in bf16; give the same" in error
    assert extract(*argv, "--vae-precision", "bf16") == 0
    assert files(output) == before


def test_two_processes_write_the_same_bytes(extracted, images, vae, tmp_path):
    argv = [*flags(images, vae, tmp_path / "latents"), "--num-workers", "1"]
    done = run_script("scripts/extract_latents.py", *argv, ranks=2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Extracted 8 images to" in done.stdout
    assert files(tmp_path / "latents") == files(extracted)


def test_a_rerun_makes_only_what_is_missing(extracted, images, vae, copy):
    (copy / "00001.npy").unlink()
    (copy / "00002.npy").write_bytes((copy / "00002.npy").read_bytes()[:-1])
    (copy / ".00001.123.tmp.npy").write_bytes(b"half a shard")
    assert extract(*flags(images, vae, copy)) == 0
    assert files(copy) == files(extracted)
    remade = {"00001.npy", "00001.json", "00002.npy", "00002.json", "index.json", "labels.npy"}
    assert {name for name, time in times(copy).items() if time != 1} == remade
    (copy / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"labels.npy: not what was written \(sha256\); delete it and run"):
        LatentShards(copy)
    assert extract(*flags(images, vae, copy)) == 0 and files(copy) == files(extracted)


def test_a_killed_extraction_goes_on_where_it_was(extracted, images, vae, tmp_path, monkeypatch):
    output, encode, calls = tmp_path / "latents", KLAutoencoder.encode_rows, []

    def killed(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(KLAutoencoder, "encode_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(*flags(images, vae, output))
    assert sorted(files(output)) == ["00000.json", "00000.npy", "manifest.json"]
    with pytest.raises(ValueError, match=r"index\.json: missing; the extraction is not finished"):
        LatentShards(output)
    before = times(output)
    assert extract(*flags(images, vae, output)) == 0
    assert files(output) == files(extracted)
    assert {name: times(output)[name] for name in before} == before


def to_format_1(path):
    """Rewrite a manifest or index as the first format."""
    content = json.loads(path.read_text())
    encoder = content.pop("encoder")
    content |= {"format": 1, "vae": encoder["name"], "scale": encoder["scaling_factor"]}
    content |= {"encoder_sha256": encoder["sha256"], "moments_shape": content.pop("row_shape")}
    path.write_text(json.dumps(content))


def test_an_extraction_of_format_1_is_continued(extracted, images, vae, copy):
    for name in ("index.json", "manifest.json"):
        to_format_1(copy / name)
    stored = LatentShards(copy)
    assert stored.vae == str(vae) and encoder_for(stored, stored.vae).latent_shape(IMAGE) == (4, 8, 8)
    (copy / "00001.npy").unlink()
    assert extract(*flags(images, vae, copy)) == 0
    ours, theirs = files(copy), files(extracted)
    assert json.loads(ours.pop("index.json")) == json.loads(theirs.pop("index.json"))
    assert all(ours[name] == theirs[name] for name in theirs if name != "manifest.json")


def test_shift_and_shape_are_recorded(images, vae, tmp_path):
    from diffusers import AutoencoderKL

    shifted = AutoencoderKL.from_pretrained(vae)
    shifted.register_to_config(shift_factor=0.1159)
    shifted.save_pretrained(tmp_path / "vae")
    assert extract(*flags(images, tmp_path / "vae", tmp_path / "latents"), "--image-size", "16", "12") == 0
    stored = LatentShards(tmp_path / "latents", flip=False)
    assert stored.image_shape == (3, 16, 12) and stored.raw_shape == (8, 8, 6)
    raw, noise = stored.gather([(0, 2)])[0], torch.zeros(1, 4, 8, 6)
    reader, direct = encoder_for(stored, stored.vae), open_encoder(stored.vae, stored.image_shape)
    latents = reader.to_latents(raw, noise)
    torch.testing.assert_close(latents, (raw[:, :4].float() - 0.1159) * 0.25)
    assert torch.equal(latents, direct.to_latents(raw, noise))
    assert torch.equal(reader.decode(latents), direct.decode(latents))
    shifted.register_to_config(shift_factor=0.2)
    shifted.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"has LatentScaling\(.*shift_factor=0.2.*but these latents"):
        encoder_for(stored, stored.vae).decode(latents)


def test_a_deterministic_encoder_is_extracted_too(images, tmp_path):
    from diffusers import AutoencoderTiny

    blocks = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **blocks).save_pretrained(tmp_path / "vae")
    assert extract(*flags(images, tmp_path / "vae", tmp_path / "latents")) == 0
    stored = LatentShards(tmp_path / "latents", flip=False)
    reader, direct = encoder_for(stored, stored.vae), open_encoder(stored.vae, IMAGE)
    latents = reader.to_latents(stored.gather([(0, 2)])[0])
    expected = direct.to_latents(direct.encode_pixels(ImageFolder(images, 16).read(2)[None]))
    torch.testing.assert_close(latents, expected, rtol=2**-10, atol=1e-4)
    assert reader.decode(latents).shape == (1, *IMAGE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "--image-size 8",
            "--image-size: {there} was started with other settings (image_shape [3, 8, 8] instead of [3, 16, 16])",
        ),
        ("--batch-size 3", "--batch-size: {there} was started with other settings (batch_size 3 instead of 2)"),
        ("--shard-size 4", "--shard-size: {there} was started with other settings (shard_size 4 instead of 3)"),
        ("--no-both-flips", "--both-flips: {there} was started with other settings (row_shape [1, 8, 8, 8] instead of"),
        ("--vae {other_vae}", "--vae: {there} was started with other settings (other encoder)"),
        ("--data-path {other_images}", "--data-path: {there} was started with other settings (images 7 instead of 8)"),
        ("--data-path {renamed}", "--data-path: {there} was started with other settings (other paths_sha256)"),
        ("--data-path {grown}", "--data-path: {there} was started with other settings (other sizes_sha256)"),
    ],
)
def test_other_settings_are_refused_by_name(change, words, images, vae, copy, tmp_path, capsys):
    places = {"there": copy / "manifest.json"}
    places |= {name: tmp_path / name for name in ("other_vae", "other_images", "renamed", "grown")}
    for name in ("other_images", "renamed", "grown"):
        make_images(tmp_path / name)
    with (tmp_path / "grown/ant/0.png").open("ab") as file:
        file.write(b"x")
    (tmp_path / "other_images/ant/0.png").unlink()
    (tmp_path / "renamed/ant/0.png").rename(tmp_path / "renamed/ant/00.png")
    if "vae" in change:
        from diffusers import AutoencoderKL

        other = AutoencoderKL.from_pretrained(vae)
        other.quant_conv.bias.data += 1
        other.save_pretrained(tmp_path / "other_vae")
        capsys.readouterr()  # diffusers may advise
    before = files(copy)
    assert extract(*flags(images, vae, copy), *change.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("extract_latents.py: error: " + words.format(**places)) and error.count("\n") == 1
    assert "another --output, or --overwrite to start again" in error
    assert files(copy) == before


def test_an_extraction_that_recorded_no_sizes_is_continued(images, vae, copy):
    manifest = read_json(copy / "manifest.json")
    assert manifest.pop("sizes_sha256")
    write_json(copy / "manifest.json", manifest)
    before = files(copy)
    assert extract(*flags(images, vae, copy)) == 0
    assert {name for name, data in files(copy).items() if data != before[name]} == {"index.json"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda there: (there / "ant/3.png").unlink(), "other images than rank 0 (7 instead of 8)"),
        (lambda there: (there / "ant/3.png").rename(there / "ant/9.png"), "other paths_sha256 than rank 0"),
        (lambda there: (there / "cat").rename(there / "dog"), "other classes than rank 0"),
    ],
    ids=["less", "renamed", "class"],
)
def test_ranks_with_other_images_stop_before_they_start(change, words, images, vae, tmp_path):
    change(make_images(tmp_path / "there"))
    argv, fault = flags(images, vae, tmp_path / "latents"), folder_by_rank("--data-path", [images, tmp_path / "there"])
    done = run_ranks("scripts/extract_latents.py", *argv, folder=tmp_path, fault=fault)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"extract_latents.py: error: --data-path: rank 1 has {words}")
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("classes", ["ant", "dog"], "--data-path: rank 2 has other classes than rank 0; give"),
        ("paths_sha256", "0", "--data-path: rank 2 has other paths_sha256 than rank 0; give"),
        ("encoder", {"sha256": "0"}, "--vae: rank 2 has other encoder than rank 0; give"),
        ("row_shape", [1, 2], r"--both-flips: rank 2 has other row_shape than rank 0 \(\[1, 2\] instead of \[2, 8,"),
    ],
)
def test_everything_that_fixes_the_bytes_is_compared(name, value, words, images, vae, tmp_path, monkeypatch):
    config = extract_latents.parse_config(ExtractConfig, flags(images, vae, tmp_path), program="x", doc=None)
    job = extract_latents.set_up(config, torch.device("cpu"))
    for other in (job.manifest, {**job.manifest, name: value}):
        monkeypatch.setattr(
            distributed, "objects_from_all_ranks", lambda manifest, other=other: [manifest, manifest, other]
        )
        if other == job.manifest:
            check_ranks(job.manifest)
        else:
            with pytest.raises(UserError, match=words):
                check_ranks(job.manifest)


def test_two_extractions_do_not_write_into_one_folder(images, vae, copy, capsys):
    (copy / "00001.npy").unlink()
    before = files(copy)
    with locked(copy, "another"):
        for more in ([], ["--overwrite"]):
            assert extract(*flags(images, vae, copy), *more) == 2
            error = capsys.readouterr().err
            assert f"error: --output {copy}: in use by process {os.getpid()} on" in error and error.count("\n") == 1
    (copy / ".lock").unlink()
    assert files(copy) == before
    assert extract(*flags(images, vae, copy)) == 0 and sorted(files(copy)) == MADE


def test_leftovers_of_a_kill_are_swept(images, vae, copy):
    for name in (".00001.7.tmp.npy", ".00002.7.tmp.json", ".index.7.tmp.json", ".manifest.7.tmp.json", ".lock"):
        (copy / name).touch()
    (copy / ".index.json.7.probe").touch()
    for name in (".mine.7.tmp.npy", ".00001.tmp.npy", "7.npy"):
        (copy / name).touch()
    assert extract(*flags(images, vae, copy)) == 0
    assert sorted(files(copy)) == sorted([*MADE, ".mine.7.tmp.npy", ".00001.tmp.npy", "7.npy"])


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["00000.npy", "index.json", "manifest.json"])
def test_files_of_another_program_are_not_touched(name, more, images, vae, tmp_path, capsys):
    (tmp_path / name).write_text('{"format": "theirs"}')
    assert extract(*flags(images, vae, tmp_path), *more) == 2
    error = capsys.readouterr().err
    assert "or remove what is there" in error and name in error and error.count("\n") == 1
    assert files(tmp_path) == {name: b'{"format": "theirs"}'}


def test_a_damaged_manifest_is_refused(images, vae, copy, capsys):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"stochastic": true', '"stochastic": null'))
    assert extract(*flags(images, vae, copy)) == 2
    error = capsys.readouterr().err
    assert f"--output {copy}: {path} is edited or damaged, it does not match its checksum; give" in error
    assert extract(*flags(images, vae, copy), "--overwrite") == 0


def test_a_shard_with_a_damaged_description_is_made_again(extracted, images, vae, copy):
    path = copy / "00001.json"
    path.write_text(path.read_text().replace('"labels": [0, 0, 1]', '"labels": [0, 1, 1]'))
    assert path.read_bytes() != (extracted / "00001.json").read_bytes()
    (copy / "index.json").unlink()
    assert extract(*flags(images, vae, copy)) == 0
    assert files(copy) == files(extracted)


def test_stored_latents_are_no_images(extracted, vae, tmp_path, capsys):
    assert extract(*flags(extracted, vae, tmp_path / "latents")) == 2
    assert f"{extracted}: holds latents of scripts/extract_latents.py" in capsys.readouterr().err


def test_another_autoencoder_is_refused_when_training_starts(extracted, vae, tmp_path):
    stored = LatentShards(extracted)
    shutil.copytree(vae, tmp_path / "moved")
    assert encoder_for(stored, str(tmp_path / "moved")).decode(torch.randn(1, 4, 8, 8)).shape == (1, *IMAGE)
    config = tmp_path / "moved/config.json"
    config.write_text(config.read_text().replace("0.25", "0.5"))
    with pytest.raises(ValueError, match=r"has LatentScaling\(scaling_factor=0.5.* but these latents LatentSc.*=0.25"):
        encoder_for(stored, str(tmp_path / "moved"))


def test_overwrite_starts_anew(images, vae, copy):
    (copy / "notes.txt").write_text("mine")
    assert extract(*flags(images, vae, copy), "--overwrite", "--no-both-flips", "--shard-size", "5") == 0
    stored = LatentShards(copy)
    stored.verify()
    assert [shard.shape for shard in stored.shards] == [(5, 1, 8, 8, 8), (3, 1, 8, 8, 8)]
    assert not (copy / "00002.npy").exists() and (copy / "notes.txt").read_text() == "mine"


@pytest.fixture
def damaged(tmp_path):
    root = make_images(tmp_path / "damaged")
    (root / "ant/1.png").write_bytes(b"")
    for i in (3, 4, 5):  # the whole second shard
        path = next(root.rglob(f"{i}.png"))
        path.write_bytes(path.read_bytes()[:60])
    return root


def test_unreadable_images_are_left_out_and_named_once(damaged, vae, tmp_path, capsys):
    argv = flags(damaged, vae, tmp_path / "latents")
    for _ in range(2):  # a finished extraction says it again
        assert extract(*argv) == 0
        out, err = capsys.readouterr()
        assert out == f"Extracted 4 images to {tmp_path / 'latents'}, left out 4\n"
        named = [line for line in err.splitlines() if "left out" in line]
        assert len(named) == 4 and named[0] == "extract_latents.py: left out ant/1.png: the file is empty"
    stored = LatentShards(tmp_path / "latents")
    stored.verify()
    kept = [stored.path(i) for i in range(len(stored))]
    assert kept == ["ant/0.png", "ant/2.png", "cat/6.png", "cat/7.png"]
    assert stored.gather([(0, i) for i in range(4)])[1].tolist() == [0, 0, 1, 1]
    assert extract(*argv, "--strict") == 2
    error = capsys.readouterr().err
    assert (
        "--strict: ant/1.png could not be read (the file is empty); replace or remove it, and delete shard 00000"
        in error
    )


@pytest.mark.parametrize("workers", ["0", "1"])
def test_strict_stops_at_an_unreadable_image(workers, damaged, vae, tmp_path, capsys):
    assert extract(*flags(damaged, vae, tmp_path / "latents"), "--strict", "--num-workers", workers) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error == [
        f"extract_latents.py: error: --strict: {damaged / 'ant/1.png'}: cannot be read: the file is empty; "
        "replace or remove the file"
    ]
    assert sorted(files(tmp_path / "latents")) == ["manifest.json"]


def test_a_mistake_of_another_rank_is_printed(capsys):
    world = extract_latents.World(1, 2, torch.device("cpu"))
    with pytest.raises(extract_latents.UserError, match="the disk is full"):
        extract_latents.fail(world, "the disk is full")
    assert capsys.readouterr().err == "extract_latents.py: error: the disk is full\n"


def test_a_folder_of_damaged_images_leaves_no_data_set(vae, tmp_path, capsys):
    root = make_images(tmp_path / "images")
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    assert extract(*flags(root, vae, tmp_path / "latents")) == 2
    assert f"error: --data-path {root}: none of its images can be read" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no images; none could be read at extraction"):
        open_dataset("latents", tmp_path / "latents", None, 3)


def test_a_file_that_cannot_be_opened_is_no_damaged_image(vae, tmp_path, monkeypatch, capsys):
    root = make_images(tmp_path / "images")
    set_up = extract_latents.set_up

    def set_up_and_lose_one(*args):
        job = set_up(*args)
        (root / "ant/2.png").unlink()
        return job

    monkeypatch.setattr(extract_latents, "set_up", set_up_and_lose_one)
    assert extract(*flags(root, vae, tmp_path / "latents")) == 2
    assert "error: --data-path: [Errno 2] No such file or directory" in capsys.readouterr().err


def test_latents_that_are_not_finite_are_never_written(images, vae, tmp_path, monkeypatch, capsys):
    encode = KLAutoencoder.encode_rows
    monkeypatch.setattr(KLAutoencoder, "encode_rows", lambda *args: encode(*args) * 1e9)
    assert extract(*flags(images, vae, tmp_path / "latents")) == 2
    error = capsys.readouterr().err
    assert f"error: --vae {vae}: the latents of ant/0.png are not finite in float16" in error
    assert sorted(files(tmp_path / "latents")) == ["manifest.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--vae none", "--vae none: pixels need no extraction"),
        ("--vae {tmp}/nothing", "--vae {tmp}/nothing: no such folder"),
        ("--image-size 15", "--image-size: image size 15 is not a multiple of the autoencoder's factor 2"),
        ("--image-size 16 15", "--image-size: image size 15 is not a multiple of the autoencoder's factor 2"),
        ("--image-size 8 8 8", "--image-size (8, 8, 8): give one side, or height and width"),
        ("--image-size 0", "--image-size 0: must be at least 1"),
        ("--vae ema --image-size 250", "--vae ema: image size 250 is not a multiple"),
        ("--batch-size 0", "--batch-size 0: must be at least 1"),
        ("--shard-size 0", "--shard-size 0: must be at least 1"),
        ("--num-workers -1", "--num-workers -1: must not be negative"),
        ("--data-path {tmp}/nothing", "--data-path {tmp}/nothing: no such folder"),
        ("--data-path {tmp}", "--data-path {tmp}: {tmp}: expected class folders"),
        ("--output {tmp}/file", "--output {tmp}/file/index.json: cannot write there"),
        ("--output {tmp}/other", "--output {tmp}/other: 00000.npy is there, but no manifest.json; give the same"),
        ("--output {tmp}/broken", "--output {tmp}/broken: {tmp}/broken/manifest.json is not JSON; give the same"),
        ("--output {tmp}/old", "--output {tmp}/old: {tmp}/old/manifest.json is of another format; give the same"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(change, words, images, vae, tmp_path_factory, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "file").touch()
    for folder, name, text in (
        ("other", "00000.npy", ""),
        ("broken", "manifest.json", "{"),
        ("old", "manifest.json", "{}"),
    ):
        (tmp / folder).mkdir()
        (tmp / folder / name).write_text(text)
    before = sorted(tmp.rglob("*"))
    if change == "--data-path {tmp}":
        for path in sorted(tmp.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        before = []
    assert extract(*flags(images, vae, tmp / "latents"), *change.format(tmp=tmp).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("extract_latents.py: error: " + words.format(tmp=tmp)) and error.count("\n") == 1
    assert sorted(tmp.rglob("*")) == before, "a refused run must leave nothing behind"


def test_data_path_is_needed(capsys):
    assert extract("--image-size", "16") == 2
    assert "error: --data-path: needed, the root of an image folder" in capsys.readouterr().err


def test_the_index_says_what_was_made(extracted, vae):
    index = json.loads((extracted / "index.json").read_text())
    assert index["count"] == COUNT and index["skipped"] == 0 and index["classes"] == ["ant", "cat"]
    assert index["format"] == 2 and index["image_shape"] == [3, 16, 16] and index["row_shape"] == [2, 8, 8, 8]
    assert index["encoder"] == json.loads(json.dumps(open_encoder(str(vae), IMAGE).describe()))
    assert index["encoder"]["name"] == str(vae) and index["encoder"]["scaling_factor"] == 0.25
    assert index["encoder"]["class"] == "AutoencoderKL" and index["encoder"]["stochastic"] is True
    assert [shard["count"] for shard in index["shards"]] == [3, 3, 2]
