"""DyDiT against the recorded numbers of the official implementation, and what its routers promise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.costs import layer_norm_elements, routed_cost
from diffusion import AncestralSampler, Evaluation, create_diffusion, evaluations, guided, sample_loop
from models import FAMILIES, ModelOutput, create_model
from models.dydit import DyDiTConfig, settings_from
from models.dydit_block import gate
from runtime.checkpoint import load_weights
from tests.golden_data import arrays, assert_close, relative_error, table
from tests.golden_dydit import TINY, assert_masks, golden_dydit, golden_gate_noise
from tests.networks import debug_network

# The tolerance of the fixtures' manifest for single evaluations
RTOL, ATOL = 1e-5, 2e-5


# ----------------------------------------------------------------------------------------------------------------------
# Recorded evaluations


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_forward_and_masks_equal_the_recorded_ones(name: str) -> None:
    golden, network = arrays(f"dydit/{name}/eval_forward"), golden_dydit(name)
    x, t, y = (golden[f"in.{key}"] for key in "xty")
    numbers = range(1, network.config.depth + 1)
    out = network(x, t, y=y, features_at=numbers)
    torch.testing.assert_close(out.sample, golden["out.out"], rtol=RTOL, atol=ATOL)
    assert_masks(out, golden)
    for block in numbers:
        torch.testing.assert_close(out.features[block], golden["out.block_out"][:, block - 1], rtol=RTOL, atol=ATOL)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_the_complete_model_equals_the_recorded_one_and_asks_no_router(name: str) -> None:
    golden, network = arrays(f"dydit/{name}/eval_forward"), golden_dydit(name)
    asked: list[object] = []
    for block in network.blocks:
        for router in (block.attn_rate, block.mlp_rate, block.token_selection):
            router.register_forward_hook(lambda module, *_: asked.append(module))
    out = network(golden["in.x"], golden["in.t"], y=golden["in.y"], complete_model=True)
    torch.testing.assert_close(out.sample, golden["out.complete"], rtol=RTOL, atol=ATOL)
    assert out.aux is None and asked == []
    assert relative_error(out.sample, golden["out.out"]) > 0.1  # routing matters in these weights


@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("scale", [1.5, 4.0])
@pytest.mark.parametrize("name", TINY)
def test_guidance_equals_the_recorded_one(name: str, scale: float, prepared: bool) -> None:
    """By masks and by the plan. Conditional and unconditional rows have the same width, but tokens of their own.

    Guidance multiplies rounding by s and s - 1, so the error is measured against the largest value.
    """
    golden, network = arrays(f"dydit/{name}/eval_cfg"), golden_dydit(name)
    rows = len(golden["in.x"]) // 2
    x, y, y_null = golden["in.x"][:rows], golden["in.y"][:rows], golden["in.y"][rows:]
    (t,) = golden["in.t"].unique().tolist()
    if prepared:
        network = network.for_sampling([t])
        network.plan.pack_from = 0
    outputs: list[ModelOutput] = []
    network.register_forward_hook(lambda module, args, out: outputs.append(out))
    denoise = guided(network, {"y": y}, {"y": y_null}, channels=3)
    assert_close(denoise(x, Evaluation(t, scale, guided=True)).sample, golden[f"out.out_{scale}"][:rows])
    assert_masks(outputs[0], golden)
    assert torch.equal(*outputs[0].aux.heads.chunk(2)) and torch.equal(*outputs[0].aux.mlp.chunk(2))
    assert not torch.equal(*outputs[0].aux.tokens.chunk(2))


@torch.no_grad()
@pytest.mark.parametrize("pack_from", [0, 10**6])
def test_the_recorded_ddpm_trajectory_is_repeated_without_what_is_off(pack_from: int) -> None:
    """Free-running: recorded noise, our own latents, all masks as recorded."""
    golden, network = arrays("dydit/v2_tiny/sample_ddpm"), golden_dydit("v2_tiny")
    sampler = AncestralSampler(create_diffusion("8"))
    assert sampler.times == tuple(golden["out.t_model"].tolist())
    prepared = network.for_sampling(sampler.times)
    assert prepared.plan is not None
    prepared.plan.pack_from = pack_from
    z, y = golden["in.z"], golden["in.y"]
    rows = len(z) // 2
    # The official loop carries the latents twice; they are equal, and so is the noise it needs.
    assert torch.equal(z[:rows], z[rows:])
    noise = iter(golden["out.noise_steps"][:, :rows])
    steps: list[Tensor] = []
    outputs: list[ModelOutput] = []
    prepared.register_forward_hook(lambda module, args, out: outputs.append(out))
    denoise, run = guided(prepared, {"y": y[:rows]}, {"y": y[rows:]}, channels=3), evaluations(sampler.times, 4.0)
    noise_fn, on_step = (lambda x: next(noise)), (lambda i, x, out: steps.append(x))
    sample_loop(denoise, sampler, z[:rows], run, noise_fn=noise_fn, on_step=on_step)
    for i, (x, out) in enumerate(zip(steps, outputs, strict=True)):
        assert_close(x, golden["out.x_steps"][i, :rows])
        assert torch.equal(out.aux.heads, golden["out.attn_width_mask"][i].expand(2 * rows, -1, -1))
        assert torch.equal(out.aux.mlp, golden["out.mlp_width_mask"][i].expand(2 * rows, -1, -1))
        assert torch.equal(out.aux.tokens, golden["out.token_mask"][i].transpose(0, 1).float())


# ----------------------------------------------------------------------------------------------------------------------
# Gates


@torch.no_grad()
@pytest.mark.parametrize("name", ["train_complete", "train_plain"])
def test_masks_under_recorded_noise_equal_the_recorded_ones(name: str) -> None:
    golden = arrays(f"dydit/v2_tiny/{name}")
    x_t = create_diffusion().q_sample(golden["in.x_start"], golden["in.t"], golden["in.noise"])
    network, noise = golden_dydit("v2_tiny"), golden_gate_noise(golden)
    assert_masks(network(x_t, golden["in.t"], y=golden["in.labels_dynamic"], gate_noise=noise), golden)


def test_the_gate_equals_the_recorded_one_forward_and_backward() -> None:
    golden = arrays("dydit/v2_tiny/gumbel_sigmoid_unit")
    for mode, noise in (("train", golden["g1"] - golden["g2"]), ("eval", None)):
        logits = golden["logits"].clone().requires_grad_()
        mask = gate(logits, noise).values
        mask.backward(golden["upstream"])
        assert torch.equal(mask.detach(), golden[f"{mode}_mask"])
        torch.testing.assert_close(logits.grad, golden[f"{mode}_grad"], rtol=1e-6, atol=1e-8)


def test_a_gate_is_exactly_0_or_1_and_closed_at_0() -> None:
    logits = torch.cat([torch.linspace(-100, 100, 10_001), torch.tensor([0.0, -torch.inf, torch.inf])])
    mask = gate(logits).values
    assert set(mask.tolist()) == {0.0, 1.0}
    assert torch.equal(mask[-3:], torch.tensor([0.0, 0.0, 1.0]))


# ----------------------------------------------------------------------------------------------------------------------
# Layouts, sizes, costs


@pytest.mark.parametrize("layout", ["first_always_on", "all_heads"])
def test_weights_with_the_official_names_and_shapes_load_strictly(layout: str) -> None:
    official = table("dydit/official_xl2_256_keys")
    shapes = dict(official["keys"]["first_always_on"])
    if layout == "all_heads":
        shapes |= official["keys"]["all_heads_differences"]
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert len(weights) == official["num_keys"] == 516
    with torch.device("meta"):
        named = create_model("DyDiT-XL/2")
        fields = settings_from(weights, named.config)
        network = create_model("DyDiT-XL/2", **fields)
    assert fields == {"router_layout": layout}
    network.load_state_dict(weights, strict=True, assign=True)
    assert [(name, list(tensor.shape)) for name, tensor in network.state_dict().items()] == list(shapes.items())
    counts = official["parameters"][layout]
    assert sum(p.numel() for p in network.parameters()) == counts["total"]
    routers = sum(
        p.numel() for n, p in network.named_parameters() if {*n.split(".")} & {*FAMILIES["DyDiT"].added_parts}
    )
    assert routers == counts["routers"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["first_always_on", "all_heads"])
def test_random_weights_of_full_size_are_loaded_and_kept(layout: str) -> None:
    with torch.device("meta"):
        shapes = create_model("DyDiT-XL/2", router_layout=layout).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.empty(meta.shape).normal_(generator=generator) for name, meta in shapes.items()}
    network = create_model("DyDiT-XL/2", **settings_from(weights, DyDiTConfig()))
    load_weights(network, weights, "test")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_weights_say_what_layout_they_have() -> None:
    for name, layout in (("v2_tiny", "first_always_on"), ("v1_tiny", "all_heads")):
        weights = arrays(f"dydit/{name}/state_dict")
        assert settings_from(weights, DyDiTConfig(num_heads=4)) == {"router_layout": layout}
    with pytest.raises(ValueError, match="routers of 3 gates; 6 heads need 5 or 6"):
        settings_from(arrays("dydit/v2_tiny/state_dict"), DyDiTConfig(num_heads=6))
    assert settings_from(create_model("DiT-debug/2").state_dict(), DyDiTConfig()) == {}


@pytest.mark.parametrize(("size", "published"), [("S", 6.07), ("B", 23.02), ("XL", 118.69)])
def test_the_published_totals_are_those_without_routers_with_layer_norms(size: str, published: float) -> None:
    with torch.device("meta"):
        network = create_model(f"DyDiT-{size}/2")
    parts = network.cost()
    total = sum(parts.values()) - parts["routers"] + 4 * layer_norm_elements(network)
    assert round(total / 1e9, 2) == published
    if size == "XL":
        assert round(parts["routers"] / 1e9, 3) == 0.596


@torch.no_grad()
def test_masks_reduce_the_costs_of_attention_and_mlp() -> None:
    network = golden_dydit("v2_tiny")
    golden = arrays("dydit/v2_tiny/eval_forward")
    out = network(golden["in.x"], golden["in.t"], y=golden["in.y"])
    dense, at = network.cost(), routed_cost(network, out.aux)
    heads, (groups, tokens) = out.aux.heads.mean(), (mask.mean(-1) for mask in out.aux[1:])
    for part, share in (("attention_linear", heads), ("attention_products", heads), ("mlp", (groups * tokens).mean())):
        assert at.pop(part) == pytest.approx(float(share) * dense[part], rel=1e-6) and 0 < share < 1
    assert all(count == dense[part] for part, count in at.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"router_layout": "some_heads"}, "router_layout 'some_heads' is none of first_always_on, all_heads"),
        ({"num_heads": 1}, "num_heads 1 leaves nothing to switch"),
        ({"mlp_ratio": 3.3}, "mlp_ratio 3.3 makes 211 channels, which cannot be cut into num_heads 4 groups"),
        ({"hidden_size": 8, "num_heads": 2}, "hidden_size 8 is too small for a token router"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("DyDiT-debug/2", **overrides)


# ----------------------------------------------------------------------------------------------------------------------
# A fresh network


@torch.no_grad()
@pytest.mark.parametrize("layout", ["first_always_on", "all_heads"])
def test_a_fresh_network_switches_nothing_off(layout: str) -> None:
    network = create_model("DyDiT-debug/2", router_layout=layout)
    for noise in (None, torch.randn(8, *network.gate_noise_shape)):
        out = network(torch.randn(8, 4, 8, 8), torch.rand(8) * 999, y=torch.arange(8), gate_noise=noise)
        assert all((mask == 1).all() for mask in out.aux)


@torch.no_grad()
def test_routers_start_at_the_biases_that_were_asked_for() -> None:
    network = create_model("DyDiT-debug/2", width_router_bias=2.5, token_router_bias=-1.0)
    for block in network.blocks:
        assert (block.attn_rate.router.bias == 2.5).all() and (block.mlp_rate.router.bias == 2.5).all()
        assert (block.token_selection.mlp_head[2].bias == -1).all() and not block.token_selection.mlp_head[0].bias.any()
    assert {DyDiTConfig().width_router_bias, DyDiTConfig().token_router_bias} == {15.0, 35.0}


@torch.no_grad()
def test_with_everything_on_it_is_the_dit_of_its_weights() -> None:
    plain = debug_network("DiT")
    network = create_model("DyDiT-debug/2").eval()
    network.load_state_dict(plain.state_dict(), strict=False)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 999]), torch.tensor([1, 2, 10])
    for out in (network(x, t, y=y), network(x, t, y=y, complete_model=True)):
        assert_close(out.sample, plain(x, t, y=y).sample, 1e-6)


def test_every_trainable_parameter_takes_part() -> None:
    network = debug_network("DyDiT")
    noise = torch.randn(4, *network.gate_noise_shape)
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([5, 100, 500, 999]), torch.arange(4)
    out = network(x, t, y=y, gate_noise=noise)
    (out.sample.square().sum() + sum(mask.sum() for mask in out.aux)).backward()
    idle = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
