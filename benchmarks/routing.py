"""Cases of routing: a DyDiT that leaves out what is off, against a plain DiT and against masks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import random_network
from benchmarks.counting import executed_cost
from benchmarks.timing import BF16, SAME, Case, Row
from diffusion import AncestralSampler, create_diffusion, evaluations, guided, sample_loop
from models import DyDiT, ModelOutput, Network, create_model
from models.dit import DiTConfig
from models.dydit_block import DyDiTBlock, TokenRouter

DENSE, ALL_ON, ROUTED, MASKED = "plain DiT", "DyDiT, everything on", "DyDiT, routed", "DyDiT, by masks"
ON, OFF = 15.0, -15.0  # biases of width routers
ALL = 1e6  # bias of a token router that nothing outweighs


class Workload(NamedTuple):
    """A network, and how much of it is on."""

    model: str  # in the registry
    depth: int | None  # blocks; None is the model's own
    rows: int  # of an evaluation (or images of a sampling loop)
    heads: int  # that are on in every block
    groups: int  # of MLP channels that are on in every block
    tokens: float  # share that goes through the MLP

    @property
    def title(self) -> str:
        """Name of the case in tables."""
        depth = "" if self.depth is None else f", {self.depth} block{'s' if self.depth > 1 else ''}"
        kept = f"{self.heads} heads, {self.groups} groups, {self.tokens:.0%} of tokens"
        return f"{self.model}{depth}, batch {self.rows}: {kept}"


class Speedup(NamedTuple):
    """Result of a case."""

    speedup: float  # time of the plain DiT over ours
    reduction: float  # its MACs over ours, routers included

    @property
    def quotient(self) -> float:
        """Share of the saved work that became saved time; 1 is all of it."""
        return self.speedup / self.reduction


class Run(NamedTuple):
    """One evaluation, or one run of the sampling loop, of a network on fixed inputs."""

    network: Callable[..., ModelOutput]
    x: Tensor
    t: float
    y: Tensor
    null: Mapping[str, Tensor]
    steps: int | None
    autocast: torch.dtype | None

    def __call__(self) -> Tensor:
        """The prediction, or with steps the latents at the end of a guided loop."""

        def evaluate(*args: Tensor | float, **options: object) -> ModelOutput:
            with torch.autocast(self.x.device.type, self.autocast, enabled=self.autocast is not None):
                return self.network(*args, **options)

        if self.steps is None:
            with torch.no_grad():
                return evaluate(self.x, self.t, y=self.y).sample
        sampler = AncestralSampler(create_diffusion(), str(self.steps))
        denoise = guided(evaluate, {"y": self.y}, self.null, channels=3)
        return sample_loop(denoise, sampler, self.x, evaluations(sampler.times, 1.5), noise_fn=torch.zeros_like)


@torch.no_grad()
def open_gates(network: DyDiT, workload: Workload, x: Tensor, t: float, y: Tensor) -> None:
    """Set the biases of all routers so that a share of everything is on.

    Heads and groups are random ones in each block, the same at all times; tokens are those of these inputs that have
    the largest logits.
    """
    generator = torch.Generator().manual_seed(3)

    def set_bias(router: TokenRouter, args: tuple[Tensor, ...]) -> None:
        first, last = router.layers
        ranked = functional.linear(first(args[0]).relu(), last.weight).flatten().sort(descending=True).values
        count = round(workload.tokens * len(ranked))
        border = -ALL if count == len(ranked) else (ranked[count - 1] + ranked[count]) / 2
        last.bias.fill_(-float(border))

    blocks: list[DyDiTBlock] = list(network.blocks)  # type: ignore[arg-type]  # ModuleList has no item type
    hooks = []
    for block in blocks:
        for router, count in ((block.attn_rate.router, workload.heads), (block.mlp_rate.router, workload.groups)):
            bias = torch.full((router.out_features,), OFF)
            bias[torch.randperm(len(bias), generator=generator)[: count - 1]] = ON  # the first is always on
            router.weight.zero_()
            router.bias.copy_(bias)
        hooks.append(block.token_selection.register_forward_pre_hook(set_bias))
    network(x, t, y=y)
    for hook in hooks:
        hook.remove()


def plain_dit(network: DyDiT) -> Network:
    """A DiT with the same weights, without the routers."""
    fields = {field.name: getattr(network.config, field.name) for field in dataclasses.fields(DiTConfig)}
    with torch.device(network.pos_embed.device):
        plain = create_model("DiT-XL/2", **fields)
    own = plain.state_dict()
    plain.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name in own})
    return plain.eval()


def make_networks(
    workload: Workload, network: DyDiT, x: Tensor, t: float, y: Tensor, compiler: str | None
) -> dict[str, Network]:
    """The networks of all cases but the one by masks, with gates as the workload has them."""
    every = network.config.num_heads
    everything = workload._replace(heads=every, groups=every, tokens=1.0)
    all_on = copy.deepcopy(network)
    plain = plain_dit(network)
    open_gates(all_on, everything, x, t, y)
    open_gates(network, workload, x, t, y)
    networks: dict[str, Network] = {DENSE: plain, ALL_ON: all_on, ROUTED: network}
    for each in networks.values() if compiler is not None else ():
        each.compile_blocks(compiler or "")
    return networks


def routing_cases(
    workload: Workload,
    device: torch.device,
    *,
    steps: int | None = None,
    autocast: torch.dtype | None = None,
    compiler: str | None = None,
) -> list[Case]:
    """A plain DiT, and a DyDiT with everything on, with a share on, and with that share by masks.

    With `steps` a guided sampling loop of so many is timed, else one evaluation.
    """
    overrides = {} if workload.depth is None else {"depth": workload.depth}
    network = random_network(workload.model, device, **overrides)
    assert isinstance(network, DyDiT)
    generator, rows = torch.Generator(device).manual_seed(1), workload.rows
    x = torch.randn(rows, *network.sample_shape, generator=generator, device=device)
    y = torch.randint(network.config.num_classes, (rows,), generator=generator, device=device)
    t = 500.0
    times = (t,) if steps is None else AncestralSampler(create_diffusion(), str(steps)).times
    networks = make_networks(workload, network, x, t, y, compiler)
    prepared = {name: each.for_sampling(times) for name, each in networks.items()}
    settings = (x, t, y, network.null_conditioning(rows), steps, autocast)
    runs = {name: Run(each, *settings) for name, each in [*prepared.items(), (MASKED, network)]}
    # Over many steps rounding flips tokens with a logit near 0, and results differ
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
            images=rows,
            precision="fp32" if autocast is None else "bf16",
        )
        for name, run in runs.items()
    ]


def executed_flop(run: Run) -> float:
    """Operations of a run, at the masks that it meets; a MAC is two."""
    network, total = run.network, 0.0
    assert isinstance(network, Network)

    def counted(x: Tensor, *args: Tensor, **options: Tensor) -> ModelOutput:
        nonlocal total
        out = network(x, *args, **options)
        total += 2 * len(x) * sum(executed_cost(network, out).values())
        return out

    run._replace(network=counted)()
    return total


def speedup(rows: Sequence[Row], name: str = ROUTED) -> Speedup:
    """Result of one of the cases, against the plain DiT in the same group."""
    by_name = {row.name: row for row in rows}
    plain, ours = by_name[DENSE], by_name[name]
    return Speedup(plain.seconds / ours.seconds, plain.flop / ours.flop)
