import importlib.util
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.encoders import Encoder, LatentScaling, Pixels, open_encoder
from data.pixels import from_uint8
from tests.golden_data import relative_error
from tests.networks import small_autoencoder

IMAGE = (3, 16, 16)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return folder, small_autoencoder(folder)


@pytest.fixture
def copy(vae_folder, tmp_path):
    """A copy of the folder, to be changed."""
    for path in vae_folder[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(change(weights), path, metadata={"format": "pt"})


def test_latents_are_a_scaled_sample_of_the_posterior(vae_folder):
    folder, vae = vae_folder
    encoder = open_encoder(str(folder), IMAGE)
    pixels, noise = torch.randn(2, *IMAGE), torch.randn(2, 4, 8, 8)
    assert encoder.stochastic and encoder.weight_bytes > 0 and encoder.name == str(folder)
    assert encoder.latent_shape(IMAGE) == (4, 8, 8) and encoder.raw_shape(IMAGE) == (8, 8, 8)
    raw = encoder.encode_pixels(pixels)
    latents = encoder.to_latents(raw, noise)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        assert torch.equal(raw, torch.cat([posterior.mean, posterior.std], dim=1))
        assert torch.equal(latents, (posterior.mean + posterior.std * noise) * 0.25)
        assert torch.equal(encoder.decode(latents), vae.decode(latents / 0.25).sample)
    with pytest.raises(ValueError, match="need noise"):
        encoder.to_latents(raw)


def test_shift_mean_and_deviation_are_those_of_diffusers_pipelines(copy):
    noise, pixels = torch.randn(2, 4, 8, 8), torch.randn(2, *IMAGE)
    plain = open_encoder(str(copy), IMAGE)
    z = plain.encode_pixels(pixels).chunk(2, dim=1)
    z = z[0] + z[1] * noise
    edit_config(copy, shift_factor=0.1159)
    shifted = open_encoder(str(copy), IMAGE)
    torch.testing.assert_close(shifted.to_latents(shifted.encode_pixels(pixels), noise), (z - 0.1159) * 0.25)
    torch.testing.assert_close(shifted.decode((z - 0.1159) * 0.25), plain.decode(z * 0.25))
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    edit_config(copy, shift_factor=None, latents_mean=mean, latents_std=std)
    whitened = open_encoder(str(copy), IMAGE)
    expected = (z - torch.tensor(mean).view(1, 4, 1, 1)) * 0.25 / torch.tensor(std).view(1, 4, 1, 1)
    torch.testing.assert_close(whitened.to_latents(whitened.encode_pixels(pixels), noise), expected)
    torch.testing.assert_close(whitened.decode(expected), plain.decode(z * 0.25))
    assert whitened.describe()["latents_std"] == (1.0, 2.0, 0.5, 4.0)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_frames_are_encoded_and_decoded_one_by_one(vae_folder, size):
    encoder = open_encoder(str(vae_folder[0]), (3, *size))
    clip, latent = torch.randint(0, 256, (2, 3, 3, *size), dtype=torch.uint8), (4, size[0] // 2, size[1] // 2)
    assert encoder.latent_shape((3, 3, *size)) == (3, *latent)
    raw = encoder.encode_pixels(clip)
    assert raw.shape == (2, *encoder.raw_shape((3, 3, *size)))
    torch.testing.assert_close(raw[1], encoder.encode_pixels(clip[1]))
    latents = encoder.to_latents(raw, torch.randn(2, 3, *latent))
    assert latents.shape == (2, 3, *latent) and encoder.decode(latents).shape == clip.shape
    torch.testing.assert_close(encoder.decode(latents)[1], encoder.decode(latents[1]))


def test_in_bf16_it_decodes_to_the_same_pixels_within_its_precision(vae_folder):
    plain, half = (open_encoder(str(vae_folder[0]), IMAGE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    latents = torch.randn(3, 4, 8, 8)
    expected, actual = plain.decode(latents), half.decode(latents)
    assert actual.dtype == torch.float32 and half.module.dtype == torch.bfloat16
    assert 0 < relative_error(actual, expected) < 0.05
    assert half.encode_pixels(torch.randn(2, *IMAGE)).dtype == torch.float32
    weight = half.module.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_in_bf16_it_encodes_to_the_same_posterior_within_a_percent(vae_folder):
    plain, half = (open_encoder(str(vae_folder[0]), IMAGE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    pixels = torch.rand(16, *IMAGE) * 2 - 1
    expected, actual = plain.encode_pixels(pixels), half.encode_pixels(pixels)
    for part, limit in ((slice(0, 4), 0.01), (slice(4, 8), 0.005)):  # means, standard deviations
        error = (actual - expected)[:, part].norm() / expected[:, part].norm()
        assert 1e-4 < error < limit
    assert half.describe() == plain.describe() == plain.describe_latents()  # one autoencoder, whatever it computes in
    assert half.describe_latents() == {**half.describe(), "precision": "bf16"}
    plain.check_precision(half.describe())
    with pytest.raises(ValueError, match=r"in fp32 \(--vae-precision\), and these latents were encoded in bf16"):
        plain.check_precision(half.describe_latents())


@pytest.mark.parametrize(("dtype", "chosen"), [(torch.float32, False), (torch.bfloat16, True)])
def test_convolutions_are_timed_while_it_encodes_in_bf16_alone(vae_folder, dtype, chosen, monkeypatch):
    encoder, seen = open_encoder(str(vae_folder[0]), IMAGE, dtype=dtype), []
    encode = encoder.module.encode
    monkeypatch.setattr(encoder.module, "encode", lambda x: seen.append(torch.backends.cudnn.benchmark) or encode(x))
    encoder.encode_pixels(torch.zeros(1, *IMAGE))
    assert seen == [chosen] and not torch.backends.cudnn.benchmark
    monkeypatch.setattr(encoder.module, "encode", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode_pixels(torch.zeros(1, *IMAGE))
    assert not torch.backends.cudnn.benchmark


def small_tiny():
    from diffusers import AutoencoderTiny

    blocks = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    return AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **blocks)


def small_dc():
    from diffusers import AutoencoderDC

    sides = ("encoder", "decoder")
    channels = {f"{part}_block_out_channels": (8, 16) for part in sides}
    layers = {f"{part}_layers_per_block": (1, 1) for part in sides}
    scales = {f"{part}_qkv_multiscales": ((), ()) for part in sides}
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.5, **channels, **layers, **scales)


@pytest.mark.parametrize(("make", "output"), [(small_tiny, "latents"), (small_dc, "latent")])
@torch.no_grad()
def test_deterministic_autoencoders_need_no_noise(make, output, tmp_path):
    torch.manual_seed(0)
    autoencoder = make().eval()
    autoencoder.save_pretrained(tmp_path)
    encoder, pixels = open_encoder(str(tmp_path), IMAGE), torch.rand(2, *IMAGE) * 2 - 1
    scale = autoencoder.config.scaling_factor
    assert not encoder.stochastic
    assert encoder.latent_shape(IMAGE) == encoder.raw_shape(IMAGE) == (4, 8, 8)
    raw = encoder.encode_pixels(pixels)
    torch.testing.assert_close(raw, getattr(autoencoder.encode(pixels), output))
    torch.testing.assert_close(encoder.to_latents(raw), raw * scale)
    torch.testing.assert_close(encoder.decode(raw * scale), autoencoder.decode(raw).sample)
    assert encoder.encode_pixels(pixels[None]).shape == (1, 2, 4, 8, 8)
    assert encoder.describe()["class"] == type(autoencoder).__name__


@torch.no_grad()
def test_a_representation_autoencoder_takes_one_size_and_pixels_from_0_to_1(tmp_path):
    pytest.importorskip("transformers")
    from diffusers import AutoencoderRAE

    autoencoder = AutoencoderRAE(
        encoder_hidden_size=64, encoder_patch_size=4, encoder_num_hidden_layers=1, decoder_hidden_size=16,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16, patch_size=8,
        encoder_input_size=8, latents_mean=torch.randn(64, 2, 2).tolist(), latents_std=torch.rand(64, 2, 2).tolist(),
    ).eval()  # fmt: skip
    autoencoder.save_pretrained(tmp_path)
    encoder, pixels = open_encoder(str(tmp_path), IMAGE), torch.rand(2, *IMAGE)
    assert encoder.latent_shape(IMAGE) == (64, 2, 2)
    latents = encoder.to_latents(encoder.encode_pixels(pixels * 2 - 1))
    torch.testing.assert_close(latents, autoencoder.encode(pixels).latent)
    torch.testing.assert_close(encoder.decode(latents), autoencoder.decode(latents).sample * 2 - 1)
    with pytest.raises(ValueError, match=r"takes images of \(16, 16\) pixels, not \(16, 24\)"):
        encoder.latent_shape((3, 16, 24))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="AutoencoderRAE needs the package transformers"):
        open_encoder(str(tmp_path), IMAGE)


MISFITS = {
    "prefix": (
        lambda w: {f"first_stage_model.{key}": value for key, value in w.items()},
        r"AutoencoderKL \(missing: encoder.conv_in.weight and 123 more; unexpected: first_stage_model.decoder",
    ),
    "missing": (lambda w: {k: v for k, v in w.items() if k != "quant_conv.bias"}, r"\(missing: quant_conv.bias\)"),
    "unexpected": (lambda w: {**w, "loss.logvar": torch.zeros(1)}, r"\(unexpected: loss.logvar\)"),
    "shape": (
        lambda w: {**w, "decoder.conv_in.weight": torch.zeros(3, 3, 3, 3)},
        r"\(of another shape: decoder.conv_in.weight\)",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fill_it_are_named(name, copy, recwarn):
    change, message = MISFITS[name]
    edit_weights(copy, change)
    with pytest.raises(ValueError, match=f"its weights do not fit .*{message}") as error:
        open_encoder(str(copy), IMAGE)
    assert "\n" not in str(error.value) and not recwarn.list


WEIGHTS = "diffusion_pytorch_model.safetensors"


def to_bin(folder):
    """Weights as earlier versions of diffusers write them."""
    path = folder / "diffusion_pytorch_model.bin"
    torch.save(load_file(folder / WEIGHTS), path)
    (folder / WEIGHTS).unlink()
    return path


def to_bin_without_checksums(folder):
    torch.serialization.set_crc32_options(False)
    try:
        return to_bin(folder)
    finally:
        torch.serialization.set_crc32_options(True)


def to_shards(folder):
    """Weights in two shards and an index."""
    weights, map_ = load_file(folder / WEIGHTS), {}
    (folder / WEIGHTS).unlink()
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        part = {key: weights[key] for key in sorted(weights)[number - 1 :: 2]}
        save_file(part, folder / name, metadata={"format": "pt"})
        map_ |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": map_}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return sorted(folder.glob("*-of-*"))


@pytest.mark.parametrize("write", [to_bin, to_bin_without_checksums, to_shards])
def test_other_files_of_the_same_weights_are_read(write, vae_folder, copy):
    write(copy)
    first, second = (open_encoder(str(folder), IMAGE) for folder in (vae_folder[0], copy))
    assert first.encoder_sha256() == second.encoder_sha256()


def swap_shards(folder):
    first, second = to_shards(folder)
    first.write_bytes(second.read_bytes())


def lose_a_shard(folder):
    to_shards(folder)[1].unlink()


def flip_a_bit(folder):
    path = to_bin(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def store_under_a_key(folder):
    path = to_bin(folder)
    torch.save({"state_dict": torch.load(path)}, path)


def change_weight(value):
    return lambda folder: edit_weights(folder, lambda w: {**w, "decoder.conv_in.bias": torch.full((16,), value)})


DAMAGES = {
    "a shard that holds other weights": (swap_shards, r"00001-of-00002.safetensors: lacks decoder.*index.json places"),
    "a missing shard": (lose_a_shard, "cannot load the autoencoder .*00002-of-00002.safetensors"),
    "a flipped bit in a zip file": (
        flip_a_bit,
        r"model.bin: damaged, .* does not match its checksum; download it again",
    ),
    "weights under a key": (store_under_a_key, r"\(missing: encoder.conv_in.weight .*; unexpected: state_dict\)"),
    "NaN": (change_weight(float("nan")), "the weights decoder.conv_in.bias of .* are not finite"),
    "infinity": (change_weight(float("inf")), "the weights decoder.conv_in.bias of .* are not finite"),
    "integers": (change_weight(3), "model.safetensors: decoder.conv_in.bias does not hold floating-point numbers"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_of_weights_are_refused(name, copy):
    damage, message = DAMAGES[name]
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        open_encoder(str(copy), IMAGE)
    assert "\n" not in str(error.value)


def test_a_scale_that_is_not_written_down_is_said(copy, recwarn):
    edit_config(copy, scaling_factor=...)
    assert open_encoder(str(copy), IMAGE).scaling == LatentScaling(0.18215)
    (warning,) = recwarn.list
    assert str(warning.message) == (
        f"--vae {copy}: config.json has no scaling_factor; it is 0.18215, the default of AutoencoderKL"
    )


def test_what_a_class_does_not_read_is_applied_all_the_same(tmp_path):
    """AutoencoderDC knows a scaling factor alone."""
    small_dc().save_pretrained(tmp_path)
    edit_config(tmp_path, shift_factor=0.5, latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0, 8.0])
    encoder = open_encoder(str(tmp_path), IMAGE)
    latents = encoder.to_latents(torch.zeros(1, 4, 8, 8))
    assert latents[0, :, 0, 0].tolist() == [-0.25, -0.375, -0.3125, -0.21875]
    assert encoder.describe()["shift_factor"] == 0.5


def test_another_encoder_than_a_description_is_refused(vae_folder, copy):
    recorded = json.loads(json.dumps(open_encoder(str(vae_folder[0]), IMAGE).describe()))
    half = open_encoder(str(copy), IMAGE, dtype=torch.bfloat16)
    half.check_same(recorded)  # its fingerprint is that of the file
    half.check_same({key: recorded[key] for key in ("name", "sha256", "stochastic")})
    edit_weights(copy, lambda w: {**w, "decoder.conv_in.bias": torch.zeros(16)})
    open_encoder(str(copy), IMAGE).check_same(recorded)
    edit_config(copy, norm_num_groups=2)
    with pytest.raises(ValueError, match="has norm_num_groups 2, but these latents 4"):
        open_encoder(str(copy), IMAGE).check_same(recorded)
    edit_config(copy, norm_num_groups=4, shift_factor=0.1)
    with pytest.raises(ValueError, match=r"has LatentScaling\(.*shift_factor=0.1.* but these latents LatentScaling"):
        open_encoder(str(copy), IMAGE).check_same(recorded)
    edit_weights(copy, lambda w: {**w, "quant_conv.bias": torch.zeros(8)})
    with pytest.raises(ValueError, match="is not the one that made these latents"):
        open_encoder(str(copy), IMAGE).check_same(recorded)


def test_older_names_of_attention_weights_are_understood(vae_folder, copy):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(weights):
        for new, old in names.items():
            weights = {key.replace(new, old): value for key, value in weights.items()}
        return weights

    edit_weights(copy, older)
    first, second = (open_encoder(str(folder), IMAGE) for folder in (vae_folder[0], copy))
    assert first.encoder_sha256() == second.encoder_sha256()


def test_image_size_must_fit_the_factor(vae_folder):
    words = "image size 15 is not a multiple of the autoencoder's factor 2; nearest: 14 or 16"
    with pytest.raises(ValueError, match=words):
        open_encoder(str(vae_folder[0]), (3, 15, 16)).latent_shape((3, 16, 15))
    with pytest.raises(ValueError, match="takes images of 3 channels, not 1"):
        open_encoder(str(vae_folder[0]), IMAGE).latent_shape((1, 16, 16))
    with pytest.raises(ValueError, match="image size 250 is not a multiple of the autoencoder's factor 8"):
        open_encoder("ema", (3, 256, 250))  # before anything is loaded
    with pytest.raises(ValueError, match="image size 4 .* factor 8; nearest: 8$"):
        open_encoder("mse", (3, 4, 8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "AutoencoderKLWan is not supported; supported are AutoencoderDC, Auto"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL is not supported"),
        ({"_class_name": ["AutoencoderKL"]}, r"\['AutoencoderKL'\] is not supported"),
        ({"_class_name": "AutoencoderTiny"}, "its weights do not fit AutoencoderTiny"),
        ({"latents_mean": [0.0, 1.0]}, "latents_mean has 2 numbers for 4 latent channels"),
        ({"latents_mean": 0.0}, "latents_mean 0.0: not a list of numbers, one per latent channel"),
        ({"latents_mean": [[0.0]] * 4, "latents_std": [1.0] * 4}, r"latents_mean \(.*\): not a number"),
        ({"latents_mean": [0.0] * 4}, "latents_mean and latents_std belong together; one of them is missing"),
        ({"latents_std": [2.0] * 4}, "latents_mean and latents_std belong together; one of them is missing"),
        (
            {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, 0.0]},
            r"latents_std \(1.0, .*\): must be positive",
        ),
        ({"scaling_factor": 0.0}, "scaling_factor 0.0: must be positive"),
        ({"scaling_factor": 1e39}, r"scaling_factor 1e\+39: must be positive in float32"),
        ({"scaling_factor": True}, "scaling_factor True: not a number"),
        ({"shift_factor": "0.1"}, "shift_factor 0.1: not a number"),
        ({"shift_factor": 1e39}, r"shift_factor 1e\+39: must be finite in float32"),
        ({"scale_factor": 0.3}, "its config.json has scale_factor 0.3, which diffusers' AutoencoderKL does not know"),
        ({"latent_shift": 0.3}, "its config.json has latent_shift 0.3, which diffusers' AutoencoderKL does not know"),
        ({"block_out_channels": [8, 24]}, "of another shape: decoder.conv_in.bias"),
        ({"block_out_channels": []}, "cannot load the autoencoder .* out of range"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(change, words, copy):
    edit_config(copy, **change)
    with pytest.raises(ValueError, match=words) as error:
        open_encoder(str(copy), IMAGE)
    assert "\n" not in str(error.value)


def test_a_missing_autoencoder_is_named(copy, tmp_path_factory):
    with pytest.raises(ValueError, match=r"is a file; give a folder of diffusers, with config.json and weights"):
        open_encoder(str(copy / "config.json"), IMAGE)
    with pytest.raises(ValueError, match="no such folder; give none, ema, mse, or the folder"):
        open_encoder(str(copy / "nothing"), IMAGE)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="has no config.json that names a class .*AutoencoderTiny of diffusers"):
        open_encoder(str(empty), IMAGE)
    (empty / "vae").mkdir()
    with pytest.raises(ValueError, match="give its subfolder vae"):
        open_encoder(str(empty), IMAGE)
    (copy / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot load the autoencoder .*Unable to load weights") as error:
        open_encoder(str(copy), IMAGE)
    assert "\n" not in str(error.value)


def test_its_loader_does_not_talk(monkeypatch, recwarn):
    def failing(*args, **kwargs):
        warnings.warn("The `local_dir_use_symlinks` argument is deprecated", stacklevel=2)
        raise OSError("no connection")

    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", failing)
    with pytest.raises(ValueError, match=r"cannot load the autoencoder .* without network .*\(no connection\)"):
        open_encoder("ema", (3, 256, 256))
    assert not recwarn.list


def test_pixels_pass_through():
    pixels, x = open_encoder("none", (1, 5, 5)), torch.randn(1, 1, 5, 5)
    assert isinstance(pixels, Pixels) and pixels.latent_shape((1, 5, 5)) == pixels.raw_shape((1, 5, 5)) == (1, 5, 5)
    assert torch.equal(pixels.encode_pixels(x), x) and torch.equal(pixels.to_latents(x), x)
    assert torch.equal(pixels.decode(x), x)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(pixels.encode_pixels(images), from_uint8(images))


def test_a_new_encoder_is_one_class(monkeypatch):
    monkeypatch.setattr(Encoder, "names", dict(Encoder.names))

    class Halved(Encoder, names=("halved",)):
        factor, scaling = 2, LatentScaling(scaling_factor=3.0)

        def encode_rows(self, pixels):
            return torch.nn.functional.avg_pool2d(pixels, 2)

        def decode_rows(self, z):
            return torch.nn.functional.interpolate(z, scale_factor=2)

    encoder = open_encoder("halved", (2, 3, 8, 4))
    latents = encoder.to_latents(encoder.encode_pixels(torch.ones(1, 2, 3, 8, 4)))
    assert latents.shape == (1, *encoder.latent_shape((2, 3, 8, 4))) and (latents == 3).all()
    assert torch.equal(encoder.decode(latents), torch.ones(1, 2, 3, 8, 4))
