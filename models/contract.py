"""What every network of the family promises to the code that trains it and samples from it.

The promise is small on purpose. A network turns (x, t, y) into a `ModelOutput`; whatever it could reuse at a later
evaluation it hands out as `state` and accepts back. *What* the state is stays the network's business; *when* it is
recomputed is the sampler's. A new family subclasses `Network`, writes its forward out, and adds one registry row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TimeConvention = Literal["index", "unit"]


class Routing(NamedTuple):
    """Which parts of the network were active, as 0/1 masks (DyDiT)."""

    heads: Tensor  # (N, L, H)
    mlp: Tensor  # (N, L, H)
    tokens: Tensor  # (N, L, T)


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
        training_passes: keyword arguments of the forward passes that one training step consists of.
        blocks: the transformer blocks, in order; what is compiled and recomputed piece by piece.
        grad_checkpointing: recompute each block's activations in the backward pass instead of keeping them.
        keeps_state: whether evaluations hand out state that a later one can reuse.
    """

    time_convention: ClassVar[TimeConvention] = "index"
    training_passes: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    config_class: ClassVar[type[Any]]

    config: Any
    blocks: nn.ModuleList
    grad_checkpointing: bool = False
    keeps_state: bool = False
    in_channels: int
    out_channels: int
    input_size: int
    num_classes: int
    class_dropout_prob: float

    @property
    def null_class(self) -> int:
        """Label of the unconditional row: `num_classes`, whatever that number is.

        Raises:
            ValueError: if the network was built without label dropout and so has no such row.
        """
        if self.class_dropout_prob <= 0:
            raise ValueError("class_dropout_prob is 0: this network has no null class and cannot be guided")
        return self.num_classes

    def run_block(self, block: nn.Module, *args: Tensor) -> Tensor:
        """Evaluates one block, keeping its activations for the backward pass or not."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

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

    def layer_norm_elements(self) -> int:
        """Elements that pass through layer norms in one forward of one image; some publications count them."""
        raise TypeError(f"{type(self).__name__} does not state its cost")
