"""DyDiT: a DiT that runs as much of itself as a timestep and a token need (Zhao et al., 2025, arXiv 2410.03456).

Every block has three small routers. Two read the timestep and switch attention heads, and groups of the MLP's
channels, on or off (timestep-wise dynamic width); the third reads each token and sends it through the MLP or past it
(spatial-wise dynamic token). Decisions are hard, 0 or 1, with the gradient of sigmoids. With all gates open the
function is DiT's.

Here, as in training, masks multiply what was computed in full. `dydit_plan.py` leaves it out in a sampling run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from models import dit
from models.contract import ModelOutput
from models.dit import DiT, DiTConfig
from models.dydit_block import TOKEN_ROUTER_RATIO, DyDiTBlock, Routing, TokenRouter, WidthRouter
from models.dydit_plan import RoutingPlan
from models.layers import without_autocast
from runtime.settings import setting

RouterLayout = Literal["first_always_on", "all_heads"]

FIRST_WIDTH_ROUTER = "blocks.0.attn_rate.router.weight"


@dataclass(frozen=True, kw_only=True)
class DyDiTConfig(DiTConfig):
    """Everything that fixes a DyDiT's parameters.

    The two releases differ in their width routers: one gate for every head and every group ("all_heads", December 2024:
    everything may be off), or for all but the first, which is always on ("first_always_on", March 2025).

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    router_layout: RouterLayout = setting(
        "first_always_on", "gates of a width router: for all heads, or for all but the first, which is always on"
    )
    # sigmoid(15) keeps every head and group on; the other is larger because its input is not bounded.
    width_router_bias: float = setting(15.0, "initial bias of the routers of heads and channel groups")
    token_router_bias: float = setting(35.0, "initial bias of the routers of tokens")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if self.cache_depth is not None:
            raise ValueError(f"cache_depth {self.cache_depth}: a DyDiT keeps no state between evaluations")
        if self.router_layout not in get_args(RouterLayout):
            layouts = ", ".join(get_args(RouterLayout))
            raise ValueError(f"router_layout {self.router_layout!r} is none of {layouts}")
        if self.router_outputs < 1:
            raise ValueError(f"num_heads {self.num_heads} leaves nothing to switch where the first is always on")
        if self.mlp_width % self.num_heads:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} makes {self.mlp_width} channels, "
                f"which cannot be cut into num_heads {self.num_heads} groups"
            )
        if self.hidden_size < TOKEN_ROUTER_RATIO:
            raise ValueError(f"hidden_size {self.hidden_size} is too small for a token router: {TOKEN_ROUTER_RATIO}")

    @property
    def router_outputs(self) -> int:
        """R, the number of gates of a width router."""
        return self.num_heads - (self.router_layout == "first_always_on")


class DyDiT(DiT):
    """DiT with routers; what an evaluation computes depends on its input.

    Attributes:
        gate_noise_shape: (L, G) of the logistic noise that one row's gates take in training.
        plan: Routing prepared by `for_sampling`; None elsewhere.
        slice_cache_bytes: Memory limit for the copies of weights that a plan makes.

    Source: arXiv 2410.03456; sizes are DiT's.
    """

    config: DyDiTConfig
    plan: RoutingPlan | None = None
    slice_cache_bytes: int = 2 * 2**30
    compile_backend: str | None = None

    def __init__(self, config: DyDiTConfig) -> None:
        super().__init__(config)
        self.gate_noise_shape = (config.depth, 2 * config.router_outputs + config.tokens)

    def make_block(self, config: DiTConfig) -> DyDiTBlock:
        """Build one block with routers."""
        assert isinstance(config, DyDiTConfig)
        return DyDiTBlock(config.hidden_size, config.num_heads, config.mlp_ratio, config.router_outputs)

    def reset_parameters(self) -> None:
        """Re-initialise: DiT's parts as there, routers so that nothing is switched off."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, WidthRouter):
                nn.init.constant_(module.router.bias, self.config.width_router_bias)
            elif isinstance(module, TokenRouter):
                nn.init.constant_(module.layers[-1].bias, self.config.token_router_bias)

    def forward(  # type: ignore[override]  # its own routers choose the tokens, so it takes no route
        self,
        x: Tensor,
        t: float | Tensor,
        *,
        y: Tensor,
        state: object = None,
        features_at: Collection[int] = (),
        complete_model: bool = False,
        gate_noise: Tensor | None = None,
    ) -> ModelOutput:
        """Predict noise (and variance values) for noisy images, as `DiT.forward` does; no state is kept.

        A complete model evaluates everything and no router: DiT's function of the same weights. Otherwise the output's
        aux is a `Routing`, by gates with logistic noise (N, L, G) float32 in training; None decides without noise.
        """
        self.check_inputs(x, None, features_at, range(len(self.blocks)))
        plan = None if complete_model or torch.is_grad_enabled() or gate_noise is not None else self.plan
        width = None if plan is None or isinstance(t, Tensor) else plan.widths.get(t)
        features: dict[int, Tensor] = {}
        masks: list[Routing] = []
        with without_autocast(x):
            e = self.t_embedder(t)  # (N, D) or (1, D)
        c = e + self.y_embedder(y)  # (N, D)
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        for i, block in enumerate(self.blocks):
            if plan is not None and width is not None:
                x, mask = plan.run_block(i, x, c, width)
            elif complete_model:
                x, mask = block(x, c)
            else:
                x, mask = block(x, c, e, None if gate_noise is None else gate_noise[:, i])
            masks.append(mask)
            if i + 1 in features_at:
                features[i + 1] = x
        routing = None if complete_model else _stacked(masks, len(x))
        x = self.final_layer(x, c)  # (N, T, p * p * C_out)
        return ModelOutput(self.unpatchify(x), None, features, routing)

    def for_sampling(self, times: Iterable[float]) -> Self:
        """Route a whole schedule: evaluations at these times leave out what is switched off.

        This holds without gradients and for a number in `times`; everything else is evaluated with masks as before.
        """
        times = tuple(times)
        with without_autocast(self.pos_embed):
            prepared = super().for_sampling(times)
        if prepared is not self and not self.pos_embed.is_meta:  # weights without values decide nothing
            blocks: list[DyDiTBlock] = list(self.blocks)  # type: ignore[arg-type]  # ModuleList has no item type
            limit, backend = self.slice_cache_bytes, self.compile_backend
            prepared.plan = RoutingPlan(blocks, prepared.t_embedder, times, limit, backend)
        return prepared

    def cost(self) -> dict[str, int]:
        """Count the MACs of one forward of one sample with everything on, by part: DiT's, and the routers'."""
        config, d, inner = self.config, self.config.hidden_size, self.config.hidden_size // TOKEN_ROUTER_RATIO
        routers = 2 * config.router_outputs * d + config.tokens * (d * inner + inner)
        return {**super().cost(), "routers": config.depth * routers}


def _stacked(masks: list[Routing], rows: int) -> Routing:
    """Join the masks of all blocks, expanding those that a shared t gives once for all rows."""
    heads, mlp, tokens = (torch.stack(parts, dim=1) for parts in zip(*masks, strict=True))
    return Routing(heads.expand(rows, -1, -1), mlp.expand(rows, -1, -1), tokens)


def settings_from(weights: Mapping[str, Tensor], config: DyDiTConfig) -> dict[str, object]:
    """Read the layout of the routers from their size; nothing if there are none.

    Raises:
        ValueError: If the routers belong to another number of heads.
    """
    if FIRST_WIDTH_ROUTER not in weights:
        return {}
    heads, outputs = config.num_heads, len(weights[FIRST_WIDTH_ROUTER])
    layouts: dict[int, RouterLayout] = {heads: "all_heads", heads - 1: "first_always_on"}
    if outputs not in layouts:
        raise ValueError(f"routers of {outputs} gates; {heads} heads need {heads - 1} or {heads}")
    return {"router_layout": layouts[outputs]}


CONFIGS: dict[str, dict[str, object]] = {
    **dit.published("DyDiT"),
    "DyDiT-debug/2": dit.DEBUG,
    "DyDiT-digits/2": dit.DIGITS,
}
