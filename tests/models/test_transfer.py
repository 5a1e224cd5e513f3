import torch

from models import create_model
from models.transfer import LABEL_TABLE, adapt_weights
from tests.networks import randomise


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
