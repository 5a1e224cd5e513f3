"""Cases of sampling: the loop around the network, the file at the end, and the whole on a GPU."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import blank_conditioning, forward_flop, random_network
from benchmarks.official import load_official_diffusion
from benchmarks.timing import BF16, Case, Work, failure
from data.encoders import Pixels
from data.pixels import to_uint8
from data.sample_file import SampleFile
from diffusion import Evaluation, ImageNoise, create_diffusion, evaluations, make_sampler, sample_loop
from diffusion.sampling import NoiseFn, Sampler
from models import Conditioning, DiT, ModelOutput, Network, family_of
from models.acceleration import Capture, CudaCapture, GraphedNetwork
from models.loading import CheckpointInfo
from runtime.background import Background
from runtime.given import Given
from runtime.settings import Values
from sampling.config import KINDS, SamplingSettings
from sampling.pipeline import Pipeline, PreparedRun

NPZ_IMAGES, NPZ_SIDE, NPZ_CHUNK = 1000, 256, 32
LATENT = (4, 32, 32)
GUIDANCE = 1.5

# What people sample with: name -> (name in the registry, step spec)
SAMPLERS = {"DDPM": ("ddpm", "250"), "DDIM": ("ddim", "ddim50"), "DPM-Solver++": ("dpm++", "20")}
LENGTHS = {"DDPM": 250, "DDIM": 50, "DPM-Solver++": 20}

# ----------------------------------------------------------------------------------------------------------------------
# The loop around the network

Loop = tuple[Sampler, tuple[Evaluation, ...]]


def loop_cases(device: torch.device, images: int, against: Path | None) -> tuple[list[Case], list[str]]:
    """Whole trajectories with a constant in place of the network, after the official loops if they are given.

    Returns:
        The cases, and the reason for those that cannot be made.
    """
    generator = torch.Generator(device).manual_seed(3)
    x = torch.randn(images, *LATENT, generator=generator, device=device)
    out = ModelOutput(torch.randn(images, 2 * LATENT[0], *LATENT[1:], generator=generator, device=device))
    cases, skipped = [], []
    for name, steps in LENGTHS.items():
        title, first = f"{name}, {steps} steps, {images} images", None
        if against is not None and name != "DPM-Solver++":
            try:
                cases.append(_official_loop(f"official {title}", against, name, x, out.sample))
                first = cases[-1].name
            except ImportError as error:
                skipped.append(f"official {name} loop: {error}")
        run = partial(_loop, out, x, lambda: torch.randn_like)
        cases.append(Case(title, partial(_prepare_loop, name), run, _result, first, steps=steps))
        if name == "DDPM":
            run = partial(_loop, out, x, lambda: ImageNoise(0, range(images), LATENT, device))
            cases.append(Case(f"{title}, noise of each image's own", partial(_prepare_loop, name), run, steps=steps))
    return cases, skipped


def _prepare_loop(name: str) -> Loop:
    kind, spec = SAMPLERS[name]
    sampler = make_sampler(kind, create_diffusion(), spec)
    return sampler, evaluations(sampler.times)


def _loop(out: ModelOutput, x: Tensor, noise: Callable[[], NoiseFn], loop: Loop) -> Tensor:
    torch.manual_seed(0)
    sampler, table = loop
    return sample_loop(lambda x, evaluation, state=None: out, sampler, x, table, noise_fn=noise())


def _result(state: object, result: Tensor) -> list[Tensor]:
    return [result]


def _official_loop(title: str, folder: Path, name: str, x: Tensor, out: Tensor) -> Case:
    process = load_official_diffusion(folder).create_diffusion(SAMPLERS[name][1])
    loop = {"DDPM": process.p_sample_loop, "DDIM": process.ddim_sample_loop}[name]

    def run(loop: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(0)
        return loop(lambda x, t: out, x.shape, noise=x, clip_denoised=False, device=x.device)

    return Case(title, lambda: loop, torch.no_grad()(run), outcome=_result, steps=LENGTHS[name])


# ----------------------------------------------------------------------------------------------------------------------
# The file at the end


def file_cases(folder: Path) -> list[Case]:
    """Images into one .npz, as sample_ddp.py writes them, after NumPy's own writer of an array in memory."""
    shape = (NPZ_IMAGES, NPZ_SIDE, NPZ_SIDE, 3)
    images, labels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), np.arange(NPZ_IMAGES)

    def plain(path: Path) -> Path:
        np.savez(path, images, labels)
        return path

    def ours(path: Path) -> Path:
        file = SampleFile(path, shape, NPZ_CHUNK)
        for chunk in file.open({}, overwrite=True):
            file.write(chunk, images[chunk * NPZ_CHUNK : (chunk + 1) * NPZ_CHUNK])
        file.finish(labels)
        return path

    def content(state: Path, path: Path) -> list[Tensor]:
        with np.load(path) as file:
            return [torch.from_numpy(file["arr_0"][::100]), torch.from_numpy(file["arr_1"])]

    title = f"{NPZ_IMAGES:,} images of {NPZ_SIDE} pixels"
    first = f"{title}, numpy.savez of them all"
    return [
        Case(first, lambda: folder / "a.npz", plain, content, images=NPZ_IMAGES),
        Case(f"{title}, in chunks", lambda: folder / "b.npz", ours, content, first, images=NPZ_IMAGES),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The whole, on a GPU


def random_pipeline(model: str, device: torch.device, compiler: str | None = None, **overrides: object) -> Pipeline:
    """Build the pipeline of a network with random weights, for latents only; blocks compiled if there is a backend."""
    network, process = random_network(model, device, **overrides).requires_grad_(False), family_of(model).process
    if compiler is not None:
        network.compile_blocks(compiler)
    info = CheckpointInfo(Path(model), "random", model, {}, process, process_settings={}, encoder="ema", meta={})
    return Pipeline(network, info, Pixels(), Given(SamplingSettings(model=model), KINDS))


@contextmanager
def tf32_restored() -> Iterator[None]:
    """Restore at the end of the block whether TF32 is allowed: preparing a run decides it for the whole process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Beginning:
    """The first steps of a sampler: a steady state that tells how long all take."""

    def __init__(self, sampler: Sampler, steps: int) -> None:
        self.times, self.step, self.time_convention = sampler.times[:steps], sampler.step, sampler.time_convention


class SamplingRun(NamedTuple):
    """A pipeline, a run that it prepared, and a number of images."""

    pipeline: Pipeline
    prepared: PreparedRun
    images: int

    def latents(self) -> Tensor:
        """Sample latents (N, ..., C, h, w), of all classes in turn or of blank texts."""
        rows, null = conditioning_in_turn(self.pipeline, self.images)
        return self.pipeline.denoise(self.prepared, 0, range(self.images), rows, null=null)


def conditioning_in_turn(pipeline: Pipeline, images: int) -> tuple[Conditioning, Conditioning | None]:
    """Conditional rows of all classes in turn, or blank texts; and unconditional ones, None for the network's own."""
    if pipeline.num_classes:
        return {"y": torch.arange(images) % pipeline.num_classes}, None
    blank = blank_conditioning(pipeline.network, images)
    return blank, blank


def prepare(pipeline: Pipeline, images: int, steps: int | None = None, **settings: object) -> SamplingRun:
    """Prepare a run with the settings of sample.py; with `steps`, only so many of its first steps."""
    with tf32_restored():
        run = pipeline.prepare(**settings)
    if steps is not None:
        run = run._replace(sampler=Beginning(run.sampler, steps), table=run.table[:steps])
    return SamplingRun(pipeline, run, images)


def guided(name: str) -> Values:
    """Settings of guided sampling in bf16 by one of `SAMPLERS`."""
    sampler, steps = SAMPLERS[name]
    return {"sampler": sampler, "num_sampling_steps": steps, "cfg_scale": GUIDANCE, "precision": "bf16"}


def guided_case(
    pipeline: Pipeline, images: int, name: str, steps: int, kind: str = "", capture: Capture | None = None
) -> Case:
    """Some guided steps in bf16; images per second are those of a whole trajectory of such steps."""

    def make() -> SamplingRun:
        run = prepare(pipeline, images, steps, **guided(name))
        if capture is None:
            return run
        return run._replace(prepared=run.prepared._replace(evaluate=GraphedNetwork(run.prepared.evaluate, capture)))

    title, fields = _title(name, images), _of_guided_steps(pipeline.network, images, name, steps)
    work = None if "compiled" in kind else Work("sampling", 2 * images, steps, graphs=capture is not None)
    return Case(title + kind, make, SamplingRun.latents, reference=title if kind else None, work=work, **fields)


def _title(name: str, images: int) -> str:
    return f"{name}-{LENGTHS[name]}, {images} guided image{'s' if images > 1 else ''}, bf16"


def _of_guided_steps(network: Network, images: int, name: str, steps: int) -> Values:
    flop, share = steps * forward_flop(network, 2 * images), images * steps / LENGTHS[name]
    return {"outcome": _result, "tolerance": BF16, "flop": flop, "images": share, "precision": "bf16", "steps": steps}


def diffusers_case(network: DiT, images: int, steps: int) -> Case:
    """The same DDIM steps by diffusers' network and scheduler, weights in bf16.

    Raises:
        ImportError: If diffusers is not installed.
    """
    from diffusers import DDIMScheduler

    from models.diffusers_format import diffusers_network

    device = next(network.parameters()).device

    def ready() -> tuple[Any, Any, Tensor, Tensor]:
        peer: Any = nn.Module.to(diffusers_network(network), device, torch.bfloat16)  # its own `to` would warn
        peer.pos_embed.pos_embed.copy_(network.pos_embed)
        scheduler: Any = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False)
        scheduler.set_timesteps(LENGTHS["DDIM"])
        labels = torch.arange(images, device=device) % network.config.num_classes
        return peer, scheduler, labels, ImageNoise(0, range(images), network.sample_shape, device).initial()

    @torch.no_grad()
    def run(state: tuple[Any, Any, Tensor, Tensor]) -> Tensor:
        peer, scheduler, labels, x = state
        both = torch.cat([labels, torch.full_like(labels, network.config.num_classes)])
        for t in scheduler.timesteps[:steps]:
            rows = torch.cat([x, x]).bfloat16()
            out = peer(rows, timestep=t.to(device).expand(len(rows)), class_labels=both).sample
            conditional, null = out[:, : x.shape[1]].float().chunk(2)
            x = scheduler.step(null + GUIDANCE * (conditional - null), t, x).prev_sample
        return x

    title = _title("DDIM", images)
    name = title.replace(", bf16", ", diffusers, bf16")
    return Case(name, ready, run, reference=title, **_of_guided_steps(network, images, "DDIM", steps))


def sampling_groups(
    model: str, images: int, steps: int, device: torch.device, compiler: str | None
) -> Iterator[Callable[[], list[Case]]]:
    """Makers of cases of guided sampling in bf16: every sampler, compiled, one image, and as diffusers does it.

    Each maker's cases share a network; each takes so many steps, of so many images.
    """

    def every_sampler(backend: str | None) -> list[Case]:
        pipeline, kind = random_pipeline(model, device, backend), ", blocks compiled" if backend else ""
        return [guided_case(pipeline, images, name, steps, kind) for name in SAMPLERS]

    def one_image() -> list[Case]:
        pipeline = random_pipeline(model, device)
        cases = [guided_case(pipeline, 1, "DDIM", steps)]
        if device.type == "cuda":
            cases.append(guided_case(pipeline, 1, "DDIM", steps, ", CUDA graphs", CudaCapture()))
        if device.type == "cuda" and compiler is not None:
            compiled = random_pipeline(model, device, compiler)
            cases.append(guided_case(compiled, 1, "DDIM", steps, ", CUDA graphs, blocks compiled", CudaCapture()))
        return cases

    def diffusers() -> list[Case]:
        network = random_network(model, device)
        assert isinstance(network, DiT)
        return [diffusers_case(network, images, steps)]

    for backend in dict.fromkeys((None, compiler)):
        yield partial(every_sampler, backend)
    yield one_image
    if importlib.util.find_spec("diffusers") is not None and family_of(model).network is DiT:
        yield diffusers


def half_precision_error(model: str, images: int, spec: str, device: torch.device) -> float:
    """Median over images of |bf16 - float32| / |float32| of the latents after a guided DDIM run, without TF32."""
    ends = []
    with tf32_restored():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        for precision in ("fp32", "bf16"):
            settings = {**guided("DDIM"), "num_sampling_steps": spec, "precision": precision}
            ends.append(prepare(random_pipeline(model, device), images, **settings).latents().flatten(1))
    exact, half = ends
    return statistics.median(((half - exact).norm(dim=1) / exact.norm(dim=1)).tolist())


def idle_share(intervals: Iterable[tuple[float, float]]) -> float:
    """Share of the time between the first start and the last end in which nothing ran.

    Raises:
        ValueError: If there are no intervals.
    """
    starts, stops = np.array(sorted(intervals)).reshape(-1, 2).T
    if not len(starts):
        raise ValueError("nothing ran")
    stops = np.maximum.accumulate(stops)
    gaps = np.maximum(starts[1:] - stops[:-1], 0)
    return float(gaps.sum() / (stops[-1] - starts[0]))


def idle_while_sampling(run: SamplingRun, chunks: int, decode: Callable[[Tensor], Tensor]) -> float:
    """Measure how long the device waits while chunks are sampled one after the other, as by sample_ddp.py.

    Args:
        run: Samples one chunk.
        chunks: Number of traced chunks; one more runs before.
        decode: Latents to pixels, in the background, like the conversion to bytes and the way to the host.

    Returns:
        The idle share of the device: of the GPU by its kernels and copies, of a CPU by its operations.
    """
    device = run.pipeline.device
    cuda = device.type == "cuda"

    @torch.no_grad()
    def finish(latents: Tensor) -> None:
        to_uint8(decode(latents)).cpu().numpy()

    def sample(count: int) -> None:
        with Background(device) as background:
            for _ in range(count):
                background.submit(partial(finish, run.latents()))
        if cuda:
            torch.cuda.synchronize(device)

    sample(1)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        sample(chunks)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    return idle_share(
        (event.time_range.start, event.time_range.end) for event in trace.events() if event.device_type == kind
    )


def random_decoder(device: torch.device, channels: int, batch: int) -> Callable[[Tensor], Tensor]:
    """Build a decoder of the official autoencoder's size with random weights, in bf16, `batch` images at a time.

    Raises:
        ImportError: If diffusers is not installed.
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


def sampling_shares(
    model: str, device: torch.device, images: int, steps: int, spec: str, deadline: float
) -> tuple[dict[str, float], list[str]]:
    """Measure shares that no timed run gives: how long the device idles, and how far bf16 is from float32.

    Args:
        model: Name in the registry.
        device: Device of all tensors.
        images: Images of a batch.
        steps: Steps of a traced chunk.
        spec: Step spec of the trajectories in both precisions.
        deadline: Time on the monotonic clock after which nothing is started.

    Returns:
        Shares by name, and the reason for each that is missing.
    """

    def idle() -> float:
        run = prepare(random_pipeline(model, device), images, steps, **guided("DDIM"))
        return idle_while_sampling(run, 2, random_decoder(device, LATENT[0], images // 2))

    measurements: dict[str, Callable[[], float]] = {
        f"device idle while chunks of {images} images are sampled, decoded and fetched": idle,
        f"bf16 latents against float32, {spec}, median over images": partial(
            half_precision_error, model, max(2, images // 4), spec, device
        ),
    }
    shares: dict[str, float] = {}
    skipped: list[str] = []
    for name, measure in measurements.items():
        if time.monotonic() > deadline:
            skipped.append(f"{name}: the time is up")
            continue
        try:
            shares[name] = measure()
        except Exception as error:  # whatever fails must not cost the other results
            skipped.append(f"{name}: {failure(error)}")
    return shares, skipped
