"""What is exported comes back as it was, there and here."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from diffusion import create_diffusion
from models import DiT, create_model
from models.diffusers_format import correct_timesteps
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.errors import run
from scripts import export
from tests.golden_data import assert_close, relative_error
from tests.networks import randomise


def checkpoint(path: Path, process: dict[str, object] | None = None, **fields: object) -> DiT:
    """A checkpoint as train.py writes it, with the positions of a fresh network."""
    network = create_model("DiT-debug/2", **fields)
    assert isinstance(network, DiT)
    positions = network.pos_embed.clone()
    randomise(network)
    with torch.no_grad():
        network.pos_embed.copy_(positions)
    meta = {
        "format": 2,
        "model": {"name": "DiT-debug/2", **dataclasses.asdict(network.config)},
        "process": process or {"name": "gaussian", "noise_schedule": "linear", "prediction": "epsilon"},
        "encoder": {"name": "ema"},
        "data": {"image_shape": [3, 64, 64]},
        "averages": {"ema-0.99": {"decay": 0.99}},
    }
    other = {name: 2 * tensor for name, tensor in network.state_dict().items()}
    save_checkpoint(path, {"ema-0.99": network.state_dict(), "model": other}, meta)
    return network


def exported(ckpt: Path, output: Path, format: str, *argv: str) -> int:
    return run(export.main, "export.py", ["--ckpt", str(ckpt), "--output", str(output), "--format", format, *argv])


@pytest.mark.parametrize(("weights", "factor"), [("ema", 1), ("model", 2)])
def test_an_official_file_holds_the_weights_and_nothing_else(
    weights: str, factor: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = checkpoint(tmp_path / "a.safetensors")
    assert exported(tmp_path / "a.safetensors", tmp_path / "a.pt", "official", "--weights", weights) == 0
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content.keys() == network.state_dict().keys()
    assert all(torch.equal(content[name], factor * tensor) for name, tensor in network.state_dict().items())
    read = read_checkpoint(tmp_path / "a.pt")
    assert read.meta is None and all(torch.equal(read.weights[name], content[name]) for name in content)
    said = capsys.readouterr().out
    assert "Not carried:" in said and "the null class 10: the official scripts always take 1000" in said
    # and out of it again, without a document beside the weights
    assert exported(tmp_path / "a.pt", tmp_path / "b.pt", "official") == 0
    again = torch.load(tmp_path / "b.pt", weights_only=True)
    assert all(torch.equal(again[name], content[name]) for name in content)


@torch.no_grad()
def test_diffusers_computes_the_same_once_its_timesteps_are_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = checkpoint(tmp_path / "a.safetensors")
    folder = tmp_path / "exported"
    assert exported(tmp_path / "a.safetensors", folder, "diffusers") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "scheduler", "transformer"]
    twin, info = DiTTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 20, 500, 999]), torch.tensor([0, 3, 9, 10])
    expected = network(x, t, y=y).sample
    assert relative_error(twin(x, timestep=t, class_labels=y).sample, expected) > 1e-4, "what no config carries"
    assert_close(correct_timesteps(twin)(x, timestep=t, class_labels=y).sample, expected, 2e-6)
    said, readme = capsys.readouterr().out, (folder / "README.md").read_text()
    assert "set it after loading, as the README.md in the exported folder shows" in said
    for note in ("downscale_freq_shift", "first 3 latent channels", "the null class 10: DiTPipeline always takes 1000"):
        assert note in said and note in readme
    loop = readme.split("```python")[1].split("scheduler = ")[0].split("from_pretrained")[1].split("\n", 1)[1]
    fresh = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    exec(loop, {"transformer": fresh})  # the README's own lines
    assert_close(fresh(x, timestep=t, class_labels=y).sample, expected, 2e-6)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("prediction", "kind"), [("epsilon", "epsilon"), ("x_start", "sample"), ("v", "v_prediction")])
def test_the_scheduler_is_the_one_of_the_process(schedule: str, prediction: str, kind: str, tmp_path: Path) -> None:
    settings = {"noise_schedule": schedule, "prediction": prediction}
    checkpoint(tmp_path / "a.safetensors", {"name": "gaussian", **settings})
    assert exported(tmp_path / "a.safetensors", tmp_path / "out", "diffusers") == 0
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    process = create_diffusion("", **settings)  # type: ignore[arg-type]
    assert_close(scheduler.alphas_cumprod, torch.from_numpy(process.tables["alphas_cumprod"]).float())
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == kind and config["clip_sample"] is False


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--output a.pt", "--ckpt: required"),
        ("--ckpt a.safetensors", "--output: required"),
        ("--ckpt a.safetensors --output a", "--output a: --format official writes a file ending in .pt"),
        ("--ckpt a.safetensors --output a.pt --format diffusers", "--format diffusers writes a folder"),
        (
            "--ckpt a.safetensors --output there.pt",
            "--output there.pt: exists already; delete it, or give",
        ),
        ("--ckpt none.pt --output b.pt", "--ckpt none.pt: no such file"),
        ("--ckpt foreign.pt --output b.pt", "--ckpt foreign.pt: its names and sizes are those of no model"),
        ("--ckpt gates.pt --output b.pt", "--ckpt gates.pt: weights of DyDiT-debug/2, but routers of 1 gates; 4 heads"),
        (
            "--ckpt no_null.safetensors --output b --format diffusers",
            "--format diffusers: diffusers' DiT has a null class",
        ),
        ("--ckpt flow.safetensors --output b --format diffusers", "cannot sample from a flow process (velocity)"),
        ("--ckpt wide.safetensors --output b --format diffusers", "an mlp_ratio of 4, not 2.0"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    argv: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(Path("a.safetensors"))
    checkpoint(Path("no_null.safetensors"), class_dropout_prob=0.0)
    checkpoint(Path("wide.safetensors"), mlp_ratio=2.0)
    checkpoint(Path("flow.safetensors"), {"name": "flow"})
    torch.save({"weight": torch.zeros(1)}, "foreign.pt")
    torch.save(create_model("DyDiT-debug/2", num_heads=2).state_dict(), "gates.pt")
    Path("there.pt").touch()
    before = sorted(tmp_path.iterdir())
    assert run(export.main, "export.py", argv.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
