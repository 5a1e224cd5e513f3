"""Sample clips and pictures of digits by their captions, score what is seen in them, and show them with their prompts.

    python scripts/text_report.py --ckpt digits_text_out

A row is clips or pictures at one guidance scale: the share in which an independent classifier finds the digit, and the
shares of the right size and direction, by area and centre of mass. Two rows compare the share of a digit under the
empty prompt with its share where a negative prompt names it. The sheets have the prompts underneath.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.captioned_digits import TextScorer
from benchmarks.moving_digits import Clips
from benchmarks.report import aligned
from benchmarks.small import PROTOCOLS, find_checkpoints
from benchmarks.timing import check_at_least
from data.captioned_digits import KINDS, CaptionedDigits, Content, caption
from data.captioned_digits import SIZES as DIGIT_SIZES
from data.moving_digits import DIRECTIONS
from data.pixels import enlarge
from data.words import DIGITS
from data.writers import writer_of
from runtime.command_line import parse_config
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from runtime.settings import setting
from sampling.pipeline import Pipeline

BATCH = 50
TILE = 4  # pixels of the sheets for one of a sample
SHOWN = 16


@dataclass(frozen=True, kw_only=True)
class TextReportSettings:
    """Settings of text_report.py."""

    ckpt: Path = setting(Path("digits_text_out"), "checkpoint of train.py, or a folder of runs")
    num_sampling_steps: int = setting(25, "steps of the sampler")
    cfg_scales: tuple[float, ...] = setting((1.0, 4.0), "guidance scales; sheets and negative prompts take the last")
    num_samples: int = setting(160, "samples of every row")
    seed: int = setting(0, "seed of the noise")
    output_dir: Path = setting(Path("digits_text_out"), "folder of the table, the sheets and the animation")

    def __post_init__(self) -> None:
        """Validate the fields."""
        check_at_least(self, 10, "num_samples")
        check_at_least(self, 1, "num_sampling_steps")


def contents_in_turn(count: int) -> list[Content]:
    """Contents to ask for: all digits in turn, in all sizes and directions."""
    sizes, directions = list(DIGIT_SIZES), list(DIRECTIONS)
    kinds = [i * 7 % KINDS for i in range(count)]  # 7 has no factor in common with the kinds
    return [
        Content(i % 10, sizes[kind // len(directions)], directions[kind % len(directions)])
        for i, kind in enumerate(kinds)
    ]


def sample_prompts(
    pipeline: Pipeline, config: TextReportSettings, prompts: Sequence[str], scale: float, negative: str = ""
) -> Clips:
    """Sample prompts as (N, F, S, S, 1) uint8; pictures have one frame."""
    rows, null = pipeline.encode_prompts(prompts, negative)
    samples = pipeline.sample(
        seed=config.seed,
        text=rows["text"],
        text_mask=rows["text_mask"],
        null=null,
        batch_size=min(BATCH, len(prompts)),
        sampler=PROTOCOLS[pipeline.info.process][0],
        num_sampling_steps=str(config.num_sampling_steps),
        cfg_scale=scale,
    )
    return samples[:, None] if samples.ndim == 4 else samples


def share_of_named_digits(pipeline: Pipeline, scorer: TextScorer, config: TextReportSettings, scale: float) -> float:
    """Mean share of a digit under the empty prompt where a negative prompt names it."""
    count = max(1, config.num_samples // 10)
    named = [
        scorer.digits(sample_prompts(pipeline, config, [""] * count, scale, f"a {word}")) == digit
        for digit, word in enumerate(DIGITS)
    ]
    return float(np.mean(named))


def examine(pipeline: Pipeline, kind: str, config: TextReportSettings) -> tuple[list[list[str]], Clips]:
    """Rows of the table about clips or pictures, and the samples at the last scale."""
    frames = pipeline.image_shape[0] if len(pipeline.image_shape) == 4 else 1
    train, test = (CaptionedDigits(s, frames=frames, side=pipeline.image_shape[-1]) for s in ("train", "test"))
    scorer, contents, moving = TextScorer(train), contents_in_turn(config.num_samples), frames > 1
    prompts = [caption(content, moving) for content in contents]
    rows = []
    for scale in config.cfg_scales:
        samples = sample_prompts(pipeline, config, prompts, scale)
        scores = scorer.score(samples, contents)
        rows.append([kind, f"{scale:g}", *(f"{x:.3f}" for x in (scores.digit, scores.size, scores.direction))])
    named = share_of_named_digits(pipeline, scorer, config, config.cfg_scales[-1])
    # In the mean over all digits it is a tenth, whatever is sampled
    rows.append([f"{kind}, empty prompt: share of a digit", f"{config.cfg_scales[-1]:g}", f"{0.1:.3f}", "", ""])
    rows.append([f"{kind}, the digit named as negative prompt", f"{config.cfg_scales[-1]:g}", f"{named:.3f}", "", ""])
    real = scorer.score(*scorer.real(test))
    rows.append([f"{kind}, real, held out", "", *(f"{x:.3f}" for x in (real.digit, real.size, real.direction))])
    return rows, samples


def show(samples: Clips, kind: str, folder: Path) -> None:
    """Write the first samples with their prompts underneath: a sheet, and of clips an animation."""
    moving = samples.shape[1] > 1
    shown = enlarge(samples[:SHOWN] if moving else samples[:SHOWN, 0], TILE)
    texts = [caption(content, moving) for content in contents_in_turn(len(shown))]
    writer = writer_of(shown.shape[1:])
    for suffix in (".png", ".gif") if moving else (".png",):
        writer.save(shown, folder / f"{kind}{suffix}", 4, gap=2, texts=texts)


def main(argv: Sequence[str]) -> None:
    """Sample, score, write.

    Raises:
        UserError: For wrong flags or files.
    """
    config = parse_config(TextReportSettings, argv, program="text_report.py", doc=__doc__)
    paths = [*find_checkpoints([config.ckpt])]
    if not paths:
        raise UserError(f"--ckpt {config.ckpt}: no checkpoint there; bash scripts/digits_text.sh makes one")
    clips = Pipeline.from_pretrained(paths[-1], device="cpu")
    if (clips.info.meta or {}).get("train", {}).get("data", {}).get("dataset") != "captioned-digits":
        raise UserError(f"--ckpt {paths[-1]}: not a checkpoint of train.py --dataset captioned-digits")
    still = Pipeline.from_pretrained(paths[-1], device="cpu", num_frames=1, temporal_blocks=False)
    check_writable(config.output_dir / "text.md", "--output-dir")
    table: list[list[str]] = []
    for kind, pipeline in (("clips", clips), ("pictures", still)):
        rows, samples = examine(pipeline, kind, config)
        show(samples, kind, config.output_dir)
        table += rows
    text = aligned(["samples", "guidance", "digit", "size", "direction"], table, left=1)
    with atomic_path(config.output_dir / "text.md") as path:
        path.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(run(main, "text_report.py"))
