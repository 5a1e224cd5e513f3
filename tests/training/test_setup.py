"""From flags or objects to a run: processes, a resolved config, weights to start from, data sets of one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import models
from data.encoders import Encoder
from models import create_model
from runtime.checkpoint import read_checkpoint
from runtime.distributed import World
from runtime.errors import UserError
from runtime.live_memory import LiveMemory
from tests import runs
from tests.runs import (
    CPU,
    DIGITS,
    assert_same,
    checkpoint,
    last_checkpoint,
    metrics,
    open_setup,
    run_folder,
    start,
    state,
)
from tests.toys import CLIP, TextToy
from training.config import KINDS, parse_settings
from training.run import open_run
from training.setup import Setup, set_up
from training.trainer import Trainer, batches

SHORT = [*DIGITS, *"--global-batch-size 12 --lr 2e-3".split()]
FLOW = {
    "name": "flow", "times": "logit_normal", "shift": 1.0, "weight": "constant", "cosine": 0.0,
    "prediction": "velocity",
}  # fmt: skip
GAUSSIAN = {
    "name": "gaussian", "noise_schedule": "linear", "prediction": "epsilon", "loss_weight": "constant",
    "min_snr_gamma": 5.0,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.parametrize(
    ("model", "flags", "process"),
    [
        ("DDT-digits/2", "", FLOW),
        ("IDiT-digits/2", "", FLOW),
        ("DiT-digits/2", "--process flow", FLOW),
        ("DiT-debug/2", "--process flow", FLOW),  # which predicts a variance elsewhere
        ("DDT-digits/2", "--process gaussian", GAUSSIAN),
        ("DiT-digits/2", "--prediction v --loss-weight min_snr", {
            **GAUSSIAN, "prediction": "v", "loss_weight": "min_snr",
        }),
        ("DDT-digits/2", "--flow-times uniform --flow-shift 2 --flow-weight ratio_at_most_5 --flow-cosine 1", {
            **FLOW, "times": "uniform", "shift": 2.0, "weight": "ratio_at_most_5", "cosine": 1.0,
        }),
    ],
)  # fmt: skip
def test_a_checkpoint_says_how_its_images_were_noised(
    model: str, flags: str, process: dict[str, Any], tmp_path: Path
) -> None:
    assert start(tmp_path, *SHORT, "--model", model, "--max-steps", 1, *flags.split()) == 0
    meta = read_checkpoint(last_checkpoint(tmp_path)).meta
    assert meta is not None and meta["process"] == process
    assert not meta["model"].get("learn_sigma", False)
    assert ("cosine" in metrics(tmp_path)[0]) == bool(process.get("cosine"))


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a flow with settings of its own."""
    results = tmp_path_factory.mktemp("flow")
    argv = [*SHORT, "--model", "DDT-digits/2", "--max-steps", 6, "--flow-shift", 2, "--encoder-depth", 5]
    assert start(results, *argv) == 0
    return results


def test_a_resolved_config_given_back_repeats_the_run_of_a_flow(flow: Path, tmp_path: Path) -> None:
    assert start(tmp_path, "--config", run_folder(flow) / "config.json") == 0
    assert runs.losses(flow) == runs.losses(tmp_path)
    meta = read_checkpoint(last_checkpoint(tmp_path)).meta
    assert meta is not None and meta["model"]["encoder_depth"] == 5 and meta["process"]["shift"] == 2


def test_a_flow_resumes_bit_by_bit_from_its_config(flow: Path, tmp_path: Path) -> None:
    argv = ["--config", run_folder(flow) / "config.json", "--resume", "auto"]
    assert start(tmp_path, *argv, "--max-steps", 3) == 0
    assert start(tmp_path, *argv) == 0
    assert_same(state(checkpoint(flow, 6)), state(checkpoint(tmp_path, 6)))


def test_a_flow_is_learned(tmp_path: Path) -> None:
    argv = "--global-batch-size 32 --log-every 20 --lr 2e-3 --model DDT-digits/2 --max-steps 60".split()
    assert start(tmp_path, *DIGITS, *argv) == 0
    losses = [m["loss"] for m in metrics(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]


def test_former_names_of_settings_are_accepted_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    setup = open_setup(*SHORT, "--model", "DDT-digits/2", "--flow-direction", "0.5")
    assert setup.document()["process"]["cosine"] == 0.5
    assert "train.py: warning: --flow-direction is now --flow-cosine" in capsys.readouterr().err
    setup = open_setup(*SHORT, "--model", "DiT-digits/2", "--predict-xstart")
    assert setup.document()["process"]["prediction"] == "x_start"
    assert "train.py: warning: --predict-xstart is now --prediction x_start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--model DDT-digits/2 --noise-schedule squaredcos_cap_v2", "--noise-schedule squaredcos_cap_v2: is a setting"),
        ("--model DDT-digits/2 --prediction epsilon", "--prediction epsilon: a flow has no prediction 'epsilon'"),
        ("--model DiT-digits/2 --flow-times uniform", "--flow-times uniform: is a setting of the process flow"),
        ("--model DDT-digits/2 --flow-shift 0", "--flow-shift 0.0: the time shift must be positive"),
        ("--model DDT-digits/2 --flow-cosine -1", "--flow-cosine -1.0: the weight of the cosine loss"),
        ("--model DDT-digits/2 --flow-weight min_snr", "--flow-weight: invalid choice: 'min_snr'"),
        ("--model DiT-digits/2 --min-snr-gamma 0", "--min-snr-gamma 0.0: the gamma of min-SNR must be positive"),
        ("--model DiT-digits/2 --process flow --learn-sigma", "--learn-sigma: has no effect with --process flow"),
        ("--model DDT-digits/2 --learn-sigma", "--learn-sigma: is a setting of the model DiT or DyDiT or Skip-DiT"),
        ("--model DDT-digits/2 --encoder-depth 6", "--encoder-depth 6: encoder_depth must lie in 1..5"),
        ("--model DDT-digits/2 --encoder-depth 0", "--encoder-depth 0: encoder_depth must lie in 1..5"),
        ("--model DDT-digits/2 --align test_vit", "--align test_vit: needs RGB images, and these are grey"),
        ("--model DDT-digits/2 --align-block 3", "--align-block 3: has no effect without --align"),
        ("--model DDT-digits/2 --align-ckpt x.pth", "--align-ckpt x.pth: has no effect without --align"),
        ("--model DDT-digits/2 --init-from {missing}", "--init-from {missing} as DDT-digits/2: the weights do not fit"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    argv: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.pth"
    if "{missing}" in argv:
        weights = create_model("DDT-digits/2").state_dict()
        torch.save({k: v for k, v in weights.items() if "s_embedder" not in k}, missing)
    assert start(tmp_path / "results", *SHORT, *argv.format(missing=missing).split()) == 2
    assert words.format(missing=missing) in runs.the_error(capsys)
    assert not (tmp_path / "results").exists()


# ----------------------------------------------------------------------------------------------------------------------
# A data set of one's own


class Noise:
    """Images of noise in two classes, without a file."""

    classes = ["dark", "bright"]
    image_shape: tuple[int, ...] = (3, 8, 8)
    vae = "none"
    worth_workers = False

    def __len__(self) -> int:
        return 6

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any, int]:
        index = key[1]
        image = torch.rand(self.image_shape, generator=torch.Generator().manual_seed(index)) * 2 - 1
        return image, index % 2, index


class Captions(Noise):
    """Images or clips with a text of five tokens, and the text of unconditional rows."""

    classes: list[str] = []
    null_conditioning = {"text": torch.zeros(5, 3), "text_mask": torch.ones(5)}

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        self.image_shape = image_shape

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any, int]:
        image, _, index = super().__getitem__(key)
        mask = (torch.arange(5) <= index % 5).float()
        return image, {"text": torch.full((5, 3), float(index)), "text_mask": mask}, index


TINY = "--model DiT-debug/2 --num-classes 2 --max-steps 3 --global-batch-size 4 --device cpu --log-every 1".split()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_object_is_trained_on(workers: int, tmp_path: Path) -> None:
    argv = f"--results-dir {tmp_path} --eval-every 3 --eval-samples 2 --num-workers {workers}"
    data = Noise()
    data.worth_workers = workers > 0
    setup = set_up(parse_settings([*TINY, *argv.split()]), CPU.device, dataset=data, held_out=Noise())
    assert setup.document()["model"]["sample_shape"] == [3, 8, 8] and setup.config.data.vae == "none"
    Trainer(setup, CPU, open_run(setup, CPU)).run()
    meta = read_checkpoint(checkpoint(tmp_path, 3)).meta
    assert meta is not None
    assert (meta["data"]["image_shape"], meta["data"]["classes"]) == ([3, 8, 8], ["dark", "bright"])
    assert "Dataset contains 6 images (Noise)" in runs.log(tmp_path)
    lines = metrics(tmp_path)
    assert [m["step"] for m in lines] == [1, 2, 3, 3] and lines[-1]["val_loss"] > 0
    assert (run_folder(tmp_path) / "samples" / "0000003.png").exists()


def test_an_average_that_would_never_move_is_one_line() -> None:
    with pytest.raises(UserError, match=r"--ema-every 4: the run ends before, after 3 steps; give at most 3"):
        open_setup(*TINY, "--ema-every", 4, dataset=Noise())
    lines = open_setup(*TINY, "--ema-every", 2, "--ema-decay", 0.5, dataset=Noise()).warnings()
    assert any("still holds 25% of the untrained weights" in line for line in lines)  # of two steps, not three


@dataclass(frozen=True)
class TextConfig:
    sample_shape: tuple[int, ...] = CLIP
    class_dropout_prob: float = 0.5


class TextNetwork(TextToy):
    def __init__(self, config: TextConfig) -> None:
        super().__init__(tuple(config.sample_shape))
        self.config, self.blocks = config, torch.nn.ModuleList()  # type: ignore[assignment]

    def cost(self) -> dict[str, int]:
        return {"all": 1}


@pytest.fixture
def text_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text-conditioned family in the registry."""
    monkeypatch.setitem(models.FAMILIES, "Text", models.Family(TextNetwork, TextConfig, {"text": {}}))
    kinds = [k._replace(owners={**k.owners, "Text": TextConfig}) if k.name == "model" else k for k in KINDS]
    for module in ("config", "setup", "resume"):
        monkeypatch.setattr(f"training.{module}.KINDS", tuple(kinds))


TEXT = "--model text --max-steps 4 --global-batch-size 6 --device cpu --log-every 1 --grad-accum 3 --lr 1e-2".split()


def test_conditioning_may_be_a_dict_of_tensors(text_family: None) -> None:
    """Rows of text and mask follow their clip; where conditioning is dropped, both are those of the data."""
    setup = set_up(parse_settings(TEXT), CPU.device, dataset=Captions(CLIP))
    network, null, dropped = setup.network, Captions.null_conditioning, []
    assert isinstance(network, TextNetwork) and network.sample_shape == CLIP
    for step, pieces in batches(setup, CPU, 0):
        for batch, draws in pieces:
            assert batch.conditioning["text"].shape == (2, 5, 3) and batch.x_start.shape == (2, *CLIP)
            assert torch.equal(batch.conditioning["text"][:, 0, 0], batch.index.float())
            network.seen.clear()
            assert setup.loss(batch, draws, step, {})["loss"].shape == (2,)
            ((_, seen),) = network.seen
            for row, gone in enumerate(draws.dropped[0].tolist()):
                expected = null if gone else {name: leaf[row] for name, leaf in batch.conditioning.items()}
                assert all(torch.equal(seen[name][row], expected[name]) for name in null)
                dropped.append(gone)
    assert len(dropped) == 24 and 4 < sum(dropped) < 20


@pytest.mark.parametrize("image_shape", [(3, 8, 8), (2, 3, 8, 12)])
def test_text_is_trained_on_and_sampled_with_guidance(
    image_shape: tuple[int, ...], text_family: None, tmp_path: Path
) -> None:
    argv = [*TEXT, "--results-dir", str(tmp_path), *"--eval-every 4 --eval-samples 3 --eval-steps 2".split()]
    data = Captions(image_shape)
    setup = set_up(parse_settings(argv), CPU.device, dataset=data, held_out=data)
    before = setup.network.weight.detach().clone()
    Trainer(setup, CPU, open_run(setup, CPU)).run()
    assert not torch.equal(setup.network.weight, before)
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 4] and metrics(tmp_path)[-1]["val_loss"] > 0
    (picture,) = (run_folder(tmp_path) / "samples").glob("*.png")
    with Image.open(picture) as image:
        tiles = (2, 2) if len(image_shape) == 3 else (2, 3)  # of a clip, frames by clips
        assert image.size == tuple(n * 66 + 2 for n in tiles) or len(image_shape) == 4


# ----------------------------------------------------------------------------------------------------------------------
# Rows of a step on many ranks


class Posterior(Encoder):
    """Raw latents are pixels and deviations of one."""

    stochastic = True

    def encode_rows(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels, torch.ones_like(pixels)], dim=1)


def rows_of(setup: Setup, world: World) -> list[dict[str, Tensor]]:
    """Everything about the rows of a rank in step 2, a dictionary for each micro-batch."""
    _, pieces = next(batches(setup, world, 2))
    return [
        {"x": b.x_start, "y": b.conditioning["y"], "t": d.t, "noise": d.noise, "dropped": d.dropped[0], **d.extra}
        for b, d in pieces
    ]


def setup_of(model: str, size: int, *argv: object) -> Setup:
    given = parse_settings([*TINY, "--model", model, "--global-batch-size", str(size), *map(str, argv)])
    setup = set_up(given, CPU.device, dataset=Noise())
    setup.encoder = Posterior()
    return setup


@pytest.mark.parametrize("model", ["DiT-debug/2", "DyDiT-debug/2"])
def test_rows_are_the_same_for_any_number_of_ranks_and_micro_batches(model: str) -> None:
    (whole,) = rows_of(setup_of(model, 64), CPU)
    assert ("gate_noise" in whole) == (model == "DyDiT-debug/2")
    for ranks, pieces in ((64, 1), (4, 4), (1, 16)):
        setup = setup_of(model, 64, "--grad-accum", pieces)
        cut = [piece for rank in range(ranks) for piece in rows_of(setup, World(rank, ranks, CPU.device))]
        assert len(cut) == ranks * pieces
        for name, tensor in whole.items():
            assert torch.equal(torch.cat([piece[name] for piece in cut]), tensor), name


class RandomNumbers(TorchDispatchMode):
    """Counts the random numbers that are made."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("generator") is not None:
            self.count += out.numel()
        return out


@pytest.mark.parametrize("model", ["DiT-debug/2", "DyDiT-debug/2"])
def test_a_ranks_rows_cost_the_same_for_any_number_of_ranks(model: str) -> None:
    """Random numbers made (so time) and memory; but for single numbers per row of the global batch."""
    local, cost = 4, {}
    for ranks in (1, 64):
        setup = setup_of(model, local * ranks)
        with RandomNumbers() as random, LiveMemory() as memory:
            rows_of(setup, World(ranks - 1, ranks, CPU.device))
        singles = local * ranks * (1 + setup.loss.passes(2))  # t, and whether a pass drops the row
        cost[ranks] = random.count - singles, memory.peak
    assert cost[64][0] == cost[1][0] >= local * 2 * 3 * 8 * 8  # noise, and that of the encoder
    assert cost[1][1] <= cost[64][1] <= cost[1][1] + 8 * singles
