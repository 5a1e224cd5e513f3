"""DyDiT against the recorded numbers of the official implementation, and what its routers promise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import Batch, Draws, Objective, create_diffusion, guided, sample_loop
from models import DyDiT, Network, create_model
from models.dydit import DyDiTConfig, DyDiTRecipe, gate
from runtime.checkpoint import load_weights
from tests.golden_data import arrays, assert_close, relative_error, table
from tests.networks import debug_network

TINY = ("v2_tiny", "v1_tiny")
# The tolerance of the fixtures' manifest for single evaluations
RTOL, ATOL = 1e-5, 2e-5


def tiny(name: str) -> DyDiT:
    """A recorded network with its weights, strictly loaded, in evaluation mode."""
    network = DyDiT(DyDiTConfig(**table(f"dydit/{name}/config")))
    network.load_state_dict(arrays(f"dydit/{name}/state_dict"))
    return network.eval()


def assert_masks(out: Any, golden: dict[str, Tensor], prefix: str = "out.") -> None:
    """Exactly equal, and exactly 0 or 1."""
    for found, name in zip(out.routing, ("attn_mask", "mlp_mask", "token_mask"), strict=True):
        recorded = golden[prefix + name]
        assert found.dtype == torch.float32
        assert torch.equal(found, recorded.squeeze(-1) if name == "token_mask" else recorded), name


# ----------------------------------------------------------------------------------------------------------------------
# Recorded evaluations


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_forward_and_masks_equal_the_recorded_ones(name: str) -> None:
    golden, network = arrays(f"dydit/{name}/eval_forward"), tiny(name)
    x, t, y = (golden[f"in.{key}"] for key in "xty")
    out = network(x, t, y=y)
    torch.testing.assert_close(out.sample, golden["out.out"], rtol=RTOL, atol=ATOL)
    assert_masks(out, golden)
    for block in range(1, network.config.depth + 1):
        features = network(x, t, y=y, features_at=(block,)).features
        torch.testing.assert_close(features, golden["out.block_out"][:, block - 1], rtol=RTOL, atol=ATOL)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_the_complete_model_equals_the_recorded_one_and_asks_no_router(name: str) -> None:
    golden, network = arrays(f"dydit/{name}/eval_forward"), tiny(name)
    asked: list[object] = []
    for block in network.blocks:
        for router in (block.attn_rate, block.mlp_rate, block.token_selection):
            router.register_forward_hook(lambda module, *_: asked.append(module))
    out = network(golden["in.x"], golden["in.t"], y=golden["in.y"], complete_model=True)
    torch.testing.assert_close(out.sample, golden["out.complete"], rtol=RTOL, atol=ATOL)
    assert out.routing is None and asked == []
    assert relative_error(out.sample, golden["out.out"]) > 0.1  # routing matters in these weights


@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("scale", [1.5, 4.0])
@pytest.mark.parametrize("name", TINY)
def test_guidance_equals_the_recorded_one(name: str, scale: float, prepared: bool) -> None:
    """By masks and by the plan. Both halves have the same width; their tokens are routed by themselves.

    Guidance multiplies the halves' rounding by s and s - 1, so the error is measured against the largest value.
    """
    golden, network = arrays(f"dydit/{name}/eval_cfg"), tiny(name)
    rows = len(golden["in.x"]) // 2
    x, y, y_null = golden["in.x"][:rows], golden["in.y"][:rows], golden["in.y"][rows:]
    (t,) = golden["in.t"].unique().tolist()
    if prepared:
        network = network.for_sampling([t])
        network.plan.pack_from = 0
    outputs = []
    denoise = guided(lambda *args: outputs.append(network(*args)) or outputs[0], y, y_null, scale, channels=3)
    assert_close(denoise(x, t).sample, golden[f"out.out_{scale}"][:rows])
    assert_masks(outputs[0], golden)
    assert torch.equal(*outputs[0].routing.heads.chunk(2)) and torch.equal(*outputs[0].routing.mlp.chunk(2))
    assert not torch.equal(*outputs[0].routing.tokens.chunk(2))


@torch.no_grad()
@pytest.mark.parametrize("pack_from", [0, 10**6])
def test_the_recorded_ddpm_trajectory_is_repeated_without_what_is_off(pack_from: int) -> None:
    """Free-running: recorded noise, our own latents, all masks as recorded."""
    golden, network = arrays("dydit/v2_tiny/sample_ddpm"), tiny("v2_tiny")
    sampler = create_diffusion("8").ancestral()
    assert sampler.times == tuple(golden["out.t_model"].tolist())
    prepared = network.for_sampling(sampler.times)
    assert prepared.plan is not None
    prepared.plan.pack_from = pack_from
    z, y = golden["in.z"], golden["in.y"]
    rows = len(z) // 2
    # The official loop carries both halves along; they are equal, and so is the noise it needs.
    assert torch.equal(z[:rows], z[rows:])
    noise = iter(golden["out.noise_steps"][:, :rows])
    steps: list[tuple[Tensor, Any]] = []
    outputs: list[Any] = []
    denoise = guided(lambda *args: outputs.append(prepared(*args)) or outputs[-1], y[:rows], y[rows:], 4.0, channels=3)
    sample_loop(denoise, sampler, z[:rows], noise_fn=lambda x: next(noise), on_step=lambda i, x, out: steps.append(x))
    for i, (x, out) in enumerate(zip(steps, outputs, strict=True)):
        assert_close(x, golden["out.x_steps"][i, :rows])
        assert torch.equal(out.routing.heads, golden["out.attn_width_mask"][i].expand(2 * rows, -1, -1))
        assert torch.equal(out.routing.mlp, golden["out.mlp_width_mask"][i].expand(2 * rows, -1, -1))
        assert torch.equal(out.routing.tokens, golden["out.token_mask"][i].transpose(0, 1).float())


# ----------------------------------------------------------------------------------------------------------------------
# Recorded training


def recorded_step(name: str) -> tuple[dict[str, Tensor], Objective, Batch, Draws, int]:
    """A recorded training step: its arrays, the objective, batch and draws, and a step number behind the warm-up."""
    golden, network = arrays(f"dydit/v2_tiny/{name}"), tiny("v2_tiny").train()
    complete = name == "train_complete"
    recipe = DyDiTRecipe(flops_target=0.7 if complete else 0.5, complete_loss_steps=None if complete else 0)
    gates = [golden[f"gumbel.{g}_g1"] - golden[f"gumbel.{g}_g2"] for g in ("attn", "token", "mlp")]
    noise = torch.cat([part.flatten(2) for part in gates], dim=2)
    passes = ("dynamic", "complete") if complete else ("dynamic",)
    dropped = torch.stack([golden[f"in.labels_{one}"] != golden["in.y"] for one in passes])
    draws = Draws(golden["in.t"], golden["in.noise"], torch.zeros_like(golden["in.noise"]), dropped, noise)
    batch = Batch(golden["in.x_start"], golden["in.y"], torch.arange(len(golden["in.y"])))
    return golden, Objective(network, create_diffusion(), recipe=recipe), batch, draws, 10**6


@pytest.mark.parametrize("name", ["train_complete", "train_plain"])
def test_recorded_draws_give_the_recorded_losses_ratio_and_gradients(name: str) -> None:
    golden, objective, batch, draws, step = recorded_step(name)
    losses = objective(batch, step, draws)
    losses["loss"].mean().backward()
    close = {"rtol": 1e-5, "atol": 1e-6}
    for recorded, ours in (("mse", "mse"), ("vb", "vb"), ("complete_mse", "complete_mse"), ("complete_vb",) * 2):
        if f"out.loss.{recorded}" in golden:
            torch.testing.assert_close(losses[ours], golden[f"out.loss.{recorded}"], **close)
    assert ("complete_mse" in losses) == (name == "train_complete")
    torch.testing.assert_close(losses["flops_ratio"], golden["out.flops_ratio_per_sample"], **close)
    torch.testing.assert_close(losses["flops_ratio_penalty"].mean(), golden["out.dynamic_loss"], **close)
    torch.testing.assert_close(losses["loss"].mean(), golden["out.total_loss"], **close)
    parameters = dict(objective.network.named_parameters())
    for key, norm in table(f"dydit/v2_tiny/{name}_grad_norms").items():
        if norm is None:
            assert parameters[key].grad is None
        else:
            assert float(parameters[key].grad.norm()) == pytest.approx(norm, rel=2e-5), key
    for key in (k for k in golden if k.startswith("grad.")):
        assert_close(parameters[key.removeprefix("grad.")].grad, golden[key], 2e-5)


@torch.no_grad()
def test_masks_under_recorded_noise_equal_the_recorded_ones() -> None:
    golden, objective, batch, draws, _ = recorded_step("train_complete")
    x_t = objective.process.q_sample(batch.x_start, draws.t, draws.noise)
    out = objective.network(x_t, draws.t, golden["in.labels_dynamic"], gate_noise=draws.gate_noise)
    assert_masks(out, golden)


def test_the_gate_equals_the_recorded_one_forward_and_backward() -> None:
    golden = arrays("dydit/v2_tiny/gumbel_sigmoid_unit")
    for mode, noise in (("train", golden["g1"] - golden["g2"]), ("eval", None)):
        logits = golden["logits"].clone().requires_grad_()
        mask = gate(logits, noise)
        mask.backward(golden["upstream"])
        assert torch.equal(mask.detach(), golden[f"{mode}_mask"])
        torch.testing.assert_close(logits.grad, golden[f"{mode}_grad"], rtol=1e-6, atol=1e-8)


def test_a_gate_is_exactly_0_or_1_and_closed_at_0() -> None:
    logits = torch.cat([torch.linspace(-100, 100, 10_001), torch.tensor([0.0, -torch.inf, torch.inf])])
    mask = gate(logits)
    assert set(mask.tolist()) == {0.0, 1.0}
    assert torch.equal(mask[-3:], torch.tensor([0.0, 0.0, 1.0]))


def test_the_two_passes_drop_different_labels() -> None:
    network = debug_network("DyDiT", class_dropout_prob=0.5)
    objective = Objective(network, create_diffusion(), recipe=DyDiTRecipe())
    seen: list[Tensor] = []
    network.y_embedder.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    batch = Batch(torch.randn(64, 4, 8, 8), torch.arange(64) % 10, torch.arange(64))
    for step in range(3):
        seen.clear()
        objective(batch, step)
        routed, complete = ((y == network.null_class) for y in seen)
        assert 8 < int((routed != complete).sum()) < 56  # independent: half of them differ
        assert 16 < int(routed.sum()) < 48 and 16 < int(complete.sum()) < 48


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
        found = DyDiT.settings_from(weights, named.config)
        network = create_model("DyDiT-XL/2", **found)
    assert found == {"router_layout": layout}
    network.load_state_dict(weights, strict=True, assign=True)
    assert [(name, list(tensor.shape)) for name, tensor in network.state_dict().items()] == list(shapes.items())
    counts = official["parameters"][layout]
    assert sum(p.numel() for p in network.parameters()) == counts["total"]
    routers = sum(p.numel() for n, p in network.named_parameters() if {*n.split(".")} & {*DyDiT.added_parts})
    assert routers == counts["routers"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["first_always_on", "all_heads"])
def test_random_weights_of_full_size_are_loaded_and_kept(layout: str) -> None:
    with torch.device("meta"):
        shapes = create_model("DyDiT-XL/2", router_layout=layout).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.empty(meta.shape).normal_(generator=generator) for name, meta in shapes.items()}
    network = create_model("DyDiT-XL/2", **DyDiT.settings_from(weights, DyDiTConfig()))
    load_weights(network, weights, "test")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_weights_say_what_layout_they_have() -> None:
    for name, layout in (("v2_tiny", "first_always_on"), ("v1_tiny", "all_heads")):
        weights = arrays(f"dydit/{name}/state_dict")
        assert DyDiT.settings_from(weights, DyDiTConfig(num_heads=4)) == {"router_layout": layout}
    with pytest.raises(ValueError, match="routers of 3 gates; 6 heads need 5 or 6"):
        DyDiT.settings_from(arrays("dydit/v2_tiny/state_dict"), DyDiTConfig(num_heads=6))
    assert DyDiT.settings_from(create_model("DiT-debug/2").state_dict(), DyDiTConfig()) == {}


@pytest.mark.parametrize(("size", "published"), [("S", 6.07), ("B", 23.02), ("XL", 118.69)])
def test_the_published_totals_are_those_without_routers_with_layer_norms(size: str, published: float) -> None:
    with torch.device("meta"):
        network = create_model(f"DyDiT-{size}/2")
    parts = network.multiply_adds()
    total = sum(parts.values()) - parts["routers"] + 4 * network.layer_norm_elements()
    assert round(total / 1e9, 2) == published
    if size == "XL":
        assert round(parts["routers"] / 1e9, 3) == 0.596


@torch.no_grad()
def test_the_ratio_is_the_blocks_share_of_multiply_adds() -> None:
    network = tiny("v2_tiny")
    golden = arrays("dydit/v2_tiny/eval_forward")
    out = network(golden["in.x"], golden["in.t"], y=golden["in.y"])
    dense, at = network.multiply_adds(), network.multiply_adds_of(out)
    blocks = ("attention_linear", "attention_products", "mlp")
    ratio = sum(at[part] for part in blocks) / sum(dense[part] for part in blocks)
    assert ratio == pytest.approx(float(network.flops_ratio(out.routing).mean()), rel=1e-6)
    assert all(at[part] == dense[part] for part in dense if part not in blocks)
    complete = network(golden["in.x"], golden["in.t"], y=golden["in.y"], complete_model=True)
    assert network.multiply_adds_of(complete) == dense


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


@pytest.mark.parametrize("layout", ["first_always_on", "all_heads"])
def test_a_fresh_network_switches_nothing_off(layout: str) -> None:
    network = create_model("DyDiT-debug/2", router_layout=layout)
    objective = Objective(network, create_diffusion(), recipe=DyDiTRecipe())
    for step in range(3):
        losses = objective(Batch(torch.randn(8, 4, 8, 8), torch.arange(8), torch.arange(8)), step)
        assert torch.equal(losses["flops_ratio"], torch.ones(8))


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
    network: Network = debug_network("DyDiT")
    objective = Objective(network, create_diffusion(), recipe=DyDiTRecipe(flops_target=0.3))
    objective(Batch(torch.randn(16, 4, 8, 8), torch.arange(16) % 10, torch.arange(16)), 10**6)["loss"].mean().backward()
    idle = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


# ----------------------------------------------------------------------------------------------------------------------
# Recipe


def test_the_target_holds_then_falls_along_a_line() -> None:
    recipe = DyDiTRecipe(flops_target=0.6, flops_warmup_steps=1000)
    assert {recipe.target(step) for step in range(100)} == {1.0}
    assert recipe.target(100) == pytest.approx(0.96) and recipe.target(500) == pytest.approx(0.8)
    assert recipe.target(1000) == recipe.target(10**6) == pytest.approx(0.6)
    assert DyDiTRecipe(flops_target=0.6, flops_warmup_steps=0).target(100) == pytest.approx(0.6)


def test_the_complete_pass_lasts_as_long_as_asked() -> None:
    assert [len(DyDiTRecipe(complete_loss_steps=3).passes(step)) for step in range(5)] == [2, 2, 2, 1, 1]
    assert len(DyDiTRecipe().passes(10**9)) == 2 and len(DyDiTRecipe(complete_loss_steps=0).passes(0)) == 1


def test_a_run_that_ends_before_the_target_has_come_down_is_doubted() -> None:
    assert DyDiTRecipe(flops_warmup_steps=1000).doubts(1001) == []
    (doubt,) = DyDiTRecipe(flops_warmup_steps=1000).doubts(600)
    assert "--flops-warmup-steps 1000: after 600 steps the target is still 0.70, not 0.5" in doubt
    (held,) = DyDiTRecipe(flops_warmup_steps=0).doubts(20)
    assert "still 1.00" in held


def test_gates_are_noisy_as_long_as_asked() -> None:
    recipe = DyDiTRecipe(gate_noise_steps=3)
    assert [[one.noisy_gates for one in recipe.passes(step)] for step in (0, 2, 3)] == [[True, False]] * 2 + [
        [False] * 2
    ]
    assert DyDiTRecipe().passes(10**9)[0].noisy_gates


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01, float("nan")])
def test_a_target_outside_its_range_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match=r"flops_target must lie in \(0, 1\]"):
        DyDiTRecipe(flops_target=target)


@pytest.mark.parametrize("setting", ["flops_weight", "flops_warmup_steps", "complete_loss_steps", "gate_noise_steps"])
def test_negative_settings_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be finite and not negative, not -1"):
        DyDiTRecipe(**{setting: -1})
