"""Flags of train.py: defaults, groups of help, owners of settings, the learning rate."""

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import train
from models import FAMILIES, create_model
from runtime.documents import free_settings
from runtime.errors import UserError, run
from runtime.settings import setting
from tests import runs
from tests.runs import DIGITS, checkpoint, metrics, open_setup, start, state
from training.config import TrainSettings, parse_settings
from training.optimization import OPTIMIZERS, register
from training.settings import OptimizationSettings


def settings(*argv: str) -> OptimizationSettings:
    return parse_settings(argv).general.optimization


def test_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    own = settings(*"--lr 1 --lr-schedule cosine --lr-warmup-steps 10 --lr-final-ratio 0.1".split())
    rates = [own.learning_rate(step, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_learning_rate_is_constant_by_default() -> None:
    assert {settings().learning_rate(step, 100) for step in range(100)} == {1e-4}


def test_the_number_of_steps_is_that_of_the_epochs_or_of_the_steps_if_fewer() -> None:
    assert settings("--epochs", "3").total_steps(1024) == 12
    assert settings("--epochs", "3", "--max-steps", "5").total_steps(1024) == 5
    assert settings("--epochs", "3", "--max-steps", "50").total_steps(1024) == 12
    assert settings("--epochs", "1").total_steps(3) == 1


def test_defaults_are_the_official_ones() -> None:
    given = parse_settings([])
    c, o = given.general, given.general.optimization
    assert (c.model, o.epochs, o.global_batch_size, o.global_seed) == ("DiT-XL/2", 1400, 256, 0)
    assert (c.data.num_workers, c.run.log_every, c.run.ckpt_every) == (4, 100, 50_000)
    assert (o.lr, o.ema_decay, str(c.run.results_dir)) == (1e-4, 0.9999, "results")
    optimizer = given.build("optimizer", c.optimizer)
    assert (c.optimizer, optimizer.adam_betas, optimizer.weight_decay) == ("adamw", (0.9, 0.999), 0.0)


def test_what_may_change_on_resume_changes_no_result() -> None:
    """Listed here once more, so that a new setting is not free by mistake."""
    assert free_settings(TrainSettings) == {
        *(f"data.{name}" for name in ("data_path", "strict", "num_workers")),
        *(f"optimization.{name}" for name in ("epochs", "max_steps", "grad_accum", "non_finite")),
        *(f"compute.{name}" for name in ("compile", "grad_checkpointing", "parallel", "shard_ranks")),
        *(f"compute.{name}" for name in ("device", "dist_timeout")),
        *(f"run.{field.name}" for field in dataclasses.fields(TrainSettings().run)),
        *(f"validation.{field.name}" for field in dataclasses.fields(TrainSettings().validation)),
        *("alignment.align_ckpt", "tracking.track", "tracking.track_project"),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Owners of settings


def shown_help(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, str]:
    """Groups of --help by title."""
    with pytest.raises(SystemExit) as stop:
        run(train.main, "train.py", [*argv, "--help"])
    assert not stop.value.code
    groups, title = {"": ""}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line.removesuffix(":")
            groups[title] = ""
        groups[title] += " ".join(line.split()) + " "
    return groups


def test_help_of_a_model_shows_its_settings_and_those_of_its_process_and_loss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    groups = shown_help(capsys, "--model", "DyDiT-S/2")
    assert "--router-layout" in groups["model DyDiT"]
    assert "--depth INT number of transformer blocks (default: 12)" in groups["model DyDiT"]  # that of S
    assert "--noise-schedule" in groups["process gaussian"] and "--flops-target" in groups["loss dydit"]
    assert not any("--flow-shift" in text or "--encoder-depth" in text for text in groups.values())
    general = ["general", "data", "optimization", "compute", "run", "validation", "alignment"]
    assert {*general} < groups.keys() and "--lr FLOAT" in groups["optimization"]
    groups = shown_help(capsys, "--model=DDT-XL/2", "--optimizer", "adamw")
    assert "--encoder-depth" in groups["model DDT"] and "--flow-shift" in groups["process flow"]
    assert "--adam-betas" in groups["optimizer adamw"] and "--route-tokens" in groups["loss diffusion"]


def test_help_alone_lists_the_owners(capsys: pytest.CaptureFixture[str]) -> None:
    groups = shown_help(capsys)
    assert not any(title.startswith(("model ", "process ", "loss ", "optimizer ")) for title in groups)
    (listed,) = (text for title, text in groups.items() if title.startswith("settings of owners"))
    assert "--model NAME DiT, DyDiT, DDT, Skip-DiT" in listed and "--process NAME gaussian, flow" in listed
    assert "--optimizer NAME adamw" in listed and "--loss" not in listed


def test_every_setting_of_a_familys_config_acts() -> None:
    setup = open_setup(*DIGITS, *"--model DyDiT-S/2 --num-classes 10 --depth 8 --hidden-size 528".split())
    reference = create_model("DyDiT-S/2", num_classes=10, depth=8, hidden_size=528, sample_shape=(1, 8, 8))
    theirs = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in setup.network.state_dict().items()} == theirs
    assert setup.document()["model"]["depth"] == 8 and setup.document()["model"]["hidden_size"] == 528
    assert setup.owners.keys() == {"model", "process", "loss", "optimizer"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--model DiT-digits/2 --flops-target 0.5", "--flops-target 0.5: is a setting of the loss dydit; this run"),
        ("--model DiT-digits/2 --stratified-t", "--stratified-t: is a setting of the loss dydit; this run"),
        ("--model DiT-digits/2 --encoder-depth 2", "--encoder-depth 2: is a setting of the model DDT; this run"),
        ("--model DiT-digits/2 --flow-shift 1", "--flow-shift 1.0: is a setting of the process flow; this run uses"),
        ("--model DDT-digits/2 --noise-schedule linear", "of the process gaussian; this run uses flow"),
        ("--model DDT-digits/2 --no-learn-sigma", "--no-learn-sigma: is a setting of the model DiT or DyDiT or S"),
        ("--model DiT-digits/2 --optimizer sgd", "--optimizer sgd: unknown; choose from adamw"),
        ("--model DiT-digits/2 --process jump", "--process jump: unknown; choose from gaussian, flow"),
    ],
)  # fmt: skip
def test_a_flag_of_another_owner_is_refused_by_name(
    argv: str, words: str, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, *DIGITS, *argv.split()) == 2
    assert words in runs.the_error(capsys)
    assert not list(tmp_path.iterdir())


def test_families_and_losses_fit_together() -> None:
    for family, row in FAMILIES.items():
        name = next(name for name in row.configs if "digits" in name)
        assert open_setup(*runs.data_for(family), "--model", name).document()["model"]["name"].startswith(family)


# ----------------------------------------------------------------------------------------------------------------------
# An optimizer is one edit


@pytest.fixture
def momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer with a setting, registered as one in a file of its own would be."""
    monkeypatch.setitem(OPTIMIZERS, "momentum", object)

    @register("momentum")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Momentum:
        momentum: float = setting(0.9, "share of the last step that is kept")

        def make(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
            return torch.optim.SGD(list(parameters), lr=lr, momentum=self.momentum, fused=True)


def test_a_registered_optimizer_has_flags_and_state_and_resumes(momentum: None, tmp_path) -> None:
    argv = [*DIGITS, *"--model DiT-digits/2 --global-batch-size 4 --lr 0.1 --optimizer momentum --momentum 0.8".split()]
    assert start(tmp_path / "whole", *argv, "--max-steps", 4) == 0
    for steps in (2, 4):
        assert start(tmp_path / "cut", *argv, "--max-steps", steps, "--resume", "auto") == 0
    whole, cut = (state(checkpoint(tmp_path / name, 4)) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any(name.endswith("/momentum_buffer") for name in whole)
    config = (runs.run_folder(tmp_path / "cut") / "config.json").read_text()
    assert '"momentum": 0.8' in config and "adam_betas" not in config
    assert start(tmp_path / "none", *argv, "--momentum", 0, "--max-steps", 2) == 0  # keeps no state
    assert start(tmp_path / "none", *argv, "--momentum", 0, "--max-steps", 3, "--resume", "auto") == 0
    assert [m["step"] for m in metrics(tmp_path / "none")] == [1, 2, 3]


def test_settings_of_another_optimizer_are_refused(momentum: None) -> None:
    given = parse_settings(["--optimizer", "momentum", "--weight-decay", "0.1"])
    with pytest.raises(UserError, match="--weight-decay 0.1: is a setting of the optimizer adamw; this run uses mom"):
        given.check_owners(optimizer=given.general.optimizer)
