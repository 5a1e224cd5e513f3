"""Every family, process and sampler, alone and with each accelerator: a cell runs, or says why it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models.acceleration import can_compile
from runtime.checkpoint import save_checkpoint
from runtime.config import parse_config
from runtime.distributed import World
from runtime.errors import UserError
from sampling.config import PROCESSES, SAMPLERS, SamplingConfig
from sampling.pipeline import Pipeline
from tests.networks import debug_name, randomise
from training import trainer
from training.config import TrainConfig
from training.setup import set_up

CPU = World(0, 1, torch.device("cpu"))
# What is combined with a sampler; the numbers are timesteps, 0 clean and 1000 noise.
WITH: dict[str, dict[str, Any]] = {
    "nothing": {},
    "interval": {"guidance_interval": (200.0, 800.0)},
    "cache": {"cache_interval": 2},
    "sharing": {"refresh_rate": 2},
    "calibrated sharing": {"refresh_rate": 2, "sharing": "cheapest"},
    "bf16": {"precision": "bf16"},
    "interval and cache and bf16": {
        "guidance_interval": (200.0, 800.0), "cache_interval": 2, "precision": "bf16",
    },
}  # fmt: skip
KEEPS_STATE = {"DDT", "Skip-DiT"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Networks of random weights, as train.py would have saved them: (family, process) -> file."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}
    for family in models.FAMILIES:
        for process in PROCESSES:
            argv = f"--dataset digits --model {debug_name(family).replace('debug', 'digits')} --process {process}"
            config = parse_config(TrainConfig, argv.split(), program="train.py", description="")
            setup = set_up(config, CPU.device)
            made[family, process] = folder / f"{family}-{process}.safetensors"
            meta = trainer.checkpoint_meta(setup, 1)
            save_checkpoint(made[family, process], {"ema": randomise(setup.network).state_dict()}, meta)
    return made


def draw(path: Path, sampler: str, folder: Path, **settings: Any) -> torch.Tensor:
    config = SamplingConfig(
        ckpt=path, sampler=sampler, num_sampling_steps="4", cfg_scale=2.0, device="cpu", sharing_dir=folder, **settings
    )
    made = Pipeline(config, CPU.device)
    return made.denoise(0, range(2), torch.tensor([1, 2]))


def refusal(family: str, sampler: str, settings: dict[str, Any]) -> str | None:
    """Why a cell cannot be; None where it can."""
    if family not in KEEPS_STATE and {"cache_interval", "refresh_rate"} & settings.keys():
        return "this network keeps nothing to reuse" if "cache_interval" in settings else "keeps no state between"
    return None


@pytest.mark.parametrize("combined", WITH)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_cell_runs_or_is_refused_in_one_line(
    checkpoints: dict[tuple[str, str], Path], family: str, sampler: str, combined: str, tmp_path: Path
) -> None:
    settings, path = WITH[combined], checkpoints[family, SAMPLERS[sampler].process]
    reason = refusal(family, sampler, settings)
    if reason is not None:
        with pytest.raises(UserError, match=reason) as error:
            draw(path, sampler, tmp_path, **settings)
        assert "\n" not in str(error.value)
        return
    drawn = draw(path, sampler, tmp_path, **settings)
    assert drawn.shape == (2, 1, 8, 8) and drawn.isfinite().all()
    plain = draw(path, sampler, tmp_path)
    assert torch.equal(drawn, plain) == (not settings), "what is combined acts"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_cached_evaluation_is_refused_where_time_does_not_fall(
    checkpoints: dict[tuple[str, str], Path], family: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--cache-interval 2: this") as error:
        draw(checkpoints[family, "flow"], "heun", tmp_path, cache_interval=2, heun_exact=True)
    assert "\n" not in str(error.value)


def test_a_plain_network_is_cached_where_a_depth_is_given(
    checkpoints: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    path = checkpoints["DiT", "gaussian"]
    cached, plain = draw(path, "ddim", tmp_path, cache_interval=2, cache_depth=1), draw(path, "ddim", tmp_path)
    assert cached.isfinite().all() and not torch.equal(cached, plain)


def test_similarities_are_kept_with_their_settings(checkpoints: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    path, shared = checkpoints["DDT", "flow"], {"refresh_rate": 2, "sharing": "cheapest"}
    first = draw(path, "euler", tmp_path, **shared)
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    assert torch.equal(draw(path, "euler", tmp_path, **shared), first)
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [stamp], "read, not measured again"
    draw(path, "adams", tmp_path, **shared)
    assert len(list(tmp_path.iterdir())) == 2, "other settings have similarities of their own"


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
def test_compiled_blocks_sample_alike(checkpoints: dict[tuple[str, str], Path], family: str, tmp_path: Path) -> None:
    assert can_compile("cpu"), "this test needs a C++ compiler"
    path = checkpoints[family, "gaussian"]
    compiled, plain = draw(path, "ddim", tmp_path, compile=True), draw(path, "ddim", tmp_path)
    assert torch.allclose(compiled, plain, atol=1e-4 * float(plain.abs().max()))
