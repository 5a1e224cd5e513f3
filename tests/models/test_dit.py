"""DiT against the recorded outputs, intermediates, layouts and sizes of the official implementation."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.costs import counted_cost, layer_norm_elements, reused_cost
from models import create_model, model_config
from models.dit import DiT
from tests.golden_data import TINY_DITS, arrays, assert_close, assert_features_close, table, tiny_dit
from tests.networks import debug_network

WITH_NULL_CLASS = ("tiny_p2", "tiny_p4_nosigma")
OFFICIAL = table("dit/official_model_table")["models"]


def on_meta(row: str) -> DiT:
    """A row of the official table, such as "DiT-XL/2@512", without memory for its weights."""
    with torch.device("meta"):
        side = OFFICIAL[row]["input_size"]
        return create_model(row.split("@")[0], sample_shape=(4, side, side))


@torch.no_grad()
@pytest.mark.parametrize("times", ["t", "t_frac"])
@pytest.mark.parametrize("name", TINY_DITS)
def test_forward_equals_the_recorded_one(name: str, times: str) -> None:
    inputs, golden = arrays(f"dit/{name}/inputs"), arrays(f"dit/{name}/outputs")
    out = tiny_dit(name)(inputs["x"], inputs[times], y=inputs["y"])
    assert_close(out.sample, golden["forward" if times == "t" else "forward_t_frac"])
    assert out.state is None and out.aux is None and out.features == {}


def record(network: DiT, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Runs a network and collects what passes between its parts, under the names of the fixture."""
    seen: dict[str, Tensor] = {}

    def watch(module: nn.Module, *names: str, inputs: tuple[str, ...] = ()) -> None:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            seen.update(zip(inputs, arguments, strict=False))
            outputs = [part.squeeze(1) for part in output] if isinstance(output, tuple) else [output]  # of modulation
            seen.update(zip(names, outputs, strict=True))

        module.register_forward_hook(hook)

    block = network.blocks[0]
    watch(network.t_embedder.mlp, "t_emb", inputs=("t_freq",))
    watch(network.y_embedder, "y_emb")
    watch(network.x_embedder, "patch_tokens")
    watch(block.attn, "block0_attn_out", inputs=("block0_attn_in",))
    parts = [f"{kind}_{part}" for part in ("msa", "mlp") for kind in ("shift", "scale", "gate")]
    watch(block.adaLN_modulation, *(f"block0_{part}" for part in parts), inputs=("c",))
    for number, each in enumerate(network.blocks):
        watch(each, f"tokens_{number + 1}", inputs=(f"tokens_{number}",))
    watch(network.final_layer, "final_tokens")
    network(x, t, y=y)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_DITS)
def test_everything_inside_equals_what_was_recorded(name: str) -> None:
    inputs, golden = arrays(f"dit/{name}/inputs"), arrays(f"dit/{name}/intermediates")
    seen = record(tiny_dit(name), inputs["x"], inputs["t"], inputs["y"])
    golden.pop("y_emb_force_drop", None)
    assert seen.keys() == golden.keys()
    assert_features_close(seen.pop("t_freq"), golden.pop("t_freq"), inputs["t"])
    for part, reference in golden.items():
        assert_close(seen[part], reference)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_NULL_CLASS)
def test_dropping_a_label_is_asking_for_the_null_class(name: str) -> None:
    inputs, network = arrays(f"dit/{name}/inputs"), tiny_dit(name)
    dropped = torch.where(inputs["force_drop_ids"] == 1, network.null_conditioning(1)["y"], inputs["y"])
    assert_close(network.y_embedder(dropped), arrays(f"dit/{name}/outputs")["y_emb_force_drop"])


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_DITS)
def test_a_number_for_t_equals_a_tensor(name: str) -> None:
    inputs, network = arrays(f"dit/{name}/inputs"), tiny_dit(name)
    for t in (0, 999, 400.25):
        rows = torch.full((len(inputs["x"]),), float(t))
        reference = network(inputs["x"], rows, y=inputs["y"]).sample
        assert_close(network(inputs["x"], t, y=inputs["y"]).sample, reference, 1e-6)


def test_a_fresh_network_predicts_exactly_zero() -> None:
    network = create_model("DiT-debug/2")
    assert not network(torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), y=torch.tensor([0, 10])).sample.any()


@torch.no_grad()
def test_fresh_weights_follow_the_published_initialisation() -> None:
    network = create_model("DiT-debug/2", num_classes=1000)
    qkv = network.blocks[3].attn.qkv.weight
    bound = (6 / (qkv.shape[0] + qkv.shape[1])) ** 0.5
    assert 0.99 * bound < qkv.abs().max() <= bound
    patches = network.x_embedder.proj.weight
    bound = (6 / (64 + 4 * 2 * 2)) ** 0.5
    assert 0.98 * bound < patches.abs().max() <= bound
    for weight in (network.t_embedder.mlp[0].weight, network.t_embedder.mlp[2].weight):
        assert weight.std() == pytest.approx(0.02, rel=0.05)
    assert network.y_embedder.embedding_table.weight.std() == pytest.approx(0.02, rel=0.05)
    for block in network.blocks:
        assert not block.adaLN_modulation[1].weight.any()
    biases = {name: value for name, value in network.named_parameters() if name.endswith("bias")}
    assert not any(value.any() for value in biases.values())


def test_every_trainable_parameter_takes_part() -> None:
    network = debug_network("DiT")
    out = network(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), y=torch.tensor([1, 10]))
    out.sample.square().sum().backward()
    idle = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == ["pos_embed"]


@torch.no_grad()
def test_prepared_network_gives_the_same_outputs() -> None:
    inputs, network = arrays("dit/tiny_p2/inputs"), tiny_dit("tiny_p2")
    prepared = network.for_sampling([979, 20, 20, 400.25])
    for t in (20, 979, 400.25, 555, inputs["t"]):
        reference = network(inputs["x"], t, y=inputs["y"]).sample
        assert_close(prepared(inputs["x"], t, y=inputs["y"]).sample, reference, 1e-6)


def test_preparing_shares_parameters_and_leaves_the_original_alone() -> None:
    network = debug_network("DiT")
    names, embedder = list(network.state_dict()), network.t_embedder
    prepared = network.for_sampling([1, 2])
    assert network.t_embedder is embedder and list(network.state_dict()) == names
    assert {id(p) for p in prepared.parameters()} == {id(p) for p in network.parameters()}


@torch.no_grad()
def test_a_prepared_schedule_costs_one_call_of_the_timestep_embedder() -> None:
    network, x, y = debug_network("DiT"), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    calls: list[int] = []
    network.t_embedder.mlp.register_forward_hook(lambda _, arguments, output: calls.append(len(output)))
    times = tuple(range(990, -1, -10))
    prepared = network.for_sampling(times)
    for t in times:
        prepared(x, t, y=y)
    assert calls == [len(times)]


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_DITS)
def test_features_are_the_tokens_after_the_blocks_asked_for(name: str) -> None:
    inputs, golden = arrays(f"dit/{name}/inputs"), arrays(f"dit/{name}/intermediates")
    network = tiny_dit(name)
    numbers = range(1, network.config.depth + 1)
    out = network(inputs["x"], inputs["t"], y=inputs["y"], features_at=numbers)
    assert list(out.features) == list(numbers)
    for block in numbers:
        assert_close(out.features[block], golden[f"tokens_{block}"])
    alone = network(inputs["x"], inputs["t"], y=inputs["y"], features_at=(2,)).features
    assert list(alone) == [2] and torch.equal(alone[2], out.features[2])


@pytest.mark.parametrize("block", [0, 5])
def test_features_of_a_block_that_is_not_there_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match=f"features_at must lie in 1..4, not {block}"):
        debug_network("DiT")(torch.randn(1, 4, 8, 8), 5, y=torch.tensor([1]), features_at=(block,))


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 4, 8, 16), (2, 3, 8, 8)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x is \(2, .*; this network takes \(N, 4, 8, 8\)"):
        debug_network("DiT")(torch.randn(shape), 5, y=torch.tensor([1, 2]))


@pytest.mark.parametrize(("row", "keys"), [("DiT-XL/2", "256"), ("DiT-XL/2@512", "512")])
def test_state_dict_has_the_official_names_shapes_and_order(row: str, keys: str) -> None:
    state_dict = on_meta(row).state_dict()
    assert [(k, list(v.shape)) for k, v in state_dict.items()] == list(table(f"dit/official_xl2_{keys}_keys").items())


@pytest.mark.parametrize("row", OFFICIAL)
def test_sizes_and_costs_equal_the_official_table(row: str) -> None:
    network, official = on_meta(row), OFFICIAL[row]
    assert sum(p.numel() for p in network.parameters()) == official["params_total"]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == official["params_trainable"]
    macs, elements = sum(network.cost().values()), layer_norm_elements(network)
    assert macs == official["macs"]
    assert round((macs + elements) / 1e9, 4) == official["gmacs_plus_1_per_layernorm_element"]
    assert round((macs + 4 * elements) / 1e9, 4) == official["gmacs_plus_4_per_layernorm_element"]
    assert (macs + elements) / 1e9 == pytest.approx(official["published_gflops"], abs=0.045, rel=1e-3)


def test_costs_by_part_equal_the_official_terms() -> None:
    parts, terms = on_meta("DiT-XL/2").cost(), OFFICIAL["DiT-XL/2"]["terms"]
    assert parts["attention_linear"] + parts["mlp"] == terms["blocks_linear"]
    assert parts["attention_products"] == terms["blocks_attn"]
    assert parts["modulation"] == terms["adaln"] + terms["final_adaln"]
    assert parts["patch_embedding"] == terms["patch_embed"]
    assert parts["final_linear"] == terms["final_linear"]
    assert parts["timestep_mlp"] == terms["t_mlp"]


# ----------------------------------------------------------------------------------------------------------------------
# State, with `cache_depth`


@torch.no_grad()
@pytest.mark.parametrize("cache_depth", [1, 2])
def test_a_cached_step_runs_the_last_blocks_on_the_remembered_tokens(cache_depth: int) -> None:
    network = debug_network("DiT", cache_depth=cache_depth)
    ran: list[tuple[int, Tensor, Tensor]] = []
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda _, arguments, output, i=i: ran.append((i, arguments[0], output)))
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    fresh = network(x, 500.0, y=y)
    assert [i for i, _, _ in ran] == [0, 1, 2, 3]
    assert torch.equal(fresh.state, ran[-cache_depth][1])
    ran.clear()
    again = network(torch.randn(2, 4, 8, 8), 300.0, y=y, state=fresh.state)  # x has no influence, time and label have
    assert [i for i, _, _ in ran] == list(range(4 - cache_depth, 4))
    assert torch.equal(ran[0][1], fresh.state) and again.state is fresh.state
    assert torch.equal(network(x, 300.0, y=y, state=fresh.state).sample, again.sample)
    assert not torch.equal(network(x, 100.0, y=y, state=fresh.state).sample, again.sample)
    assert not torch.equal(network(x, 300.0, y=y.flip(0), state=fresh.state).sample, again.sample)


@torch.no_grad()
def test_caching_changes_neither_names_nor_fresh_outputs() -> None:
    plain, cached = debug_network("DiT"), debug_network("DiT", cache_depth=1)
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    assert list(plain.state_dict()) == list(cached.state_dict())
    assert torch.equal(plain(x, 5.0, y=y).sample, cached(x, 5.0, y=y).sample)
    assert plain(x, 5.0, y=y, state=cached(x, 5.0, y=y).state).state is None
    assert (plain.keeps_state, cached.keeps_state) == (False, True)


def test_a_cached_step_costs_the_last_blocks_and_no_patches() -> None:
    plain, cached = create_model("DiT-debug/2"), create_model("DiT-debug/2", cache_depth=1)
    full, rest = cached.cost(), reused_cost(cached)
    assert full == plain.cost() == reused_cost(plain)
    assert {name for name in full if name not in rest} == {"patch_embedding"}
    for part in ("attention_linear", "attention_products", "mlp"):
        assert full[part] == 4 * rest[part]
    assert full["final_linear"] == rest["final_linear"] and full["timestep_mlp"] == rest["timestep_mlp"]
    assert counted_cost(cached) == sum(full.values()) and counted_cost(cached, reused=True) == sum(rest.values())


@torch.no_grad()
def test_features_of_a_block_that_does_not_run_are_refused() -> None:
    network = debug_network("DiT", cache_depth=1)
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    out = network(x, 5.0, y=y, features_at=(4,))
    assert torch.equal(network(x, 5.0, y=y, state=out.state, features_at=(4,)).features[4], out.features[4])
    with pytest.raises(ValueError, match="features_at 3: that block does not run when state is reused"):
        network(x, 5.0, y=y, state=out.state, features_at=(3,))


@torch.no_grad()
def test_state_of_other_rows_is_refused() -> None:
    network = debug_network("DiT", cache_depth=1)
    state = network(torch.randn(2, 4, 8, 8), 5.0, y=torch.tensor([1, 2])).state
    with pytest.raises(ValueError, match="state of 2 rows cannot be reused for 4 rows"):
        network(torch.randn(4, 4, 8, 8), 5.0, y=torch.tensor([1, 2, 3, 4]), state=state)


@pytest.mark.parametrize("cache_depth", [0, 3, -1])
def test_a_cache_depth_beyond_half_the_blocks_is_refused(cache_depth: int) -> None:
    with pytest.raises(ValueError, match=rf"cache_depth {cache_depth} must lie in 1\.\.2, half the depth"):
        model_config("DiT-debug/2", cache_depth=cache_depth)
