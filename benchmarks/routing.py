"""What routing saves: a DyDiT that leaves out what is off, beside a plain DiT and beside masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cases import filled_network
from benchmarks.timing import BF16, SAME, Case, Row
from diffusion import create_diffusion, guided, sample_loop
from models import DyDiT, ModelOutput, Network, create_model
from models.dit import DiTConfig
from models.dydit import DyDiTBlock

DENSE, ALL_ON, ROUTED, MASKED = "plain DiT", "DyDiT, everything on", "DyDiT, routed", "DyDiT, by masks"
ON, OFF = 15.0, -15.0  # biases of width routers
ALL = 1e6  # bias of a token router that nothing outweighs


class Share(NamedTuple):
    """How much of a network is on.

    Attributes:
        model: registry name.
        depth: blocks; None is the model's own.
        rows: of an evaluation (or images of a sampling loop).
        heads: that are on in every block.
        groups: of MLP channels, likewise.
        tokens: share that goes through the MLP.
    """

    model: str
    depth: int | None
    rows: int
    heads: int
    groups: int
    tokens: float

    @property
    def title(self) -> str:
        """Names the case in tables."""
        depth = "" if self.depth is None else f", {self.depth} block{'s' if self.depth > 1 else ''}"
        kept = f"{self.heads} heads, {self.groups} groups, {self.tokens:.0%} of tokens"
        return f"{self.model}{depth}, batch {self.rows}: {kept}"


class Saving(NamedTuple):
    """What came of it.

    Attributes:
        speedup: time of the plain DiT over ours.
        reduction: its multiply-adds over ours, routers included.
    """

    speedup: float
    reduction: float

    @property
    def quotient(self) -> float:
        """How much of the saved work is saved time; 1 is all of it."""
        return self.speedup / self.reduction


class Run(NamedTuple):
    """One evaluation, or one run of the sampling loop, of a network on fixed inputs."""

    network: Callable[..., ModelOutput]
    x: Tensor
    t: float
    y: Tensor
    y_null: int
    steps: int | None
    autocast: torch.dtype | None

    def __call__(self) -> Tensor:
        """The prediction, or with steps the latents at the end of a guided loop."""

        def evaluate(*args: Any) -> ModelOutput:
            with torch.autocast(self.x.device.type, self.autocast, enabled=self.autocast is not None):
                return self.network(*args)

        if self.steps is None:
            with torch.no_grad():
                return evaluate(self.x, self.t, self.y).sample
        sampler = create_diffusion(str(self.steps)).ancestral()
        return sample_loop(guided(evaluate, self.y, self.y_null, 1.5, 3), sampler, self.x, noise_fn=torch.zeros_like)


@torch.no_grad()
def open_gates(network: DyDiT, share: Share, x: Tensor, t: float, y: Tensor) -> None:
    """Sets the biases of all routers so that a share of everything is on.

    Heads and groups are random ones in each block, the same at all times; tokens are those of these inputs that have
    the largest logits.
    """
    generator = torch.Generator().manual_seed(3)

    def set_bias(router: nn.Module, args: tuple[Tensor, ...]) -> None:
        first, _, last = router.mlp_head  # type: ignore[misc]  # a TokenRouter
        ranked = functional.linear(first(args[0]).relu(), last.weight).flatten().sort(descending=True).values
        count = round(share.tokens * len(ranked))
        border = -ALL if count == len(ranked) else (ranked[count - 1] + ranked[count]) / 2
        last.bias.fill_(-float(border))

    blocks: list[DyDiTBlock] = list(network.blocks)  # type: ignore[arg-type]  # ModuleList has no item type
    hooks = []
    for block in blocks:
        for router, count in ((block.attn_rate.router, share.heads), (block.mlp_rate.router, share.groups)):
            bias = torch.full((router.out_features,), OFF)
            bias[torch.randperm(len(bias), generator=generator)[: count - 1]] = ON  # beside the first, always on
            router.weight.zero_()
            router.bias.copy_(bias)
        hooks.append(block.token_selection.register_forward_pre_hook(set_bias))
    network(x, t, y)
    for hook in hooks:
        hook.remove()


def plain_dit(network: DyDiT) -> Network:
    """A DiT with the same weights, but for the routers."""
    fields = {name: getattr(network.config, name) for name in DiTConfig.__dataclass_fields__}
    with torch.device(network.pos_embed.device):
        plain = create_model("DiT-XL/2", **fields)
    own = plain.state_dict()
    plain.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name in own})
    return plain.eval()


def routing_cases(
    share: Share,
    device: torch.device,
    *,
    steps: int | None = None,
    autocast: torch.dtype | None = None,
    compiler: str | None = None,
) -> list[Case]:
    """A plain DiT, and a DyDiT with everything on, with a share on, and with that share by masks.

    Args:
        share: what is on.
        device: where to compute.
        steps: time a guided sampling loop of this many steps; None times one evaluation.
        autocast: precision of the network; None is float32.
        compiler: backend for the blocks; None leaves them as they are.
    """
    overrides = {} if share.depth is None else {"depth": share.depth}
    network = filled_network(share.model, device, **overrides)
    assert isinstance(network, DyDiT)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(share.rows, 4, network.input_size, network.input_size, generator=generator, device=device)
    y = torch.randint(network.num_classes, (share.rows,), generator=generator, device=device)
    t = 500.0
    times = (t,) if steps is None else create_diffusion(str(steps)).ancestral().times
    every = network.config.num_heads
    everything = share._replace(heads=every, groups=every, tokens=1.0)
    networks: dict[str, Network] = {DENSE: plain_dit(network), ALL_ON: copy.deepcopy(network), ROUTED: network}
    for name, wanted in ((ALL_ON, everything), (ROUTED, share)):
        opened = networks[name]
        assert isinstance(opened, DyDiT)
        open_gates(opened, wanted, x, t, y)
    if compiler is not None:
        for each in networks.values():
            each.compile_blocks(compiler)
    prepared = {name: each.for_sampling(times) for name, each in networks.items()}
    settings = (x, t, y, network.null_class, steps, autocast)
    runs = {name: Run(each, *settings) for name, each in [*prepared.items(), (MASKED, network)]}
    # Over many steps rounding flips tokens whose logit is nearly 0, and what comes out differs
    compared = {MASKED: ROUTED, ALL_ON: DENSE} if steps is None else {}
    return [
        Case(
            name,
            lambda run=run: run,  # type: ignore[misc]  # bound now
            lambda run: run(),
            outcome=lambda run, result: [result],
            reference=compared.get(name),
            tolerance=SAME if autocast is None else BF16,
            flop=executed_flop(run),
            images=share.rows,
            precision="fp32" if autocast is None else "bf16",
        )
        for name, run in runs.items()
    ]


def executed_flop(run: Run) -> float:
    """Operations of a run, at the masks that it meets; a multiply-add is two."""
    network, total = run.network, 0.0

    def counted(*args: Any) -> ModelOutput:
        nonlocal total
        out = network(*args)
        total += 2 * len(args[0]) * sum(network.multiply_adds_of(out).values())  # type: ignore[attr-defined]
        return out

    run._replace(network=counted)()
    return total


def saving(rows: Sequence[Row], name: str = ROUTED) -> Saving:
    """Of one of the cases, against the plain DiT in the same group."""
    by_name = {row.name: row for row in rows}
    plain, ours = by_name[DENSE], by_name[name]
    return Saving(plain.seconds / ours.seconds, plain.flop / ours.flop)
