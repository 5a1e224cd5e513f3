"""Folders for diffusers: the generated code is ours, and samples the same where this project cannot be imported."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.encoders import Encoder
from data.words import Words
from models import FAMILIES, create_model
from runtime.errors import UserError
from sampling.bundle import network_source, pipeline_source
from sampling.flatten import PACKAGES, ROOT, flatten
from sampling.pipeline import Pipeline
from tests.checkpoints import write_network
from tests.digits_checkpoints import save_digits_checkpoint
from tests.hub_server import TOKEN, serving
from tests.networks import conditioning, debug_name, debug_network, randomise, small_autoencoder, unconditional

# Samples from each folder with the arguments in a file; the project is taken off the path, and missed there.
BY_DIFFUSERS = """
import importlib.util, json, os, sys

root = sys.argv[1]
sys.path[:] = [place for place in sys.path if not os.path.exists(os.path.join(place, "sampling", "pipeline.py"))]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
for package in ("models", "diffusion", "sampling", "runtime", "evaluator"):
    assert importlib.util.find_spec(package) is None, package
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

for source, how in json.loads(sys.argv[2]).items():
    pipeline = DiffusionPipeline.from_pretrained(source, **how["load"])
    for i, call in enumerate(how["calls"]):
        tensors = load_file(call.pop("tensors")) if "tensors" in call else {}
        output = call.pop("output")
        try:
            samples = pipeline(**call, **tensors, output_type="pt")
        except ValueError as error:
            print(f"{i}: {error}")
            continue
        (pixels,) = vars(samples).values()
        save_file({"pixels": pixels.contiguous()}, output)
"""
TRUSTED = {"trust_remote_code": True}


def by_diffusers(sources: Mapping[str, Any], folder: Path, **variables: str) -> str:
    """Run the pipelines in a process without this project; returns what it printed."""
    environment = {"HF_HOME": str(folder / "home"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **variables}
    argv = [sys.executable, "-c", BY_DIFFUSERS, str(ROOT), json.dumps(dict(sources))]
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pictures(pipeline: Pipeline, rows: dict[str, Tensor], null: dict[str, Tensor] | None, **settings: Any) -> Tensor:
    """Ours, in [0, 1]: images 0 and 1 of seed 3."""
    run = pipeline.prepare(**settings)
    latents = pipeline.denoise(run, 3, [0, 1], rows, null=null if run.takes_null else None)
    return (pipeline.decode(latents, run) / 2 + 0.5).clamp(0, 1)


def same_by_diffusers(cases: Mapping[str, tuple[Path, dict[str, Any], dict[str, Any]]], folder: Path) -> None:
    """Compare bundles of checkpoints, given as name -> (file, our settings, those of diffusers), in one process."""
    sources: dict[str, Any] = {}
    expected: dict[str, Tensor] = {}
    for name, (path, ours, theirs) in cases.items():
        pipeline = Pipeline.from_pretrained(path, device="cpu")
        rows, null = conditioning(pipeline.network, [0, 1]), None
        if rows and ours.get("cfg_scale") != 1.0:
            null = unconditional(pipeline.network, 2)
        expected[name] = pictures(pipeline, rows, null, **ours)
        bundle = pipeline.save_pretrained(folder / name, for_diffusers=True, shard_size=200_000)
        again = Pipeline.from_pretrained(bundle, device="cpu")
        assert torch.equal(pictures(again, rows, null, **ours), expected[name]), "loaded by this project"
        call: dict[str, Any] = {"seed": 3, "output": str(folder / f"{name}.safetensors"), **theirs}
        if "text" in rows:
            names = {"text": "prompt_embeds", "text_mask": "prompt_attention_mask"}
            tensors = {names[key]: leaf for key, leaf in rows.items()}
            tensors |= {f"negative_{names[key]}": leaf for key, leaf in (null or {}).items()}
            call["tensors"] = str(folder / f"{name}.inputs")
            save_file({key: leaf.clone() for key, leaf in tensors.items()}, call["tensors"])
        else:
            call |= {"class_labels": rows["y"].tolist()} if rows else {"num_samples": 2}
        how = {"custom_pipeline": str(bundle)} if name == "unconditional" else {}
        sources[str(bundle)] = {"load": {**TRUSTED, **how}, "calls": [call]}
    by_diffusers(sources, folder)
    for name, pixels in expected.items():
        theirs_pixels = load_file(folder / f"{name}.safetensors")["pixels"]
        assert theirs_pixels.shape == pixels.shape and pixels.std() > 0.05
        assert (theirs_pixels - pixels).abs().max() <= 1e-5, name


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_are_ours_without_this_project(tmp_path: Path) -> None:
    """Three classes on pixels with noise in every step, an autoencoder, clips from text and from nothing."""
    three = randomise(create_model("DiT-debug/2", sample_shape=(3, 8, 8), num_classes=3))
    pixels = write_network(tmp_path / "pixels.safetensors", "DiT-debug/2", three)
    small_autoencoder(tmp_path / "vae")
    vae = {"encoder": {"name": str(tmp_path / "vae")}, "data": {"image_shape": [3, 16, 16], "classes": None}}
    latents = write_network(tmp_path / "latents.safetensors", debug_name("DDT"), debug_network("DDT"), **vae)
    text = write_network(tmp_path / "text.safetensors", debug_name("LatteT2V"), debug_network("LatteT2V"))
    free = debug_network("Skip-Latte", num_classes=0)
    nothing = write_network(tmp_path / "free.safetensors", debug_name("Skip-Latte"), free)
    ours = {"num_sampling_steps": 4, "cfg_scale": 3.0}
    theirs = {"num_inference_steps": 4, "guidance_scale": 3.0}
    interval = {"guidance_interval": (100.0, 900.0)}
    same_by_diffusers(
        {
            "pixels": (pixels, ours, theirs),
            "latents": (latents, {**ours, **interval}, {**theirs, **interval}),
            "text": (text, {**ours, "sampler": "dpm++"}, {**theirs, "sampler": "dpm++"}),
            "unconditional": (nothing, {"num_sampling_steps": 4}, {"num_inference_steps": 4}),
        },
        tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_every_family_are_ours(family: str, tmp_path: Path) -> None:
    """With and without guidance, by the sampler of its release and another one, under both processes."""
    cases: dict[str, Any] = {}
    other = {"gaussian": ("unipc", {}), "flow": ("heun", {})}
    for process in ("gaussian", "flow"):
        fields = {"learn_sigma": False} if process == "flow" and hasattr(FAMILIES[family].config, "learn_sigma") else {}
        network = debug_network(family, **fields)
        if process == "gaussian" and network.out_channels == network.sample_shape[-3]:
            settings = {"name": process, "noise_schedule": "squaredcos_cap_v2"}
        else:
            settings = {"name": process}
        path = write_network(tmp_path / f"{process}.safetensors", debug_name(family), network, process=settings)
        name, options = other[process]
        for scale in (1.0, 2.5):
            ours = {"num_sampling_steps": 5, "cfg_scale": scale}
            theirs = {"num_inference_steps": 5, "guidance_scale": scale}
            cases[f"{process}-{scale}"] = path, ours, theirs
        cases[f"{process}-{name}"] = path, {**ours, "sampler": name, **options}, {**theirs, "sampler": name, **options}
    same_by_diffusers(cases, tmp_path)


@pytest.mark.slow
def test_prompts_labels_and_pictures_by_diffusers_from_the_hub(tmp_path: Path) -> None:
    """Published to the stand-in, loaded by name; mistakes are ValueErrors."""
    network = randomise(create_model("LatteT2V-digits/4", text_width=Words.width, depth=4, hidden_size=32))
    text = write_network(tmp_path / "a.safetensors", "LatteT2V-digits/4", network, text=Words().describe())
    labels = save_digits_checkpoint(tmp_path / "l/0000001.safetensors", "DiT-digits/2")
    prompts = ["a small three moving right", "seven"]
    script = """
import json, os, sys
from sampling.pipeline import Pipeline
for path, name in json.loads(sys.argv[1]):
    Pipeline.from_pretrained(path, device="cpu").push_to_hub(name, licence="mit", for_diffusers=True)
"""
    with serving() as hub:
        environment = {**hub.environment(tmp_path / "mine"), "PYTHONPATH": str(ROOT)}
        pushed = json.dumps([(str(text), "me/text"), (str(labels), "me/labels")])
        argv = [sys.executable, "-c", script, pushed]
        subprocess.run(argv, env=environment, check=True, cwd=tmp_path, capture_output=True)
        calls = {
            "me/text": [{"prompt": prompts, "num_inference_steps": 3, "guidance_scale": 2.0}],
            "me/labels": [{"class_labels": [3, 7], "num_inference_steps": 3}, {"class_labels": [10]}, {"prompt": "a"}],
        }
        sources = {
            name: {"load": TRUSTED, "calls": [
                {**call, "seed": 3, "output": str(tmp_path / f"{name[3:]}{i}")} for i, call in enumerate(each)
            ]} for name, each in calls.items()
        }  # fmt: skip
        said = by_diffusers(sources, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN)
        assert "1: class_labels [10]: must be a list of whole numbers, 0 to 9" in said
        assert "2: this network takes class_labels, and nothing else" in said
        card = hub.repositories["me/text"].files["README.md"].decode()
    assert 'DiffusionPipeline.from_pretrained("me/text", trust_remote_code=True)' in card
    pipeline = Pipeline.from_pretrained(text, device="cpu")
    rows, null = pipeline.encode_prompts(prompts)
    expected = pictures(pipeline, dict(rows), dict(null), num_sampling_steps=3, cfg_scale=2.0)
    assert (load_file(tmp_path / "text0")["pixels"] - expected).abs().max() <= 1e-5
    pipeline = Pipeline.from_pretrained(labels, device="cpu")
    rows = {"y": torch.tensor([3, 7])}
    expected = pictures(pipeline, rows, pipeline.network.null_conditioning(2), num_sampling_steps=3)
    assert (load_file(tmp_path / "labels0")["pixels"] - expected).abs().max() <= 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Code


class WithoutModules(ast.NodeTransformer):
    """Replace members of modules, such as `flow.EulerSampler`, by their names."""

    def __init__(self, modules: set[str]) -> None:
        self.modules = modules

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Replace one."""
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            return ast.copy_location(ast.Name(node.attr, ast.Load()), node)
        return node


def our_statements() -> set[str]:
    """All statements at the top of our modules, in a form that does not depend on layout."""
    found = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        names = {alias.asname or alias.name for node in imports if node.module in PACKAGES for alias in node.names}
        found |= {ast.dump(WithoutModules(names).visit(node)) for node in tree.body}
    return found


@pytest.fixture(scope="module")
def ours() -> set[str]:
    return our_statements()


@pytest.mark.parametrize("family", [*FAMILIES, ""])
def test_the_code_is_ours_and_stands_alone(family: str, ours: set[str]) -> None:
    """Every statement is one of our modules', but imports of others and the class that names the family's."""
    source = network_source(family) if family else pipeline_source()
    assert re.search(rf"^\s*(from|import) ({'|'.join(PACKAGES)})\b", source, flags=re.M) is None
    tree = ast.parse(source)
    statements = [node for node in tree.body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
    if family:
        last = statements.pop()
        assert isinstance(last, ast.ClassDef) and [ast.unparse(base) for base in last.bases] == ["FamilyTransformer"]
    assert [ast.unparse(node)[:80] for node in statements if ast.dump(node) not in ours] == []
    assert len(statements) > 20
    others = [name for name in FAMILIES if f"class {name.replace('-', '')}(" in source]
    assert family in others if family else others == []


def test_two_definitions_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="published is defined in models.* and in models.*; rename one"):
        flatten(["models.dit.published", "models.latte_t2v.published"])
    with pytest.raises(ValueError, match="models.dit has no Nothing"):
        flatten(["models.dit.Nothing"])


def test_an_autoencoder_that_the_pipeline_cannot_decode_with_is_refused(tmp_path: Path) -> None:
    path = save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2")
    pipeline = Pipeline.from_pretrained(path, device="cpu")
    pipeline.encoder = OtherEncoder("other")
    with pytest.raises(UserError, match="--vae other: a pipeline of diffusers is not written with it"):
        pipeline.save_pretrained(tmp_path / "b", for_diffusers=True)
    assert [*tmp_path.iterdir()] == [path]


class OtherEncoder(Encoder):
    """An encoder that is no module of diffusers."""
