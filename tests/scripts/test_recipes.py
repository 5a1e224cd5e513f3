"""The recipes for GPUs and the scripts for the digits: what they would start, and what they say to a wrong call."""

import os
import subprocess
from pathlib import Path

import pytest

from evaluator.settings import EvaluatorConfig
from models import model_config
from runtime.command_line import parse, parse_config
from runtime.given import Given
from runtime.settings import choose_owners
from sample_ddp import SampleDDPSettings
from sampling.config import KINDS as SAMPLING_KINDS
from scripts.compare_families import CompareSettings
from tests.processes import ROOT
from training.config import KINDS, TrainSettings

PATHS = {
    "train_dit_xl2_256": 1,
    "train_dit_xl2_512": 1,
    "train_dydit_0.5": 2,
    "train_dydit_0.7": 2,
    "train_ddt_xl2_256": 1,
    "train_ddt_xl2_512": 2,
}
TEXT = ("train_latte_t2v", "sample_latte_t2v")
RECORD = '#!/bin/bash\nprintf "%s\\n" "$@" ---- >> "$RECORDED"\n'


def recipe(name: str, folder: Path, *argv: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs a recipe in a folder, with a torchrun that only records its arguments."""
    torchrun = folder / "bin" / "torchrun"
    torchrun.parent.mkdir(exist_ok=True)
    torchrun.write_text(RECORD)
    torchrun.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{torchrun.parent}:{os.environ['PATH']}",
        "RECORDED": str(folder / "recorded"),
    }
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *argv]
    return subprocess.run(command, cwd=folder, env=environment | settings, capture_output=True, text=True)


def recorded(folder: Path, script: str, launcher: str = "--nproc-per-node") -> list[list[str]]:
    """Arguments of each program that was started, after its name."""
    runs = (folder / "recorded").read_text().split("----\n")[:-1]
    started = [run.splitlines() for run in runs]
    assert all(launcher in argv for argv in started if script in argv)
    return [argv[argv.index(script) + 1 :] for argv in started if script in argv]


def check_owners(given: Given[TrainSettings]) -> None:
    """Check that every flag has an effect in this run, and that its owner takes the value."""
    owners = choose_owners(KINDS, vars(given.general))
    given.check_owners(**owners)
    for kind in ("process", "loss", "optimizer"):
        given.build(kind, owners[kind])
    model_config(given.general.model, **given.fields("model", owners["model"]))


@pytest.mark.parametrize("name", PATHS)
def test_a_recipe_starts_train_py_with_flags_that_it_knows(name: str, tmp_path: Path) -> None:
    for place in ("data", "weights.pt"):
        (tmp_path / place).mkdir()
    done = recipe(name, tmp_path, *("data", "weights.pt")[: PATHS[name]], "--one-more-flag")
    assert done.returncode == 0, done.stderr
    ((*argv, last),) = recorded(tmp_path, "train.py")
    assert last == "--one-more-flag"
    given = parse(TrainSettings, argv, program="train.py", doc=None, kinds=KINDS)
    check_owners(given)
    config = given.general
    assert config.data.data_path == tmp_path / "data" and config.model.endswith("-XL/2")
    assert config.run.init_from in (None, tmp_path / "weights.pt") and config.optimization.global_batch_size == 256


CLIPS = {"ffs": "ffs-skip", "sky": "skytimelapse-skip", "taichi": "taichi-skip", "ucf101": "ucf101-skip"}


def test_a_recipe_says_in_one_line_that_there_is_no_gpu(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = recipe("train_latte_sky", tmp_path, "videos")
    assert done.returncode == 2 and not (tmp_path / "recorded").exists()
    assert done.stderr == "train_latte: PyTorch finds no GPU here; GPUS=1 starts one process on the CPU\n"
    assert recipe("train_latte_sky", tmp_path, "videos", GPUS="1").returncode == 0


@pytest.mark.parametrize("name", CLIPS)
def test_a_recipe_for_clips_starts_train_py_as_published(name: str, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    done = recipe(f"train_latte_{name}", tmp_path, "videos", "--one-more-flag")
    assert done.returncode == 0, done.stderr
    ((*argv, last),) = recorded(tmp_path, "train.py")
    assert last == "--one-more-flag"
    given = parse(TrainSettings, argv, program="train.py", doc=None, kinds=KINDS)
    check_owners(given)
    config, steps = given.general, given.general.optimization
    assert config.data.data_path == tmp_path / "videos" and config.model == "Skip-Latte-XL/2"
    assert (config.data.flip is False) == (name == "sky")
    last = 100_000 if name == "ucf101" else 1_000_000
    assert steps.learning_rate(last - 1, steps.max_steps) == pytest.approx(0, abs=2e-9) and steps.max_steps == last
    assert steps.learning_rate(last // 2, last) == pytest.approx(5e-5, rel=0.01)
    fields = given.fields("model", "Skip-Latte")
    assert model_config(config.model, **fields).num_classes == (101 if name == "ucf101" else 0)


@pytest.mark.parametrize("name", CLIPS)
def test_released_clips_are_sampled_and_scored(name: str, tmp_path: Path) -> None:
    (tmp_path / "real.npz").touch()
    done = recipe(
        f"sample_latte_{name}", tmp_path, "real.npz", "--cache-interval", "2", SAMPLES=str(tmp_path / "s.npz")
    )
    assert done.returncode == 0, done.stderr
    (argv,) = recorded(tmp_path, "sample_ddp.py")
    given = parse(SampleDDPSettings, argv, program="sample_ddp.py", doc=None, kinds=SAMPLING_KINDS)
    assert given.general.checkpoint.ckpt == Path(CLIPS[name]) and given.general.job.num_fid_samples == 2048
    (argv,) = recorded(tmp_path, "evaluator/evaluator.py")
    scored = parse_config(EvaluatorConfig, argv, program="evaluator", doc=None)
    assert (scored.ref_batch, scored.sample_batch) == (tmp_path / "real.npz", tmp_path / "s.npz")


@pytest.mark.parametrize("stage", ["1", "2"])
def test_networks_of_texts_are_trained_in_two_stages(stage: str, tmp_path: Path) -> None:
    for place in ("latents", "transformer"):
        (tmp_path / place).mkdir()
    done = recipe("train_latte_t2v", tmp_path, stage, "latents", "transformer", "--one-more-flag")
    assert done.returncode == 0, done.stderr
    ((*argv, last),) = recorded(tmp_path, "train.py")
    assert last == "--one-more-flag"
    given = parse(TrainSettings, argv, program="train.py", doc=None, kinds=KINDS)
    check_owners(given)
    config, steps = given.general, given.general.optimization
    assert (config.data.data_path, config.run.init_from) == (tmp_path / "latents", tmp_path / "transformer")
    assert config.model == "Skip-LatteT2V-XL/2" and steps.train_only == {"1": "added", "2": None}[stage]
    assert (steps.global_batch_size, steps.grad_accum, steps.skip_updates_above) == (32, 2, 0.02)
    assert steps.ema_decay == pytest.approx(1 - 1e-4 * (2 + 1) / 2) and steps.learning_rate(9, 10) == 1e-4
    done = recipe("train_latte_t2v", tmp_path, "3", "latents", "transformer")
    assert done.returncode == 2 and "stage 3: must be 1 (the skip units) or 2 (everything)" in done.stderr


def test_prompts_are_sampled_with_the_released_weights(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n")
    assert recipe("sample_latte_t2v", tmp_path, "prompts.txt", "--cache-interval", "3").returncode == 0
    (argv,) = recorded(tmp_path, "sample_ddp.py")
    given = parse(SampleDDPSettings, argv, program="sample_ddp.py", doc=None, kinds=SAMPLING_KINDS)
    assert given.general.checkpoint.ckpt == Path("Latte-skip") and given.general.caching.cache_interval == 3
    assert tmp_path / "prompts.txt" == Path(argv[argv.index("--prompt-file") + 1])


@pytest.mark.parametrize(("name", "runs"), [("digits_dydit", 2), ("digits_ddt", 2), ("digits_skip_dit", 6)])
def test_scripts_for_the_digits_give_flags_that_have_an_effect(name: str, runs: int, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(RECORD)
    python.chmod(0o755)
    settings = {"DIGITS_PYTHON": str(python), "DIGITS_DIT": "start.safetensors"}
    done = recipe(name, tmp_path, str(tmp_path / "out"), **settings)
    assert done.returncode == 0, done.stderr
    trained = recorded(tmp_path, "train.py", "train.py")
    assert len(trained) == runs
    for argv in trained:
        check_owners(parse(TrainSettings, argv, program="train.py", doc=None, kinds=KINDS))
    for argv in recorded(tmp_path, "scripts/compare_families.py", "--output-dir"):
        assert parse_config(CompareSettings, argv, program="compare_families.py", doc=None).num_images == 1000


def test_script_for_fashion_mnist_gives_flags_that_have_an_effect(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(RECORD)
    python.chmod(0o755)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte").touch()
    models = ("DiT", "DyDiT", "DDT", "Skip-DiT")
    for model in models:
        (tmp_path / "out/runs" / model).mkdir(parents=True)
        (tmp_path / "out/runs" / model / "1.safetensors").touch()
    settings = {"FASHION_PYTHON": str(python), "FASHION_DATA": str(tmp_path)}
    done = recipe("fashion_families", tmp_path, str(tmp_path / "out"), **settings)
    assert done.returncode == 0, done.stderr
    configs = []
    for argv in recorded(tmp_path, "train.py", "train.py"):
        check_owners(given := parse(TrainSettings, argv, program="train.py", doc=None, kinds=KINDS))
        configs.append(given.general)
    assert [config.model for config in configs] == [f"{model}-S/4" for model in models]
    assert {(config.data.data_path, config.run.resume) for config in configs} == {(tmp_path, "auto")}
    assert configs[1].run.init_from == tmp_path / "out/runs/DiT/1.safetensors"


def test_script_for_fashion_mnist_without_its_data_is_one_line(tmp_path: Path) -> None:
    done = recipe("fashion_families", tmp_path, FASHION_DATA=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no train-images-idx3-ubyte" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
    assert "bash scripts/fashion_families.sh [" in recipe("fashion_families", tmp_path, "--help").stdout


@pytest.mark.parametrize(("name", "model"), [("sample_0.7", "new_dydit0.7"), ("sample_0.5", "new_dydit0.5")])
def test_released_dydits_are_drawn_from_and_scored(name: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "ref.npz").touch()
    done = recipe(name, tmp_path, "ref.npz", "--overwrite", SAMPLES=str(tmp_path / "s.npz"))
    assert done.returncode == 0, done.stderr
    (argv,) = recorded(tmp_path, "sample_ddp.py")
    given = parse(SampleDDPSettings, argv, program="sample_ddp.py", doc=None, kinds=SAMPLING_KINDS)
    given.check_owners(model="DyDiT", sampler="ddpm")
    job = given.general.job
    assert given.general.checkpoint.ckpt == Path(model) and job.num_fid_samples == 50_000 and job.overwrite
    (argv,) = recorded(tmp_path, "evaluator/evaluator.py")
    scored = parse_config(EvaluatorConfig, argv, program="evaluator", doc=None)
    assert (scored.ref_batch, scored.sample_batch) == (tmp_path / "ref.npz", tmp_path / "s.npz")


@pytest.mark.parametrize(
    "name", [*PATHS, "sample_0.5", "sample_0.7", "sample_dydit", "train_latte", "sample_latte", *TEXT]
)
def test_too_few_paths_are_one_line_and_help_is_the_header(name: str, tmp_path: Path) -> None:
    done = recipe(name, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "usage: bash scripts/" in done.stderr
    if not name.startswith("sample_0"):
        assert f"bash scripts/{name}.sh " in recipe(name, tmp_path, "--help").stdout
    assert not (tmp_path / "recorded").exists()
