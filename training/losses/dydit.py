"""DyDiT's loss: a routed pass, a complete pass, and a penalty on how much of the network runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.loss import Batch, DiffusionLoss, Draws, LossSettings, row_generators
from models.dydit import FIRST_WIDTH_ROUTER, DyDiT
from models.dydit_block import Routing
from models.transfer import rank_by_magnitude
from runtime import distributed
from runtime.settings import setting

TIME_STRATA = 4
HOLD_STEPS = 100  # at the start of training, during which everything may stay on
RATIO = "flops_ratio"


@dataclass(frozen=True, kw_only=True)
class DyDiTLossSettings(LossSettings):
    """Training of a DyDiT.

    Raises:
        ValueError: Naming the field, its value and what would be right.
    """

    flops_target: float = setting(0.5, "share of the blocks' MACs to come down to, over the global batch")
    flops_weight: float = setting(2.0, "weight of the squared distance from that target")
    flops_warmup_steps: int = setting(1000, "steps over which the target falls from 1")
    complete_loss_steps: int | None = setting(None, "steps that also train the network unrouted", shown="all")
    gate_noise_steps: int | None = setting(None, "steps with noise in the routers' decisions", shown="all")
    stratified_t: bool = setting(False, "cover the four quarters of the times evenly in a batch")
    rank_by_magnitude: bool = setting(False, "sort heads and MLP channels of --init-from, largest first")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not 0 < self.flops_target <= 1:
            raise ValueError(f"flops_target must lie in (0, 1], not {self.flops_target}")
        for name in ("flops_weight", "flops_warmup_steps", "complete_loss_steps", "gate_noise_steps"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, not {getattr(self, name)}")

    def check(self, *, rows: int, ranks: int, from_weights: bool) -> None:
        """Check that strata fit a process's rows, and that there are weights to rank."""
        if self.stratified_t and rows % TIME_STRATA:
            raise ValueError(
                f"{rows} images a process do not cover {TIME_STRATA} parts of the schedule evenly; choose "
                f"--global-batch-size as a multiple of {ranks * TIME_STRATA}"
            )
        if self.rank_by_magnitude and not from_weights:
            raise ValueError("has no effect without --init-from")

    def target(self, step: int) -> float:
        """Ratio that step `step` (from 0) is held to: 1 for a hundred steps, then along a line down to the target."""
        if step < HOLD_STEPS:
            return 1.0
        if step >= self.flops_warmup_steps:
            return self.flops_target
        return 1 - (1 - self.flops_target) * step / self.flops_warmup_steps


class DyDiTLoss(DiffusionLoss):
    """Two diffusion losses of the same weights on the same noisy samples, and a penalty (ratio - target)^2.

    The complete pass, which drops conditioning independently, keeps the whole network a good one while its parts learn
    to work without each other. Noise in the gates lets routers try what they would not choose. Sampling has none and
    then runs more than the ratio held in training wherever a gate is undecided; steps without noise at the end of
    training settle that.

    Source: arXiv 2410.03456, section 3.3; weights and schedule as in the released training code.
    """

    network: DyDiT
    settings: DyDiTLossSettings
    Settings = DyDiTLossSettings
    logged = (RATIO,)

    # ------------------------------------------------------------------------------------------------------------------
    # Randomness

    def passes(self, step: int) -> int:
        """The routed pass, and the complete one as long as it lasts."""
        steps = self.settings.complete_loss_steps
        return 2 if steps is None or step < steps else 1

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times of the global batch, (count,); stratified if asked for."""
        if self.settings.stratified_t:
            return self.process.stratified_times(count, TIME_STRATA, generator)
        return super().draw_times(count, generator)

    def draw_extra(self, step: int, rows: range, device: torch.device | str) -> dict[str, Tensor]:
        """Logistic noise of the gates, (N, L, G), in the steps that have it."""
        steps, shape = self.settings.gate_noise_steps, self.network.gate_noise_shape
        if steps is not None and step >= steps:
            return {}
        noise = torch.empty(len(rows), *shape, device=device)
        for row, generator in zip(noise, row_generators("gates", self.seed, step, rows, device), strict=True):
            # The logarithm of an exponential variable is a Gumbel variable, negated
            one, other = torch.empty((2, *shape), device=device).exponential_(generator=generator).log_()
            torch.sub(one, other, out=row)
        return {"gate_noise": noise}

    # ------------------------------------------------------------------------------------------------------------------
    # Losses

    @torch.no_grad()
    def shared(self, pieces: Sequence[tuple[Batch, Draws]], step: int) -> dict[str, Tensor]:
        """Mean ratio over the global batch, which the penalty needs before the first backward pass.

        Source of an extra forward pass where a step is cut into micro-batches; an uncut one has its ratios on the way.
        """
        if len(pieces) == 1:
            return {}
        ratios = []
        for batch, draws in pieces:
            x_t = self.process.q_sample(batch.x_start, draws.t, draws.noise)
            ratios.append(self.flops_ratio(self.evaluate(x_t, batch, draws, 0, **draws.extra).aux))
        return {RATIO: distributed.mean_over_ranks(torch.cat(ratios).mean())}

    def forward(self, batch: Batch, draws: Draws, step: int, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses of both passes, the share of the blocks' MACs that each row kept on, and the penalty on its mean.

        The penalty is the global batch's, the same in every row; its gradient is spread over the rows so that their
        mean has it. All processes call together.
        """
        x_t = self.process.q_sample(batch.x_start, draws.t, draws.noise)
        out = self.evaluate(x_t, batch, draws, 0, **draws.extra)
        losses = self.losses(out, x_t, batch, draws)
        ratio = self.flops_ratio(out.aux)
        mean = shared[RATIO] if RATIO in shared else distributed.mean_over_ranks(ratio.detach().mean())
        penalty = self._penalty(ratio, mean, step)
        total = losses["loss"] + penalty
        losses |= {RATIO: ratio, f"{RATIO}_penalty": penalty}
        if self.passes(step) == 2:
            complete = self.evaluate(x_t, batch, draws, number=1, complete_model=True)
            others = self.losses(complete, x_t, batch, draws)
            total = total + others["loss"]
            losses |= {f"complete_{name}": value for name, value in others.items()}
        return {**losses, "loss": total}

    def flops_ratio(self, routing: Routing) -> Tensor:
        """Share of the blocks' MACs that masks leave on: (N,) float32; modulation and routers do not count.

        Linear in the heads, which take their products with them, and bilinear in MLP groups and tokens.
        """
        parts = self.network.cost()
        attention, mlp = parts["attention_linear"] + parts["attention_products"], parts["mlp"]
        heads = routing.heads.mean(-1)  # (N, L)
        channels = routing.mlp.mean(-1) * routing.tokens.mean(-1)
        return ((attention * heads + mlp * channels) / (attention + mlp)).mean(-1)

    def _penalty(self, ratio: Tensor, mean: Tensor, step: int) -> Tensor:
        """The penalty p(m) at the global mean m, once per row, with gradient p'(m) dr for the row's ratio r.

        That is linear in the rows, so that an average of gradients over rows, micro-batches or processes is the
        gradient of p(m).
        """
        distance, weight = mean.detach() - self.settings.target(step), self.settings.flops_weight
        return weight * distance**2 + 2 * weight * distance * (ratio - ratio.detach())

    # ------------------------------------------------------------------------------------------------------------------
    # Before the first step

    def warnings(self, total_steps: int) -> list[str]:
        """A line if the run ends before the target has come down."""
        settings, last = self.settings, self.settings.target(total_steps - 1)
        if last == settings.flops_target:
            return []
        return [
            f"--flops-warmup-steps {settings.flops_warmup_steps}: after {total_steps:,} steps the target is still "
            f"{last:.2f}, not {settings.flops_target}; choose fewer (the first {HOLD_STEPS} hold it at 1)"
        ]

    def start(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Rank heads and channels if asked for.

        Raises:
            ValueError: If there are routers, which know heads and groups by their place.
        """
        if not self.settings.rank_by_magnitude:
            return []
        if FIRST_WIDTH_ROUTER in weights:
            raise ValueError("rank_by_magnitude is for weights without routers, and these have some")
        network = self.network
        network.load_state_dict(rank_by_magnitude(network.state_dict(), network.config.num_heads))
        return ["heads and MLP channels ranked by magnitude, largest first"]
