"""Joint training of clips and images with texts against the recorded step of the official code, and its draws."""

import pytest
import torch
from torch import Tensor

from diffusion import create_diffusion
from diffusion.loss import Batch, Draws
from tests.golden_data import assert_close, assert_close_elementwise
from tests.golden_latte_t2v import golden, recorded_network, total_norm, without_frame_positions
from tests.networks import debug_network, inputs
from tests.runs import CAPTIONED_DIGITS, CPU, open_setup
from training.losses import JointLoss
from training.losses.joint import IMAGES_DROPPED, JointLossSettings
from training.trainer import batches

GOLDEN = golden()
IMAGES = 2


def recorded_step() -> tuple[Batch, Draws]:
    """Batch and draws of the recorded step; its texts are those of a clip, then those of its images."""
    text, rows = GOLDEN["train.encoder_hidden_states"], torch.arange(2)
    return Batch(GOLDEN["train.x_start"], {"text": text}, rows), Draws(GOLDEN["train.t"], GOLDEN["train.noise"])


def loss_of(network: torch.nn.Module, images: int = IMAGES, dropout: float = 0.0) -> JointLoss:
    settings = JointLossSettings(joint_images=images)
    return JointLoss(network, create_diffusion(), seed=1, dropout_prob=dropout, settings=settings)  # type: ignore[arg-type]


def test_losses_gradients_and_norms_equal_the_recorded_ones() -> None:
    network = recorded_network().train()
    losses = loss_of(network)(*recorded_step(), 0, {})
    for name in ("loss", "mse", "vb"):
        assert_close_elementwise(losses[name].detach(), GOLDEN[f"train.{name}"], rtol=1e-5)
    losses["loss"].mean().backward()
    recorded = {name.removeprefix("train.grad."): v for name, v in GOLDEN.items() if name.startswith("train.grad.")}
    assert len(recorded) == 11
    for name, value in recorded.items():
        gradient = network.get_parameter(name).grad
        assert gradient is not None
        assert_close(gradient, value)
    assert_close(total_norm(network, "skip_"), GOLDEN["train.grad_norm_stage1"])
    assert_close(total_norm(network), GOLDEN["train.grad_norm_full"])


@torch.no_grad()
def test_frames_have_positions_in_training_which_the_official_code_forgets_without_checkpointing() -> None:
    network, defective = recorded_network().train(), GOLDEN["train.out_without_checkpointing"]
    batch, draws = recorded_step()  # of a clip without noise
    right = loss_of(network).evaluate(batch.x_start, batch, draws).sample
    assert not torch.allclose(right[:, :3], defective[:, :3], rtol=0.01)
    assert_close(right[:, 3:], defective[:, 3:])
    assert_close(loss_of(without_frame_positions(network)).evaluate(batch.x_start, batch, draws).sample, defective)


@torch.no_grad()
def test_texts_of_dropped_clips_and_images_are_the_empty_one_with_its_mask() -> None:
    network = debug_network("Skip-LatteT2V")
    x, _, own = inputs(network)
    null = {"text": torch.randn(2, 5, 12), "text_mask": torch.tensor([[1.0, 0, 0, 0, 0]] * 2)}
    text, mask = torch.randn(2, 3, 5, 12), torch.ones(2, 3, 5)
    text[:, 0], mask[:, 0] = own["text"], own["text_mask"]
    joint = torch.cat([x, x[:, :2]], 1)

    def losses(text: Tensor, mask: Tensor, dropped: list[bool], images: list[bool]) -> Tensor:
        extra = {IMAGES_DROPPED: torch.tensor(images)}
        draws = Draws(torch.tensor([300, 600]), torch.ones_like(joint), torch.tensor([dropped]), extra)
        batch = Batch(joint, {"text": text, "text_mask": mask}, torch.arange(2), null=null)
        return loss_of(network)(batch, draws, 0, {})["loss"]

    def replaced(rows: slice, places: slice) -> tuple[Tensor, Tensor]:
        other, kept = text.clone(), mask.clone()
        other[rows, places], kept[rows, places] = null["text"][0], null["text_mask"][0]
        other[rows, places] = null["text"][rows, None]
        return other, kept

    none = [False, False]
    first, clip, images = slice(0, 1), slice(0, 1), slice(1, 3)
    assert torch.equal(losses(text, mask, [True, False], none), losses(*replaced(first, clip), none, none))
    assert torch.equal(losses(text, mask, none, [True, False]), losses(*replaced(first, images), none, none))
    assert not torch.equal(losses(text, mask, none, [True, False]), losses(text, mask, none, none))


@pytest.mark.parametrize("images", [0, 3])
def test_captioned_digits_are_trained_on_with_images_behind_them(images: int) -> None:
    argv = ["--model", "LatteT2V-debug/2", "--joint-images", images, "--global-batch-size", 4]
    setup = open_setup(*CAPTIONED_DIGITS, *argv, "--max-steps", 1, "--caption-dropout-prob", 0.5)
    ((_, ((batch, draws),)),) = batches(setup, CPU, 0)
    assert batch.x_start.shape == (4, 4 + images, 1, 16, 16) and setup.network.sample_shape == (4, 1, 16, 16)
    assert batch.conditioning["text"].shape == (4, *([1 + images] if images else []), 8, 32)
    seen: dict[str, Tensor] = {}
    setup.network.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    assert setup.loss(batch, draws, 0, {})["loss"].shape == (4,)
    assert seen["text"].shape == (4, 8, 32) and ("image_text" in seen) == (images > 0)
    if images:
        assert seen["image_text"].shape == (4, images, 8, 32) and seen["image_text_mask"].shape == (4, images, 8)
