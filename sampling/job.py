"""A job of many images: which ones, and how processes share the work and write one file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.sample_file import LISTING, SHARD, SampleFile
from diffusion.solver_table import SolverTable
from runtime import distributed, migrate
from runtime.background import Background
from runtime.distributed import World
from runtime.documents import flag_of, flatten, free_settings, to_dict
from runtime.download import read_record
from runtime.errors import UserError
from runtime.files import atomic_path, check_writable
from runtime.settings import Values, setting
from runtime.shards import Shard
from runtime.stores import check_store, is_there, staged, upload
from runtime.weight_files import weights_sha256
from sampling.clips import ClipSettings
from sampling.config import KINDS, SamplingSettings
from sampling.pipeline import Pipeline, batch_indices
from sampling.plan import COUNTS, JobSettings, plan_job, rows_of_shard
from sampling.prompts import Prompts, deciding
from sampling.protocol import describe_checkpoint, describe_versions, settings_of
from sampling.run import PreparedRun

PROGRAM = "sample_ddp.py"
AUTO_MACS = 64 * 118.6e9  # of a batch: 64 images of XL/2 at 256 pixels, which takes 118.62 G each
LARGEST_AUTO = 256


@dataclass(frozen=True, kw_only=True)
class JobClipSettings(ClipSettings):
    """Files of single clips, in a folder of the .npz's name."""

    save_gif: bool = setting(False, "write clips as GIF, too", free=True)


@dataclass(frozen=True, kw_only=True)
class SampleDDPSettings(SamplingSettings):
    """Settings of sample_ddp.py."""

    job: JobSettings = field(default_factory=JobSettings)
    clips: JobClipSettings = field(default_factory=JobClipSettings)

    @property
    def files(self) -> tuple[str, ...]:
        """Suffixes of the files that are written of every sample."""
        chosen = {".png": self.job.save_png, ".gif": self.clips.save_gif, ".mp4": self.clips.save_mp4}
        return tuple(suffix for suffix, is_chosen in chosen.items() if is_chosen)


def auto_batch_size(macs: int) -> int:
    """Images per batch for a network of this cost: a power of two that keeps a large GPU busy and fits a small one.

    It depends neither on free memory nor on the number of processes: a job's bytes would depend on them.
    """
    fitting = max(1, round(AUTO_MACS / macs))
    return min(LARGEST_AUTO, 1 << fitting.bit_length() - 1)


def fingerprint(path: Path, flag: str = "--ckpt") -> str:
    """SHA-256 of the checkpoint, computed by one process.

    Raises:
        UserError: If it was downloaded and is not what it was then.
    """
    digest = distributed.on_rank0(lambda: weights_sha256(path, flag))
    record = read_record(path)
    if record is not None and record["sha256"] != digest:
        raise UserError(f"{flag} {path}: damaged since it was downloaded; delete it to download it again")
    return digest


def encoder_digest(description: Values) -> str | None:
    """Short digest of an encoder's weights and scaling, whatever its folder; None without weights."""
    content = json.dumps({**description, "name": None}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16] if description["sha256"] else None


class Job:
    """A job, started or resumed.

    Images or clips are cut into chunks by number, and processes take whole chunks; a chunk always has the same number
    of rows (the last one is filled up), on whichever process. So the bytes do not depend on the number of processes.

    Args:
        pipeline: Samples.
        run: From the pipeline, with `SampleDDPSettings`.
        world: This process among all.
        prompts: Prompts of a network that takes text.

    Raises:
        UserError: If the images cannot be made, or the file cannot be started or resumed.
    """

    def __init__(self, pipeline: Pipeline, run: PreparedRun, world: World, prompts: Prompts | None = None) -> None:
        assert isinstance(run.config, SampleDDPSettings)
        self.pipeline, self.run, self.world = pipeline, run, world
        job = run.config.job
        self.writer = run.config.clips.writer(pipeline.image_shape, pipeline.info.path)
        self.plan = plan_job(job, pipeline.num_classes, COUNTS[self.writer.unit], prompts)
        self.size = job.per_proc_batch_size or auto_batch_size(sum(pipeline.network.cost().values()))
        every = len(self.plan.noise)
        job = replace(job, per_proc_batch_size=self.size, num_fid_samples=every)
        self.shard = None if job.shard is None else Shard.parse(job.shard)
        self.rows = rows_of_shard(self.shard, every, self.size)
        self.total = len(self.rows)
        self.checksum = fingerprint(pipeline.info.path)
        self.encoder = distributed.on_rank0(pipeline.encoder.describe)
        self.fixed = fixed = self._deciding_settings(replace(run.config, job=job))
        path = job.output or job.sample_dir / self._name(fixed)
        self.config = replace(run.config, job=replace(job, output=path))
        self.protocol = self._describe()  # what is wrong with it is found before hours of sampling

        self.flag = flag = "--output" if job.output else "--sample-dir"
        path = path if self.shard is None else self.shard.path(path)
        self.path, local = path, staged(path)
        check_store(path, flag)
        check_writable(local, flag)
        *frames, channels, height, width = pipeline.image_shape
        shape = (self.total, *frames, height, width, channels)
        self.file = SampleFile(local, shape, self.size, world.rank, first=self.rows.start)
        self.missing = distributed.on_rank0(lambda: self._open_file(flag))

    def sample(self) -> None:
        """Sample this process's share of the missing chunks; each is decoded and written during the next one."""
        left = sum(map(self.file.rows_in, self.missing))
        hidden = None if self.world.is_main else True
        bar = tqdm(total=self.total, initial=self.total - left, disable=hidden, unit=self.writer.unit)
        with bar, Background(self.world.device) as background:
            for chunk in self.missing[self.world.rank :: self.world.size]:
                rows = batch_indices(self.rows.start + chunk * self.size, self.size, len(self.plan.noise))
                noise, (conditioning, null) = [self.plan.noise[i] for i in rows], self.plan.conditioning(rows)
                latents = self.pipeline.denoise(self.run, self.config.job.global_seed, noise, conditioning, null=null)
                background.submit(partial(self._store, chunk, latents, bar))

    def finish(self, timings: Values) -> Path:
        """Complete the file and write the JSON next to it, on one process; returns the path or address."""
        labels = None if self.plan.labels is None else self.plan.labels[self.rows.start : self.rows.stop].numpy()
        if (listing := self._listing()) is not None:
            with atomic_path(self.file.path.with_suffix(LISTING)) as temporary:
                temporary.write_text(listing, encoding="utf-8")
        self.file.finish(labels, {**self.protocol, "run": timings}, digest=self.shard is not None)
        for suffix in (LISTING, ".json", "", self.path.suffix):  # last what a later job finds
            local = self.file.path.with_suffix(suffix)
            if local.exists():
                upload(local, self.path.with_suffix(suffix), self.flag)
        return self.path

    def _listing(self) -> str | None:
        """Prompts of all samples, one a line; None if there are none, or their texts are not known."""
        prompts = self.plan.prompts
        if prompts is None or not prompts.texts:
            return None
        return "".join(f"{prompts.text_of(i)}\n" for i in self.rows)

    def _store(self, chunk: int, latents: Tensor, bar: tqdm) -> None:
        pixels = self.pipeline.decode(latents, self.run)
        samples = self.writer.to_uint8(pixels).cpu().numpy()[: self.file.rows_in(chunk)]
        for index, sample in enumerate(samples, start=chunk * self.size):
            for suffix in self.config.files:
                self.writer.save(sample[None], self.file.path_of(index, suffix))
        self.file.write(chunk, samples)
        bar.update(min(len(samples) * self.world.size, self.total - bar.n))

    def _deciding_settings(self, config: SampleDDPSettings) -> Values:
        """Everything that decides the images, by flag."""
        cls = type(config)
        free, values = free_settings(cls), flatten(settings_of(self.pipeline, self.run, config))
        settings = {flag_of(cls, KINDS, path): value for path, value in values.items() if path not in free}
        if self.pipeline.guide is not None:
            settings["--guide-ckpt"] = fingerprint(self.pipeline.guide.info.path, "--guide-ckpt")
        if isinstance(self.run.settings, SolverTable):
            settings["--solver-table"] = to_dict(self.run.settings)  # not the name of a file that may change
        settings |= config.clips.given()  # only of networks of clips: names of other jobs stay as they were
        if self.plan.prompts is not None:
            settings |= deciding(self.plan.prompts)
        return {"format": 2, "--ckpt": self.checksum, "--device": self.world.device.type, **settings}

    def _name(self, fixed: Values) -> str:
        """The official name, extended by sampler, steps, and a digest of everything else that decides the images."""
        config, info = self.run.config, self.pipeline.info
        digest = hashlib.blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=4).hexdigest()
        parts = [
            info.model, info.path.stem, "size", self.pipeline.image_shape[-2], "vae", Path(info.encoder).name,
            "cfg", config.guidance.cfg_scale, "seed", fixed["--global-seed"], config.sampler or "table",
            config.num_sampling_steps, digest,
        ]  # fmt: skip
        return f"{'-'.join(map(str, parts)).replace('/', '-')}.npz"

    def _open_file(self, flag: str) -> list[int]:
        """Start or resume the file, on one process; returns the chunks that are still to be made."""
        job, file = self.config.job, self.file
        listing, path = self._listing(), file.path.with_suffix(LISTING)
        if listing is not None and path.exists() and not job.overwrite and path.read_bytes() != listing.encode():
            raise UserError(f"{flag}: {path} exists already, with other text; --overwrite replaces it")
        if file.path != self.path and not job.overwrite and is_there(self.path, flag):
            raise UserError(f"{flag}: {self.path} exists already; --overwrite replaces it")
        try:
            missing = file.open(self._settings(), overwrite=job.overwrite, files=self.config.files)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from error
        if len(missing) < file.chunks:
            print(f"Continuing {file.partial}: {file.chunks - len(missing)} of {file.chunks} chunks are there")
        return missing

    def _settings(self) -> Values:
        """Everything that must not change while a job is unfinished, and is the same in all of its shards."""
        # Not part of the name, under which version 0.1 started jobs without it
        return {**self.fixed, "torch": torch.__version__, migrate.ENCODER: encoder_digest(self.encoder)}

    def _describe(self) -> Values:
        """Settings, checkpoint and versions, as JSON values."""
        sections = settings_of(self.pipeline, self.run, self.config)
        return {
            "config": {"format": 2, "script": PROGRAM, **sections},
            "checkpoint": describe_checkpoint(self.pipeline.info, self.checksum),
            "autoencoder": self.encoder,
            **({} if self.plan.prompts is None else {"text": self.plan.prompts.record}),
            **({} if self.shard is None else {SHARD: {"number": str(self.shard), "settings": self._settings()}}),
            "versions": describe_versions(self.world.device),
        }
