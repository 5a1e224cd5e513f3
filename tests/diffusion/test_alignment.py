"""Alignment against the recorded losses and gradients of the official trainers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion import Batch, DiffusionLoss, Draws, FlowMatching
from diffusion.alignment import Alignment, resample_tokens
from tests.golden_data import arrays, assert_close, table
from tests.golden_ddt import FORWARD, LOSS, assert_within, golden_ddt
from tests.networks import debug_network

FIXTURES = ("ddt_a_repa", "ddt_a_repa_resize_down", "ddt_a_repa_resize_up", "idit_repa")
META = table("ddt/manifest")["files"]


class Replay:
    """Hands out recorded tokens, whatever the images, and remembers these."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.width = tokens, tokens.shape[-1]
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor, /) -> Tensor:
        self.seen.append(images)
        return self.tokens


def recorded(name: str) -> tuple[dict[str, Tensor], DiffusionLoss, Batch, Draws]:
    """A fixture with the loss, batch and draws that it was recorded from."""
    golden, meta = arrays(f"ddt/train/{name}"), META[f"train/{name}.safetensors"]["meta"]
    network = golden_ddt(name.split("_repa")[0]).train()
    hidden, features = golden["proj.0.0.weight"].shape
    alignment = Alignment(
        Replay(golden["dst"]),
        features,
        block=meta["align_layer"],
        weight=meta["feat_loss_weight"],
        hidden=hidden,
    )
    weights = {key.removeprefix("proj.0."): value for key, value in golden.items() if key.startswith("proj.")}
    alignment.projector.load_state_dict(weights)
    images = golden.get("raw", torch.rand(4, 3, 64, 64))
    batch = Batch(golden["x"], {"y": golden["y"]}, torch.arange(4), images)
    draws = Draws(golden["t"], golden["noise"], golden["drop_mask"][None])
    return golden, DiffusionLoss(network, FlowMatching(), alignment=alignment), batch, draws


def norm(module: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", FIXTURES)
def test_losses_and_gradients_are_the_recorded_ones(name: str) -> None:
    golden, loss, batch, draws = recorded(name)
    losses = loss(batch, draws, 0, {})
    assert_within(losses["mse"].mean(), golden["fm_loss"], LOSS)
    assert_within(losses["align"].mean(), golden["cos_loss"], LOSS)
    assert_within(losses["loss"].mean(), golden["loss"], LOSS)
    losses["loss"].mean().backward()
    assert loss.alignment is not None
    assert_within(norm(loss.network), golden["grad_norm_denoiser"], LOSS)
    assert_within(norm(loss.alignment), golden["grad_norm_proj"], LOSS)


@torch.no_grad()
@pytest.mark.parametrize("name", FIXTURES)
def test_projected_features_are_the_recorded_ones(name: str) -> None:
    golden, loss, batch, draws = recorded(name)
    projected: list[Tensor] = []
    assert loss.alignment is not None
    loss.alignment.projector.register_forward_hook(lambda _, arguments, out: projected.append(out))
    loss(batch, draws, 0, {})
    assert_within(projected[0], golden["src_proj"], FORWARD)


def test_losses_are_per_row_and_do_not_depend_on_how_rows_are_cut() -> None:
    golden, loss, batch, draws = recorded("ddt_a_repa")
    whole = loss(batch, draws, 0, {})
    assert {name: value.shape for name, value in whole.items()} == dict.fromkeys(("loss", "mse", "align"), (4,))
    encoder = loss.alignment._encode
    for row in range(4):
        encoder.tokens = golden["dst"][row : row + 1]
        cut = slice(row, row + 1)
        one = Batch(batch.x_start[cut], {"y": batch.conditioning["y"][cut]}, batch.index[cut], batch.image[cut])
        for name, value in loss(one, draws.rows(row, row + 1), 0, {}).items():
            torch.testing.assert_close(value[0], whole[name][row], rtol=1e-5, atol=1e-6)


def test_the_encoder_sees_the_raw_images_and_is_no_part_of_the_module() -> None:
    _, loss, batch, draws = recorded("ddt_a_repa")
    loss(batch, draws, 0, {})
    assert loss.alignment is not None
    (seen,) = loss.alignment._encode.seen
    assert seen is batch.image
    assert all(name.startswith("projector.") for name in loss.alignment.state_dict())


def test_without_images_there_is_nothing_to_align_with() -> None:
    _, loss, batch, draws = recorded("ddt_a_repa")
    with pytest.raises(ValueError, match="alignment needs the network's features and the raw images of the batch"):
        loss(Batch(batch.x_start, batch.conditioning, batch.index), draws, 0, {})


@torch.no_grad()
def test_other_families_can_be_aligned_too() -> None:
    network = debug_network("DiT", learn_sigma=False)
    alignment = Alignment(Replay(torch.randn(2, 4, 12)), 64, block=2)
    y, images = {"y": torch.tensor([1, 2])}, torch.rand(2, 3, 16, 16)
    loss = DiffusionLoss(network, FlowMatching(), alignment=alignment)
    losses = loss(Batch(torch.randn(2, 4, 8, 8), y, torch.arange(2), images), loss.draw(0, 2), 0, {})
    assert_close(losses["loss"], losses["mse"] + 0.5 * losses["align"], 1e-6)


def test_in_half_precision_the_cosine_is_taken_in_float32() -> None:
    golden, loss, batch, draws = recorded("ddt_a_repa")
    loss.autocast = torch.bfloat16
    losses = loss(batch, draws, 0, {})
    assert losses["align"].dtype == torch.float32
    assert losses["align"].mean().item() == pytest.approx(golden["cos_loss"].item(), abs=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Grids


def test_a_coarser_grid_is_the_mean_of_its_tokens() -> None:
    tokens = torch.randn(2, 16, 3)
    means = tokens.view(2, 2, 2, 2, 2, 3).mean(dim=(2, 4)).view(2, 4, 3)
    assert_close(resample_tokens(tokens, 4), means, 1e-6)
    assert resample_tokens(tokens, 16) is tokens


@pytest.mark.parametrize(("have", "want"), [(15, 16), (16, 15)])
def test_grids_that_are_not_square_are_refused(have: int, want: int) -> None:
    with pytest.raises(
        ValueError, match=f"{have} target tokens cannot be resampled to {want}: both grids must be square"
    ):
        resample_tokens(torch.randn(1, have, 3), want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, "the block must be at least 1, not 0"),
        ({"hidden": 0}, "the hidden width must be at least 1, not 0"),
        ({"weight": 0.0}, "the weight must be positive and finite, not 0.0"),
        ({"weight": float("inf")}, "the weight must be positive and finite, not inf"),
    ],
)
def test_settings_without_a_meaning_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Alignment(Replay(torch.randn(1, 4, 3)), 8, **settings)
