"""Save a checkpoint as a folder with a model card, or upload it to the Hugging Face hub; see docs/publishing.md.

    python scripts/publish.py --ckpt CKPT --output digits --license apache-2.0
    python scripts/publish.py --folder digits --repo YOUR_NAME/digits          # as it is, with its card
    python scripts/publish.py --ckpt CKPT --repo YOUR_NAME/digits --license apache-2.0 --scores samples.scores.json

The token is that of `hf auth login` or HF_TOKEN. The card has the recipe, the data, the losses in the folder of the
run, and the scores and pictures that are given. Samples of the weights have `--sampler`, `--num-sampling-steps` and
`--cfg-scale` where no other flags are given. `--ckpt YOUR_NAME/digits` samples from the repository, on any machine.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.plotting import pyplot, save_figure, style
from diffusion import PROCESSES, SAMPLERS
from models.loading import CheckpointInfo
from runtime.command_line import parse_config
from runtime.errors import run
from runtime.hub import CARD, check_repository, latest_commit
from runtime.pretrained import SHARD_SIZE, check_shard_size
from runtime.settings import flag_name, setting
from sampling.cards.card import read_losses
from sampling.cards.pictures import CURVE, check_names
from sampling.cards.recipe import untrained
from sampling.cards.scores import read_scores
from sampling.pipeline import Pipeline
from sampling.publishing import DTYPES
from sampling.upload import push_saved

METRICS = "metrics.jsonl"
# Settings that decide what is written from a checkpoint, and their flags
SAMPLING = ("sampler", "num_sampling_steps", "cfg_scale")
NAMES = "weights model process num_classes vae scores pictures for_diffusers dtype shard_size code_url".split()
OF_CHECKPOINTS = {name: flag_name(name) for name in (*NAMES, *SAMPLING)} | {"licence": "--license"}


@dataclass(frozen=True, kw_only=True)
class PublishSettings:
    """Settings of publish.py."""

    ckpt: Path | None = setting(
        None, "checkpoint: a file, a folder, the name of a released one, or owner/name[@revision] on the hub"
    )
    folder: Path | None = setting(None, "folder of an earlier --output, to upload as it is, with what was added to it")
    weights: str = setting("ema", "weights of a training checkpoint: ema, model, or one of several averages by name")
    model: str | None = setting(None, "name of the model", shown="the checkpoint's")
    process: str | None = setting(None, "noise process", tuple(PROCESSES), shown="the checkpoint's")
    num_classes: int | None = setting(None, "number of classes", shown="the weights'")
    vae: str | None = setting(None, "autoencoder: ema, mse, a local folder, or none", shown="the checkpoint's")
    output: Path | None = setting(None, "new folder to save to")
    repo: str | None = setting(None, "repository to upload to, owner/name")
    licence: str | None = setting(
        None, "licence of the weights, such as apache-2.0", flag="--license", shown="that of weights they came from"
    )
    sampler: str | None = setting(None, "sampler", tuple(SAMPLERS), shown="the process's first, or a release's own")
    num_sampling_steps: str | None = setting(
        None, "number of steps, or step spec such as 10,15,20 or ddim50", shown="the sampler's, or a release's own"
    )
    cfg_scale: float | None = setting(
        None, "guidance scale; 1: no guidance", shown="1.5, or a release's own; 1 without labels"
    )
    private: bool = setting(False, "make a new repository private")
    update: bool = setting(False, "replace weights of this code that are in the repository")
    card: Literal["keep", "new"] | None = setting(
        None, "of a card that was edited on the hub: keep it, or replace it by a new one", shown="an error"
    )
    code_url: str | None = setting(
        None, "public address of this code, for the card", shown="that of git's remote origin, if it is public"
    )
    scores: tuple[Path, ...] = setting((), "files of scores that the evaluator wrote")
    pictures: tuple[Path, ...] = setting((), "pictures of samples")
    for_diffusers: bool = setting(False, "write a pipeline that diffusers loads, with its code")
    dtype: str = setting("fp32", "of the weights of blocks: fp32, or bf16 for half the size", tuple(DTYPES))
    shard_size: str = setting(SHARD_SIZE, "largest size of a file of weights, such as 500MB")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if (self.ckpt is None) == (self.folder is None):
            raise ValueError("--ckpt, --folder: give one of them")
        if (self.output is None) == (self.repo is None):
            raise ValueError("--output, --repo: give one of them")
        for name in ("private", "update", "folder", "card"):
            if getattr(self, name) and self.repo is None:
                raise ValueError(f"--{name}: has no effect without --repo")
        for name, flag in OF_CHECKPOINTS.items():
            if self.folder is not None and getattr(self, name) != getattr(type(self), name, None):
                raise ValueError(f"{flag}: has no effect with --folder, which is uploaded as it is")
        if self.card == "keep" and (self.scores or self.pictures):
            raise ValueError("--scores, --pictures: have no effect with --card keep")
        check_shard_size(self.shard_size, "--shard-size")
        check_names(self.pictures)
        names = [path.name for path in self.scores]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"--scores: two files are named {name}; rename one")


def draw_losses(losses: Sequence[tuple[int, float]], path: Path) -> Path:
    """Draw losses against steps; returns the path."""
    figure, axis = pyplot().subplots(figsize=(6, 3.5), layout="constrained")
    axis.plot(*zip(*losses, strict=True), linewidth=1)
    style(axis, "step", "loss")
    save_figure(figure, path)
    return path


def publish(config: PublishSettings, scratch: Path) -> str:
    """Save or upload; returns the folder or address.

    Raises:
        UserError: For anything about the checkpoint, the files, the licence or the repository that does not fit.
    """
    where: dict[str, Any] = {"private": config.private, "update": config.update, "card": config.card, "flag": "--repo"}
    if config.folder is not None:
        assert config.repo is not None  # `__post_init__` checked it
        return push_saved(config.folder, config.repo, folder_flag="--folder", **where)
    assert config.ckpt is not None
    scores = {path.name: read_scores(path) for path in config.scores}
    if config.repo is not None:
        check_repository(config.repo, update=config.update, card=config.card)
    flags = {name: getattr(config, name) for name in ("model", "process", "num_classes", "vae")}
    given = {name: value for name, value in flags.items() if value is not None}
    pipeline = Pipeline.from_pretrained(config.ckpt, device="cpu", weights=config.weights, **given)
    losses = read_losses(pipeline.info.path.parent.parent / METRICS)
    known: dict[str, Any] = {"scores": scores, "losses": losses, "pictures": config.pictures, "license": config.licence}
    if losses:
        known["curves"] = (draw_losses(losses, scratch / CURVE),)
    known |= {"shard_size": config.shard_size, "dtype": config.dtype, "for_diffusers": config.for_diffusers}
    known["sampling"] = {name: value for name in SAMPLING if (value := getattr(config, name)) is not None}
    if config.code_url is not None:
        known["code_url"] = config.code_url
    for note in notes(config, pipeline.info):
        print(note)
    if config.output is not None:
        place = str(pipeline.save_pretrained(config.output, flag="--output", **known))
    else:
        assert config.repo is not None
        place = pipeline.push_to_hub(config.repo, **where, **known)
    if (line := untrained({**(pipeline.info.meta or {}), "weights": pipeline.info.weights})) is not None:
        print(f"publish.py: warning: {line}; --weights model has others", file=sys.stderr)
    return place


def notes(config: PublishSettings, info: CheckpointInfo) -> Iterator[str]:
    """Lines about a licence that is missing, and about a card that is not taken."""
    origin = None if info.origin is None else info.origin.licence
    if config.output is not None and config.licence is None and ((info.meta or {}).get("licence") or origin) is None:
        yield "--license: not given, so that the card says unknown, and others may not use the weights"
    if config.repo is not None and info.repository is None and (info.path / CARD).is_file():
        yield f"--ckpt {info.path}: its {CARD} is written anew; --folder {info.path} uploads the folder as it is"


def main(argv: Sequence[str]) -> None:
    """Parse flags, save or upload, say where."""
    config = parse_config(PublishSettings, argv, program="publish.py", doc=__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        print(f"Wrote {publish(config, Path(scratch))}")
    if config.repo is not None:
        print(f"This commit, also when others follow: --ckpt {config.repo}@{latest_commit(config.repo)}")


if __name__ == "__main__":
    sys.exit(run(main, "publish.py"))
