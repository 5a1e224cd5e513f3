"""Networks from files of other projects: family, process, units of time, and what was guessed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sample
from diffusion import FlowMatching
from models import create_model
from models.diffusers_format import diffusers_network, from_diffusers, to_diffusers
from models.loading import build_network, load_network, resolve_checkpoint
from runtime.errors import UserError, run
from runtime.releases import find_release
from sampling.pipeline import Pipeline
from tests.networks import randomise

SMALL = {"sample_shape": (4, 8, 8), "num_classes": 10}


def network(**fields: Any) -> Any:
    fresh = create_model("DiT-debug/2", **{**SMALL, **fields})
    positions = fresh.pos_embed.clone()
    made = randomise(fresh)
    with torch.no_grad():
        made.pos_embed.copy_(positions)  # files of diffusers have none
    return made


def official(folder: Path, weights: dict[str, Tensor], name: str = "a.pt") -> Path:
    torch.save({"ema": weights, "epoch": 4}, folder / name)
    return folder / name


def test_the_guess_and_its_reason_are_told(tmp_path: Path) -> None:
    path = official(tmp_path, network().state_dict())
    info, _ = resolve_checkpoint(path)
    assert info.notes == (
        "DiT-debug/2 (by names and shapes)",
        "process gaussian (that of its family)",
        "weights 'ema'",
        "epoch 4",
        "checksums of the file compared",
    )
    torch.save({"ema": network().state_dict()}, path, _use_new_zipfile_serialization=False)
    assert "unverified: the file has no checksums" in resolve_checkpoint(path, process="flow")[0].notes


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("how", ["name", "flags"])
def test_weights_of_sit_are_a_flow_at_their_own_times(tmp_path: Path, learn_sigma: bool, how: str) -> None:
    """SiT evaluates DiT's network at times from 0 (noise) to 1 (data), and uses the first half of its channels."""
    made = network(learn_sigma=learn_sigma)
    path = official(tmp_path, made.state_dict(), "SiT-S-2.pt" if how == "name" else "other.pt")
    flags: dict[str, Any] = {} if how == "name" else {"process": "flow", "network_times": "unit"}
    info, weights = resolve_checkpoint(path, **flags)
    ours = build_network(info, weights)
    assert (info.process, ours.time_convention) == ("flow", "unit")
    assert f"process flow ({'by the name of the file' if how == 'name' else 'given'})" in info.notes
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    expected = made.eval()(x, 0.25, y=y).sample[:, :4]
    assert torch.allclose(ours(x, 0.25, y=y).sample, expected, atol=1e-6)
    pipeline = Pipeline.from_pretrained(path, device="cpu", vae="none", **flags)
    assert isinstance(pipeline.process, FlowMatching)
    seen: list[float] = []
    run = pipeline.prepare(sampler="euler", num_sampling_steps=4, cfg_scale=1.0)
    run.network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    pipeline.denoise(run, 0, range(2), {"y": y})
    assert seen == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("name", ["SiT-XL-2-256x256.pt", "sit_b2.pth", "my-SiT.safetensors"])
def test_names_of_sit_are_a_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With and without a row in the table of releases, which is of DiT's model."""
    row = find_release(name)
    if row is not None:
        monkeypatch.setattr("runtime.releases.RELEASES", (row._replace(model="DiT-debug/2", image_size=64),))
    weights = network().state_dict()
    path = tmp_path / name
    if path.suffix != ".safetensors":
        official(tmp_path, weights, name)
    else:
        save_file(weights, path)
    info, taken = resolve_checkpoint(path)
    assert (info.process, info.time_convention, info.release is not None) == ("flow", "unit", row is not None)
    assert build_network(info, taken).out_channels == 4, "without a variance"


@pytest.mark.parametrize("name", ["DiT-transit.pt", "visit.pt", "positions.pt"])
def test_other_names_are_no_sit(tmp_path: Path, name: str) -> None:
    assert resolve_checkpoint(official(tmp_path, network().state_dict(), name))[0].process == "gaussian"


def test_our_own_files_know_their_process(tmp_path: Path) -> None:
    from tests.checkpoints import write_network

    path = write_network(tmp_path / "a.safetensors", "DiT-debug/2", network())
    with pytest.raises(UserError, match="--process flow: .* was trained under 'gaussian'"):
        resolve_checkpoint(path, process="flow")
    with pytest.raises(UserError, match="--network-times unit: has no effect on"):
        resolve_checkpoint(path, network_times="unit")
    assert resolve_checkpoint(path, process="gaussian")[0].notes == ()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    weights = network().state_dict()
    weights["blocks.1.mlp.fc1.bias"][3] = value
    with pytest.raises(UserError, match="blocks.1.mlp.fc1.bias has NaN or infinity"):
        load_network(official(tmp_path, weights))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_weights_of_whole_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in network().state_dict().items()}
    with pytest.raises(UserError, match=f"holds {str(dtype).removeprefix('torch.')}; quantised"):
        load_network(official(tmp_path, weights))


def test_a_label_table_without_a_null_row_samples_without_guidance(tmp_path: Path, capsys: Any) -> None:
    path = official(tmp_path, network(class_dropout_prob=0.0).state_dict())
    argv = f"--ckpt {path} --num-classes 10 --vae none --image-size 8 --num-sampling-steps 2 --device cpu".split()
    argv += ["--output", str(tmp_path / "a.png"), "--overwrite"]
    assert run(sample.main, "sample.py", [*argv, "--cfg-scale", "1", "--class-labels", "9"]) == 0
    assert "process gaussian (that of its family)" in capsys.readouterr().out
    assert run(sample.main, "sample.py", [*argv, "--cfg-scale", "1", "--class-labels", "10"]) == 2
    assert "--class-labels 10: the model has classes 0 to 9" in capsys.readouterr().err
    pipeline = Pipeline.from_pretrained(path, device="cpu", vae="none", num_classes=10)
    labels = {"y": torch.tensor([9, 0])}
    assert pipeline.num_classes == 10
    out = pipeline.denoise(pipeline.prepare(cfg_scale=1.0, num_sampling_steps=2), 0, range(2), labels)
    assert out.isfinite().all()
    with pytest.raises(UserError, match="--cfg-scale 1.5: .*null"):
        pipeline.prepare(cfg_scale=1.5)


def test_diffusers_layout_is_the_inverse_of_the_export(tmp_path: Path) -> None:
    made = network(sample_shape=(4, 32, 32)).eval()
    weights = made.state_dict()
    again = from_diffusers(to_diffusers(weights, made.config.depth))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    broken = to_diffusers(weights, made.config.depth)
    label = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(ValueError, match="its blocks have different y_embedder"):
        from_diffusers({**broken, label: broken[label] + 1})
    with pytest.raises(ValueError, match=f"{label} is missing"):
        from_diffusers({name: x for name, x in broken.items() if name != label})


@pytest.mark.parametrize("of", ["folder", "pipeline", "file"])
def test_files_of_diffusers_load(tmp_path: Path, of: str) -> None:
    made = network().eval()
    folder = tmp_path / "transformer" if of == "pipeline" else tmp_path
    diffusers_network(made).save_pretrained(folder)  # type: ignore[operator]
    source = {"folder": folder, "pipeline": tmp_path, "file": folder / "diffusion_pytorch_model.safetensors"}[of]
    loaded, info = load_network(source)
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    assert torch.allclose(loaded(x, 7.0, y=y).sample, made(x, 7.0, y=y).sample, atol=1e-6)
    assert "in diffusers' layout" in info.notes[0] and "unverified: the file has no checksums" in info.notes
