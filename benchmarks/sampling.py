"""What is timed of sampling: the loop around the network, the file at the end, and the whole on a GPU."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import filled_network, forward_flop
from benchmarks.official import load_official_diffusion
from benchmarks.timing import BF16, SAME, Case
from diffusion import GaussianDiffusion, ImageNoise, create_diffusion, guided, sample_loop
from diffusion.sampling import NoiseFn, Sampler
from models import DiT, ModelOutput, Network, family_of
from models.acceleration import Capture, CudaCapture, Evaluate, GraphedNetwork, autocast, cast_weights_once
from runtime.background import Background

NPZ_IMAGES, NPZ_SIDE, NPZ_CHUNK = 1000, 256, 32
LATENT = (4, 32, 32)
GUIDANCE = 1.5

# What people sample with: name -> (step spec, sampler)
SAMPLERS: dict[str, tuple[str, Callable[[GaussianDiffusion], Sampler]]] = {
    "DDPM": ("250", lambda process: process.ancestral()),
    "DDIM": ("ddim50", lambda process: process.ddim()),
    "DPM-Solver++": ("20", lambda process: process.dpm_solver()),
}

# ----------------------------------------------------------------------------------------------------------------------
# The loop around the network


def loop_cases(device: torch.device, images: int, against: Path | None) -> tuple[list[Case], list[str]]:
    """Whole trajectories with a constant in place of the network, the official loops in front where they are there.

    Returns:
        The cases, and a word on those that cannot be made.
    """
    generator = torch.Generator(device).manual_seed(3)
    x = torch.randn(images, *LATENT, generator=generator, device=device)
    out = ModelOutput(torch.randn(images, 2 * LATENT[0], *LATENT[1:], generator=generator, device=device))
    cases, skipped = [], []
    for name, (spec, make) in SAMPLERS.items():
        steps = create_diffusion(spec).num_timesteps
        title, first = f"{name}, {steps} steps, {images} images", None
        if against is not None and name != "DPM-Solver++":
            try:
                cases.append(_official_loop(f"official {title}", against, spec, name, x, out.sample, steps))
                first = cases[-1].name
            except ImportError as error:
                skipped.append(f"official {name} loop: {error}")
        draw = partial(_loop, out, x, lambda: torch.randn_like)
        cases.append(Case(title, partial(_sampler, spec, make), draw, _result, first, tolerance=SAME, steps=steps))
        if name == "DDPM":
            numbered = partial(_loop, out, x, lambda: ImageNoise(0, range(images), LATENT, device))
            cases.append(
                Case(f"{title}, noise of each image's own", partial(_sampler, spec, make), numbered, steps=steps)
            )
    return cases, skipped


def _sampler(spec: str, make: Callable[[GaussianDiffusion], Sampler]) -> Sampler:
    return make(create_diffusion(spec))


def _loop(out: ModelOutput, x: Tensor, noise: Callable[[], NoiseFn], sampler: Sampler) -> Tensor:
    def denoise(x: Tensor, t: float | Tensor, state: Any = None, /) -> ModelOutput:
        return out

    torch.manual_seed(0)
    return sample_loop(denoise, sampler, x, noise_fn=noise())


def _result(state: Any, result: Tensor) -> list[Tensor]:
    return [result]


def _official_loop(name: str, folder: Path, spec: str, kind: str, x: Tensor, out: Tensor, steps: int) -> Case:
    process = load_official_diffusion(folder).create_diffusion(spec)
    loop = {"DDPM": process.p_sample_loop, "DDIM": process.ddim_sample_loop}[kind]

    def run(loop: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(0)
        return loop(lambda x, t: out, x.shape, noise=x, clip_denoised=False, device=x.device)

    return Case(name, lambda: loop, torch.no_grad()(run), outcome=_result, steps=steps)


# ----------------------------------------------------------------------------------------------------------------------
# The file at the end


def file_cases(folder: Path) -> list[Case]:
    """Images of a job into one .npz, as sample_ddp.py writes them, beside NumPy's own writer of an array in memory.

    Raises:
        ImportError: if a package is missing that `data` needs.
    """
    from data.sample_file import SampleFile

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NPZ_IMAGES, NPZ_SIDE, NPZ_SIDE, 3), dtype=np.uint8)
    labels = np.arange(NPZ_IMAGES)

    def plain(path: Path) -> Path:
        np.savez(path, images, labels)
        return path

    def ours(path: Path) -> Path:
        file = SampleFile(path, images.shape, NPZ_CHUNK)
        for chunk in file.take_up({}, overwrite=True):
            file.write(chunk, images[chunk * NPZ_CHUNK : (chunk + 1) * NPZ_CHUNK])
        file.finish(labels)
        return path

    def content(state: Path, path: Path) -> list[Tensor]:
        with np.load(path) as file:
            return [torch.from_numpy(file["arr_0"][::100]), torch.from_numpy(file["arr_1"])]

    title, first = f"{NPZ_IMAGES:,} images of {NPZ_SIDE} pixels", "numpy.savez of them all"
    return [
        Case(f"{title}, {first}", lambda: folder / "a.npz", plain, content, images=NPZ_IMAGES),
        Case(f"{title}, in chunks", lambda: folder / "b.npz", ours, content, f"{title}, {first}", images=NPZ_IMAGES),
    ]


def file_rows(measure: Callable[[Sequence[Case]], list[Any]]) -> tuple[list[Any], list[str]]:
    """Rows of `file_cases` in a scratch folder, and a word if they cannot be made."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return measure(file_cases(Path(folder))), []
        except ImportError as error:
            return [], [f"images to .npz: {error}"]


# ----------------------------------------------------------------------------------------------------------------------
# The whole, on a GPU


class Beginning:
    """The first steps of a sampler: a steady state from which the rest follows."""

    def __init__(self, sampler: Sampler, steps: int) -> None:
        self.times, self.step = sampler.times[:steps], sampler.step


class Ready(NamedTuple):
    """What a guided run needs."""

    evaluate: Evaluate
    sampler: Beginning
    labels: Tensor
    null_class: int
    shape: tuple[int, int, int]

    def run(self) -> Tensor:
        """Latents after the steps."""
        noise = ImageNoise(0, range(len(self.labels)), self.shape, self.labels.device)
        denoise = guided(self.evaluate, self.labels, self.null_class, GUIDANCE)
        return sample_loop(denoise, self.sampler, noise.initial(), noise_fn=noise)


def prepare(
    network: Network, images: int, spec: str, make: Callable[[GaussianDiffusion], Sampler], steps: int,
    *, dtype: torch.dtype | None = torch.bfloat16, compiler: str | None = None, capture: Capture | None = None,
) -> Ready:  # fmt: skip
    """A network made ready as the pipeline does it.

    Args:
        network: changed in place.
        images: guided, so twice as many rows.
        spec: step spec.
        make: the sampler.
        steps: how many of its steps a run takes.
        dtype: of autocast; None is float32.
        compiler: backend for the blocks; None leaves them as they are.
        capture: records evaluations; None does not.
    """
    device = next(network.parameters()).device
    process = create_diffusion(spec, learn_sigma=network.out_channels != network.in_channels)
    sampler = Beginning(make(process), steps)
    network = network.requires_grad_(False)
    prepared = network.for_sampling(sampler.times)
    evaluate: Evaluate = prepared
    labels = torch.arange(images, device=device) % network.num_classes
    shape = (network.in_channels, network.input_size, network.input_size)
    if dtype is not None:
        evaluate = autocast(prepared, device, dtype)
        x = torch.zeros(1, *shape, device=device)
        cast_weights_once(prepared, dtype, lambda: evaluate(x, sampler.times[0], labels[:1]))
    if compiler is not None:
        network.compile_blocks(compiler)
    if capture is not None:
        evaluate = GraphedNetwork(evaluate, capture)
    return Ready(evaluate, sampler, labels, network.null_class, shape)


def guided_case(
    network: Network, images: int, name: str, steps: int, *, compiler: str | None = None, capture: Capture | None = None
) -> Case:
    """Some guided steps in bf16; images per second are those of a whole trajectory of such steps."""
    spec, make = SAMPLERS[name]
    length = create_diffusion(spec).num_timesteps
    title = f"{name}-{length}, {_guided(images)}, bf16"
    kind = ", blocks compiled" if compiler else ", CUDA graphs" if capture else ""
    return Case(
        title + kind,
        lambda: prepare(network, images, spec, make, steps, compiler=compiler, capture=capture),
        Ready.run,
        outcome=_result,
        reference=title if kind else None,
        tolerance=BF16,
        flop=steps * forward_flop(network, 2 * images),
        images=images * steps / length,
        precision="bf16",
        steps=steps,
    )


def _guided(images: int) -> str:
    return f"{images} guided image{'s' if images > 1 else ''}"


def diffusers_case(network: DiT, images: int, steps: int) -> Case:
    """The same DDIM steps as diffusers' pipeline takes them, weights in bf16.

    Raises:
        ImportError: if diffusers is not installed.
    """
    from diffusers import DDIMScheduler

    from models.diffusers_format import diffusers_network

    spec, make = SAMPLERS["DDIM"]
    device = next(network.parameters()).device

    def ready() -> tuple[Any, Any, Tensor, Tensor]:
        twin = nn.Module.to(diffusers_network(network), device, torch.bfloat16)  # its own way to move would warn
        twin.pos_embed.pos_embed.copy_(network.pos_embed)  # type: ignore[union-attr,operator]
        scheduler: Any = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False)
        scheduler.set_timesteps(create_diffusion(spec).num_timesteps)
        labels = torch.arange(images, device=device) % network.num_classes
        shape = (network.in_channels, network.input_size, network.input_size)
        return twin, scheduler, labels, ImageNoise(0, range(images), shape, device).initial()

    @torch.no_grad()
    def run(state: tuple[Any, Any, Tensor, Tensor]) -> Tensor:
        twin, scheduler, labels, x = state
        both = torch.cat([labels, torch.full_like(labels, network.null_class)])
        for t in scheduler.timesteps[:steps]:
            rows = torch.cat([x, x]).bfloat16()
            out = twin(rows, timestep=t.to(device).expand(len(rows)), class_labels=both).sample
            conditional, null = out[:, : network.in_channels].float().chunk(2)
            x = scheduler.step(null + GUIDANCE * (conditional - null), t, x).prev_sample
        return x

    length = create_diffusion(spec).num_timesteps
    return Case(
        f"DDIM-{length}, {_guided(images)}, diffusers, bf16",
        ready,
        run,
        outcome=_result,
        reference=f"DDIM-{length}, {_guided(images)}, bf16",
        tolerance=BF16,
        flop=steps * forward_flop(network, 2 * images),
        images=images * steps / length,
        precision="bf16",
        steps=steps,
    )


def sampling_groups(
    model: str, images: int, steps: int, device: torch.device, compiler: str | None
) -> Iterator[Callable[[], list[Case]]]:
    """Guided sampling in bf16: every sampler, compiled, one image at a time, and as diffusers does it.

    Args:
        model: registry name.
        images: of a batch; each is two rows.
        steps: of a timed run.
        device: where.
        compiler: backend for the blocks; None leaves them as they are.

    Yields:
        Makers of cases that share a network.
    """

    def every_sampler(kind: str | None) -> list[Case]:
        network = filled_network(model, device)
        return [guided_case(network, images, name, steps, compiler=kind) for name in SAMPLERS]

    def one_image() -> list[Case]:
        network = filled_network(model, device)
        graphs = [CudaCapture()] if device.type == "cuda" else []
        return [guided_case(network, 1, "DDIM", steps, capture=capture) for capture in (None, *graphs)]

    def diffusers() -> list[Case]:
        network = filled_network(model, device)
        assert isinstance(network, DiT)
        return [diffusers_case(network, images, steps)]

    for kind in dict.fromkeys((None, compiler)):
        yield partial(every_sampler, kind)
    yield one_image
    if importlib.util.find_spec("diffusers") is not None and family_of(model).network is DiT:
        yield diffusers


def half_precision_error(model: str, images: int, spec: str, device: torch.device) -> float:
    """Median over images of |bf16 - float32| / |float32| of the latents at the end of a guided DDIM run.

    TF32 is off meanwhile; noise and labels are the same.
    """
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        ends = []
        for dtype in (None, torch.bfloat16):
            network = filled_network(model, device)
            steps = create_diffusion(spec).num_timesteps
            ends.append(prepare(network, images, spec, SAMPLERS["DDIM"][1], steps, dtype=dtype).run().flatten(1))
            del network
            gc.collect()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    exact, half = ends
    return statistics.median(((half - exact).norm(dim=1) / exact.norm(dim=1)).tolist())


def idle_share(intervals: Iterable[tuple[float, float]]) -> float:
    """Share of the time between the first beginning and the last end in which nothing ran.

    Raises:
        ValueError: if there are none.
    """
    ordered = sorted(intervals)
    if not ordered:
        raise ValueError("nothing ran")
    busy, (begin, end) = 0.0, ordered[0]
    for start, stop in ordered:
        if start > end:
            busy, begin = busy + end - begin, start
        end = max(end, stop)
    first, last = ordered[0][0], end
    return 1 - (busy + end - begin) / (last - first)


def idle_while_sampling(ready: Ready, chunks: int, decode: Callable[[Tensor], Tensor]) -> float:
    """How long the device waits while chunks are drawn one after the other, as sample_ddp.py draws them.

    Args:
        ready: draws one chunk.
        chunks: traced ones; one more runs before.
        decode: latents to pixels, behind the main thread, like the conversion to bytes and the way to the host.

    Returns:
        The idle share of the device: of the GPU by its kernels and copies, of a CPU by its operations.
    """
    device = ready.labels.device
    cuda = device.type == "cuda"

    def draw(count: int) -> None:
        with Background(device) as behind:
            for _ in range(count):
                latents = ready.run()
                behind.submit(lambda latents=latents: _to_host(decode(latents)))  # type: ignore[misc]
        if cuda:
            torch.cuda.synchronize(device)

    draw(1)
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        draw(chunks)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    return idle_share(
        (event.time_range.start, event.time_range.end) for event in trace.events() if event.device_type == wanted
    )


@torch.no_grad()
def _to_host(pixels: Tensor) -> None:
    (127.5 * pixels).add_(128.0).clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu()


def random_decoder(device: torch.device, channels: int, batch: int) -> Callable[[Tensor], Tensor]:
    """A decoder of the official autoencoder's size with random weights, in bf16, `batch` images at a time.

    Raises:
        ImportError: if diffusers is not installed.
    """
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512) if device.type == "cuda" else (8, 8, 8, 8)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    groups = 32 if device.type == "cuda" else 4
    vae: Any = AutoencoderKL(
        block_out_channels=widths, down_block_types=down, up_block_types=up, layers_per_block=2, norm_num_groups=groups,
        latent_channels=channels,
    )  # fmt: skip
    vae = nn.Module.to(vae, device, torch.bfloat16).to(memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return torch.cat([vae.decode(piece.bfloat16()).sample.float() for piece in latents.split(batch)])

    return decode


def sampling_facts(
    model: str, device: torch.device, images: int, steps: int, spec: str, deadline: float
) -> tuple[dict[str, float], list[str]]:
    """Shares that no timed run gives: how long the device idles, and how far bf16 is from float32.

    Args:
        model: registry name.
        device: where.
        images: of a batch.
        steps: of a traced chunk.
        spec: steps of the trajectories whose precision is compared.
        deadline: on the monotonic clock; nothing is begun after it.

    Returns:
        Shares by what they are, and a word on each that there was no time or no package for.
    """
    facts: dict[str, float] = {}
    skipped: list[str] = []

    def idle() -> float:
        ready = prepare(filled_network(model, device), images, *SAMPLERS["DDIM"], steps)
        return idle_while_sampling(ready, 2, random_decoder(device, ready.shape[0], images // 2))

    wanted: dict[str, Callable[[], float]] = {
        f"device idle while chunks of {images} images are drawn, decoded and fetched": idle,
        f"bf16 latents against float32, {spec}, median over images": lambda: half_precision_error(
            model, max(2, images // 4), spec, device
        ),
    }
    for name, measure in wanted.items():
        if time.monotonic() > deadline:
            skipped.append(f"{name}: the time is up")
            continue
        try:
            facts[name] = measure()
        except (ImportError, torch.cuda.OutOfMemoryError) as error:
            skipped.append(f"{name}: {error}")
        gc.collect()
    return facts, skipped
