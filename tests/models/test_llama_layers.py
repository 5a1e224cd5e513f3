"""RMSNorm, SwiGLU and rotary positions against recorded values and against their formulas."""

import pytest
import torch
from torch.nn import functional

from models.llama_layers import RMSNorm, RotaryAttention, SwiGLU, rotary_table, rotate
from tests.golden_data import arrays, assert_close
from tests.golden_ddt import FORWARD, assert_within
from tests.networks import randomise

MISC = arrays("ddt/misc")


# ----------------------------------------------------------------------------------------------------------------------
# RMSNorm


@torch.no_grad()
def test_rms_norm_rounds_where_ddt_s_release_rounds_and_gives_the_improved_dit_s_in_float32() -> None:
    norm = RMSNorm(32)
    norm.weight.copy_(MISC["rms.weight"])
    out = norm(MISC["rms.x_bf16"])
    assert out.dtype == MISC["rms.ddt_out"].dtype and torch.equal(out, MISC["rms.ddt_out"])
    assert torch.equal(norm(MISC["rms.x_bf16"].float()).to(torch.bfloat16), MISC["rms.idit_out"])


@torch.no_grad()
def test_rms_norm_equals_its_formula() -> None:
    norm, x = RMSNorm(48), 1e-3 * torch.randn(3, 5, 48)
    norm.weight.normal_()
    wide = x.double()
    reference = wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.float32
    assert_close(norm(x), reference.float(), 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# SwiGLU


@torch.no_grad()
def test_swiglu_equals_its_formula_and_has_no_biases() -> None:
    mlp, x = SwiGLU(6, 10), torch.randn(2, 3, 6)
    assert [(name, tuple(p.shape)) for name, p in mlp.named_parameters()] == [
        ("w1.weight", (10, 6)), ("w3.weight", (10, 6)), ("w2.weight", (6, 10)),
    ]  # fmt: skip
    gate = x @ mlp.w1.weight.T
    assert_close(mlp(x), (gate / (1 + (-gate).exp()) * (x @ mlp.w3.weight.T)) @ mlp.w2.weight.T, 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions


@pytest.mark.parametrize(
    ("name", "rows", "columns", "chosen"),
    [
        ("d16.h4.w4", 4, 4, slice(None)),
        ("d72.h16.w16", 16, 16, [0, 1, 15, 16, 17, 100, 255]),
        ("d64.h3.w5", 3, 5, slice(None)),
        ("d12.h1.w4", 1, 4, slice(None)),
    ],
)
def test_rotary_tables_equal_the_recorded_ones(name: str, rows: int, columns: int, chosen: slice | list[int]) -> None:
    table = rotary_table(rows, columns, int(name.split(".")[0][1:]))
    assert len(table) == rows * columns
    for part, place in (("re", 0), ("im", 1)):
        assert_within(table[chosen][..., place], MISC[f"rope.{name}.{part}"], FORWARD)


def test_rotated_queries_and_keys_equal_the_recorded_ones() -> None:
    table = rotary_table(2, 3, 12)
    for part in ("q", "k"):
        assert_within(rotate(MISC[f"rotary.{part}"], table), MISC[f"rotary.{part}_out"], FORWARD)


def test_the_form_that_is_compiled_equals_the_complex_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table = torch.randn(2, 15, 3, 64), rotary_table(3, 5, 64)
    complex_product = rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(rotate(x, table), complex_product, 1e-6)


def test_a_rotation_keeps_lengths_and_depends_on_distances_alone() -> None:
    """q . k between tokens two columns apart is the same everywhere in the grid."""
    q, k = torch.randn(2, 16).double()
    table = rotary_table(4, 5, 16).double()
    turned_q, turned_k = (rotate(x.expand(1, 20, 1, 16), table)[0, :, 0] for x in (q, k))
    assert_close(turned_q.norm(dim=-1), q.norm().expand(20), 1e-6)
    products = (turned_q.view(4, 5, 16)[:, :3] * turned_k.view(4, 5, 16)[:, 2:]).sum(dim=-1)
    assert (products - products[0, 0]).abs().max() < 1e-5 * q.norm() * k.norm()
    assert (turned_q[0] @ turned_k[1] - turned_q[0] @ turned_k[2]).abs() > 1e-3


@torch.no_grad()
def test_attention_is_softmax_over_normalised_and_turned_heads() -> None:
    attention = randomise(RotaryAttention(24, 2))
    x, table = torch.randn(2, 6, 24), rotary_table(2, 3, 12)
    q, k, v = attention.qkv(x).view(2, 6, 3, 2, 12).unbind(2)
    q, k = rotate(attention.q_norm(q), table), rotate(attention.k_norm(k), table)
    weights = torch.einsum("nihd,njhd->nhij", q, k).div(12**0.5).softmax(dim=-1)
    heads = torch.einsum("nhij,njhd->nihd", weights, v).flatten(2)
    assert_close(attention(x, table), functional.linear(heads, attention.proj.weight, attention.proj.bias))
