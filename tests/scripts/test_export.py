"""What is exported comes back as it was, there and here."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import nn

from diffusion import create_diffusion
from models import Network, create_model
from models.diffusers_format import correct_timesteps
from models.loading import CheckpointInfo, load_network
from runtime.checkpoint import read_checkpoint
from runtime.errors import run
from runtime.groups import save_checkpoint
from scripts import export
from tests.checkpoints import write_network
from tests.golden_data import assert_close, relative_error, table
from tests.networks import randomise


def checkpoint(
    path: Path, process: dict[str, object] | None = None, name: str = "DiT-debug/2", **fields: object
) -> Network:
    """A checkpoint as train.py writes it, with the positions of a fresh network."""
    network = create_model(name, **fields)
    positions = getattr(network, "pos_embed", None)
    kept = None if positions is None else positions.clone()
    randomise(network)
    if positions is not None:
        with torch.no_grad():
            positions.copy_(kept)
    meta = {
        "format": 2,
        "step": 40,
        "model": {"name": name, **dataclasses.asdict(network.config)},
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


class LightningModule(nn.Module):
    """The two networks of the official DDT trainer and its own loading: what is missing is not noticed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.denoiser, self.ema_denoiser = create_model(name), create_model(name)

    @classmethod
    def from_cli(cls, name: str, path: Path) -> "LightningModule":
        """What `main.py predict --ckpt_path` does with the file."""
        content = torch.load(path, weights_only=True)
        assert [int(part) for part in content["pytorch-lightning_version"].split(".")] >= [2, 0, 0]
        assert content.get("callbacks") is None and isinstance(content["global_step"] + content["epoch"], int)
        module = cls(name)
        problems = module.load_state_dict(content["state_dict"], strict=False)
        assert not problems.missing_keys and not problems.unexpected_keys
        return module


def load_in_app(name: str, path: Path) -> Network:
    """What the official demo does with the file: names that it does not find are printed."""
    network, weights = create_model(name), torch.load(path, weights_only=True)["state_dict"]
    with torch.no_grad():
        for key, value in network.state_dict().items():
            value.copy_(weights[f"ema_denoiser.{key}"])  # KeyError where the demo goes on
    return network


def load_in_scripts(name: str, path: Path) -> Network:
    """What the official sample.py and sample_ddp.py of DiT, DyDiT and Skip-DiT do with the file."""
    content = torch.load(path, weights_only=True)
    network = create_model(name)
    network.load_state_dict(content["ema"] if "ema" in content else content)
    return network


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
@pytest.mark.parametrize("name", ["DDT-debug/2", "IDiT-digits/2"])
def test_the_loaders_of_the_official_ddt_fill_their_networks(
    name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = checkpoint(tmp_path / "a.safetensors", {"name": "flow"}, name)
    output = tmp_path / f"a{suffix}"
    assert exported(tmp_path / "a.safetensors", output, "official") == 0
    module = LightningModule.from_cli(name, output)
    x, t, y = torch.randn(2, *network.sample_shape), torch.tensor([0.1, 0.7]), torch.tensor([0, 3])
    expected = network(x, t, y=y).sample
    for loaded in (module.denoiser, module.ema_denoiser, load_in_app(name, output)):
        assert torch.equal(loaded.eval()(x, t, y=y).sample, expected)
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    assert output.stat().st_size < 1.5 * size, "both networks share the numbers in the file"
    assert torch.load(output, weights_only=True)["global_step"] == 40
    assert "the YAML config of the official code has to name them" in capsys.readouterr().out
    for weights in ("ema", "model"):  # and back again
        read = read_checkpoint(output, weights).weights
        assert all(torch.equal(read[key], tensor) for key, tensor in network.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(
    ("classes", "note"), [(10, "the null class 10: the official scripts always take 101"), (0, "")]
)
def test_an_official_file_of_clips_holds_an_average(
    classes: int, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The official loader of clips takes "ema" or "model" and no flat file."""
    network = randomise(create_model("Skip-Latte-debug/2", num_classes=classes))
    write_network(tmp_path / "a.safetensors", "Skip-Latte-debug/2", network)
    assert exported(tmp_path / "a.safetensors", tmp_path / "a.pt", "official") == 0
    said = capsys.readouterr().out
    assert note in said and ("null class" in said) == bool(note)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content.keys() == {"ema"} and content["ema"].keys() == network.state_dict().keys()
    again, info = load_network(tmp_path / "a.pt")
    assert info.model == "Skip-Latte-debug/2" and again.config.num_classes == classes
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["LatteT2V-debug/2", "Skip-LatteT2V-debug/2"])
def test_an_official_file_of_texts_holds_an_average(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = randomise(create_model(name))
    write_network(tmp_path / "a.safetensors", name, network)
    assert exported(tmp_path / "a.safetensors", tmp_path / "a.pt", "official") == 0
    said = capsys.readouterr().out
    assert "text encoder" in said and "class" not in said
    again, info = load_network(tmp_path / "a.pt")
    assert info.model == name and again.config == network.config
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["DiT-debug/2", "DyDiT-debug/2", "Skip-DiT-debug/2"])
def test_the_loaders_of_the_other_official_scripts_fill_their_networks(name: str, tmp_path: Path) -> None:
    network = checkpoint(tmp_path / "a.safetensors", name=name)
    assert exported(tmp_path / "a.safetensors", tmp_path / "a.pt", "official") == 0
    loaded = load_in_scripts(name, tmp_path / "a.pt")
    x, y = torch.randn(2, *network.sample_shape), torch.tensor([0, 3])
    assert torch.equal(loaded.eval()(x, 500.0, y=y).sample, network(x, 500.0, y=y).sample)


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("DDT-XL/2", "ddt/official_xl_22en6de_256_keys"),
        ("DiT-XL/2", "dit/official_xl2_256_keys"),
        ("Skip-DiT-XL/2", "skip_dit/official_xl2_skip_keys"),
    ],
)
def test_exported_names_and_shapes_are_the_official_ones(name: str, golden: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        network = create_model(name)
    content = export.official_content(network, CheckpointInfo(tmp_path, "ema", name, {}, "flow", {}, "ema", None))
    weights = content.get("state_dict", content)
    official = table(golden)
    keys = official.get("keys", official)
    assert len(keys) > 200
    prefixes = ("ema_denoiser.", "denoiser.") if "state_dict" in content else ("",)
    expected = {prefix + key: shape for prefix in prefixes for key, shape in keys.items()}
    assert {key: list(tensor.shape) for key, tensor in weights.items()} == expected


@torch.no_grad()
def test_diffusers_computes_the_same_once_its_timesteps_are_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = checkpoint(tmp_path / "a.safetensors", num_classes=1000)
    folder = tmp_path / "exported"
    assert exported(tmp_path / "a.safetensors", folder, "diffusers") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "scheduler", "transformer"]
    twin, info = DiTTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 20, 500, 999]), torch.tensor([0, 3, 9, 1000])
    expected = network(x, t, y=y).sample
    assert relative_error(twin(x, timestep=t, class_labels=y).sample, expected) > 1e-4, "what no config carries"
    assert_close(correct_timesteps(twin)(x, timestep=t, class_labels=y).sample, expected, 2e-6)
    said, readme = capsys.readouterr().out, (folder / "README.md").read_text()
    assert "set it after loading, as the README.md in the exported folder shows" in said
    for note in ("downscale_freq_shift", "first 3 latent channels", "the licence of the weights: unknown"):
        assert note in said and note in readme
    loop = readme.split("```python")[1].split("scheduler = ")[0].split("from_pretrained")[1].split("\n", 1)[1]
    fresh = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    exec(loop, {"transformer": fresh})  # the README's own lines
    assert_close(fresh(x, timestep=t, class_labels=y).sample, expected, 2e-6)


@torch.no_grad()
def test_a_pipeline_is_written_for_any_family_and_carries_the_licence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = {"name": "DiT-XL-2-256x256", "licence": "cc-by-nc-4.0"}
    network = randomise(create_model("Skip-DiT-debug/2", num_classes=3))
    path = write_network(tmp_path / "a.safetensors", "Skip-DiT-debug/2", network, origin=origin)
    assert exported(path, tmp_path / "out", "pipeline") == 0
    assert "weights of Skip-DiT-debug/2 to" in capsys.readouterr().out
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["transformer"] == ["skip_dit_network", "SkipDiTTransformer"] and index["vae"] == [None, None]
    assert "license: cc-by-nc-4.0" in (tmp_path / "out/README.md").read_text()
    again, info = load_network(tmp_path / "out")
    x, y = torch.randn(2, *network.sample_shape), torch.tensor([0, 3])
    assert torch.equal(again(x, 500.0, y=y).sample, network(x, 500.0, y=y).sample)
    assert exported(path, tmp_path / "a.pt", "official") == 0
    assert "the licence of the weights: cc-by-nc-4.0" in capsys.readouterr().out


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("prediction", "kind"), [("epsilon", "epsilon"), ("x_start", "sample"), ("v", "v_prediction")])
def test_the_scheduler_is_the_one_of_the_process(schedule: str, prediction: str, kind: str, tmp_path: Path) -> None:
    settings = {"noise_schedule": schedule, "prediction": prediction}
    checkpoint(tmp_path / "a.safetensors", {"name": "gaussian", **settings}, num_classes=1000)
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
        ("--ckpt a.safetensors --output b --format diffusers", "null class 1000, not 10; give --format pipeline"),
        ("--ckpt pixels.safetensors --output b --format diffusers", "needs an autoencoder; give --format pipeline"),
        ("--ckpt a.safetensors --output b.pt --format pipeline", "--format pipeline writes a folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    argv: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(Path("a.safetensors"))
    checkpoint(Path("no_null.safetensors"), class_dropout_prob=0.0, num_classes=1000)
    checkpoint(Path("wide.safetensors"), mlp_ratio=2.0, num_classes=1000)
    write_network(Path("pixels.safetensors"), "DiT-debug/2", create_model("DiT-debug/2"))
    checkpoint(Path("flow.safetensors"), {"name": "flow"})
    torch.save({"weight": torch.zeros(1)}, "foreign.pt")
    torch.save(create_model("DyDiT-debug/2", num_heads=2).state_dict(), "gates.pt")
    Path("there.pt").touch()
    before = sorted(tmp_path.iterdir())
    assert run(export.main, "export.py", argv.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
