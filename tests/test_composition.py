"""Every family, process and sampler, alone and with each accelerator: a cell runs, or says why it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.config import parse_config
from torch._dynamo.testing import CompileCounter

import models
from diffusion import PROCESSES
from models.acceleration import can_compile
from models.dydit_plan import RoutingPlan
from runtime.checkpoint import save_checkpoint
from runtime.distributed import World
from runtime.errors import UserError
from sampling.config import SAMPLERS, SamplingConfig
from sampling.pipeline import Pipeline
from tests.networks import debug_name, randomise
from training import trainer
from training.config import TrainConfig
from training.setup import set_up

CPU = World(0, 1, torch.device("cpu"))
INTERVAL = (200.0, 800.0)  # timesteps, 0 clean and 1000 noise
# What is combined with a sampler.
WITH: dict[str, dict[str, Any]] = {
    "nothing": {},
    "interval": {"guidance_interval": INTERVAL},
    "cache": {"cache_interval": 2},
    "sharing": {"refresh_rate": 2},
    "calibrated sharing": {"refresh_rate": 2, "sharing": "cheapest"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": True},
    "interval and bf16 and compile": {"guidance_interval": INTERVAL, "precision": "bf16", "compile": True},
    "interval and cache and bf16": {"guidance_interval": INTERVAL, "cache_interval": 2, "precision": "bf16"},
    "all": {"guidance_interval": INTERVAL, "cache_interval": 2, "precision": "bf16", "compile": True},
}
REUSE = {"cache_interval", "refresh_rate"}
# Rows of the README's matrix: a family, and what makes its networks keep state.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in models.FAMILIES},
    "DiT, cache depth": ("DiT", {"cache_depth": 1}),
}
KEEPS_STATE = {"DDT", "Skip-DiT", "DiT, cache depth"}


class Watch:
    """What ran in a cell: blocks of a routing plan, and pieces of code that were compiled."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.routed, self.compiled = 0, CompileCounter()
        run_block = RoutingPlan.run_block

        def counted(plan: RoutingPlan, *args: Any) -> Any:
            self.routed += 1
            return run_block(plan, *args)

        patch.setattr(RoutingPlan, "run_block", counted)
        patch.setattr("sampling.pipeline.COMPILE_BACKEND", self.compiled)
        patch.setattr("sampling.config.can_compile", lambda device_type: True)  # this backend needs no compiler
        torch._dynamo.reset()


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


def refusal(network: str, settings: dict[str, Any]) -> str | None:
    """Why a cell cannot be; None where it can."""
    if NETWORKS[network][1] and not REUSE & settings.keys():
        return "--cache-depth 1: has no effect without --cache-interval"
    if network in KEEPS_STATE or not REUSE & settings.keys():
        return None
    return "keeps nothing to reuse" if "cache_interval" in settings else "keeps no state between"


@pytest.mark.parametrize("combined", WITH)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_cell_runs_or_is_refused_in_one_line(
    checkpoints: dict[tuple[str, str], Path], network: str, sampler: str, combined: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    family, own = NETWORKS[network]
    settings, path = {**WITH[combined], **own}, checkpoints[family, SAMPLERS[sampler].process]
    watch, reason = Watch(monkeypatch), refusal(network, settings)
    if reason is not None:
        with pytest.raises((UserError, ValueError), match=reason) as error:
            draw(path, sampler, tmp_path, **settings)
        assert "\n" not in str(error.value)
        return
    drawn = draw(path, sampler, tmp_path, **settings)
    assert drawn.shape == (2, 1, 8, 8) and drawn.isfinite().all()
    assert (watch.routed > 0) == (family == "DyDiT"), "routed networks are routed"
    assert (watch.compiled.frame_count > 0) == settings.get("compile", False)
    acts = settings.keys() - {"compile"}
    plain = draw(path, sampler, tmp_path)
    assert torch.allclose(drawn, plain, rtol=0, atol=1e-5 * float(plain.abs().max())) == (not acts), "each acts"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_cached_evaluation_is_refused_where_time_does_not_fall(
    checkpoints: dict[tuple[str, str], Path], family: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--cache-interval 2: this") as error:
        draw(checkpoints[family, "flow"], "heun", tmp_path, cache_interval=2, heun_exact=True)
    assert "\n" not in str(error.value)


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
