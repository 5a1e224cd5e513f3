"""Shared layers against recorded values and against their formulas."""

import pytest
import torch
from torch import Tensor, nn

from models import FAMILIES, create_model
from models.layers import (
    Attention,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    TimestepTable,
    modulate,
    multiply_add,
    rounded_state,
    sincos_position_table,
    timestep_features,
    unpatchify,
)
from tests.golden_data import arrays, assert_close, assert_features_close
from tests.networks import debug_network, inputs, randomise


@pytest.mark.parametrize("dim", [256, 7])
def test_timestep_features_equal_the_recorded_ones(dim: int) -> None:
    golden = arrays("dit/timestep_embedding")
    features = timestep_features(golden["t"], dim)
    assert_features_close(features, golden[f"emb_{dim}"], golden["t"])


@pytest.mark.parametrize("dim", [256, 7])
def test_timestep_features_of_a_number_equal_those_of_a_tensor(dim: int) -> None:
    golden = arrays("dit/timestep_embedding")
    numbers = torch.cat([timestep_features(t, dim) for t in golden["t"].tolist()])
    assert_close(numbers, timestep_features(golden["t"], dim), 1e-7)


def test_integer_timesteps_are_computed_in_float32() -> None:
    features = timestep_features(torch.tensor([3, 999]), 8)
    assert features.dtype == torch.float32
    assert torch.equal(features, timestep_features(torch.tensor([3.0, 999.0]), 8))


@pytest.mark.parametrize(("width", "grid"), [(64, 4), (48, 4), (32, 4), (16, 3), (8, 5)])
def test_position_table_equals_the_recorded_one(width: int, grid: int) -> None:
    golden = arrays("dit/pos_embed")[f"pos_{width}_{grid}"]
    torch.testing.assert_close(sincos_position_table(width, grid, grid), golden, rtol=1e-12, atol=1e-15)


def test_position_table_of_the_largest_model_equals_the_recorded_one() -> None:
    golden = arrays("dit/pos_embed")
    table = sincos_position_table(1152, 16, 16)
    assert torch.equal(table[[0, 1, 16, 17, 255]].float(), golden["pos_1152_16_rows"])
    torch.testing.assert_close(torch.stack([table.sum(), table.abs().sum()]), golden["pos_1152_16_sum"])


def test_positions_of_a_rectangle_follow_the_formula_of_the_square() -> None:
    """Rows and columns of a larger square's table: positions are indices, whatever the size of the grid."""
    square = sincos_position_table(64, 7, 7).view(7, 7, 64)
    for rows, columns in ((3, 5), (5, 3), (1, 7)):
        assert torch.equal(sincos_position_table(64, rows, columns).view(rows, columns, 64), square[:rows, :columns])


def test_position_table_refuses_a_width_that_is_no_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 4 for 2-D positions, not 6"):
        sincos_position_table(6, 2, 2)


def test_modulation_and_gate_apply_one_vector_to_all_tokens() -> None:
    x, update = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    shift, scale, gate = torch.randn(3, 2, 1, 4)
    for n in range(2):
        for token in range(3):
            expected = x[n, token] * (1 + scale[n, 0]) + shift[n, 0]
            torch.testing.assert_close(modulate(x, shift, scale)[n, token], expected)
            expected = x[n, token] + gate[n, 0] * update[n, token]
            torch.testing.assert_close(multiply_add(x, gate, update)[n, token], expected)


def test_modulate_shares_one_row_among_all_samples() -> None:
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    torch.testing.assert_close(modulate(x, shift, scale), modulate(x, shift.expand(2, 1, 4), scale.expand(2, 1, 4)))


def test_unpatchify_reads_a_token_as_row_column_channel() -> None:
    patch, channels, (rows, columns) = 2, 3, (2, 3)
    tokens = torch.randn(1, rows * columns, patch * patch * channels)
    image = unpatchify(tokens, (rows, columns), patch, channels)
    assert image.shape == (1, channels, 4, 6)
    for row in range(4):
        for column in range(6):
            token = (row // patch) * columns + column // patch
            first = ((row % patch) * patch + column % patch) * channels
            assert torch.equal(image[0, :, row, column], tokens[0, token, first : first + channels])


def test_patch_embedding_is_one_linear_map_per_patch_in_row_major_order() -> None:
    embed = PatchEmbed(2, 3, 5)
    x = torch.randn(1, 3, 4, 6)
    tokens = embed(x)
    patch = x[0, :, 2:4, 4:6].flatten()  # second row of patches, third column
    expected = embed.proj.weight.flatten(1) @ patch + embed.proj.bias
    torch.testing.assert_close(tokens[0, 1 * 3 + 2], expected)


def test_tokens_enter_the_blocks_contiguous() -> None:
    assert PatchEmbed(2, 3, 5)(torch.randn(2, 3, 4, 4)).is_contiguous()


@pytest.mark.slow
def test_a_compiled_block_equals_the_eager_one_in_bf16_at_full_width() -> None:
    """With tokens from the embedder: strided ones made the compiled block return NaN on a CPU."""
    network = randomise(create_model("DiT-S/2", depth=1))
    x, y = torch.randn(8, 4, 32, 32), torch.arange(8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eager = network(x, 500, y=y).sample.float()
        network.blocks[0].compile(dynamic=False)
        compiled = network(x, 500, y=y).sample.float()
    assert compiled.isfinite().all()
    assert_close(compiled, eager, 2e-2)


def test_attention_is_softmax_attention_over_contiguous_heads() -> None:
    width, heads = 8, 2
    attention, x = Attention(width, heads), torch.randn(2, 5, width)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    outputs = []
    for columns in torch.arange(width).chunk(heads):
        scores = q[..., columns] @ k[..., columns].transpose(1, 2) / (width / heads) ** 0.5
        outputs.append(scores.softmax(dim=-1) @ v[..., columns])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(outputs, dim=-1)))


@pytest.mark.parametrize(("null_class", "rows"), [(True, 6), (False, 5)])
def test_label_table_has_a_null_row_only_on_request(null_class: bool, rows: int) -> None:
    assert LabelEmbedder(5, 8, null_class=null_class).embedding_table.weight.shape == (rows, 8)


def test_null_labels_are_the_last_row_on_the_tables_device() -> None:
    assert LabelEmbedder(5, 8, null_class=True).null_labels(2).tolist() == [5, 5]
    assert LabelEmbedder(5, 8, null_class=True).to("meta").null_labels(2).device.type == "meta"
    with pytest.raises(ValueError, match="class_dropout_prob is 0: this network has no null class"):
        LabelEmbedder(5, 8, null_class=False).null_labels(2)


def test_final_layer_starts_at_exactly_zero() -> None:
    layer = FinalLayer(8, 2, 4)
    layer.reset_parameters()
    assert not layer(torch.randn(2, 3, 8), torch.randn(2, 8)).any()


class CountingEmbedder(TimestepEmbedder):
    """A timestep embedder that counts its calls."""

    calls = 0

    def forward(self, t: float | Tensor) -> Tensor:
        self.calls += 1
        return super().forward(t)


def test_timestep_table_embeds_all_known_times_in_one_call() -> None:
    embedder = CountingEmbedder(8)
    table = TimestepTable(embedder, [7, 3, 3, 0.5])
    assert embedder.calls == 1
    for t in (3, 7.0, 0.5):
        torch.testing.assert_close(table(t), TimestepEmbedder.forward(embedder, t))
    assert embedder.calls == 1


def test_timestep_table_passes_everything_else_to_the_embedder() -> None:
    embedder = CountingEmbedder(8)
    table = TimestepTable(embedder, [3])
    assert torch.equal(table(4), TimestepEmbedder.forward(embedder, 4))
    t = torch.tensor([3.0, 4.0])
    assert torch.equal(table(t), TimestepEmbedder.forward(embedder, t))
    assert embedder.calls == 3


def test_timestep_table_is_a_snapshot_of_the_weights() -> None:
    embedder = TimestepEmbedder(8)
    table = TimestepTable(embedder, [3])
    before = table(3).clone()
    nn.init.ones_(embedder.mlp[2].weight)
    assert torch.equal(table(3), before)
    assert not torch.equal(TimestepTable(embedder, [3])(3), before)


def test_timestep_table_refuses_to_be_initialised() -> None:
    with pytest.raises(TypeError, match="initialise the original"):
        TimestepTable(TimestepEmbedder(8), [3]).reset_parameters()


def test_timestep_frequencies_are_not_part_of_a_checkpoint() -> None:
    assert list(TimestepEmbedder(8).state_dict()) == ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]


def test_timestep_features_keep_their_precision_in_a_half_precision_network() -> None:
    embedder = TimestepEmbedder(8)
    exact = embedder(torch.tensor([981.0]))
    assert_close(embedder.bfloat16()(981.0).float().detach(), exact.detach(), 2e-2)


def test_a_prepared_network_can_be_prepared_again() -> None:
    embedder = TimestepEmbedder(8)
    again = TimestepTable(TimestepTable(embedder, [3]), [5])
    assert again.embedder is embedder and list(again.rows) == [5]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_what_autocast_rounds_changes_no_bit_under_it(family: str) -> None:
    """Routers, embeddings and norms compute in float32 there, so they are not rounded; tables of positions neither."""
    network = debug_network(family)
    x, t, cond = inputs(network)
    state = rounded_state(network, torch.bfloat16)
    assert state.keys() == network.state_dict().keys()
    sizes = [sum(tensor.nbytes for tensor in each.values()) for each in (state, network.state_dict())]
    assert sizes[0] < 0.62 * sizes[1]

    def outputs() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            low = network(x, t, **cond).sample
        return [low, network(x, t, **cond).sample]

    before = outputs()
    network.load_state_dict(state)
    after = outputs()
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
