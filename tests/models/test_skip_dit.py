"""Skip-DiT against the recorded outputs, gradients, names and costs of the official implementation."""

import re

import pytest
import torch
from torch import Tensor, nn

from benchmarks.costs import layer_norm_elements, reused_cost
from diffusion import Batch, DiffusionLoss, Draws, Evaluation, create_diffusion, guided
from models import DiT, SkipDiT, create_model, list_models, model_config
from models.dit import DiTConfig
from models.skip_dit import SkipDiTConfig, SkipLinear, SkipNorm
from tests.golden_data import arrays, assert_close, assert_close_elementwise, table, with_sample_shape
from tests.golden_skip_dit import CASES, recorded_network
from tests.networks import debug_network, inputs, randomise

OFFICIAL = table("skip_dit/official_xl2_skip_keys")


def watch_blocks(network: DiT) -> list[tuple[int, Tensor, Tensor]]:
    """A list that fills with (index, tokens in, tokens out) of every block that runs."""
    seen: list[tuple[int, Tensor, Tensor]] = []
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda _, arguments, output, i=i: seen.append((i, arguments[0], output)))
    return seen


def sample(network: DiT, rows: int = 2) -> tuple[Tensor, float, Tensor]:
    x, t, conditioning = inputs(network, rows)
    return x, t, conditioning["y"]


# ----------------------------------------------------------------------------------------------------------------------
# Recorded numbers


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_forward_and_what_passes_between_blocks_equal_the_recorded_ones(case: str) -> None:
    golden, network = arrays(f"skip_dit/{case}/io"), recorded_network(case)
    seen = watch_blocks(network)
    out = network(golden["fwd.x"], golden["fwd.t"], y=golden["fwd.y"])
    assert_close(out.sample, golden["fwd.out_skip"])
    assert [i for i, _, _ in seen] == list(range(network.config.depth))
    recorded = sorted({int(n) for name in golden for n in re.findall(r"^fwd\.block(\d+)", name)})
    assert len(recorded) == 4
    for i in recorded:
        assert_close(seen[i][1], golden[f"fwd.block{i}.in"])
        assert_close(seen[i][2], golden[f"fwd.block{i}.out"])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_without_its_skip_units_it_is_the_plain_network(case: str) -> None:
    golden = arrays(f"skip_dit/{case}/io")
    network = DiT(DiTConfig(**with_sample_shape(table(f"skip_dit/{case}/config")["model"])))
    weights = arrays(f"skip_dit/{case}/state_dict")
    network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("skip_")})
    assert_close(network(golden["fwd.x"], golden["fwd.t"], y=golden["fwd.y"]).sample, golden["fwd.out_plain_dit"])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_guidance_equals_the_recorded_one(case: str) -> None:
    """The official batch is doubled beforehand, and its second half carries the null rows' unguided channels along."""
    golden, network = arrays(f"skip_dit/{case}/io"), recorded_network(case)
    (x, _), (t, _), (y, y_null) = (golden[f"cfg.{name}"].chunk(2) for name in "xty")
    scale = table(f"skip_dit/{case}/config")["cfg_scale"]
    out = guided(network, {"y": y}, {"y": y_null}, channels=3)(x, Evaluation(t, scale, guided=True))
    assert_close(out.sample, golden["cfg.out_skip"].chunk(2)[0])


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_recorded_ones(case: str) -> None:
    golden, network = arrays(f"skip_dit/{case}/io"), recorded_network(case)
    loss = network(golden["fwd.x"], golden["fwd.t"], y=golden["fwd.y"]).sample.square().mean()
    loss.backward()
    assert_close_elementwise(loss.detach(), golden["grad.loss"])
    recorded = {name.removeprefix("grad."): value for name, value in golden.items() if name.startswith("grad.")}
    del recorded["loss"]
    assert len(recorded) == 2 + 4 * network.num_units
    for name, value in recorded.items():
        gradient = network.get_parameter(name).grad
        assert gradient is not None
        assert_close(gradient, value)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_training_losses_equal_the_recorded_ones(case: str) -> None:
    golden, network = arrays(f"skip_dit/{case}/io"), recorded_network(case)
    x, t, y, noise = golden["fwd.x"], golden["fwd.t"], golden["fwd.y"], golden["train.noise"]
    batch = Batch(x, {"y": y}, torch.arange(len(y)))
    losses = DiffusionLoss(network, create_diffusion())(batch, Draws(t, noise), 0, {})
    assert losses.keys() == {"loss", "mse", "vb"}
    for name, value in losses.items():
        assert_close_elementwise(value, golden[f"train.{name}"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    # what one rounding in the last place of the largest value leaves
    [("fp32", torch.float32, 1e-6), ("fp16", torch.float16, 2**-10), ("bf16", torch.bfloat16, 2**-7)],
)
def test_a_skip_unit_in_low_precision_equals_the_recorded_one(
    precision: str, dtype: torch.dtype, tolerance: float
) -> None:
    golden, settings = arrays("skip_dit/skip_unit_precision/io"), table("skip_dit/skip_unit_precision/config")
    width = settings["hidden"]
    unit = nn.ModuleDict({"norm": SkipNorm(2 * width, eps=settings["eps"]), "linear": SkipLinear(width)})
    weights = arrays("skip_dit/skip_unit_precision/state_dict")
    names = {"skip_norms.0": "norm", "skip_linears.0": "linear"}
    unit.load_state_dict({_renamed(name, names): value for name, value in weights.items()})
    unit = unit.to(dtype)
    normed = unit["norm"](torch.cat([golden["x"], golden["skip"]], dim=-1).to(dtype))
    out = unit["linear"](normed)
    assert normed.dtype == out.dtype == dtype
    assert_close(normed, golden[f"norm_{precision}"], tolerance)
    assert_close(out, golden[f"out_{precision}"], tolerance)


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        name = name.replace(old, new)
    return name


# ----------------------------------------------------------------------------------------------------------------------
# Names, sizes, costs


def official_size() -> SkipDiT:
    with torch.device("meta"):
        return create_model("Skip-DiT-XL/2")


def test_state_dict_has_the_official_names_shapes_and_order() -> None:
    network = official_size()
    shapes = [(name, list(value.shape)) for name, value in network.state_dict().items()]
    assert shapes == list(OFFICIAL["keys"].items()) and len(shapes) == 348
    assert sum(p.numel() for p in network.parameters()) == OFFICIAL["params_total"]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == OFFICIAL["params_trainable"]


def test_costs_equal_the_official_ones() -> None:
    network, official = official_size(), OFFICIAL["gmacs_per_image_forward"]
    full, reused = network.cost(), reused_cost(network)
    assert sum(full.values()) == round(official["skip_full"]["total"] * 1e9)
    assert sum(reused.values()) == round(official["skip_cached_step"]["total"] * 1e9)
    assert full["skip_units"] == 14 * round(official["skip_full"]["skip"] * 1e9)
    assert reused["skip_units"] == 4 * round(official["skip_full"]["skip"] * 1e9)
    depth, tokens, width = network.config.depth, network.config.tokens, network.config.hidden_size
    assert layer_norm_elements(network) == (2 * depth + 1 + 2 * network.num_units) * tokens * width


def test_all_sizes_of_the_plain_family_are_there_and_one_for_the_digits() -> None:
    plain = [name for name in list_models("DiT-*") if not name.startswith(("DiT-debug", "DiT-digits"))]
    assert set(list_models("Skip-DiT-*")) == {f"Skip-{name}" for name in (*plain, "DiT-debug/2", "DiT-digits/2")}
    for name in plain:
        ours, theirs = model_config(f"Skip-{name}"), model_config(name)
        for field in ("depth", "hidden_size", "num_heads", "patch_size", "sample_shape", "num_classes", "learn_sigma"):
            assert getattr(ours, field) == getattr(theirs, field)
    assert model_config("Skip-DiT-debug/2").depth == model_config("Skip-DiT-digits/2").depth == 8


@pytest.mark.parametrize(("depth", "expected"), [(2, 1), (4, 1), (6, 1), (8, 2), (12, 3), (16, 4), (24, 4), (28, 4)])
def test_cache_depth_is_a_quarter_of_the_depth_and_four_at_most(depth: int, expected: int) -> None:
    assert SkipDiTConfig(depth=depth).cache_depth == expected
    assert SkipDiTConfig(depth=depth, cache_depth=1).cache_depth == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 7}, "depth 7 must be even: every block of the second half has one in the first"),
        ({"depth": 6, "cache_depth": 4}, r"cache_depth 4 must lie in 1\.\.3, half the depth"),
        ({"cache_depth": 0}, r"cache_depth 0 must lie in 1\.\.4, half the depth"),
        ({"depth": 0}, "depth must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_built_is_refused(overrides: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("Skip-DiT-debug/2", **overrides)


@torch.no_grad()
def test_fresh_skip_units_are_initialised_as_pytorch_does() -> None:
    network = create_model("Skip-DiT-debug/2")
    for unit in range(network.num_units):
        norm, linear = network.skip_norms[unit], network.skip_linears[unit].linear
        assert torch.equal(norm.weight, torch.ones(128)) and not norm.bias.any()
        for parameter in (linear.weight, linear.bias):
            assert 0.9 * 128**-0.5 < parameter.abs().max() <= 128**-0.5
    before = network.skip_linears[1].linear.weight.clone()
    network.reset_parameters()
    after = network.skip_linears[1].linear.weight
    assert not torch.equal(before, after) and 0.9 * 128**-0.5 < after.abs().max() <= 128**-0.5


# ----------------------------------------------------------------------------------------------------------------------
# What runs


@torch.no_grad()
@pytest.mark.parametrize(("depth", "cache_depth"), [(2, 1), (4, 2), (6, 2), (8, 2), (8, 4), (10, 3)])
def test_a_cached_step_runs_the_first_and_last_blocks_alone(depth: int, cache_depth: int) -> None:
    network = debug_network("Skip-DiT", depth=depth, cache_depth=cache_depth)
    units: list[int] = []
    for k, linear in enumerate(network.skip_linears):
        linear.register_forward_hook(lambda *_, k=k: units.append(k))
    seen, (x, t, y) = watch_blocks(network), sample(network)
    fresh = network(x, t, y=y)
    assert [i for i, _, _ in seen] == list(range(depth)) and units == list(range(depth // 2))
    assert torch.equal(fresh.state, seen[depth - cache_depth - 1][2])
    seen.clear()
    units.clear()
    again = network(x, 300.0, y=y, state=fresh.state)
    assert [i for i, _, _ in seen] == [*range(cache_depth), *range(depth - cache_depth, depth)]
    assert len(seen) == 2 * cache_depth
    assert units == list(range(depth // 2 - cache_depth, depth // 2))
    assert again.state is fresh.state


@torch.no_grad()
def test_a_cached_step_sees_the_new_image_time_and_label() -> None:
    network = debug_network("Skip-DiT")
    x, t, y = sample(network)
    state = network(x, t, y=y).state
    reference = network(x, t, y=y, state=state).sample
    for other in (
        network(x.flip(-1), t, y=y, state=state),
        network(x, 100.0, y=y, state=state),
        network(x, t, y=y.flip(0), state=state),
    ):
        assert (other.sample - reference).abs().max() > 1e-3 * reference.abs().max()


@torch.no_grad()
def test_a_cached_step_depends_on_the_state() -> None:
    network = debug_network("Skip-DiT")
    x, t, y = sample(network)
    out = network(x, t, y=y)
    assert (network(x, t, y=y, state=out.state.flip(0)).sample - out.sample).abs().max() > 1e-3 * out.sample.abs().max()


@torch.no_grad()
def test_state_of_other_rows_is_refused() -> None:
    network = debug_network("Skip-DiT")
    x, t, conditioning = inputs(network)
    state = network(x, t, **conditioning).state
    with pytest.raises(ValueError, match="state of 2 rows cannot be reused for 3 rows"):
        x, t, conditioning = inputs(network, rows=3)
        network(x, t, **conditioning, state=state)


@torch.no_grad()
def test_features_are_the_tokens_after_the_blocks_asked_for() -> None:
    network = debug_network("Skip-DiT")
    seen, (x, t, y) = watch_blocks(network), sample(network)
    state = network(x, t, y=y).state
    outputs = [output for _, _, output in seen]
    for block in range(1, 9):
        assert torch.equal(network(x, t, y=y, features_at=(block,)).features[block], outputs[block - 1])
    features = network(x, t, y=y, state=state, features_at=(8, 2)).features
    assert torch.equal(features[2], outputs[1]) and torch.equal(features[8], outputs[7])
    for block in (3, 6):
        with pytest.raises(ValueError, match=f"features_at {block}: that block does not run when state is reused"):
            network(x, t, y=y, state=state, features_at=(block,))


@torch.no_grad()
def test_tokens_and_state_keep_their_precision_under_autocast() -> None:
    network = debug_network("Skip-DiT")
    seen, (x, t, y) = watch_blocks(network), sample(network)
    reference = network(x, t, y=y).sample
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, t, y=y)
    assert out.state.dtype == torch.float32 and {tokens.dtype for _, tokens, _ in seen} == {torch.float32}
    assert_close(out.sample.float(), reference, 0.03)


@torch.no_grad()
def test_a_network_cast_to_half_precision_stays_close() -> None:
    network = debug_network("Skip-DiT")
    x, t, y = sample(network)
    reference = network(x, t, y=y).sample
    out = network.bfloat16()(x.bfloat16(), t, y=y)
    assert out.sample.dtype == out.state.dtype == torch.bfloat16
    assert_close(out.sample.float(), reference, 0.05)


def test_every_trainable_parameter_takes_part() -> None:
    network = debug_network("Skip-DiT")
    x, t, y = sample(network)
    network(x, t, y=y).sample.square().sum().backward()
    idle = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


@torch.no_grad()
def test_all_patch_sizes_work() -> None:
    for patch in (4, 8):
        network = randomise(create_model("Skip-DiT-debug/2", patch_size=patch))
        x, t, y = sample(network)
        assert network(x, t, y=y).sample.shape == (2, 8, 8, 8)
