import pytest
import torch

from models import create_model
from models.transfer import LABEL_TABLE, adapt_weights
from runtime.checkpoint import load_weights
from runtime.errors import UserError
from tests.networks import debug_network, randomise


def network(**overrides):
    return randomise(create_model("DiT-debug/2", **overrides))


def test_weights_that_fit_are_left_alone():
    source, target = network(), network()
    weights, notes = adapt_weights(target, source.state_dict())
    assert notes == [] and all(torch.equal(weights[k], v) for k, v in source.state_dict().items())


def test_label_rows_are_kept_by_name_and_the_others_drawn():
    source, target = network(num_classes=3), network(num_classes=4)
    weights, notes = adapt_weights(
        target, source.state_dict(), old_classes=["ant", "bee", "cat"], new_classes=["bee", "cow", "cat", "dog"]
    )
    old, own, new = source.state_dict()[LABEL_TABLE], target.state_dict()[LABEL_TABLE], weights[LABEL_TABLE]
    assert torch.equal(new[0], old[1]) and torch.equal(new[2], old[2]) and torch.equal(new[-1], old[-1])
    assert torch.equal(new[1], own[1]) and torch.equal(new[3], own[3])
    assert notes == ["label rows: 2 kept by name, 2 drawn anew, null row kept"]
    target.load_state_dict(weights)


def test_the_same_number_of_other_classes_is_not_mistaken_for_the_same_classes():
    source, target = network(num_classes=2), network(num_classes=2)
    weights, _ = adapt_weights(target, source.state_dict(), old_classes=["a", "b"], new_classes=["b", "c"])
    assert torch.equal(weights[LABEL_TABLE][0], source.state_dict()[LABEL_TABLE][1])
    assert torch.equal(weights[LABEL_TABLE][1], target.state_dict()[LABEL_TABLE][1])


def test_without_names_another_class_count_keeps_the_null_row():
    source, target = network(num_classes=5), network(num_classes=3)
    weights, notes = adapt_weights(target, source.state_dict(), new_classes=["x", "y", "z"])
    assert torch.equal(weights[LABEL_TABLE][-1], source.state_dict()[LABEL_TABLE][-1])
    assert torch.equal(weights[LABEL_TABLE][:-1], target.state_dict()[LABEL_TABLE][:-1])
    assert notes == ["label rows: 0 kept by name, 3 drawn anew, null row kept"]


def test_another_resolution_recomputes_positions():
    source, target = network(), create_model("DiT-debug/2", input_size=16)
    weights, notes = adapt_weights(target, source.state_dict())
    assert torch.equal(weights["pos_embed"], target.pos_embed)
    assert notes == ["positions recomputed for 64 tokens (the weights had 16)"]
    target.load_state_dict(weights)


def test_a_plain_network_starts_one_with_skip_units_which_are_drawn_anew_and_named():
    source, target = network(depth=8), create_model("Skip-DiT-debug/2")
    own = {name: value.clone() for name, value in target.state_dict().items()}
    weights, notes = adapt_weights(target, source.state_dict())
    assert notes == [
        "drawn anew, because the weights have none: skip_norms.0..3.weight, skip_norms.0..3.bias, "
        "skip_linears.0..3.linear.weight, skip_linears.0..3.linear.bias"
    ]
    load_weights(target, weights, "test")
    for name, value in target.state_dict().items():
        assert torch.equal(value, own[name] if name.startswith("skip_") else source.state_dict()[name])


def test_skip_units_that_are_there_are_kept():
    source, target = debug_network("Skip-DiT"), create_model("Skip-DiT-debug/2")
    weights, notes = adapt_weights(target, source.state_dict())
    assert notes == [] and all(torch.equal(weights[name], value) for name, value in source.state_dict().items())


def test_some_missing_skip_units_are_damage_and_not_a_start():
    source, target = debug_network("Skip-DiT").state_dict(), create_model("Skip-DiT-debug/2")
    del source["skip_norms.2.bias"]
    weights, notes = adapt_weights(target, source)
    assert notes == []
    with pytest.raises(UserError, match=r"do not fit the model in 1 places.*: missing skip_norms\.2\.bias"):
        load_weights(target, weights, "test")


def test_a_network_of_two_layers_names_its_one_skip_unit():
    _, notes = adapt_weights(create_model("Skip-DiT-debug/2", depth=2), network(depth=2).state_dict())
    assert notes[0].endswith("skip_linears.0.linear.weight, skip_linears.0.linear.bias")
