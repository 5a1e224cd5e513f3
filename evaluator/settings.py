"""Settings of the evaluator: flags, defaults, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from runtime.config import flag_name, positional, setting

from evaluator.inception.weights import default_cache
from evaluator.metrics import DistancePrecision
from evaluator.scores import ADM_METRICS, METRICS

BATCH_SIZE = {"cuda": 64, "cpu": 8}  # a CPU is fastest while layers fit into its caches


@dataclass(frozen=True)
class EvaluatorConfig:
    """Settings of the evaluator; the names of both files are ADM's."""

    ref_batch: Path = positional("reference .npz: arr_0 images (N, H, W, 3) uint8, or mu, sigma, mu_s, sigma_s, or all")
    sample_batch: Path = positional("samples .npz: arr_0 images (N, H, W, 3) uint8")
    metrics: str = setting(",".join(ADM_METRICS), f"what to compute, separated by commas: {', '.join(METRICS)}")
    num_samples: int | None = setting(None, "use only the first images of the samples")
    pr_precision: str = setting(
        "adm", "distances of precision and recall: in float16 as in published numbers, or exact", ("adm", "float32")
    )
    backend: str = setting("torch", "what runs the network; tensorflow is the cross-check", ("torch", "tensorflow"))
    weights: Path | None = setting(None, "the frozen graph, classify_image_graph_def.pb, instead of a downloaded one")
    offline: bool = setting(False, "never download")
    cache_dir: Path | None = setting(None, "where weights and a reference's features are kept (~/.cache/dit-family)")
    json: Path | None = setting(None, "where the result goes (beside the samples, as NAME.scores.json)")
    batch_size: int | None = setting(None, "images at a time (64 on a GPU, 8 on a CPU)")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name in ("num_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_name(name)} {value}: must be at least 1")
        if not self._wanted or self._wanted - METRICS.keys():
            raise ValueError(f"--metrics {self.metrics}: choose from {', '.join(METRICS)}, separated by commas")

    @property
    def _wanted(self) -> set[str]:
        return {name.strip() for name in self.metrics.split(",")} - {""}

    @property
    def metric_names(self) -> list[str]:
        """Keys of `METRICS`, in the order of that table."""
        return [name for name in METRICS if name in self._wanted]

    @property
    def distance_precision(self) -> DistancePrecision:
        """--pr-precision, as the metrics take it."""
        return cast(DistancePrecision, self.pr_precision)

    @property
    def cache(self) -> Path:
        """--cache-dir, or the user's cache folder."""
        return self.cache_dir or default_cache()

    def images_at_a_time(self, device_type: str) -> int:
        """--batch-size, or what suits the device."""
        return self.batch_size or BATCH_SIZE[device_type]
