"""DyDiT: a DiT that runs as much of itself as a timestep and a token need (Zhao et al., 2025, arXiv 2410.03456).

Three small routers stand in every block. Two look at the timestep and switch attention heads, and groups of the MLP's
channels, on or off (timestep-wise dynamic width); the third looks at each token and lets it through the MLP or past it
(spatial-wise dynamic token). Decisions are hard, 0 or 1; the gradient passes as through sigmoids. With all gates open
the function is DiT's.

Here, as in training, masks multiply what was computed in full. What a sampling run leaves out: `models/dydit_plan.py`.

Shapes as in `layers.py`, and L depth, R outputs of a width router, G = 2 R + T gates of a block for one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import dit
from models.contract import ModelOutput, Network, Pass, Routing, TrainingRecipe
from models.dit import DiT, DiTBlock, DiTConfig
from models.dydit_plan import RoutingPlan
from models.layers import gated_add, modulate, unpatchify, without_autocast
from models.ranking import rank_by_magnitude

RouterLayout = Literal["first_always_on", "all_heads"]

TEMPERATURE = 5.0  # of the gates' gradient in training
TOKEN_ROUTER_RATIO = 16  # a token router is this many times narrower than the network
TIME_STRATA = 4
HOLD_STEPS = 100  # at the start of training, during which everything may stay on
FIRST_WIDTH_ROUTER = "blocks.0.attn_rate.router.weight"


@dataclass(frozen=True, kw_only=True)
class DyDiTConfig(DiTConfig):
    """Everything that fixes a DyDiT's parameters.

    The two releases differ in their width routers: one gate for every head and every group ("all_heads", December 2024:
    everything may be off), or for all but the first, which is always on ("first_always_on", March 2025).

    Raises:
        ValueError: naming the field, its value and what would be right.
    """

    router_layout: RouterLayout = "first_always_on"
    width_router_bias: float = 15.0  # initial; sigmoid(15) leaves every head and group on
    token_router_bias: float = 35.0  # initial; more than the other, because its input is not bounded

    def __post_init__(self) -> None:
        """Refuses what cannot be built."""
        super().__post_init__()
        if self.cache_depth is not None:
            raise ValueError(f"cache_depth {self.cache_depth}: a DyDiT keeps no state between evaluations")
        if self.router_layout not in get_args(RouterLayout):
            layouts = ", ".join(get_args(RouterLayout))
            raise ValueError(f"router_layout {self.router_layout!r} is none of {layouts}")
        if self.router_outputs < 1:
            raise ValueError(f"num_heads {self.num_heads} leaves nothing to switch where the first is always on")
        if int(self.hidden_size * self.mlp_ratio) % self.num_heads:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} makes {int(self.hidden_size * self.mlp_ratio)} channels, "
                f"which cannot be cut into num_heads {self.num_heads} groups"
            )
        if self.hidden_size < TOKEN_ROUTER_RATIO:
            raise ValueError(f"hidden_size {self.hidden_size} is too small for a token router: {TOKEN_ROUTER_RATIO}")

    @property
    def router_outputs(self) -> int:
        """R: gates of a width router."""
        return self.num_heads - (self.router_layout == "first_always_on")


# ----------------------------------------------------------------------------------------------------------------------
# Gates and routers


def gate(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """Decides, in hard numbers with a soft gradient (straight-through Gumbel-sigmoid).

    Args:
        logits: float32.
        noise: like `logits`, logistic (the difference of two Gumbel draws), for training; None decides without.

    Returns:
        Like `logits`, exactly 1 where sigmoid(logits + noise) > 0.5 and else 0. The gradient is that of
        sigmoid((logits + noise) / 5), or without noise of sigmoid(logits).

    Source: arXiv 2410.03456, section 3; the temperature is the released code's.
    """
    soft = torch.sigmoid(logits if noise is None else (logits + noise) / TEMPERATURE)
    return (soft > 0.5) + (soft - soft.detach())


def float32_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear map in float32 whatever runs around it: rounding a logit would switch gates at random."""
    return functional.linear(x.float(), layer.weight.float(), layer.bias.float())


class WidthRouter(nn.Module):
    """Switches groups of heads or channels by timestep; one linear map, one level down as in the official names."""

    def __init__(self, width: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.always_on = groups - outputs
        self.router = nn.Linear(width, outputs)

    def forward(self, e: Tensor, noise: Tensor | None = None) -> Tensor:
        """Timestep embedding (N, D) or (1, D), without label; noise (N, R) -> mask (N, H) or (1, H), float32."""
        with without_autocast(e):
            mask = gate(float32_linear(self.router, e), noise)
        return functional.pad(mask, (self.always_on, 0), value=1.0)


class TokenRouter(nn.Module):
    """Sends tokens through the MLP or past it, by what they carry: linear, ReLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // TOKEN_ROUTER_RATIO
        self.mlp_head = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, 1))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Residual stream (N, T, D), neither normed nor modulated; noise (N, T) -> mask (N, T), float32."""
        first, _, last = self.mlp_head
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        with without_autocast(x):
            return gate(float32_linear(last, float32_linear(first, x).relu()).squeeze(-1), noise)


# ----------------------------------------------------------------------------------------------------------------------
# Block


class DyDiTBlock(DiTBlock):
    """DiT's block with three routers."""

    def __init__(self, config: DyDiTConfig) -> None:
        width, heads = config.hidden_size, config.num_heads
        super().__init__(width, heads, config.mlp_ratio)
        self.attn_rate = WidthRouter(width, config.router_outputs, heads)
        self.mlp_rate = WidthRouter(width, config.router_outputs, heads)
        self.token_selection = TokenRouter(width)

    def forward(  # type: ignore[override]  # hands out masks, too
        self, x: Tensor, c: Tensor, e: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """One block, in full or masked.

        Args:
            x: (N, T, D) tokens.
            c: (N, D) or (1, D) conditioning: timestep and label.
            e: (N, D) or (1, D) timestep embedding alone, for the width routers; None evaluates all else and no router.
            noise: (N, G) logistic noise of the gates: heads, tokens, groups; None decides without.

        Returns:
            Tokens (N, T, D), and the masks (N or 1, H), (N or 1, H), (N, T), or None where nobody was asked.
        """
        if e is None:
            return super().forward(x, c), None
        outputs = self.attn_rate.router.out_features
        sizes = (outputs, x.shape[1], outputs)
        head_noise, token_noise, group_noise = (None, None, None) if noise is None else noise.split(sizes, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        heads = self.attn_rate(e, head_noise)
        x = gated_add(x, gate_msa, self.attn(modulate(self.norm1(x), shift_msa, scale_msa), heads))
        tokens = self.token_selection(x, token_noise)
        groups = self.mlp_rate(e, group_noise)
        update = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp), groups)
        x = gated_add(x, gate_mlp, update * tokens.unsqueeze(-1).to(update.dtype))
        return x, Routing(heads, groups, tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True, kw_only=True)
class DyDiTRecipe(TrainingRecipe):
    """How a DyDiT is made of a DiT: a routed pass, a complete pass, and a penalty on how much of the network runs.

    The complete pass keeps the whole network a good one while its parts learn to do without each other. It is a second
    diffusion loss of the same weights on the same noisy images, with labels dropped independently.

    Noise in the gates lets routers try what they would not choose. Sampling goes without, and then runs more than the
    ratio held in training wherever a gate is undecided; steps without noise at the end of training settle that.

    Raises:
        ValueError: naming the field, its value and what would be right.

    Source: arXiv 2410.03456, section 3.3; weights and schedule as in the released training code.
    """

    statistic_name: ClassVar[str | None] = "flops_ratio"

    flops_target: float = 0.5  # lambda: share of the blocks' multiply-adds, over the global batch
    flops_weight: float = 2.0  # of the penalty (ratio - target)^2
    flops_warmup_steps: int = 1000  # over which the target falls from 1
    complete_loss_steps: int | None = None  # of training with a complete pass; None: all
    gate_noise_steps: int | None = None  # of training with noise in the gates; None: all
    stratified_t: bool = False  # times of a batch cover the four quarters of the schedule evenly
    rank_by_magnitude: bool = False  # heads and channels of the weights to start from, largest first

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if not 0 < self.flops_target <= 1:
            raise ValueError(f"flops_target must lie in (0, 1], not {self.flops_target}")
        for name in ("flops_weight", "flops_warmup_steps", "complete_loss_steps", "gate_noise_steps"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, not {getattr(self, name)}")

    @property
    def time_strata(self) -> int:
        """Four, if asked for."""
        return TIME_STRATA if self.stratified_t else 1

    def passes(self, step: int) -> tuple[Pass, ...]:
        """The routed pass, and the complete one as long as it lasts."""
        routed = Pass(noisy_gates=self.gate_noise_steps is None or step < self.gate_noise_steps)
        if self.complete_loss_steps is not None and step >= self.complete_loss_steps:
            return (routed,)
        return routed, Pass({"complete_model": True}, "complete_")

    def target(self, step: int) -> float:
        """The ratio that step `step` (from 0) is held to: 1 for a hundred steps, then along a line down to lambda."""
        if step < HOLD_STEPS:
            return 1.0
        if step >= self.flops_warmup_steps:
            return self.flops_target
        return 1 - (1 - self.flops_target) * step / self.flops_warmup_steps

    def statistic(self, network: Network, output: ModelOutput) -> Tensor:
        """(N,) share of the blocks' multiply-adds that each row kept on."""
        assert isinstance(network, DyDiT) and output.routing is not None
        return network.flops_ratio(output.routing)

    def penalty(self, mean: Tensor, step: int) -> Tensor:
        """Squared distance of the global batch's ratio from the target."""
        return self.flops_weight * (mean - self.target(step)) ** 2

    def doubts(self, steps: int) -> list[str]:
        """Says if the run ends before the target has come down."""
        last = self.target(steps - 1)
        if last == self.flops_target:
            return []
        return [
            f"--flops-warmup-steps {self.flops_warmup_steps}: after {steps:,} steps the target is still "
            f"{last:.2f}, not {self.flops_target}; choose fewer (the first {HOLD_STEPS} hold it at 1)"
        ]

    def start(self, network: Network, weights: Mapping[str, Tensor]) -> list[str]:
        """Ranks heads and channels where that was asked for.

        Raises:
            ValueError: if there are routers, which know heads and groups by their place.
        """
        if not self.rank_by_magnitude:
            return []
        if FIRST_WIDTH_ROUTER in weights:
            raise ValueError("rank_by_magnitude is for weights without routers, and these have some")
        network.load_state_dict(rank_by_magnitude(network.state_dict(), network.config.num_heads))
        return ["heads and MLP channels ranked by magnitude, largest first"]


# ----------------------------------------------------------------------------------------------------------------------
# Network


class DyDiT(DiT):
    """DiT with routers.

    Attributes:
        plan: routing prepared by `for_sampling`; None elsewhere.
        slice_cache_bytes: how much memory copies of weights may take that a plan makes.

    Source: arXiv 2410.03456; sizes are DiT's.
    """

    config_class = DyDiTConfig
    recipe_class = DyDiTRecipe
    added_parts = ("attn_rate", "mlp_rate", "token_selection")
    decides_by_input = True
    config: DyDiTConfig
    plan: RoutingPlan | None = None
    slice_cache_bytes: int = 2 * 2**30
    compile_backend: str | None = None

    def __init__(self, config: DyDiTConfig) -> None:
        super().__init__(config)
        self.gate_noise_shape = (config.depth, 2 * config.router_outputs + self.pos_embed.shape[1])

    def make_block(self, config: DiTConfig) -> DyDiTBlock:
        """One block with routers."""
        assert isinstance(config, DyDiTConfig)
        return DyDiTBlock(config)

    def reset_parameters(self) -> None:
        """Draws all weights anew: DiT's as there, routers so that nothing is switched off."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, WidthRouter):
                nn.init.constant_(module.router.bias, self.config.width_router_bias)
            elif isinstance(module, TokenRouter):
                last = module.mlp_head[-1]
                assert isinstance(last, nn.Linear)
                nn.init.constant_(last.bias, self.config.token_router_bias)

    @classmethod
    def settings_from(cls, weights: Mapping[str, Tensor], config: DyDiTConfig) -> dict[str, Any]:
        """The layout of the routers, which shows in their size; nothing if there are none.

        Raises:
            ValueError: if the routers belong to another number of heads.
        """
        if FIRST_WIDTH_ROUTER not in weights:
            return {}
        heads, outputs = config.num_heads, len(weights[FIRST_WIDTH_ROUTER])
        layouts: dict[int, RouterLayout] = {heads: "all_heads", heads - 1: "first_always_on"}
        if outputs not in layouts:
            raise ValueError(f"routers of {outputs} gates; {heads} heads need {heads - 1} or {heads}")
        return {"router_layout": layouts[outputs]}

    def forward(
        self,
        x: Tensor,
        t: float | Tensor,
        y: Tensor,
        state: Any = None,
        *,
        complete_model: bool = False,
        gate_noise: Tensor | None = None,
        features_at: int | None = None,
    ) -> ModelOutput:
        """Predicts noise (and variance values) for noisy images.

        Args:
            x: (N, C, S, S) noisy latents, float.
            t: timestep on the index scale, 0..999; a number that all rows share, or an (N,) tensor; may be fractional.
            y: (N,) int64 labels in [0, num_classes], the last being the null class.
            state: accepted for the contract; nothing is kept between evaluations.
            complete_model: evaluate everything and ask no router: DiT's function of the same weights.
            gate_noise: (N, L, G) float32 logistic noise for training; None decides without.
            features_at: 1-based number of the block whose output tokens are returned as `features`.

        Returns:
            `ModelOutput` with sample (N, C_out, S, S) and, unless complete, routing.

        Raises:
            ValueError: if x has another size than the positions were made for, or there is no such block.
        """
        self.check_inputs(x, None, features_at, range(len(self.blocks)))
        plan = None if complete_model or torch.is_grad_enabled() or gate_noise is not None else self.plan
        prepared = None if plan is None or isinstance(t, Tensor) else plan.evaluations.get(t)
        features, masks = None, []
        with without_autocast(x):
            e = self.t_embedder(t)  # (N, D) or (1, D)
        c = e + self.y_embedder(y)  # (N, D)
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        for i, block in enumerate(self.blocks):
            if plan is not None and prepared is not None:
                x, mask = plan.run_block(i, x, c, prepared)
            elif complete_model:
                x, mask = self.run_block(block, x, c)
            else:
                x, mask = self.run_block(block, x, c, e, None if gate_noise is None else gate_noise[:, i])
            masks.append(mask)
            if i + 1 == features_at:
                features = x
        routing = None if complete_model else _stacked(masks, len(x))
        x = self.final_layer(x, c)  # (N, T, p * p * C_out)
        sample = unpatchify(x, self.out_channels, self.config.patch_size)
        return ModelOutput(sample, routing=routing, features=features)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every block, and what plans made from now on run instead of blocks."""
        super().compile_blocks(backend)
        self.compile_backend = backend

    def for_sampling(self, times: Iterable[float]) -> Self:
        """Routes a whole schedule: evaluations at these times leave out what is switched off.

        Without gradients, and at one of the times, given as a number. Everything else is evaluated by masks, as before.
        """
        times = tuple(times)
        with without_autocast(self.pos_embed):
            prepared = super().for_sampling(times)
        if not self.pos_embed.is_meta:  # weights without values decide nothing
            prepared.plan = RoutingPlan(prepared, times, self.slice_cache_bytes, self.compile_backend)
        return prepared

    # ------------------------------------------------------------------------------------------------------------------
    # Cost

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of one forward of one image with everything on, by part; DiT's, and those of the routers."""
        config, d, inner = self.config, self.config.hidden_size, self.config.hidden_size // TOKEN_ROUTER_RATIO
        routers = 2 * config.router_outputs * d + self.pos_embed.shape[1] * (d * inner + inner)
        return {**super().multiply_adds(), "routers": config.depth * routers}

    def multiply_adds_at(self, routing: Routing) -> dict[str, float]:
        """The same at given masks, mean over rows. Reads the masks."""
        heads = routing.heads.mean()
        mlp = (routing.mlp.mean(-1) * routing.tokens.mean(-1)).mean()
        kept = {"attention_linear": float(heads), "attention_products": float(heads), "mlp": float(mlp)}
        return {part: kept.get(part, 1.0) * count for part, count in self.multiply_adds().items()}

    def multiply_adds_of(self, output: ModelOutput) -> dict[str, float]:
        """What the evaluation behind an output needed, mean over its rows. Reads the masks."""
        return super().multiply_adds_of(output) if output.routing is None else self.multiply_adds_at(output.routing)

    def flops_ratio(self, routing: Routing) -> Tensor:
        """Share of the blocks' multiply-adds that masks leave on: (N,) float32; modulation and routers do not count.

        Linear in the heads, whose products are left out with them, and bilinear in MLP groups and tokens.
        """
        parts = self.multiply_adds()
        attention, mlp = parts["attention_linear"] + parts["attention_products"], parts["mlp"]
        heads = routing.heads.mean(-1)  # (N, L)
        channels = routing.mlp.mean(-1) * routing.tokens.mean(-1)
        return ((attention * heads + mlp * channels) / (attention + mlp)).mean(-1)


def _stacked(masks: list[Any], rows: int) -> Routing:
    """Masks of all blocks, one for every row, from those of each block, where a shared t has one for all rows."""
    heads, mlp, tokens = (torch.stack(parts, dim=1) for parts in zip(*masks, strict=True))
    return Routing(heads.expand(rows, -1, -1), mlp.expand(rows, -1, -1), tokens)


CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"DyDiT-{size}/{patch}": {**numbers, "patch_size": patch}
        for size, numbers in dit.SIZES.items()
        for patch in dit.PATCH_SIZES
    },
    "DyDiT-debug/2": {**dit.DEBUG, "patch_size": 2},
    "DyDiT-digits/2": {**dit.DIGITS, "patch_size": 2},
}
