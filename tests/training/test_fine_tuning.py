"""Fine-tuning: kept classes, the label table alone, and low-rank updates, from the first step to a merged file."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from models import FAMILIES
from models.loading import load_network
from models.transfer import LABEL_TABLE
from runtime.adapters import DOWN, UP, merge_adapters
from runtime.checkpoint import read_checkpoint
from runtime.errors import UserError
from scripts import merge_lora
from tests import runs
from tests.networks import debug_name, debug_network, inputs, labelled, randomise
from tests.runs import assert_same, checkpoint, last_checkpoint, start, state
from training.config import TrainSettings
from training.fine_tuning import TRAINED, choose_layers, train_labels, train_lora
from training.settings import OptimizationSettings

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed (pip install peft)")
MODEL = "--model DiT-debug/2 --image-size 8 --vae none --in-channels 1 --no-flip --global-batch-size 8".split()
FLAGS = [*MODEL, *"--device cpu --num-workers 0 --log-every 1 --lr 0.01 --precision fp32 --no-learn-sigma".split()]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of the classes a and b, others of c and b, and a checkpoint with random weights of the first two."""
    folder = tmp_path_factory.mktemp("photos")
    for place, classes in (("old", "ab"), ("new", "cb")):
        for i in range(12):
            pixels = np.random.RandomState(i).randint(0, 256, (8, 8), np.uint8)
            path = folder / place / classes[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    argv = [*FLAGS, "--data-path", folder / "old", "--num-classes", 2, "--max-steps", 2, "--ema-decay", 0.5]
    assert start(folder / "runs", *argv) == 0
    return folder


def tuning(material: Path, *argv: object) -> list[object]:
    flags = ["--data-path", material / "new", "--num-classes", 3, "--keep-classes", "--ema-decay", 0.5]
    return [*FLAGS, *flags, "--init-from", last_checkpoint(material / "runs"), *argv]


def group(path: Path, name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in state(path).items() if key.startswith(f"{name}/")}


def test_new_classes_come_after_those_of_the_weights(material: Path, tmp_path: Path) -> None:
    setup = runs.open_setup(*tuning(material))
    assert list(setup.dataset.classes) == ["a", "b", "c"]
    assert {setup.dataset[0, i][1] for i in range(12)} == {1, 2}
    before = read_checkpoint(last_checkpoint(material / "runs")).weights[LABEL_TABLE]
    after = setup.network.state_dict()[LABEL_TABLE]
    assert torch.equal(after[:2], before[:2]) and torch.equal(after[3], before[2]) and len(after) == 4
    assert any("label rows: 2 kept by name, 1 initialised afresh, null row kept" in note for note in setup.start_notes)


def test_classes_of_a_released_table_are_its_numbers(material: Path, tmp_path: Path) -> None:
    weights = read_checkpoint(last_checkpoint(material / "runs")).weights
    torch.save(weights, tmp_path / "a.pt")
    setup = runs.open_setup(*tuning(material, "--init-from", tmp_path / "a.pt", "--num-classes", 4))
    assert list(setup.dataset.classes) == ["0", "1", "b", "c"]
    after = setup.network.state_dict()[LABEL_TABLE]
    assert torch.equal(after[[0, 1, 4]], weights[LABEL_TABLE])


def test_only_rows_of_classes_train_and_the_others_are_as_they_were(material: Path, tmp_path: Path) -> None:
    assert start(tmp_path, *tuning(material, "--train-only", "labels", "--max-steps", 3)) == 0
    before, after = (read_checkpoint(path, "model").weights for path in
                     (last_checkpoint(material / "runs"), last_checkpoint(tmp_path)))  # fmt: skip
    average = read_checkpoint(last_checkpoint(material / "runs")).weights
    for name, value in average.items():  # a run starts from the average
        if name != LABEL_TABLE:
            assert torch.equal(after[name], value), name
    assert torch.equal(after[LABEL_TABLE][[0, 3]], average[LABEL_TABLE][[0, 2]])  # class a, which has no photos; null
    assert not torch.equal(after[LABEL_TABLE][1], average[LABEL_TABLE][1])
    assert {name.rsplit("/", 1)[0] for name in group(last_checkpoint(tmp_path), "optimizer")} == {LABEL_TABLE}
    assert before.keys() == after.keys()


@needs_peft
def test_low_rank_updates_train_resume_bit_by_bit_and_load_as_an_ordinary_checkpoint(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tuning(material, "--train-only", "lora", "--lora-rank", 2, "--ckpt-every", 2)
    assert start(tmp_path / "whole", *argv, "--max-steps", 4) == 0
    assert start(tmp_path / "cut", *argv, "--max-steps", 2) == 0
    assert start(tmp_path / "cut", *argv, "--max-steps", 4, "--resume", "auto") == 0
    path = checkpoint(tmp_path / "whole", 4)
    assert_same(state(path), state(checkpoint(tmp_path / "cut", 4)))

    raw, base = group(path, "model"), read_checkpoint(last_checkpoint(material / "runs")).weights
    trained = {name.rsplit("/", 1)[0] for name in group(path, "optimizer")}
    assert trained == {LABEL_TABLE, *(name for name in raw if name.endswith((DOWN, UP)))} and len(trained) > 30
    for name, value in raw.items():
        if name not in trained:
            assert torch.equal(value, base[name.replace(".base_layer.", ".")]), name
    assert all(raw[name].any() for name in trained if name.endswith(UP))
    assert {len(raw[name]) for name in trained if name.endswith(DOWN)} == {2}

    network, info = load_network(path)
    assert info.classes == ("a", "b", "c") and not any("lora" in name for name in network.state_dict())
    assert_files_of_merge_lora(path, network, tmp_path, base)
    assert start(tmp_path / "next", *tuning(material, "--init-from", path, "--max-steps", 1)) == 0
    assert (
        start(tmp_path / "plain", *tuning(material, "--init-from", tmp_path / "merged.safetensors", "--dry-run")) == 0
    )


def assert_files_of_merge_lora(path: Path, network: nn.Module, folder: Path, base: dict[str, Tensor]) -> None:
    """The merged file is the network, and so is what peft itself makes of the updates and the weights before."""
    from peft import PeftModel

    argv = ["--ckpt", str(path), "--output", str(folder / "merged.safetensors"), "--adapter", str(folder / "lora")]
    merge_lora.main(argv)
    merged, _ = load_network(folder / "merged.safetensors")
    assert_same_values(merged.state_dict(), network.state_dict())
    assert (folder / "lora" / "adapter_model.safetensors").stat().st_size < path.stat().st_size / 8

    start_network, _ = load_network(folder / "merged.safetensors")
    table = {LABEL_TABLE: torch.zeros_like(start_network.state_dict()[LABEL_TABLE])}
    start_network.load_state_dict({**base, **table})
    by_peft = PeftModel.from_pretrained(start_network, str(folder / "lora")).eval().base_model.model
    x, t, _ = inputs(network, 4)
    y = torch.tensor([0, 1, 2, 3])
    actual, expected = by_peft(x, t, y=y).sample, network(x, t, y=y).sample
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def assert_same_values(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def settings(family: str) -> TrainSettings:
    return TrainSettings(model=debug_name(family))


@needs_peft
@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if not row.data_dependent])
def test_every_update_reaches_the_output_and_merges_to_the_same_function(family: str) -> None:
    network = debug_network(family)
    before = dict(network.state_dict())
    x, t, conditioning = inputs(network)
    plain = network(x, t, **conditioning).sample
    train_lora(settings(family), network)
    torch.testing.assert_close(network(x, t, **conditioning).sample, plain, rtol=1e-5, atol=1e-6)  # zero at first
    for name, parameter in network.named_parameters():
        if name.endswith(UP):
            torch.nn.init.normal_(parameter, std=0.1)
    output = network(x, t, **conditioning).sample
    output.square().sum().backward()
    updates = [name for name, _ in network.named_parameters() if name.endswith((DOWN, UP))]
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert {*gradients} - {LABEL_TABLE} == {*updates} and len(updates) >= 2 * 4
    assert [name for name in updates if gradients[name] is None or not gradients[name].any()] == []
    assert (LABEL_TABLE in gradients) == labelled(family)
    assert not torch.allclose(output, plain, atol=1e-3)
    merged = debug_network(family)
    weights = merge_adapters(network.state_dict())
    assert weights.keys() == before.keys()
    merged.load_state_dict(weights)
    torch.testing.assert_close(merged(x, t, **conditioning).sample, output.detach(), rtol=1e-4, atol=1e-5)


@needs_peft
def test_a_dry_run_counts_what_is_trained(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for only in ("lora", "labels", None):
        flags = [] if only is None else ["--train-only", only]
        assert start(tmp_path, *tuning(material, *flags, "--dry-run")) == 0
        out = capsys.readouterr().out
        words = {line.split("  ")[1].strip(): line.split() for line in out.splitlines() if line.startswith("  ")}
        trained = int(re.search(r"of which ([\d,]+) are trained", out)[1].replace(",", ""))  # type: ignore[index]
        sizes[only] = trained, float(words["gradients"][-2]), float(words["optimizer"][-2])
    network = runs.open_setup(*tuning(material)).network
    rank, every = 8, choose_layers("DiT-debug/2", network, None)
    low_rank = sum(rank * sum(network.get_parameter(f"{name}.weight").shape) for name in every)
    table = network.get_parameter(LABEL_TABLE).numel()
    whole = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert [sizes[only][0] for only in sizes] == [low_rank + table, table, whole]
    for trained, gradients, optimizer in sizes.values():
        assert gradients == pytest.approx(4e-9 * trained, abs=6e-4) and optimizer == pytest.approx(
            8e-9 * trained, abs=6e-4
        )
    assert not list(tmp_path.iterdir())


def test_layers_are_chosen_by_the_ends_of_their_names() -> None:
    network = debug_network("DiT")
    every = choose_layers("DiT-debug/2", network, None)
    assert {name.split(".", 2)[2] for name in every} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert choose_layers("DiT-debug/2", network, ("qkv",)) == [name for name in every if name.endswith(".qkv")]
    assert "final_layer.linear" in choose_layers("DiT-debug/2", network, ("final_layer.linear", "proj"))


def test_the_null_row_gets_no_gradient() -> None:
    network = randomise(debug_network("DiT"))
    train_labels(settings("DiT"), network)
    table = network.get_parameter(LABEL_TABLE)
    x, t, _ = inputs(network, 3)
    network(x, t, y=torch.tensor([0, 1, network.config.num_classes])).sample.square().sum().backward()
    assert table.grad is not None and table.grad[:2].any(dim=1).all() and not table.grad[2:].any()
    assert [name for name, p in network.named_parameters() if p.requires_grad] == [LABEL_TABLE]


MISTAKES = {
    "nothing to start from": (
        ["--train-only", "labels", "--num-classes", 2, "--init-from", None],
        "--train-only labels: the other parts would stay random; give --init-from",
    ),
    "DyDiT": (
        ["--train-only", "lora", "--model", "DyDiT-debug/2"],
        "--train-only lora: --model DyDiT-debug/2 computes with parts of its layers, which LoRA does not reach",
    ),
    "another family's layers": (
        ["--train-only", "lora", "--lora-layers", "attn.qkv", "mlp.w1"],
        "--lora-layers mlp.w1: --model DiT-debug/2 has no such linear layers; it has",
    ),
    "no LoRA": (["--lora-rank", 4], "--lora-rank 4: has no effect without --train-only lora"),
    "layers without LoRA": (["--lora-layers", "qkv"], "--lora-layers qkv: has no effect without --train-only lora"),
    "rank 0": (["--train-only", "lora", "--lora-rank", 0], "--lora-rank 0: must be at least 1"),
    "classes of nothing": (["--init-from", None], "--keep-classes: has no effect without --init-from"),
    "a number of classes without the old ones": (["--num-classes", 2], "--num-classes 2: the data has 3 classes; use"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_has_no_meaning_is_refused(
    material: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = MISTAKES[name]
    if "lora" in changes and name == "another family's layers" and find_spec("peft") is None:
        pytest.skip("peft is not installed (pip install peft)")
    argv = tuning(material)
    if None in changes:
        place = argv.index("--init-from")
        argv = argv[:place] + argv[place + 2 :]
        changes = [each for each in changes if each not in ("--init-from", None)]
        argv += ["--no-keep-classes"] if name == "nothing to start from" else []
    assert start(tmp_path, *argv, "--max-steps", 1, *changes) == 2
    assert words in runs.the_error(capsys) and not list(tmp_path.iterdir())


def test_a_network_for_text_has_no_label_table() -> None:
    with pytest.raises(UserError, match="--train-only labels: --model LatteT2V-debug/2 has no label table"):
        train_labels(settings("LatteT2V"), debug_network("LatteT2V"))


def test_peft_is_asked_for_by_name(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert start(tmp_path, *tuning(material, "--train-only", "lora", "--max-steps", 1)) == 2
    assert "--train-only lora: needs the package peft; pip install" in runs.the_error(capsys)


def test_every_choice_of_the_flag_has_a_row() -> None:
    literal, _ = get_args(get_type_hints(OptimizationSettings)["train_only"])
    assert {*get_args(literal)} == {*TRAINED}
