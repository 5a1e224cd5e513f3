"""Settings of the evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluator.inception.weights import default_cache
from evaluator.metrics import DistancePrecision
from evaluator.scores import ADM_METRICS, METRICS
from runtime.devices import DeviceName
from runtime.settings import flag_name, positional, setting

BATCH_SIZE = {"cuda": 64, "cpu": 8}  # a CPU is fastest while layers fit into its caches


@dataclass(frozen=True)
class EvaluatorConfig:
    """Settings of the evaluator; the names of both files are ADM's.

    Raises:
        ValueError: Naming the flag and its value.
    """

    ref_batch: Path = positional(
        "reference .npz: arr_0 images (N, H, W, 3) uint8, or mu, sigma, mu_s, sigma_s, or all; or a folder of PNG"
    )
    sample_batch: Path = positional("samples .npz: arr_0 images (N, H, W, 3) uint8; or a folder of PNG")
    metrics: str = setting(",".join(ADM_METRICS), f"metrics, separated by commas: {', '.join(METRICS)}")
    num_samples: int | None = setting(None, "use only the first images of the samples", shown="all")
    pr_precision: DistancePrecision = setting(
        "adm", "distances of precision and recall: in float16 as in published numbers, or exact"
    )
    backend: Literal["torch", "tensorflow"] = setting(
        "torch", "what runs the Inception network; tensorflow is the cross-check"
    )
    weights: Path | None = setting(
        None, "the frozen graph, classify_image_graph_def.pb", shown="$DIT_EVAL_INCEPTION, or downloaded once"
    )
    offline: bool = setting(False, "never download")
    cache_dir: Path | None = setting(
        None, "folder for weights and the reference's features", shown="~/.cache/dit-family"
    )
    json: Path | None = setting(None, "file for the result", shown="SAMPLES.scores.json")
    batch_size: int | None = setting(None, "images at a time", shown="64 on a GPU, 8 on a CPU")
    device: DeviceName | None = setting(None, "where to compute", shown="cuda if there is one")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("num_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_name(name)} {value}: must be at least 1")
        if self.device == "mps":
            raise ValueError("--device mps: scores need float64, which Apple's GPUs do not compute; use --device cpu")
        if not self._names or self._names - METRICS.keys():
            raise ValueError(f"--metrics {self.metrics}: choose from {', '.join(METRICS)}, separated by commas")

    @property
    def _names(self) -> set[str]:
        return {name.strip() for name in self.metrics.split(",")} - {""}

    @property
    def metric_names(self) -> list[str]:
        """Keys of `METRICS`, in the order of that table."""
        return [name for name in METRICS if name in self._names]

    @property
    def cache(self) -> Path:
        """--cache-dir, or the user's cache folder."""
        return self.cache_dir or default_cache()

    def batch_size_on(self, device_type: str) -> int:
        """--batch-size, or the device's default."""
        return self.batch_size or BATCH_SIZE[device_type]
