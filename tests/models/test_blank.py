"""Networks that are filled from a file are built without values, and differ in nothing from others."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import models
from models.blank import blank_model, without_values
from models.loading import load_network
from runtime.checkpoint import load_weights
from tests.networks import debug_name, debug_network, inputs


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_blank_network_is_filled_to_the_same_one(family: str) -> None:
    network = debug_network(family)
    state = torch.get_rng_state()
    blank = blank_model(debug_name(family))
    assert all(tensor.is_meta for tensor in blank.state_dict().values())
    load_weights(blank, network.state_dict(), "x")
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    assert not any(tensor.is_meta for tensor in (*blank.parameters(), *blank.buffers()))
    assert [p.requires_grad for p in blank.parameters()] == [p.requires_grad for p in network.parameters()]
    x, t, conditioning = inputs(network)
    assert torch.equal(blank.eval()(x, t, **conditioning).sample, network(x, t, **conditioning).sample)


def test_weights_are_copied_in_the_dtype_of_the_network() -> None:
    weights = {name: tensor.bfloat16() for name, tensor in debug_network("DiT").state_dict().items()}
    blank = blank_model(debug_name("DiT"))
    load_weights(blank, weights, "x")
    assert {tensor.dtype for tensor in blank.state_dict().values()} == {torch.float32}
    full = {name: tensor.float() for name, tensor in weights.items()}
    again = blank_model(debug_name("DiT"))
    load_weights(again, full, "x")
    for tensor in full.values():
        tensor.fill_(7)
    assert all(torch.equal(ours, weights[name].float()) for name, ours in again.state_dict().items())


@pytest.mark.parametrize("kind", ["attribute", "buffer that is not saved"])
def test_a_network_that_makes_tables_of_its_own_is_built_with_values(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = models.DiT.__init__

    def with_table(self: models.DiT, config: object) -> None:
        original(self, config)
        if kind == "attribute":
            self.table = torch.arange(3.0)
        else:
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    monkeypatch.setattr(models.DiT, "__init__", with_table)
    name = debug_name("DiT")
    assert blank_model(name).table.tolist() == [0, 1, 2]
    path = tmp_path / "x.safetensors"
    save_file({key: value.contiguous() for key, value in models.create_model(name).state_dict().items()}, path)
    network, _ = load_network(path, model=name)
    assert network.table.tolist() == [0, 1, 2]
    assert not any(leaf.is_meta for leaf in tree_leaves(dict(network.named_parameters())))


def test_initialisers_leave_tensors_without_values_alone() -> None:
    with without_values():
        layer = nn.Embedding(4, 3)
        for initialise in (nn.init.normal_, nn.init.trunc_normal_, nn.init.xavier_uniform_, nn.init.zeros_):
            result: Tensor = initialise(layer.weight)
            assert result is layer.weight and result.is_meta
    assert nn.init.normal_(torch.zeros(100)).std() > 0.5, "outside the block they draw"
