"""The state that a step of training changes, and the document of its checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from data.dataset import digest_of, text_of
from runtime.restoring import fill, part_of
from runtime.settings import Values
from runtime.sharding import leaf, like, local
from training.optimization import EMA
from training.resume import ResumeState
from training.run import DRAWS
from training.setup import Setup

PROJECTOR = "projector"  # the alignment's group in checkpoints


def checkpoint_meta(setup: Setup, step: int, updates: int | None = None, averaged: int | None = None) -> Values:
    """The JSON document of a checkpoint: all settings, and what sampling has to know.

    Args:
        setup: Setup of the run.
        step: Number of steps taken.
        updates: Number of those that were not dropped; None for all.
        averaged: Number of those that the average holds; None for all.
    """
    sections = setup.document()
    owners = {name: sections.pop(name) for name in ("model", "process", "loss", "optimizer")}
    decay = setup.config.optimization.ema_decay
    behind = {} if averaged in (None, step if updates is None else updates) else {"updates": averaged}
    return {
        "format": 2,
        "step": step,
        **({} if updates in (None, step) else {"updates": updates}),
        **owners,
        "encoder": {"name": setup.config.data.vae},
        **({} if (text := text_of(setup.dataset)) is None else {"text": text}),
        "autoencoder": setup.encoder.describe_latents(),
        "data": {
            "image_shape": list(setup.loss.settings.network_shape(tuple(setup.dataset.image_shape))),
            "classes": list(setup.dataset.classes),
            "images": len(setup.dataset),
            "digest": digest_of(setup.dataset),
        },
        "averages": {f"ema-{decay:g}": {"decay": decay, **behind}},
        "train": sections,
        "draws": DRAWS,
        "origin": None if setup.origin is None else setup.origin.as_json(),
        **setup.digests,
    }


class TrainingState:
    """All that a step changes: weights, their average, the optimizer, the count of steps.

    Attributes:
        step: Number of steps taken.
        updates: Number of those that were not dropped, which the learning rate follows.
    """

    def __init__(self, setup: Setup) -> None:
        optimization, self.network, self._parallel = setup.config.optimization, setup.network, setup.parallel
        average = self._parallel.place(setup.loss)  # first: the optimizer takes parameters as they are then
        self.step = self.updates = 0
        self._parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.alignment = setup.loss.alignment
        if self.alignment is not None:
            self._parameters |= {f"{PROJECTOR}.{name}": p for name, p in self.alignment.named_parameters()}
        self.trained = {name: leaf(parameter) for name, parameter in self._parameters.items()}
        self.optimizer = setup.optimizer.make(self.trained.values(), optimization.lr)
        self.ema = EMA(
            self.network,
            optimization.ema_decay,
            ramp=optimization.ema_ramp,
            every=optimization.ema_every,
            average=average,
        )

    def collect_gradients(self) -> Tensor:
        """Hand the gradients of a step to the tensors that the optimizer steps on; returns their norm, a scalar."""
        parts, whole = list[Tensor](), list[Tensor]()
        for name, trained in self.trained.items():
            parameter = self._parameters[name]
            if trained is not parameter and parameter.grad is not None:
                trained.grad, parameter.grad = local(parameter.grad), None
            if trained.grad is not None:
                (whole if trained is parameter else parts).append(trained.grad)
        self._parallel.average(whole)
        return self._parallel.norm(parts, whole)

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The state as named tensors, divided ones as such."""
        moments = {
            f"{name}/{key}": like(value, self._parameters[name])
            for name, trained in self.trained.items()
            for key, value in self.optimizer.state[trained].items()
        }
        own = {"model": self.network.state_dict(), self.ema.name: self.ema.network.state_dict(), "optimizer": moments}
        return own if self.alignment is None else {**own, PROJECTOR: self.alignment.state_dict()}

    def restore(self, saved: ResumeState) -> None:
        """Continue where a checkpoint was saved.

        Raises:
            UserError: If it belongs to another network.
        """
        modules = {"model": self.network, self.ema.name: self.ema.network, PROJECTOR: self.alignment}
        for name, module in modules.items():
            if module is not None:
                fill(module, saved.groups.get(name, {}), f"--resume {saved.folder} as {name}")
        moments = saved.groups.get("optimizer", {})  # absent if the optimizer keeps no state
        for trained in self.trained.values():
            self.optimizer.state[trained] = {}
        for name, stored in moments.items():
            parameter, key = name.rsplit("/", 1)
            if parameter in self.trained:
                target: Tensor = self._parameters[parameter]
                if stored.shape != target.shape:  # such as the count of steps
                    target = torch.empty(stored.shape, dtype=stored.dtype, device=target.device)
                self.optimizer.state[self.trained[parameter]][key] = part_of(stored, target)
        self.step = saved.meta["step"]
        self.updates = self.ema.updates = saved.meta.get("updates", self.step)
        self.ema.averaged = saved.meta.get("averages", {}).get(self.ema.name, {}).get("updates", self.updates)
