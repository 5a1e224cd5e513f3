"""Stacks of blocks on patches that can return the tokens which enter one of their last blocks, and start from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from models.config import BackboneConfig
from models.contract import Network
from models.layers import FREQUENCY_DIM
from models.token_route import choose_blocks, routed_cost


class Transformer(Network):
    """Base class of the DiT family's backbones.

    With `cache_depth` B, the tokens that enter block L - B are returned as state, and an evaluation that is given them
    runs the last B blocks on them and ignores x. This is the baseline that Skip-DiT is compared with.

    Attributes:
        grid: Rows and columns of patches.
        cache_at: L - B, the index of the block that takes the state as input; None without `cache_depth`.
    """

    config: BackboneConfig

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_shape, self.grid = config.sample_shape, config.grid
        self.out_channels = config.sample_shape[-3] * (2 if config.learn_sigma else 1)
        self.cache_at = config.cache_at
        self.keeps_state = self.cache_at is not None

    def blocks_to_run(self, *, reused: bool) -> Sequence[int]:
        """Return the indices of the blocks that an evaluation runs, with or without state, in order."""
        return range(self.cache_at if reused and self.cache_at is not None else 0, self.config.depth)

    def check_inputs(
        self, x: Tensor, state: Tensor | None, features_at: Collection[int], blocks: Sequence[int]
    ) -> None:
        """Validate the arguments of an evaluation that runs these blocks; raises the ValueErrors of `forward`."""
        self.check_shape(x)
        if state is not None and len(state) != len(x):
            raise ValueError(f"state of {len(state)} rows cannot be reused for {len(x)} rows")
        for number in features_at:
            if not 1 <= number <= len(self.blocks):
                raise ValueError(f"features_at must lie in 1..{len(self.blocks)}, not {number}")
            if number - 1 not in blocks:
                raise ValueError(f"features_at {number}: that block does not run when state is reused")

    def check_shape(self, x: Tensor) -> None:
        """Raise a ValueError unless x has the network's shape."""
        if x.shape[1:] != self.sample_shape:
            takes = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"x is {tuple(x.shape)}; this network takes (N, {takes})")

    def cost(self) -> dict[str, int]:
        """Count the MACs of one forward of one sample by part; they sum to the "Gflops" of the paper's table 1.

        Layer norms, activations and softmax are not counted.
        """
        return self.cost_of(range(self.config.depth))

    def attended_tokens(self, block: int) -> int:
        """Number of tokens that each token attends to in a block."""
        return self.config.tokens

    def routable(self, chosen: tuple[int, int] | None) -> range:
        """Return the indices of blocks that tokens pass by in training, given their numbers; see `choose_blocks`."""
        return choose_blocks(chosen, range(self.config.depth), margins=(2, 4))

    def routed_cost(self, blocks: range, share: float) -> float:
        """Count the MACs of these blocks for one sample of which a share of the tokens passes through them."""
        return routed_cost(self.cost_of(blocks), share)

    def cost_of(self, blocks: Sequence[int]) -> dict[str, int]:
        """Count the MACs by part of these blocks with the embedders and the final layer."""
        config, d, tokens, count = self.config, self.config.hidden_size, self.config.tokens, len(blocks)
        patch_values = config.patch_size**2
        return {
            "patch_embedding": tokens * d * patch_values * config.sample_shape[-3],
            "timestep_mlp": FREQUENCY_DIM * d + d * d,
            "attention_linear": count * 4 * tokens * d * d,
            "attention_products": sum(2 * tokens * self.attended_tokens(i) * d for i in blocks),
            "mlp": count * 2 * tokens * d * config.mlp_width,
            "modulation": self.modulation_cost(count),
            "final_linear": tokens * d * patch_values * self.out_channels,
        }

    def modulation_cost(self, blocks: int) -> int:
        """Count the MACs that make the modulation of so many blocks and of the final layer."""
        return (blocks * 6 + 2) * self.config.hidden_size**2
