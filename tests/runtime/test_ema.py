import pytest
import torch
from runtime.ema import EMA

from models import create_model


def walk(model, steps):
    """Moves the weights about and yields after each move."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        yield


@pytest.mark.parametrize(("decay", "ramp"), [(0.9, False), (0.99, True)])
def test_average_follows_the_recurrence(decay, ramp):
    model = create_model("DiT-debug/2", depth=1)
    ema = EMA(model, decay, ramp=ramp)
    expected = model.blocks[0].attn.qkv.weight.detach().double()
    for n, _ in enumerate(walk(model, 30)):
        ema.update()
        d = min(decay, (1 + n) / (10 + n)) if ramp else decay
        expected = d * expected + (1 - d) * model.blocks[0].attn.qkv.weight.detach().double()
    assert torch.allclose(ema.network.blocks[0].attn.qkv.weight.double(), expected, atol=1e-6)


def test_frozen_positions_do_not_drift_and_the_average_has_no_gradients():
    model = create_model("DiT-debug/2", depth=1)
    ema = EMA(model, 0.999)
    for _ in walk(model, 20):
        ema.update()
    assert torch.equal(ema.network.pos_embed, model.pos_embed)
    assert not ema.network.training and not any(p.requires_grad for p in ema.network.parameters())
    assert ema.network.state_dict().keys() == model.state_dict().keys()


def test_starts_as_a_copy_and_shares_nothing():
    model = create_model("DiT-debug/2", depth=1)
    ema = EMA(model, 0.5)
    before = ema.network.blocks[0].mlp.fc1.weight.clone()
    assert torch.equal(before, model.blocks[0].mlp.fc1.weight)
    next(walk(model, 1))
    assert torch.equal(ema.network.blocks[0].mlp.fc1.weight, before)
