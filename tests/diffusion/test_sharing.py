"""Encoder sharing: schedules against the recorded and against all others, similarities, what is really skipped."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion.refresh import cheapest, every_nth, reuse_cost, sharing_budget
from diffusion.sharing import Calibration, run_similarity, state_similarity
from torch import Tensor

from diffusion import FlowMatching, ImageNoise, guided, sample_loop
from models import create_model
from tests.golden_data import arrays, assert_close, table
from tests.golden_ddt import FORWARD, TRAJECTORY, assert_within, golden_ddt
from tests.networks import debug_network, randomise

FLOW = FlowMatching()
META = table("ddt/manifest")["files"]["dp.safetensors"]["meta"]
SHAPE = (4, 8, 8)


def flags(evaluations: int, chosen: list[int]) -> tuple[bool, ...]:
    return tuple(i in chosen for i in range(evaluations))


# ----------------------------------------------------------------------------------------------------------------------
# The cheapest schedule


@pytest.mark.parametrize("name", META)
def test_schedules_from_recorded_states_are_the_recorded_ones(name: str) -> None:
    golden, meta = arrays("ddt/dp"), META[name]
    similarity = state_similarity(list(golden[f"{name}.states"]))
    assert_within(similarity, golden[f"{name}.sim"], FORWARD)
    budget = sharing_budget(meta["num_steps"], meta["refresh_rate"])
    assert budget == meta["budget"]
    for matrix in (similarity, golden[f"{name}.sim"]):
        refresh = cheapest(matrix, budget)
        assert refresh == flags(meta["num_steps"], golden[f"{name}.schedule"].tolist())
        assert reuse_cost(matrix, refresh) == pytest.approx(meta["dp_cost"], abs=1e-4)
        uniform = every_nth(meta["num_steps"], meta["refresh_rate"])
        assert uniform == flags(meta["num_steps"], meta["uniform_schedule"])
        assert reuse_cost(matrix, uniform) == pytest.approx(meta["uniform_cost"], abs=1e-4)


def random_similarity(rng: np.random.Generator, count: int) -> Any:
    """Cosines of a random walk's places, as those of a trajectory's states."""
    walk = rng.normal(size=(count, 6)).cumsum(axis=0) + 3
    walk /= np.linalg.norm(walk, axis=1, keepdims=True)
    return walk @ walk.T


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_of_the_same_budget_is_cheaper(seed: int) -> None:
    """Against every schedule there is."""
    similarity = random_similarity(np.random.default_rng(seed), 9)
    for budget in range(1, 10):
        refresh = cheapest(similarity, budget)
        assert sum(refresh) == budget and refresh[0] and len(refresh) == 9
        others = [flags(9, [0, *rest]) for rest in combinations(range(1, 9), budget - 1)]
        assert reuse_cost(similarity, refresh) == pytest.approx(min(reuse_cost(similarity, o) for o in others))
        assert refresh in others


def test_a_long_schedule_is_cheaper_than_uniform_and_random_ones() -> None:
    rng = np.random.default_rng(0)
    similarity = random_similarity(rng, 250)
    for rate in (2, 5, 10, 25):
        refresh = cheapest(similarity, sharing_budget(250, rate))
        assert reuse_cost(similarity, refresh) <= reuse_cost(similarity, every_nth(250, rate))
        for _ in range(20):
            chosen = rng.choice(np.arange(1, 250), sum(refresh) - 1, replace=False).tolist()
            assert reuse_cost(similarity, refresh) <= reuse_cost(similarity, flags(250, [0, *chosen]))


def test_the_cost_counts_each_evaluation_once() -> None:
    similarity = 1 - np.arange(16.0).reshape(4, 4)  # error[i, j] = 4 i + j
    assert reuse_cost(similarity, (True, False, True, False)) == 0 + 4 + 10 + 14
    assert reuse_cost(similarity, (True,) * 4) == 0 + 5 + 10 + 15


def test_of_equal_schedules_the_first_is_taken() -> None:
    assert cheapest(np.ones((5, 5)), 2) == (True, True, False, False, False)


@pytest.mark.parametrize(("evaluations", "rate", "budget"), [(250, 1, 250), (250, 5, 50), (10, 3, 3), (7, 7, 1)])
def test_the_budget_is_rounded_down(evaluations: int, rate: int, budget: int) -> None:
    assert sharing_budget(evaluations, rate) == budget


@pytest.mark.parametrize("rate", [0, -1, 11])
def test_a_rate_that_leaves_no_refresh_is_refused(rate: int) -> None:
    with pytest.raises(
        ValueError, match=rf"the refresh rate must lie in 1\.\.10, the number of evaluations, not {rate}"
    ):
        sharing_budget(10, rate)


def test_budgets_and_matrices_that_do_not_fit_are_refused() -> None:
    for budget in (0, 6):
        with pytest.raises(ValueError, match=f"{budget} refreshes do not fit 5 evaluations"):
            cheapest(np.ones((5, 5)), budget)
    for matrix in (np.ones((5, 4)), np.full((5, 5), np.nan)):
        with pytest.raises(ValueError, match="similarities must be finite and of every two evaluations"):
            cheapest(matrix, 2)


# ----------------------------------------------------------------------------------------------------------------------
# The recorded run: calibration, schedule, trajectory


def test_calibration_and_the_shared_run_are_the_recorded_ones() -> None:
    golden = arrays("ddt/samplers/ddt_a_dp_sharing")
    network, sampler, interval = golden_ddt("ddt_a"), FLOW.euler(10, shift=1.5, last_step=0.04), (0.3, 1.0)
    network = network.for_sampling(sampler.times)
    null, times = network.null_class, sampler.times
    template = guided(network, golden["template_labels"], null, 2.5, None, interval, times, always_both=True)
    similarity = run_similarity(template, sampler, golden["template_noise"], torch.randn_like)
    assert_within(similarity, golden["sim"], FORWARD)
    refresh = cheapest(similarity, sharing_budget(10, 3))
    assert refresh == flags(10, golden["schedule"].tolist())
    assert list(refresh) == golden["state_fresh"].bool().tolist()
    denoise = guided(network, golden["y"], golden["uncond"], 2.5, None, interval, times, refresh)
    visited = [golden["noise"]]
    final = sample_loop(denoise, sampler, golden["noise"], refresh, on_step=lambda i, x, out: visited.append(x))
    for x, reference in zip(visited, golden["traj"], strict=False):
        assert_within(x, reference, TRAJECTORY)
    assert_within(final, golden["final"], TRAJECTORY)


@pytest.mark.parametrize("rate", [1, 2, 5, 20])
def test_the_encoder_runs_as_often_as_the_budget_says(rate: int) -> None:
    network, sampler, shape = debug_network("DDT"), FLOW.euler(20), SHAPE
    calls = {"encoder": 0, "decoder": 0}
    for name, part in (("encoder", network.s_embedder), ("decoder", network.final_layer)):
        part.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    refresh = cheapest(random_similarity(np.random.default_rng(0), 20), sharing_budget(20, rate))
    noise = ImageNoise(0, [0, 1], shape)
    sample_loop(guided(network, torch.tensor([1, 2]), 10, 2.0), sampler, noise.initial(), refresh, noise)
    assert calls == {"encoder": 20 // rate, "decoder": 20}


def test_rows_outside_the_interval_are_conditional_alone_between_refreshes_too() -> None:
    """Rows average n (1 + f) when nothing is cached; a reuse window that reaches into the interval runs both halves."""
    network, sampler = debug_network("DDT"), FLOW.euler(10)
    rows: list[int] = []
    network.final_layer.register_forward_hook(lambda _, arguments, out: rows.append(len(out)))
    noise = ImageNoise(0, [0, 1], SHAPE)
    runs = {(True,) * 10: [2] * 4 + [4] * 6, flags(10, [0, 3, 8]): [2] * 3 + [4] * 7}
    for refresh, expected in runs.items():
        denoise = guided(network, torch.tensor([1, 2]), 10, 2.0, None, (0.35, 1.0), sampler.times, refresh)
        sample_loop(denoise, sampler, noise.initial(), refresh, noise)
        assert rows == expected
        rows.clear()


@pytest.mark.parametrize("interval", [(0.5, 0.5), (1.0, 0.3), (float("nan"), 1.0)])
def test_an_empty_interval_is_refused_before_anything_runs(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=rf"the guidance interval \({interval[0]:g}, {interval[1]:g}\) is empty"):
        guided(debug_network("DDT"), torch.tensor([1]), 10, 2.0, None, interval, FLOW.euler(4).times)


# ----------------------------------------------------------------------------------------------------------------------
# Similarities


def test_similarity_is_the_mean_cosine_of_tokens() -> None:
    states = torch.randn(5, 3, 7, 6)
    by_hand = torch.cosine_similarity(states[:, None].double(), states[None].double(), dim=-1).mean(dim=(2, 3))
    assert_close(state_similarity(list(states)), by_hand, 1e-6)


def test_similarity_does_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    states = list(torch.randn(4, 3, 7, 6))
    whole = state_similarity(states)
    monkeypatch.setattr("diffusion.sharing._CHUNK", 100)
    assert_close(state_similarity(states), whole, 1e-12)


def calibration(network: Any = None, **changes: Any) -> Calibration:
    network = debug_network("DDT") if network is None else network
    settings = {"sampling": {"sampler": "euler"}, "scale": 2.0, "interval": (0.3, 1.0), "shape": SHAPE, "images": 4}
    return Calibration(**{"network": network, "sampler": FLOW.euler(6), **settings, **changes})


def test_calibration_sees_both_halves_at_every_evaluation_and_all_classes() -> None:
    network = randomise(create_model("DDT-debug/2", num_classes=3))  # not a thousand, not ten
    rows: list[int] = []
    labels: list[Tensor] = []
    network.final_layer.register_forward_hook(lambda _, arguments, out: rows.append(len(out)))
    network.y_embedder.register_forward_hook(lambda _, arguments, out: labels.append(arguments[0]))
    similarity = calibration(network, images=12, images_at_a_time=4).measure()
    assert rows == [8] * 6 * 3
    assert {int(y) for row in labels for y in row} == {0, 1, 2, 3}
    assert similarity.shape == (6, 6) and similarity.dtype == torch.float64
    assert_close(similarity, similarity.T, 1e-12)
    assert_close(similarity.diagonal(), torch.ones(6, dtype=torch.float64), 1e-6)
    assert 0 < similarity.min() < 0.9999


def test_calibration_does_not_depend_on_how_its_images_are_cut() -> None:
    network = debug_network("DDT")
    one, three = (calibration(network, images_at_a_time=n).measure() for n in (1, 3))
    assert_close(one, three, 1e-6)


def test_calibration_without_guidance_runs_the_conditional_rows() -> None:
    network = debug_network("DDT", class_dropout_prob=0.0)  # it could not be guided
    rows: list[int] = []
    network.final_layer.register_forward_hook(lambda _, arguments, out: rows.append(len(out)))
    calibration(network, scale=1.0, interval=None, images=2).measure()
    assert rows == [1] * 12


def test_a_network_without_state_cannot_share_it() -> None:
    with pytest.raises(ValueError, match="this network keeps nothing between evaluations that could be shared"):
        calibration(debug_network("DDT", encoder_depth=None)).measure()
    network = debug_network("DiT", learn_sigma=False)
    denoise = guided(network, torch.tensor([1]), None, 1.0)
    with pytest.raises(ValueError, match="this network keeps no tokens between evaluations"):
        run_similarity(denoise, FLOW.euler(3, convention="index"), torch.randn(1, *SHAPE), torch.randn_like)


# ----------------------------------------------------------------------------------------------------------------------
# What was measured is kept, and serves the settings it was measured with


def count_measurements(monkeypatch: pytest.MonkeyPatch) -> list[Calibration]:
    measured: list[Calibration] = []
    original = Calibration.measure

    def measure(self: Calibration) -> Tensor:
        measured.append(self)
        return original(self)

    monkeypatch.setattr(Calibration, "measure", measure)
    return measured


def test_similarities_are_measured_once_for_each_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, network, store = count_measurements(monkeypatch), debug_network("DDT"), tmp_path / "sharing"
    first = calibration(network).similarity(store)
    assert torch.equal(calibration(network, images_at_a_time=4).similarity(store), first)  # costs memory, no more
    assert len(measured) == 1
    other_weights = debug_network("DDT")
    with torch.no_grad():
        other_weights.y_embedder.embedding_table.weight[3] += 1e-3
    changes: list[dict[str, Any]] = [
        {"scale": 3.0}, {"interval": (0.2, 1.0)}, {"interval": None}, {"channels": 3}, {"seed": 1}, {"images": 5},
        {"sampler": FLOW.euler(7)}, {"sampler": FLOW.euler(6, shift=2.0)}, {"sampling": {"sampler": "sde"}},
        {"shape": (4, 8, 12)}, {"autocast": torch.bfloat16}, {"network": other_weights},
    ]  # fmt: skip
    for number, change in enumerate(changes, start=2):
        calibration(**{"network": network, **change}).similarity(store)
        assert len(measured) == number, change
    assert torch.equal(calibration(network).similarity(store), first)
    assert len(measured) == 1 + len(changes) == len(list(store.iterdir()))


def test_a_damaged_file_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, network = count_measurements(monkeypatch), debug_network("DDT")
    first = calibration(network).similarity(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    assert torch.equal(calibration(network).similarity(tmp_path), first)
    assert torch.equal(calibration(network).similarity(tmp_path), first)
    assert len(measured) == 2


def test_without_a_store_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calibration().similarity()
    assert list(tmp_path.iterdir()) == []
