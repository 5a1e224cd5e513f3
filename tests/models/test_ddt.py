"""DDT and its undivided baseline against the recorded outputs, layouts and sizes of the official implementation."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.costs import counted_cost, layer_norm_elements, reused_cost
from models import DDT, create_model, llama_layers, model_config
from models.ddt import patchify, unpatchify
from models.layers import timestep_features
from models.llama_layers import rms_norm
from tests.golden_data import arrays, assert_close, table
from tests.golden_ddt import DIVIDED, FORWARD, NETWORKS, assert_within, golden_ddt
from tests.networks import debug_network, randomise

OFFICIAL = table("ddt/official_xl_22en6de_256_keys")
COSTS = {
    "DDT-XL/2": OFFICIAL["flops"],
    "DDT-L/2": OFFICIAL["other_configs"]["DDT-L/2 (20en4de)"],
    "DDT-B/2": OFFICIAL["other_configs"]["DDT-B/2 (8en4de)"],
    **{f"IDiT-{size}/2": OFFICIAL["other_configs"][f"improved DiT-{size}/2"] for size in ("XL", "L", "B")},
}


def undivided(**overrides: Any) -> DDT:
    """The debug-size baseline with random weights."""
    return randomise(create_model("IDiT-debug/2", **overrides))


def rounded_after_the_scale(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as the improved DiT's release computes it under autocast."""
    with torch.autocast("cpu", enabled=False):
        return (functional.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * weight).to(x.dtype)


@torch.no_grad()
def test_bf16_of_an_undivided_network_is_as_near_to_float32_as_with_the_release_s_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mean errors of 60 networks: their ratio is known to 0.4 %."""

    def error(network: DDT) -> float:
        x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([1, 2])
        exact = network(x, t, y=y).sample
        with torch.autocast("cpu", torch.bfloat16):
            return float((network(x, t, y=y).sample - exact).norm() / exact.norm())

    means = []
    for norm in (rms_norm, rounded_after_the_scale):
        monkeypatch.setattr(llama_layers, "rms_norm", norm)
        torch.manual_seed(0)
        means.append(sum(error(randomise(create_model("IDiT-debug/2"), seed)) for seed in range(60)) / 60)
    assert 0.004 < means[1] < 0.01 and means[0] < 1.005 * means[1], means


# ----------------------------------------------------------------------------------------------------------------------
# Recorded outputs


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_equals_the_recorded_one(name: str) -> None:
    golden, network = arrays(f"ddt/{name}/forward"), golden_ddt(name)
    out = network(golden["x"], golden["t"], y=golden["y"])
    assert_within(out.sample, golden["v"], FORWARD)
    assert out.features == {} and out.aux is None
    if name in DIVIDED:
        assert_within(out.state, golden["s"], FORWARD)
    else:
        assert out.state is None


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_another_resolution_and_aspect_ratio_equal_the_recorded_one(name: str) -> None:
    golden = arrays(f"ddt/{name}/forward")
    assert golden["xb"].shape[-2] != golden["xb"].shape[-1]
    assert_within(golden_ddt(name)(golden["xb"], golden["tb"], y=golden["yb"]).sample, golden["vb"], FORWARD)


@torch.no_grad()
@pytest.mark.parametrize("name", DIVIDED)
def test_reused_state_equals_the_recorded_reuse(name: str) -> None:
    golden, network = arrays(f"ddt/{name}/forward"), golden_ddt(name)
    state = network(golden["x"], golden["t"], y=golden["y"]).state
    reused = network(golden["x2"], golden["t2"], y=golden["y2"], state=state)
    fresh = network(golden["x2"], golden["t2"], y=golden["y2"])
    assert reused.state is state
    assert_within(reused.sample, golden["v2_reuse"], FORWARD)
    assert_within(fresh.sample, golden["v2_fresh"], FORWARD)
    assert_within(fresh.state, golden["s2_fresh"], FORWARD)


@torch.no_grad()
@pytest.mark.parametrize("name", DIVIDED)
def test_with_state_time_and_label_have_no_influence_and_the_encoder_does_not_run(name: str) -> None:
    golden, network = arrays(f"ddt/{name}/forward"), golden_ddt(name)
    state = network(golden["x"], golden["t"], y=golden["y"]).state
    ran: list[str] = []
    for part, module in network.named_modules():
        module.register_forward_hook(lambda *_, part=part: ran.append(part))
    first = network(golden["x2"], golden["t2"], y=golden["y2"], state=state).sample
    assert torch.equal(network(golden["x2"], 0.123, y=golden["y2"] * 0, state=state).sample, first)
    encoder = {f"blocks.{i}" for i in range(network.config.encoder_depth)} | {"s_embedder", "t_embedder", "y_embedder"}
    assert f"blocks.{network.config.encoder_depth}" in ran and encoder.isdisjoint(ran)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_parts_equal_the_recorded_ones(name: str) -> None:
    golden, network = arrays(f"ddt/{name}/forward"), golden_ddt(name)
    seen: dict[str, Tensor] = {}
    first = network.blocks[0]
    watched: list[tuple[str, nn.Module]] = [
        ("t_emb", network.t_embedder), ("y_emb", network.y_embedder), ("block0", first), ("attn0", first.attn),
        ("mlp0", first.mlp), ("final_tokens", network.final_layer),
    ]  # fmt: skip
    if name in DIVIDED:
        depth = network.config.encoder_depth
        watched += [("enc_tokens", network.blocks[depth - 1]), ("dec0", network.blocks[depth])]
    for key, module in watched:
        module.register_forward_hook(lambda _, arguments, output, key=key: seen.update({key: output}))
    first.register_forward_pre_hook(lambda _, arguments: seen.update(cond=arguments[1]))
    network(golden["x"], golden["t"], y=golden["y"])
    for key, value in seen.items():
        assert_within(value, golden[key], FORWARD)
    assert_within(patchify(golden["x"], 2), golden["tokens"], 0)
    assert_within(network._table(*(side // 2 for side in golden["x"].shape[-2:]), torch.device("cpu")).unbind(-1)[0],
                  golden["rope_re"], FORWARD)  # fmt: skip


def test_time_features_equal_the_recorded_ones() -> None:
    golden = arrays("ddt/misc")
    assert_within(timestep_features(golden["temb.t"], 256, 10.0), golden["temb.256"], FORWARD)


@torch.no_grad()
@pytest.mark.parametrize("name", DIVIDED)
def test_features_are_the_tokens_after_the_blocks_asked_for(name: str) -> None:
    golden, network = arrays(f"ddt/{name}/forward"), golden_ddt(name)
    depth = network.config.encoder_depth
    recorded = {1: "block0", depth: "enc_tokens", depth + 1: "dec0"}
    features = network(golden["x"], golden["t"], y=golden["y"], features_at=recorded).features
    assert features.keys() == recorded.keys()
    for number, key in recorded.items():
        assert_within(features[number], golden[key], FORWARD)


# ----------------------------------------------------------------------------------------------------------------------
# Layout and size


def test_xl_has_exactly_the_official_parameters_in_the_official_order() -> None:
    with torch.device("meta"):
        network = create_model("DDT-XL/2")
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == OFFICIAL["keys"]
    parts = list(dict.fromkeys(name.split(".")[0] for name, _ in network.named_parameters()))
    assert parts == ["x_embedder", "s_embedder", "t_embedder", "y_embedder", "final_layer", "blocks"]
    assert len(network.state_dict()) == OFFICIAL["num_tensors"] and not list(network.buffers())


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", COSTS)
def test_parameters_and_costs_equal_the_official_counts(name: str, side: int) -> None:
    official = COSTS[name]
    with torch.device("meta"):
        network = create_model(name, sample_shape=(4, side, side))
    assert sum(p.numel() for p in network.parameters()) == official.get("params", official.get("param_count"))
    assert 2 * sum(network.cost().values()) == official[f"flops_latent{side}"]
    with_state = sum(reused_cost(network).values())
    if network.keeps_state:
        # The release embeds the time even where it has no influence.
        d = network.config.hidden_size
        official_decoder = official[f"gmacs_latent{side}_decoder_only_state_given"]
        assert (with_state + 256 * d + d * d) / 1e9 == pytest.approx(official_decoder, abs=5e-4)
    else:
        assert with_state == sum(network.cost().values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["DDT-debug/2", "IDiT-debug/2", "DDT-S/4"])
def test_pytorchs_own_counter_agrees_exactly(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name)
    assert counted_cost(network) == sum(network.cost().values())
    assert counted_cost(network, reused=True) == sum(reused_cost(network).values())
    depth, tokens, width = network.config.depth, network.config.tokens, network.config.hidden_size
    assert layer_norm_elements(network) == (4 * depth + 1) * tokens * width  # per block two, and of queries and keys


def test_sharing_saves_what_the_paper_says() -> None:
    with torch.device("meta"):
        network = create_model("DDT-XL/2")
    full, reused = sum(network.cost().values()), sum(reused_cost(network).values())
    speedups = [n * full / (full + (n - 1) * reused) for n in (4, 10)]
    assert speedups == pytest.approx([2.13, 2.76], abs=0.01)  # what sharing 75 % and 90 % can give at 256 pixels


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("DDT-XL/2", (28, 22, 1152, 16)), ("DDT-L/2", (24, 20, 1024, 16)), ("DDT-B/2", (12, 8, 768, 12)),
        ("IDiT-XL/2", (28, None, 1152, 16)), ("IDiT-L/2", (24, None, 1024, 16)), ("IDiT-B/2", (12, None, 768, 12)),
    ],
)  # fmt: skip
def test_published_configs(name: str, numbers: tuple[int | None, ...]) -> None:
    config = model_config(name)
    assert (config.depth, config.encoder_depth, config.hidden_size, config.num_heads) == numbers
    assert (config.sample_shape, config.num_classes, config.patch_size) == ((4, 32, 32), 1000, 2)


def test_the_width_of_the_mlp_is_rounded_down() -> None:
    assert [model_config(f"DDT-{size}/2").mlp_width for size in ("XL", "L", "B")] == [3072, 2730, 2048]
    assert model_config("DDT-debug/2").mlp_width == 170


# ----------------------------------------------------------------------------------------------------------------------
# Fresh weights


@torch.no_grad()
def test_fresh_weights_follow_the_published_initialisation() -> None:
    network = create_model("DDT-debug/2", num_classes=1000)
    assert network(torch.randn(2, 4, 8, 8), 0.3, y=torch.tensor([0, 1000])).sample.abs().max() == 0
    for linear in (module for module in network.blocks.modules() if isinstance(module, nn.Linear)):
        bound = linear.in_features**-0.5
        assert 0.98 * bound < linear.weight.abs().max() <= bound  # the modulation too: gates do not start at zero
    for embedder in (network.x_embedder, network.s_embedder):
        bound = (6 / (64 + 16)) ** 0.5
        assert 0.95 * bound < embedder.proj.weight.abs().max() <= bound and not embedder.proj.bias.any()
    for layer in (network.t_embedder.mlp[0], network.t_embedder.mlp[2]):
        assert layer.weight.std() == pytest.approx(0.02, rel=0.05)
        assert 0.5 * layer.in_features**-0.5 < layer.bias.abs().max() <= layer.in_features**-0.5
    assert network.y_embedder.embedding_table.weight.std() == pytest.approx(0.02, rel=0.05)
    assert not any(parameter.any() for parameter in network.final_layer.parameters())
    norms = [p for name, p in network.named_parameters() if "norm" in name]
    assert len(norms) == 16 and all((p == 1).all() for p in norms)


@torch.no_grad()
def test_reset_parameters_initialises_everything() -> None:
    network, fresh = debug_network("DDT"), create_model("DDT-debug/2")
    before = {name: p.clone() for name, p in network.named_parameters()}
    network.reset_parameters()
    for (name, p), reference in zip(network.named_parameters(), fresh.parameters(), strict=True):
        assert not torch.equal(p, before[name]), name
        assert p.std() == pytest.approx(reference.std().item(), rel=0.5, abs=1e-6), name


@pytest.mark.parametrize("make", [lambda: debug_network("DDT"), undivided])
def test_every_parameter_takes_part(make: Any) -> None:
    network = make()
    out = network(torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.7]), y=torch.tensor([1, 10]))
    out.sample.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


# ----------------------------------------------------------------------------------------------------------------------
# Behaviour


@torch.no_grad()
def test_half_precision_weights_give_nearly_the_same() -> None:
    network, x, y = debug_network("DDT"), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    reference = network(x, 0.4, y=y).sample
    half = network.bfloat16()(x.bfloat16(), 0.4, y=y)
    assert half.sample.dtype == half.state.dtype == torch.bfloat16
    assert_close(half.sample.float(), reference, 0.05)


@torch.no_grad()
def test_a_prepared_schedule_costs_one_call_of_the_timestep_embedder() -> None:
    network, x, y = debug_network("DDT"), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    calls: list[int] = []
    network.t_embedder.mlp.register_forward_hook(lambda _, arguments, output: calls.append(len(output)))
    times = tuple(i / 50 for i in range(50))
    prepared = network.for_sampling(times)
    for t in times:
        prepared(x, t, y=y)
    assert calls == [len(times)]


def test_a_network_used_in_inference_mode_can_still_be_trained_and_pickled() -> None:
    network, x, y = debug_network("DDT"), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    with torch.inference_mode():
        network(x, 0.5, y=y)
    network(x, 0.5, y=y).sample.sum().backward()
    assert torch.equal(pickle.loads(pickle.dumps(network))(x, 0.5, y=y).sample, network(x, 0.5, y=y).sample)


def test_unpatchify_undoes_patchify() -> None:
    x = torch.randn(2, 3, 6, 10)
    assert torch.equal(unpatchify(patchify(x, 2), 3, 5, 2), x)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder_depth": 0}, r"encoder_depth must lie in 1..3, which leaves the decoder a block, not 0"),
        ({"encoder_depth": 4}, r"encoder_depth must lie in 1..3, which leaves the decoder a block, not 4"),
        ({"encoder_depth": -1}, r"encoder_depth must lie in 1..3"),
        ({"num_heads": 5}, "hidden_size 64 over num_heads 5 is 12.8; rotary positions need a multiple of 4"),
        ({"hidden_size": 24}, "hidden_size 24 over num_heads 4 is 6; rotary positions need a multiple of 4"),
        ({"sample_shape": (4, 33, 32)}, r"sample_shape \(4, 33, 32\): .*; nearest: \(4, 32, 32\) or \(4, 34, 32\)"),
        ({"class_dropout_prob": 1.0}, r"class_dropout_prob must lie in \[0, 1\), not 1.0"),
        ({"mlp_ratio": 0.01}, "mlp_ratio 0.01 leaves the MLP without channels"),
        ({"depth": 0}, "depth must be at least 1, not 0"),
        ({"learn_sigma": True}, "DDT-debug/2 has no setting 'learn_sigma'"),
    ],
)
def test_values_that_do_not_fit_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("DDT-debug/2", **overrides)


@pytest.mark.parametrize("shape", [(2, 4, 9, 8), (2, 4, 8, 7), (2, 3, 8, 8)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x is \(2, .*; this network takes \(N, 4, H, W\) with sides"):
        debug_network("DDT")(torch.randn(shape), 0.5, y=torch.tensor([1, 2]))


def test_state_of_other_rows_or_tokens_is_refused() -> None:
    network, y = debug_network("DDT"), torch.tensor([1, 2])
    state = network(torch.randn(2, 4, 8, 8), 0.5, y=y).state
    for x in (torch.randn(4, 4, 8, 8), torch.randn(2, 4, 8, 12)):
        with pytest.raises(ValueError, match=r"the state is of \(2, 16\) rows and tokens, x of \("):
            network(x, 0.5, y=y.repeat(len(x) // 2), state=state)


@pytest.mark.parametrize("block", [0, 5])
def test_features_of_a_block_that_is_not_there_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match=rf"features_at must lie in 1..4, not {block}"):
        debug_network("DDT")(torch.randn(1, 4, 8, 8), 0.5, y=torch.tensor([1]), features_at=(block,))


def test_features_of_an_encoder_that_does_not_run_are_refused() -> None:
    network, x, y = debug_network("DDT"), torch.randn(1, 4, 8, 8), torch.tensor([1])
    with pytest.raises(ValueError, match=r"features_at must lie in 4..4, not 3"):
        network(x, 0.5, y=y, state=network(x, 0.5, y=y).state, features_at=(3,))
