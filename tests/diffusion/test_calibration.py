"""Calibration of encoder sharing: recorded similarities and run, what is skipped, and the store."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import Calibration, EulerSampler, FlowMatching, ImageNoise, evaluations, guided, sample_loop
from diffusion.caching import cheapest, every_nth, reuse_cost, sharing_budget
from diffusion.calibration import run_similarity, state_similarity
from models import ModelOutput, create_model
from tests.golden_data import arrays, assert_close, table
from tests.golden_ddt import FORWARD, TRAJECTORY, assert_within, golden_ddt
from tests.networks import debug_network, randomise
from tests.toys import TextToy

META = table("ddt/manifest")["files"]["dp.safetensors"]["meta"]
SHAPE = (4, 8, 8)


def flags(evaluations: int, chosen: list[int]) -> tuple[bool, ...]:
    return tuple(i in chosen for i in range(evaluations))


# ----------------------------------------------------------------------------------------------------------------------
# The recorded run: calibration, schedule, trajectory


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


def test_calibration_and_the_shared_run_are_the_recorded_ones() -> None:
    golden, interval = arrays("ddt/samplers/ddt_a_dp_sharing"), (0.3, 1.0)
    sampler = EulerSampler(FlowMatching(), 10, shift=1.5, last_step=0.04)
    network = golden_ddt("ddt_a").for_sampling(sampler.times)
    labels = {"y": golden["template_labels"]}
    template = guided(network, labels, network.null_conditioning(len(labels["y"])))
    run = evaluations(sampler.times, 2.5, interval, always_both=True)
    similarity = run_similarity(template, sampler, golden["template_noise"], run)
    assert_within(similarity, golden["sim"], FORWARD)
    refresh = cheapest(similarity, sharing_budget(10, 3))
    assert refresh == flags(10, golden["schedule"].tolist())
    assert list(refresh) == golden["state_fresh"].bool().tolist()
    denoise = guided(network, {"y": golden["y"]}, {"y": golden["uncond"]})
    run = evaluations(sampler.times, 2.5, interval, refresh)
    visited = [golden["noise"]]
    final = sample_loop(denoise, sampler, golden["noise"], run, on_step=lambda i, x, out: visited.append(x))
    for x, reference in zip(visited, golden["traj"], strict=False):
        assert_within(x, reference, TRAJECTORY)
    assert_within(final, golden["final"], TRAJECTORY)


@pytest.mark.parametrize("interval", [1, 2, 5, 20])
def test_the_encoder_runs_as_often_as_the_budget_says(interval: int) -> None:
    network, sampler = debug_network("DDT"), EulerSampler(FlowMatching(), 20)
    calls = {"encoder": 0, "decoder": 0}
    for name, part in (("encoder", network.s_embedder), ("decoder", network.final_layer)):
        part.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    walk = np.random.default_rng(0).normal(size=(20, 6)).cumsum(axis=0)
    refresh = cheapest(walk @ walk.T / 1000, sharing_budget(20, interval))
    noise = ImageNoise(0, [0, 1], SHAPE)
    denoise = guided(network, {"y": torch.tensor([1, 2])}, network.null_conditioning(2))
    sample_loop(denoise, sampler, noise.initial(), evaluations(sampler.times, 2.0, refresh=refresh), noise_fn=noise)
    assert calls == {"encoder": 20 // interval, "decoder": 20}


def test_rows_outside_the_interval_are_conditional_alone_between_refreshes_too() -> None:
    """Rows average n (1 + f) when nothing is cached; a reuse window that reaches into the interval has both rows."""
    network, sampler = debug_network("DDT"), EulerSampler(FlowMatching(), 10)
    rows: list[int] = []
    network.final_layer.register_forward_hook(lambda _, arguments, out: rows.append(len(out)))
    noise = ImageNoise(0, [0, 1], SHAPE)
    denoise = guided(network, {"y": torch.tensor([1, 2])}, network.null_conditioning(2))
    for refresh, expected in {(True,) * 10: [2] * 4 + [4] * 6, flags(10, [0, 3, 8]): [2] * 3 + [4] * 7}.items():
        sample_loop(denoise, sampler, noise.initial(), evaluations(sampler.times, 2.0, (0.35, 1.0), refresh))
        assert rows == expected
        rows.clear()


# ----------------------------------------------------------------------------------------------------------------------
# Similarities


def test_similarity_is_the_mean_cosine_of_tokens() -> None:
    states = torch.randn(5, 3, 7, 6)
    by_hand = torch.cosine_similarity(states[:, None].double(), states[None].double(), dim=-1).mean(dim=(2, 3))
    assert_close(state_similarity(list(states)), by_hand, 1e-6)


def test_similarity_does_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    states = list(torch.randn(4, 3, 7, 6))
    whole = state_similarity(states)
    monkeypatch.setattr("diffusion.calibration._CHUNK", 100)
    assert_close(state_similarity(states), whole, 1e-12)


def calibration(network: Any = None, **changes: Any) -> Calibration:
    network = debug_network("DDT") if network is None else network
    settings = {"sampling": {"sampler": "euler"}, "scale": 2.0, "interval": (0.3, 1.0), "images": 4}
    return Calibration(**{"network": network, "sampler": EulerSampler(FlowMatching(), 6), **settings, **changes})


def test_calibration_evaluates_both_rows_everywhere_and_labels_of_all_classes() -> None:
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
    network, sampler = debug_network("DiT", learn_sigma=False), EulerSampler(FlowMatching(), 3)
    denoise = guided(network, {"y": torch.tensor([1])}, times="unit")
    with pytest.raises(ValueError, match="this network keeps no tokens between evaluations"):
        run_similarity(denoise, sampler, torch.randn(1, *SHAPE), evaluations(sampler.times))


class TokenToy(TextToy):
    """Text-conditioned, with a token per frame as state."""

    def output(self, x: Tensor, t: float | Tensor, added: Tensor) -> ModelOutput:
        out = super().output(x, t, added)
        return out._replace(state=out.sample.flatten(2))


def test_text_is_given_with_its_unconditional_rows() -> None:
    torch.manual_seed(0)
    network = TokenToy(convention="unit")
    null = {"text": torch.zeros(3, 5, 4), "text_mask": torch.ones(3, 5)}
    cond = {"text": torch.randn(3, 5, 4), "text_mask": torch.ones(3, 5)}
    settings = {"network": network, "images": 3, "images_at_a_time": 2}
    with_text = calibration(**settings, conditioning=cond, null=null)
    assert with_text.measure().shape == (6, 6)
    assert [len(seen["text"]) for _, seen in network.seen] == [4] * 6 + [2] * 6
    assert torch.equal(network.seen[0][1]["text"], torch.cat([cond["text"][:2], null["text"][:2]]))
    other = calibration(**settings, conditioning={**cond, "text": cond["text"] + 1}, null=null)
    assert with_text.settings() != other.settings()
    with pytest.raises(ValueError, match="calibration needs the conditioning text, text_mask"):
        calibration(**settings).measure()


# ----------------------------------------------------------------------------------------------------------------------
# Measurements are stored, and serve the settings they were made with, and serves the settings it was measured with


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
    small: dict[str, Any] = {"network": network, "images": 2, "sampler": EulerSampler(FlowMatching(), 3)}
    first = calibration(**small).similarity(store)
    assert torch.equal(calibration(**small, images_at_a_time=2).similarity(store), first)  # costs memory, no more
    assert len(measured) == 1
    other_weights = debug_network("DDT")
    with torch.no_grad():
        other_weights.y_embedder.embedding_table.weight[3] += 1e-3
    changes: list[dict[str, Any]] = [
        {"scale": 3.0}, {"interval": (0.2, 1.0)}, {"interval": None}, {"channels": 3}, {"seed": 1}, {"images": 3},
        {"sampler": EulerSampler(FlowMatching(), 4)}, {"sampler": EulerSampler(FlowMatching(), 3, shift=2.0)},
        {"sampling": {"sampler": "sde"}}, {"autocast": torch.bfloat16}, {"network": other_weights},
        {"network": debug_network("DDT", sample_shape=(4, 8, 12))},
    ]  # fmt: skip
    for number, change in enumerate(changes, start=2):
        calibration(**{**small, **change}).similarity(store)
        assert len(measured) == number, change
    assert torch.equal(calibration(**small).similarity(store), first)
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
