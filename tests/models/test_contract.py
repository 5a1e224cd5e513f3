"""What the base class of all networks promises when a family adds nothing."""

import pytest

from models import Network


def test_a_network_is_its_own_preparation_unless_it_says_otherwise() -> None:
    network = Network()
    assert network.for_sampling([999, 0]) is network


@pytest.mark.parametrize("cost", ["multiply_adds", "layer_norm_elements"])
def test_a_network_without_a_stated_cost_says_so(cost: str) -> None:
    with pytest.raises(TypeError, match="Network does not state its cost"):
        getattr(Network(), cost)()


def test_the_null_class_follows_the_real_ones() -> None:
    network = Network()
    network.num_classes, network.class_dropout_prob = 10, 0.1
    assert network.null_class == 10


def test_there_is_no_null_class_without_label_dropout() -> None:
    network = Network()
    network.num_classes, network.class_dropout_prob = 10, 0.0
    with pytest.raises(ValueError, match="class_dropout_prob is 0: this network has no null class"):
        _ = network.null_class


def test_a_network_that_keeps_nothing_costs_the_same_with_state() -> None:
    network = Network()
    network.multiply_adds = lambda: {"a": 3, "b": 4}
    assert network.keeps_state is False
    assert network.multiply_adds_with_state() == {"a": 3, "b": 4}
    assert network.executed_multiply_adds([True, False, True]) == 21


def test_a_run_costs_what_its_fresh_and_its_reusing_evaluations_do() -> None:
    network = Network()
    network.multiply_adds, network.multiply_adds_with_state = lambda: {"a": 5}, lambda: {"a": 2}
    assert network.executed_multiply_adds([True, False, False]) == 9
    assert network.executed_multiply_adds([]) == 0
