"""Sample moving digits from trained networks at several intervals of Skip-Cache, score them, and show them.

    python scripts/clips_report.py --ckpt digits_video_out/Skip-Latte digits_video_out/Latte
    python scripts/clips_report.py --ckpt digits_video_out --intervals 2 --num-clips 50 --output-dir report

A row is a network at one interval: how many evaluations computed everything, the MACs that a clip took, the share of
clips in which an independent classifier finds the requested digit, the share that moves steadily in the requested
direction, the Frechet distance to the training clips, and the distance to the nearest one, both over those of held-out
clips. All sample the same labels from the same noise. The picture has one clip a row. NETWORK.scores.json, and
NETWORK-N2.scores.json with an interval, hold the scores with their protocol.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.moving_digits import ClipScorer, ClipScores
from benchmarks.report import aligned
from benchmarks.small import BATCH, PROTOCOLS, find_checkpoints, open_model, psnr, sample_images
from benchmarks.timing import check_at_least
from data.pixels import Images, enlarge
from data.writers import writer_of
from evaluator.report import write_document
from evaluator.small import MOVING_DIGITS
from evaluator.small.report import scores_document
from runtime.command_line import parse_config
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from runtime.settings import Values, setting
from sampling.pipeline import Pipeline
from sampling.protocol import protocol_of
from sampling.run import PreparedRun

PROGRAM = "clips_report.py"
TILE = 4  # pixels of the picture for one of a clip


@dataclass(frozen=True, kw_only=True)
class ClipReportSettings:
    """Settings of clips_report.py."""

    ckpt: tuple[Path, ...] = setting((Path("digits_video_out"),), "checkpoints of train.py, or folders of runs")
    num_sampling_steps: int = setting(25, "steps of the sampler")
    intervals: tuple[int, ...] = setting((2, 3, 4), "evaluations from one that computes kept state to the next")
    cfg_scale: float | None = setting(None, "guidance scale", shown="1.1; 1, no guidance, for flows")
    num_clips: int = setting(200, "clips of every row, of all classes in turn")
    seed: int = setting(0, "seed of the noise")
    output_dir: Path = setting(Path("digits_video_out"), "folder of the table, the contact sheets and animations")

    def __post_init__(self) -> None:
        check_at_least(self, 10, "num_clips")
        check_at_least(self, 1, "num_sampling_steps")
        for interval in self.intervals:
            if interval < 2:
                raise ValueError(f"--intervals {interval}: must be at least 2")


class Row(NamedTuple):
    """Result of one network at one interval."""

    name: str  # of the model
    interval: int  # 1: everything at every step
    full: int  # evaluations that computed everything
    evaluations: int
    macs: float  # of one clip
    scores: ClipScores
    psnr: float | None  # to the clips without reuse, dB
    clips: Images  # (N, F, S, S, 1)
    protocol: Values  # settings and weights

    @property
    def file(self) -> str:
        """Start of the names of its files."""
        return self.name.replace("/", "-") + ("" if self.interval == 1 else f"-N{self.interval}")


def open_clip_network(path: Path) -> tuple[Pipeline, ClipScorer]:
    """Open a checkpoint of a network that was trained on moving digits, built so that it keeps state, and its scorer.

    Raises:
        UserError: If it is another.
    """
    model = open_model(path)
    if not isinstance(model.scorer, ClipScorer):
        raise UserError(f"--ckpt {path}: not a checkpoint of train.py --dataset moving-digits")
    return model.pipeline, model.scorer


def prepare(pipeline: Pipeline, config: ClipReportSettings, interval: int) -> PreparedRun:
    """Prepare the run of an interval."""
    sampler, scale = PROTOCOLS[pipeline.info.process]
    scale = scale if config.cfg_scale is None else config.cfg_scale
    reuse = {} if interval == 1 else {"cache_interval": interval}
    steps = str(config.num_sampling_steps)
    return pipeline.prepare(sampler=sampler, num_sampling_steps=steps, cfg_scale=scale, **reuse)


def examine(pipeline: Pipeline, scorer: ClipScorer, config: ClipReportSettings) -> list[Row]:
    """All rows of one network."""
    rows, labels = list[Row](), scorer.labels_in_turn(config.num_clips)
    for interval in (1, *(config.intervals if pipeline.network.keeps_state else ())):
        prepared = prepare(pipeline, config, interval)
        clips, cost = sample_images(pipeline, prepared, labels, config.seed)
        macs, scores = cost.executed.total() / len(clips), scorer.score(clips, labels)
        difference = psnr(clips, rows[0].clips) if rows else None
        full, count = sum(evaluation.refresh for evaluation in prepared.table), len(prepared.table)
        job = {"num_fid_samples": len(clips), "global_seed": config.seed, "balanced_labels": True, "class_labels": None}
        protocol = protocol_of(pipeline, prepared, PROGRAM, job={**job, "per_proc_batch_size": BATCH})
        rows.append(Row(pipeline.info.model, interval, full, count, macs, scores, difference, clips, protocol))
    return rows


def describe(row: Row, scorer: ClipScorer) -> Values:
    """Describe the scores of a row in the form of the evaluator's results."""
    digest = hashlib.sha256(np.ascontiguousarray(row.clips).data).hexdigest()
    count, frames, side, *_ = row.clips.shape
    size = {"image_size": [side, side], "frames": frames}
    return scores_document(
        row.scores,
        MOVING_DIGITS,
        reference={
            "sha256": scorer.train.digest(),
            "clips_in_file": len(scorer.train),
            "image_size": side,
            "frames": frames,
        },
        samples={"path": PROGRAM, "sha256": digest, "clips_in_file": count, **size},
        protocol=row.protocol,
        config={"set": MOVING_DIGITS.name},
    )


def table(rows: Sequence[Row], scorer: ClipScorer) -> str:
    """Markdown, with held-out clips in the last row."""
    titles = ["network", "N", "full evaluations", "M MACs", "recognised", "direction", "Frechet", "nearest", "PSNR, dB"]
    lines = [
        [
            row.name,
            "" if row.interval == 1 else str(row.interval),
            f"{row.full} of {row.evaluations}",
            f"{row.macs / 1e6:,.0f}",
            f"{row.scores.accuracy:.3f}",
            f"{row.scores.direction:.3f}",
            _shown(row.scores.frechet_ratio),
            f"{row.scores.nearest_ratio:.2f}",
            "" if row.psnr is None else f"{row.psnr:.1f}",
        ]
        for row in rows
    ]
    real = scorer.score(*scorer.real(scorer.test))
    shares = [f"{real.accuracy:.3f}", f"{real.direction:.3f}"]
    lines.append(["real, held out", "", "", "", *shares, _shown(real.frechet_ratio), "1.00", ""])
    return aligned(titles, lines, left=2)


def _shown(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def main(argv: Sequence[str]) -> None:
    """Sample, score, write.

    Raises:
        UserError: For wrong flags or files.
    """
    config = parse_config(ClipReportSettings, argv, program=PROGRAM, doc=__doc__)
    paths = [path for place in config.ckpt for path in find_checkpoints([place])]
    if not paths:
        raise UserError(f"--ckpt {config.ckpt[0]}: no checkpoint there; bash scripts/digits_video.sh makes some")
    networks = [open_clip_network(path) for path in paths]
    check_writable(config.output_dir / "clips.md", "--output-dir")
    rows: list[Row] = []
    for pipeline, scorer in networks:
        own = examine(pipeline, scorer, config)
        for row in own:
            write_document(describe(row, scorer), config.output_dir / f"{row.file}.scores.json")
        for row in own[:2]:
            shown, writer = enlarge(row.clips[:10], TILE), writer_of(pipeline.image_shape)
            for suffix, columns in ((".png", 1), (".gif", 5)):
                writer.save(shown, config.output_dir / f"{row.file}{suffix}", columns, gap=2)
        rows += own
    text = table(rows, scorer)
    with atomic_path(config.output_dir / "clips.md") as path:
        path.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(run(main, PROGRAM))
