"""What every network of the family promises to the code that trains it and samples from it.

The promise is small on purpose. A network turns (x, t, y) into a `ModelOutput`; whatever it could reuse at a later
evaluation it hands out as `state` and accepts back. *What* the state is stays the network's business; *when* it is
recomputed is the sampler's. A new family subclasses `Network`, writes its forward out, and adds one registry row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TimeConvention = Literal["index", "unit"]
R = TypeVar("R")


class Routing(NamedTuple):
    """Which parts of the network were active, as float32 masks of exactly 0 and 1 (DyDiT)."""

    heads: Tensor  # (N, L, H)
    mlp: Tensor  # (N, L, H) groups of channels
    tokens: Tensor  # (N, L, T) those that go through the MLP


class ModelOutput(NamedTuple):
    """Result of one network evaluation.

    Attributes:
        sample: (N, C_out, H, W) raw prediction: epsilon (and variance values behind it) or velocity.
        state: opaque to everyone but its maker; hand it back at a later evaluation to reuse it. None: nothing to reuse.
        routing: DyDiT's masks, None elsewhere.
        features: (N, T, D) tokens after the block that `features_at` asked for, else None.
    """

    sample: Tensor
    state: Any = None
    routing: Routing | None = None
    features: Tensor | None = None


class Pass(NamedTuple):
    """One forward pass of a training step.

    Attributes:
        options: keyword arguments of the network's forward.
        prefix: in front of the names of its losses.
        noisy_gates: whether the forward takes `gate_noise`, logistic noise (N, *network.gate_noise_shape).
    """

    options: Mapping[str, Any] = MappingProxyType({})
    prefix: str = ""
    noisy_gates: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What a family's training consists of beyond one plain forward pass and the loss of the process: here, nothing.

    A family that needs more subclasses this (`Network.recipe_class`). Its fields are the settings that train.py offers
    as flags of the same names.

    Attributes:
        statistic_name: what `statistic` is called in logs; None: there is no penalty.
    """

    statistic_name: ClassVar[str | None] = None

    @property
    def time_strata(self) -> int:
        """Equal parts of the index scale, n of them: row i of the global batch takes its time from part i mod n."""
        return 1

    def passes(self, step: int) -> tuple[Pass, ...]:
        """The forward passes of a step; each drops labels of its own, and their losses add up."""
        return (Pass(),)

    def statistic(self, network: Network, output: ModelOutput) -> Tensor:
        """A number for each row, (N,) float32, from the first pass."""
        raise TypeError(f"{type(self).__name__} has no penalty")

    def penalty(self, mean: Tensor, step: int) -> Tensor:
        """What is added to the loss for the statistic's mean over the GLOBAL batch: a scalar for a scalar."""
        raise TypeError(f"{type(self).__name__} has no penalty")

    def doubts(self, steps: int) -> list[str]:
        """What a user should know who trains for so many steps, a line each."""
        return []

    def start(self, network: Network, weights: Mapping[str, Tensor]) -> list[str]:
        """Prepares a network that was filled from a file for the first step, in place; says what it did.

        Args:
            network: with everything that the file lacked drawn anew.
            weights: what the file holds.

        Raises:
            ValueError: if a setting cannot be followed with these weights.
        """
        return []


class Network(nn.Module):
    """Base of every family: the attributes that processes, guidance and the trainer read.

    Attributes:
        in_channels: channels of x.
        out_channels: channels of `ModelOutput.sample`.
        input_size: side of the square x that the positions were made for.
        num_classes: number of real classes K; labels are 0..K-1.
        class_dropout_prob: share of labels replaced by the null class in training; 0 means there is no null class.
        config: the frozen dataclass (`config_class`) that fixes all parameters; it has at least the fields input_size,
            in_channels, num_classes and class_dropout_prob, by which the scripts fit a network to its data.
        time_convention: "index" (0..999, 0 = clean) or "unit" (0 = noise, 1 = data): the units of t.
        recipe_class: what training asks for beyond one plain forward pass.
        gate_noise_shape: of the noise that one row's gates take in training; None without gates.
        blocks: the transformer blocks, in order; what is compiled and recomputed piece by piece.
        grad_checkpointing: recompute each block's activations in the backward pass instead of keeping them.
        keeps_state: whether evaluations hand out state that a later one can reuse.
        decides_by_input: whether what an evaluation computes depends on its input, so that it cannot be recorded.
        added_parts: names of the modules that a family adds to the one it grew from. Weights that have none of them
            can start the family's training (`models.transfer`).
    """

    time_convention: ClassVar[TimeConvention] = "index"
    config_class: ClassVar[type[Any]]
    recipe_class: ClassVar[type[TrainingRecipe]] = TrainingRecipe
    plain_recipe: ClassVar[TrainingRecipe] = TrainingRecipe()
    added_parts: ClassVar[tuple[str, ...]] = ()
    decides_by_input: ClassVar[bool] = False

    config: Any
    blocks: nn.ModuleList
    grad_checkpointing: bool = False
    keeps_state: bool = False
    in_channels: int
    out_channels: int
    input_size: int
    num_classes: int
    class_dropout_prob: float
    gate_noise_shape: tuple[int, ...] | None = None

    @classmethod
    def settings_from(cls, weights: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
        """Fields of the config that the weights in a file decide.

        Args:
            weights: parameter name -> tensor.
            config: of the network that they are meant for, as far as it is known.

        Raises:
            ValueError: if they are a network's of the family, but cannot be this one's.
        """
        return {}

    @property
    def null_class(self) -> int:
        """Label of the unconditional row: `num_classes`, whatever that number is.

        Raises:
            ValueError: if the network was built without label dropout and so has no such row.
        """
        if self.class_dropout_prob <= 0:
            raise ValueError("class_dropout_prob is 0: this network has no null class and cannot be guided")
        return self.num_classes

    def run_block(self, block: Callable[..., R], *args: Tensor | None) -> R:
        """Evaluates one block, keeping its activations for the backward pass or not."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every block on its own: the same code each time, so that one compilation serves all."""
        for block in self.blocks:
            block.compile(dynamic=False, backend=backend)

    def for_sampling(self, times: Iterable[float]) -> Self:
        """Prepares the network for the evaluations at `times`; a snapshot, to be taken again after weights change.

        Args:
            times: host numbers in the network's own units, one per evaluation (repeats allowed).

        Returns:
            A network with the same outputs at these times; the network itself where nothing can be prepared.
        """
        return self

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of one forward of one image, by part (1 MAC = 1); linear maps and attention products only."""
        raise TypeError(f"{type(self).__name__} does not state its cost")

    def multiply_adds_with_state(self) -> dict[str, int]:
        """The same for an evaluation that is handed state; where there is nothing to reuse, nothing is saved."""
        return self.multiply_adds()

    def executed_multiply_adds(self, refresh: Iterable[bool]) -> int:
        """Multiply-adds of a run of evaluations for one image.

        Args:
            refresh: one flag per evaluation: whether it starts from nothing, or is handed state.
        """
        cost = {True: sum(self.multiply_adds().values()), False: sum(self.multiply_adds_with_state().values())}
        return sum(cost[bool(fresh)] for fresh in refresh)

    def multiply_adds_of(self, output: ModelOutput) -> dict[str, float]:
        """The same for the evaluation behind an output, mean over its rows: less where the input decides what runs."""
        return {part: float(count) for part, count in self.multiply_adds().items()}

    def layer_norm_elements(self) -> int:
        """Elements that pass through layer norms in one forward of one image; some publications count them."""
        raise TypeError(f"{type(self).__name__} does not state its cost")
