"""Parts of a network that are trained: those that its family adds, its label table, or low-rank updates (LoRA).

A further choice is a function and a row in `TRAINED`; the trainer sees parameters with and without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

from models import Network, family_of
from models.transfer import LABEL_TABLE
from runtime.errors import UserError
from runtime.seeds import derive_seed
from training.config import TrainSettings


def choose_trained(config: TrainSettings, network: Network, fake: FakeTensorMode | None = None) -> None:
    """Leave a gradient to what --train-only names.

    Args:
        config: Settings of the run.
        network: Network with the weights to start from, or without values.
        fake: Mode of the tensors of a network without values; those that are added get none either.

    Raises:
        UserError: If the network has no such parts, or the other parts would stay random.
    """
    only = config.optimization.train_only
    if only is None:
        return
    TRAINED[only](config, network)
    if config.run.init_from is None and config.run.resume is None:
        raise UserError(f"--train-only {only}: the other parts would stay random; give --init-from")
    for module in network.modules() if fake is not None else ():
        for name, parameter in module.named_parameters(recurse=False):
            if fake is not None and not isinstance(parameter, FakeTensor):
                empty = fake.from_tensor(parameter.detach())
                setattr(module, name, nn.Parameter(empty, parameter.requires_grad))


def train_added(config: TrainSettings, network: Network) -> None:
    """Train the parts that the family adds to the one that it grew from."""
    added = {*family_of(config.model).added_parts}
    if not added:
        raise UserError(f"--train-only added: --model {config.model} adds no parts to another model")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not added.isdisjoint(name.split(".")))


def train_labels(config: TrainSettings, network: Network) -> None:
    """Train the rows of the classes in the label table; the null row stays, and with it every other class."""
    table = label_table(network)
    if table is None:
        raise UserError(f"--train-only labels: --model {config.model} has no label table; it takes no labels")
    network.requires_grad_(False)
    train_rows(table, network)


def train_lora(config: TrainSettings, network: Network) -> None:
    """Add low-rank updates to linear layers, and train these and the rows of the classes in the label table.

    A layer's output gets B A x on top, with A (rank, inputs) random and B (outputs, rank) zero at first.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685, section 4.1, with
        alpha equal to the rank.
    """
    if family_of(config.model).data_dependent:
        raise UserError(
            f"--train-only lora: --model {config.model} computes with parts of its layers, which LoRA does not reach; "
            "fine-tune all weights, or the DiT that it grew from"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model  # heavy, and an extra
    except ImportError as error:
        raise UserError("--train-only lora: needs the package peft; pip install 'dit-family[finetune]'") from error
    layers, rank = choose_layers(config.model, network, config.lora.lora_layers), config.lora.lora_rank
    torch.manual_seed(derive_seed("lora", config.optimization.global_seed))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), network)
    table = label_table(network)
    if table is not None:
        train_rows(table, network)


TRAINED: dict[str, Callable[[TrainSettings, Network], None]] = {
    "added": train_added,
    "labels": train_labels,
    "lora": train_lora,
}


def label_table(network: nn.Module) -> nn.Parameter | None:
    """The label table; None in networks without labels."""
    return dict(network.named_parameters()).get(LABEL_TABLE)


def train_rows(table: nn.Parameter, network: Network) -> None:
    """Give a gradient to the rows of classes, and none to the null row, on which guidance of every class depends."""
    count: int = network.config.num_classes

    def of_classes(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:count], torch.zeros_like(gradient[count:])])

    table.requires_grad_(True).register_hook(of_classes)


def choose_layers(model: str, network: Network, endings: Sequence[str] | None) -> list[str]:
    """Names of the linear layers that get low-rank updates.

    Args:
        model: Name of the network, for messages.
        network: The network.
        endings: Ends of names, such as "attn.qkv"; None takes all layers of attention and MLPs in blocks.

    Raises:
        UserError: For an ending that no linear layer has.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if endings is None:
        inside = {id(module) for block in network.blocks for module in block.modules()}
        modules = dict(network.named_modules())
        return [name for name in linear if id(modules[name]) in inside and "adaLN_modulation" not in name.split(".")]
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in linear):
            has = dict.fromkeys(".".join(name.split(".")[-2:]) for name in linear)
            raise UserError(
                f"--lora-layers {ending}: --model {model} has no such linear layers; it has {', '.join(has)}"
            )
    return [name for name in linear if any(f".{name}".endswith(f".{ending}") for ending in endings)]
