"""Every family, process and sampler, alone and with each accelerator: a cell acts, or is refused in one line."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from diffusion import PROCESSES, SAMPLERS
from models.acceleration import can_compile
from models.dydit_plan import RoutingPlan
from runtime.checkpoint import save_checkpoint
from runtime.errors import UserError
from sampling.pipeline import Pipeline
from tests.networks import debug_name, randomise
from training import trainer
from training.config import parse_settings
from training.setup import set_up

CPU = torch.device("cpu")
INTERVAL = (200.0, 800.0)  # timesteps, 0 clean and 1000 noise
# What is combined with a sampler.
WITH: dict[str, dict[str, Any]] = {
    "nothing": {},
    "interval": {"guidance_interval": INTERVAL},
    "cache": {"cache_interval": 2},
    "sharing": {"sharing_interval": 2},
    "calibrated sharing": {"sharing_interval": 2, "sharing": "cheapest"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": True},
    "interval and bf16 and compile": {"guidance_interval": INTERVAL, "precision": "bf16", "compile": True},
    "interval and cache and bf16": {"guidance_interval": INTERVAL, "cache_interval": 2, "precision": "bf16"},
    "all": {"guidance_interval": INTERVAL, "cache_interval": 2, "precision": "bf16", "compile": True},
}
REUSE = {"cache_interval", "sharing_interval"}
# Rows of the matrix in docs/sampling.md: a family, and what makes its networks keep state.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in models.FAMILIES},
    "DiT, cache depth": ("DiT", {"cache_depth": 1}),
}
Open = Callable[[str, str], Pipeline]


class Backend:
    """Compiles nothing and counts the calls of what was traced; one for all cells, which share their traces."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return run


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = Backend()
    with (
        pytest.MonkeyPatch.context() as patch,
        torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096),
    ):
        patch.setattr("sampling.pipeline.COMPILE_BACKEND", made)
        patch.setattr("sampling.config.can_compile", lambda device_type: True)  # this backend needs no compiler
        yield made
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Pipelines of random networks, saved as train.py saves them: (row of `NETWORKS`, process) -> pipeline."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def saved(family: str, process: str) -> Path:
        name, path = debug_name(family), folder / f"{family}-{process}.safetensors"
        setup = set_up(parse_settings(["--dataset", "digits", "--model", name, "--process", process]), CPU)
        meta = trainer.checkpoint_meta(setup, 1)
        save_checkpoint(path, {next(iter(meta["averages"])): randomise(setup.network).state_dict()}, meta)
        return path

    @cache
    def make(network: str, process: str) -> Pipeline:
        family, own = NETWORKS[network]
        return Pipeline.from_pretrained(saved(family, process), device="cpu", **own)

    return make


def sample(pipeline: Pipeline, sampler: str, folder: Path, **settings: Any) -> torch.Tensor:
    run = pipeline.prepare(sampler=sampler, num_sampling_steps=4, cfg_scale=2.0, sharing_dir=folder, **settings)
    return pipeline.denoise(run, 0, range(2), {"y": torch.tensor([1, 2])})


@pytest.fixture(scope="module")
def plain(opened: Open, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], torch.Tensor]:
    """Latents of a network's cell without anything: (row of `NETWORKS`, sampler) -> tensor."""
    folder = tmp_path_factory.mktemp("plain")
    return cache(lambda network, name: sample(opened(network, SAMPLERS[name].process), name, folder))


@pytest.mark.parametrize("combined", WITH)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_cell_acts_or_is_refused_in_one_line(
    opened: Open, plain: Callable[[str, str], torch.Tensor], backend: Backend, network: str, sampler: str,
    combined: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings, pipeline = WITH[combined], opened(network, SAMPLERS[sampler].process)
    if REUSE & settings.keys() and not pipeline.network.keeps_state:
        with pytest.raises(UserError, match="keeps nothing to reuse") as error:
            sample(pipeline, sampler, tmp_path, **settings)
        assert "\n" not in str(error.value)
        return
    reference, routed, calls = plain(network, sampler), [], backend.calls
    run_block = RoutingPlan.run_block
    monkeypatch.setattr(RoutingPlan, "run_block", lambda *args: routed.append(1) or run_block(*args))
    latents = sample(pipeline, sampler, tmp_path, **settings)
    assert latents.shape == (2, 1, 8, 8) and latents.isfinite().all()
    assert bool(routed) == models.family_of(pipeline.info.model).data_dependent or settings == {}
    assert (backend.calls > calls) == settings.get("compile", False)
    acts = settings.keys() - {"compile"}
    close = torch.allclose(latents, reference, rtol=0, atol=1e-5 * float(reference.abs().max()))
    assert close == (not acts), "each acts"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_cached_evaluation_is_refused_where_time_does_not_fall(opened: Open, family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cache-interval 2: this") as error:
        sample(opened(family, "flow"), "heun", tmp_path, cache_interval=2, heun_exact=True)
    assert "\n" not in str(error.value)


def test_similarities_are_kept_with_their_settings(opened: Open, tmp_path: Path) -> None:
    shared = {"sharing_interval": 2, "sharing": "cheapest"}
    (path,) = {opened("DDT", "flow").info.path}

    def fresh(sampler: str) -> torch.Tensor:
        return sample(Pipeline.from_pretrained(path, device="cpu"), sampler, tmp_path, **shared)

    first = fresh("euler")
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    assert torch.equal(fresh("euler"), first)
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [stamp], "read, not measured again"
    fresh("adams")
    assert len(list(tmp_path.iterdir())) == 2, "other settings have other similarities"


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
def test_compiled_blocks_sample_alike(opened: Open, family: str, tmp_path: Path) -> None:
    assert can_compile("cpu"), "this test needs a C++ compiler"
    pipeline = opened(family, next(iter(PROCESSES)))
    compiled, plain = (sample(pipeline, "ddim", tmp_path, compile=compiled) for compiled in (True, False))
    assert torch.allclose(compiled, plain, atol=1e-4 * float(plain.abs().max()))
