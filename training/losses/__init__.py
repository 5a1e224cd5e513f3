"""Losses by name: a family with its own loss has a file here, a row in `LOSSES`, and one in `FAMILY_LOSS`."""

from __future__ import annotations

from typing import NamedTuple

from diffusion.loss import DiffusionLoss, LossSettings
from training.losses.dydit import DyDiTLoss, DyDiTLossSettings
from training.losses.joint import JointLoss, JointLossSettings
from training.losses.routed import RoutedLoss, RoutedLossSettings


class LossRow(NamedTuple):
    """One row of the registry."""

    loss: type[DiffusionLoss]
    settings: type[LossSettings]


LOSSES: dict[str, LossRow] = {
    "diffusion": LossRow(RoutedLoss, RoutedLossSettings),
    "dydit": LossRow(DyDiTLoss, DyDiTLossSettings),
    "joint": LossRow(JointLoss, JointLossSettings),
}
# "diffusion" for all others
FAMILY_LOSS = {"DyDiT": "dydit", **dict.fromkeys(("Latte", "Skip-Latte", "LatteT2V", "Skip-LatteT2V"), "joint")}


def loss_of(family: str) -> str:
    """Name of the loss that a family is trained with."""
    return FAMILY_LOSS.get(family, "diffusion")
