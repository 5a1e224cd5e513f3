"""Cases of networks, training steps and loaders, each with a plain baseline."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import BF16, SAME, SAME_GRADIENT, Case
from models import Conditioning, Network, create_model
from models.acceleration import can_compile
from training.optimization import EMA

GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
EMA_DECAY, LEARNING_RATE = 0.9999, 1e-4

# ----------------------------------------------------------------------------------------------------------------------
# Networks


class Inputs(NamedTuple):
    """Noisy samples, times, labels or texts, and the target of the prediction."""

    x: Tensor
    t: Tensor
    conditioning: Conditioning
    target: Tensor


def random_network(name: str, device: torch.device, **overrides: object) -> Network:
    """Build a network with random weights, in eval mode, in which the official network drops no labels."""
    torch.manual_seed(0)
    with device:
        return fill_zeros(create_model(name, **overrides)).eval()


@torch.no_grad()
def fill_zeros(network: Network) -> Network:
    """Make zero-initialised weights random too, in place: else the network's output would be 0."""
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.02)
    return network


def blank_conditioning(network: Network, rows: int) -> dict[str, Tensor]:
    """Conditioning of the right shapes and types, on the network's device: the first class, or texts of zeros."""
    weights = next(network.parameters())
    if "text" in network.conditioning:
        text = weights.new_zeros(rows, network.config.text_length, network.config.text_width)
        return {"text": text, "text_mask": text.new_ones(text.shape[:2])}
    return {name: weights.new_zeros(rows, dtype=torch.int64) for name in network.conditioning}


def make_inputs(network: Network, rows: int, device: torch.device) -> Inputs:
    """Random inputs of the right shapes, the same at every call."""
    generator = torch.Generator(device).manual_seed(1)
    randn = partial(torch.randn, generator=generator, device=device)
    *frames, channels, height, width = network.sample_shape
    t = torch.randint(1000, (rows,), generator=generator, device=device)
    conditioning = blank_conditioning(network, rows)
    if "y" in conditioning:
        conditioning["y"] = torch.randint(network.config.num_classes, (rows,), generator=generator, device=device)
    if "text" in conditioning:  # blank words are all the same, and nothing then depends on what attends to them
        conditioning["text"] = randn(*conditioning["text"].shape)
    t = t if network.time_convention == "index" else t / 1000
    x = randn(rows, *frames, channels, height, width)
    return Inputs(x, t, conditioning, randn(rows, *frames, network.out_channels, height, width))


def forward(network: nn.Module, inputs: Inputs, autocast: torch.dtype | None = None) -> Tensor:
    """Evaluate our network or an official one."""
    with torch.autocast(inputs.x.device.type, autocast, enabled=autocast is not None):
        out = network(inputs.x, inputs.t, **inputs.conditioning)
    sample: Tensor = out if isinstance(out, Tensor) else out[0]
    return sample


def forward_flop(network: Network, rows: int) -> float:
    """Operations of a forward pass; a MAC is two."""
    return 2.0 * sum(network.cost().values()) * rows


def find_compiler(device: torch.device) -> str | None:
    """Backend of torch.compile: "inductor" if there is a C++ compiler, or Triton on a GPU; else None."""
    available = importlib.util.find_spec("triton") if device.type == "cuda" else can_compile(device.type)
    return "inductor" if available else None


def compiled(network: Network, backend: str) -> Network:
    """The network, its blocks compiled for the shapes they will see, as by train.py --compile."""
    network.compile_blocks(backend)
    return network


def gemm_cases(device: torch.device, shapes: Iterable[tuple[int, int, int]]) -> list[Case]:
    """Bare linear maps in both precisions: (rows, inputs, outputs) each."""

    def prepare(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)

    return [
        Case(
            f"GEMM {precision}, {m} x {k} x {n}",
            partial(prepare, m, k, n, dtype),
            lambda state: nn.functional.linear(*state),
            flop=2.0 * m * k * n,
            precision=precision,
            is_peak=True,
        )
        for m, k, n in dict.fromkeys(shapes)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]


def peak_cases(network: Network, rows: int, device: torch.device) -> list[Case]:
    """A large square product, and the network's own largest if it has a width and tokens."""
    side = GEMM_SIDE[device.type]
    shapes = [(side, side, side)]
    width, tokens = getattr(network.config, "hidden_size", None), getattr(network.config, "tokens", None)
    if width and tokens:
        shapes.append((rows * tokens, width, 4 * width))
    return gemm_cases(device, shapes)


def forward_case(
    name: str, flop: float, inputs: Inputs, make: Callable[[], nn.Module], reference: str | None, *, bf16: bool = False
) -> Case:
    """A forward pass in float32 or under autocast; without a reference if it is its own."""
    autocast = torch.bfloat16 if bf16 else None
    return Case(
        name,
        make,
        torch.no_grad()(lambda network: forward(network, inputs, autocast)),
        outcome=lambda network, result: [result],
        reference=None if name == reference else reference,
        tolerance=BF16 if bf16 else SAME,
        flop=flop,
        images=len(inputs.x),
        precision="bf16" if bf16 else "fp32",
    )


def forward_cases(network: Network, inputs: Inputs, peer: nn.Module | None, compiler: str | None) -> list[Case]:
    """The network as it is, in bf16, compiled; the official one before it if it is given."""
    first, flop = "official, fp32" if peer is not None else "fp32", forward_flop(network, len(inputs.x))
    case = partial(forward_case, flop=flop, inputs=inputs, reference=first)
    cases = [case(first, make=lambda: peer)] if peer is not None else []
    cases += [case("fp32", make=lambda: network), case("bf16 autocast", make=lambda: network, bf16=True)]
    if compiler is not None:
        made = partial(_compiled_copy, network, compiler)
        cases.append(case("fp32, blocks compiled", make=made))
        cases.append(case("bf16 autocast, blocks compiled", make=made, bf16=True))
    return cases


def _compiled_copy(network: Network, compiler: str) -> Network:
    return compiled(copy.deepcopy(network), compiler)


# ----------------------------------------------------------------------------------------------------------------------
# Training


class ParameterwiseEMA:
    """The average of the official train.py: parameter by parameter, frozen ones too."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.source, self.network, self.decay = network, copy.deepcopy(network).requires_grad_(False), decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network."""
        averages = dict(self.network.named_parameters())
        for name, parameter in self.source.named_parameters():
            averages[name].mul_(self.decay).add_(parameter, alpha=1 - self.decay)


class TrainLoop:
    """A training step on one batch: mean squared error, AdamW, average.

    `plain` is AdamW as it is by default and `ParameterwiseEMA`, as in the official train.py; else fused and foreach.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, *, plain: bool, autocast: torch.dtype | None = None) -> None:
        self.network, self.inputs, self.autocast = network, inputs, autocast
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.trained, plain=plain)
        self.ema = ParameterwiseEMA(network, EMA_DECAY) if plain else EMA(network, EMA_DECAY)

    def step(self) -> Tensor:
        """Train one step; returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = (forward(self.network, self.inputs, self.autocast).float() - self.inputs.target).square().mean()
        loss.backward()
        self.optimizer.step()
        self.ema.update()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Gradients of the last step, without those that are rounding alone.

        The bias of keys adds the same to all scores of a query, which changes no attention weight.
        """
        named = dict(self.network.named_parameters())
        return [p.grad for name, p in sorted(named.items()) if p.grad is not None and not name.endswith("to_k.bias")]


def make_optimizer(parameters: Iterable[Tensor], *, plain: bool) -> torch.optim.Optimizer:
    """AdamW with the official settings: as PyTorch chooses by itself, or fused."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=None if plain else True)


def train_cases(network: Network, inputs: Inputs, peer: nn.Module | None, compiler: str | None) -> list[Case]:
    """Training steps from the same weights on the same batch; compared by loss and gradients of the first one."""
    first = "official, fp32" if peer is not None else "fp32, plain AdamW and EMA"

    def case(name: str, make: Callable[[], nn.Module], *, plain: bool = False, bf16: bool = False) -> Case:
        autocast = torch.bfloat16 if bf16 else None
        return Case(
            name,
            lambda: TrainLoop(make(), inputs, plain=plain, autocast=autocast),
            lambda loop: loop.step(),
            outcome=lambda loop, loss: [loss, *loop.gradients()],
            reference=None if name == first else first,
            tolerance=BF16 if bf16 else SAME_GRADIENT,
            flop=3 * forward_flop(network, len(inputs.x)),
            images=len(inputs.x),
            precision="bf16" if bf16 else "fp32",
        )

    own = partial(copy.deepcopy, network)
    cases = [] if peer is None else [case(first, partial(copy.deepcopy, peer), plain=True)]
    cases.append(case("fp32, plain AdamW and EMA", own, plain=True))
    cases.append(case("fp32, fused AdamW, foreach EMA", own))
    cases.append(case("bf16 autocast, fused AdamW, foreach EMA", own, bf16=True))
    if compiler is not None:
        cases.append(case("the same, blocks compiled", partial(_compiled_copy, network, compiler), bf16=True))
    return cases


def optimizer_cases(network: Network) -> list[Case]:
    """AdamW and the average alone, plain and as the trainer has them."""

    def optimizer(plain: bool) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        trained = [p for p in copy.deepcopy(network).parameters() if p.requires_grad]
        generator = torch.Generator(trained[0].device).manual_seed(2)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter).normal_(std=0.01, generator=generator)
        return make_optimizer(trained, plain=plain), trained

    def average(kind: type[ParameterwiseEMA] | type[EMA[nn.Module]]) -> ParameterwiseEMA | EMA[nn.Module]:
        ahead = copy.deepcopy(network)
        ema = kind(ahead, EMA_DECAY)
        with torch.no_grad():
            for parameter in ahead.parameters():
                parameter.mul_(3.0 if parameter.requires_grad else 1.0)
        return ema

    def averages(ema: EMA[nn.Module], _: object) -> list[Tensor]:
        return [p.clone() for p in ema.network.parameters()]

    def weights(state: tuple[object, list[Tensor]], _: object) -> list[Tensor]:
        return [p.detach().clone() for p in state[1]]

    def step(state: tuple[torch.optim.Optimizer, object]) -> None:
        state[0].step()

    plain, loop = "AdamW, as by default", "EMA, a loop over parameters"
    return [
        Case(plain, partial(optimizer, True), step, weights),
        Case("AdamW, fused", partial(optimizer, False), step, weights, plain),
        Case(loop, partial(average, ParameterwiseEMA), lambda ema: ema.update(), averages),
        Case("EMA, one foreach", partial(average, EMA), lambda ema: ema.update(), averages, loop),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Loaders


def loader_cases(folder: Path) -> list[Callable[[], Case]]:
    """Makers of the loaders' cases, in a scratch folder; a maker raises ImportError if a package is missing."""
    return [partial(image_folder_case, folder / "images"), digits_case, partial(latents_case, folder / "latents")]


def image_folder_case(folder: Path, images: int = 8) -> Case:
    """Decode, crop and flip photographs of ImageNet's usual size, about 100 KB each."""
    from PIL import Image

    from data import open_dataset

    (folder / "one").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse) + rng.normal(0, 10, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "one" / f"{number}.jpg", quality=90)
    dataset = open_dataset("imagefolder", folder, 256, 3)
    title = "JPEG 500 x 375 to 256 pixels"
    return Case(title, lambda: dataset, lambda data: [data[0, index] for index in range(images)], images=images)


def digits_case(images: int = 256) -> Case:
    """Items of the embedded digits, collated."""
    from torch.utils.data import default_collate

    from data import open_dataset

    dataset = open_dataset("digits", None, None, 1)
    keys = [(0, index) for index in range(images)]
    return Case(
        "digits, collated", lambda: dataset, lambda data: default_collate([data[key] for key in keys]), images=images
    )


def latents_case(folder: Path, images: int = 256) -> Case:
    """A shuffled batch of stored latents of 256-pixel images, both flips, from memory-mapped shards."""
    from data.latent_files import FORMAT, MANIFEST, Encoded, write_index, write_json, write_shard
    from data.latents import LatentShards

    folder.mkdir(parents=True)
    shape, rng = (2, 8, 32, 32), np.random.default_rng(0)
    encoder = {"name": "none", "sha256": "0", "stochastic": True}
    about = {"format": FORMAT, "classes": ["one"], "image_shape": [3, 256, 256], "row_shape": shape, "encoder": encoder}
    write_json(folder / MANIFEST, about)
    for number in range(2):
        raw = rng.standard_normal((images, *shape)).astype(np.float16)
        write_shard(folder, number, shape, [Encoded(raw, [0] * images, [f"one/{i}.jpg" for i in range(images)], [])])
    write_index(folder, 2)
    keys = [(0, int(index)) for index in rng.permutation(2 * images)[:images]]
    return Case("stored latents, gathered", lambda: LatentShards(folder), lambda data: data.gather(keys), images=images)


def make_all(makers: Iterable[Callable[[], Case]]) -> tuple[list[Case], list[str]]:
    """The cases that can be made here, and the reason for each that cannot."""
    cases, skipped = [], []
    for maker in makers:
        try:
            cases.append(maker())
        except ImportError as error:
            function = maker.func if isinstance(maker, partial) else maker
            skipped.append(f"{function.__name__.removesuffix('_case').replace('_', ' ')}: {error}")
    return cases, skipped
