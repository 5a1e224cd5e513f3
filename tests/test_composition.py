"""Every family, process and sampler, alone and with each accelerator: a cell runs, or says why it does not."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

import models
from diffusion import SAMPLERS
from models.acceleration import can_compile
from models.dydit_plan import RoutingPlan
from runtime.errors import UserError
from sampling.pipeline import Pipeline
from tests.checkpoints import write_network
from tests.networks import conditioning, debug_name, randomise, unconditional

INTERVAL = (200.0, 800.0)  # timesteps, 0 clean and 1000 noise
# What is combined with a sampler.
WITH: dict[str, dict[str, Any]] = {
    "nothing": {},
    "interval": {"guidance_interval": INTERVAL},
    "cache": {"cache_interval": 2},
    "sharing": {"sharing_interval": 2},
    "calibrated sharing": {"sharing_interval": 2, "sharing": "cheapest"},
    "schedule": {"guidance_schedule": "cosine"},
    "forecast": {"forecast": "2,1"},
    "cache forecast": {"cache_interval": 2, "cache_forecast": 1},
    "sharing forecast": {"sharing_interval": 2, "cache_forecast": 1},
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
STEPS = "4"
Open = Callable[[str, str], Pipeline]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Pipelines of random weights, opened once: (network, process) -> pipeline."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def open_one(network: str, process: str) -> Pipeline:
        family, own = NETWORKS[network]
        name, path = debug_name(family), folder / f"{network}-{process}.safetensors"
        without_variance = process == "flow" and "learn_sigma" in models.FAMILIES[family].config.__dataclass_fields__
        made = models.create_model(name, **({"learn_sigma": False} if without_variance else {}))
        write_network(path, name, randomise(made), process={"name": process})
        settings = {"num_sampling_steps": STEPS, "cfg_scale": 2.0, "sharing_dir": folder / "sharing"}
        return Pipeline.from_pretrained(path, device="cpu", **settings, **own)

    return open_one


PLAIN: dict[tuple[str, str], torch.Tensor] = {}  # network and sampler -> latents with nothing else


def sampled(pipeline: Pipeline, **settings: Any) -> torch.Tensor:
    rows = conditioning(pipeline.network, [1, 2])
    null = None if "y" in rows else unconditional(pipeline.network, 2)  # the pipeline asks the network for its own
    return pipeline.denoise(pipeline.prepare(**settings), 0, range(2), rows, null=null)


def plain(pipeline: Pipeline, network: str, sampler: str) -> torch.Tensor:
    if (network, sampler) not in PLAIN:
        PLAIN[network, sampler] = sampled(pipeline, sampler=sampler)
    return PLAIN[network, sampler]


class Watch:
    """Counts of what ran in a cell: blocks of a routing plan, and pieces of compiled code."""

    routed = compiled = 0

    def backend(self, graph: Any, inputs: object) -> Callable[..., Any]:
        """A compiler whose code counts its calls; cells share the code."""

        def code(*args: Any) -> Any:
            self.compiled += 1
            return graph(*args)

        return code


WATCH = Watch()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    run_block = RoutingPlan.run_block

    def counted(plan: RoutingPlan, *args: Any) -> Any:
        WATCH.routed += 1
        return run_block(plan, *args)

    monkeypatch.setattr(RoutingPlan, "run_block", counted)
    monkeypatch.setattr("sampling.run.COMPILE_BACKEND", WATCH.backend)
    monkeypatch.setattr("sampling.config.can_compile", lambda device_type: True)  # this backend needs no compiler
    WATCH.routed = WATCH.compiled = 0
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
        yield WATCH


@pytest.mark.parametrize("combined", WITH)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_cell_runs_or_is_refused_in_one_line(
    opened: Open, watch: Watch, network: str, sampler: str, combined: str
) -> None:
    pipeline, settings = opened(network, SAMPLERS[sampler].process), WITH[combined]
    refusal = "evaluates the network once a step" if sampler == "edm" and "forecast" in settings else None
    if REUSE & settings.keys() and not pipeline.network.keeps_state:
        refusal = "keeps nothing to reuse"
    if refusal is None and sampler == "edm" and "cache_interval" in settings:
        refusal = "evaluates the network once a step"
    if refusal is None and combined == "calibrated sharing" and "y" not in pipeline.network.conditioning:
        refusal = "calibration needs the conditioning text, text_mask"
    if refusal is not None:
        with pytest.raises(UserError, match=refusal) as error:
            sampled(pipeline, sampler=sampler, **settings)
        assert "\n" not in str(error.value)
        return
    latents = sampled(pipeline, sampler=sampler, **settings)
    assert latents.shape == (2, *pipeline.network.sample_shape) and latents.isfinite().all()
    assert (watch.routed > 0) == (NETWORKS[network][0] == "DyDiT"), "routed networks are routed"
    assert (watch.compiled > 0) == settings.get("compile", False)
    reference = plain(pipeline, network, sampler)
    same = torch.allclose(latents, reference, rtol=0, atol=1e-5 * float(reference.abs().max()))
    assert same == (not settings.keys() - {"compile"}), "each acts"


@pytest.mark.parametrize("network", NETWORKS)
def test_results_do_not_depend_on_settings_used_before(opened: Open, network: str) -> None:
    """After all cells of a network, whose runs share one pipeline."""
    for process, sampler in {row.process: name for name, row in SAMPLERS.items()}.items():
        pipeline = opened(network, process)
        assert torch.equal(sampled(pipeline, sampler=sampler), plain(pipeline, network, sampler))
        assert all(p.dtype == torch.float32 for p in pipeline.network.parameters())


def test_what_keeps_state_is_what_the_table_says(opened: Open) -> None:
    keeps = {network for network in NETWORKS if opened(network, "gaussian").network.keeps_state}
    assert keeps >= {"DDT", "Skip-DiT", "DiT, cache depth"} and keeps.isdisjoint({"DiT", "DyDiT"})


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_cached_evaluation_is_refused_where_time_does_not_fall(opened: Open, family: str) -> None:
    with pytest.raises(UserError, match="--cache-interval 2: this") as error:
        sampled(opened(family, "flow"), sampler="heun", cache_interval=2, heun_exact=True)
    assert "\n" not in str(error.value)


def test_similarities_are_kept_with_their_settings(opened: Open, tmp_path: Path) -> None:
    pipeline, shared = opened("DDT", "flow"), {"sharing_interval": 2, "sharing": "cheapest", "sharing_dir": tmp_path}
    first = sampled(pipeline, sampler="euler", **shared)
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    pipeline._runs.clear()
    assert torch.equal(sampled(pipeline, sampler="euler", **shared), first)
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [stamp], "read, not measured again"
    sampled(pipeline, sampler="adams", **shared)
    assert len(list(tmp_path.iterdir())) == 2, "other settings have similarities of their own"


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
def test_compiled_blocks_sample_alike(opened: Open, family: str) -> None:
    assert can_compile("cpu"), "this test needs a C++ compiler"
    pipeline = opened(family, "gaussian")
    compiled, reference = sampled(pipeline, sampler="ddim", compile=True), sampled(pipeline, sampler="ddim")
    # One evaluation differs by 4e-7 of the maximum, which the steps of networks with random weights amplify
    assert torch.allclose(compiled, reference, atol=1e-3 * float(reference.abs().max()))
