"""Sampling with a DyDiT without computing what is switched off.

All rows of a sampling step share their timestep, so the heads and channel groups it runs follow from the schedule: the
width masks of all evaluations are computed once, in float32, and read to the host before sampling starts. A block then
works with the weights of what is on, and attention sees only heads that are on. Copies of weights are shared by all
evaluations with the same pattern and kept within a number of bytes.

The tokens that go through the MLP depend on the images, and are known only after the block's attention. Those of the
whole batch are packed into one matrix for norm, modulation and MLP, and added to the residual stream.

Packing needs the number of tokens on the host, to shape that matrix: one read in a block, which costs nothing on a CPU.
A GPU idles for some tens of microseconds, until the host, after reading the count, has launched the next kernels; the
gain is the part of an MLP that is saved. So few tokens are not packed but masked, and nothing is read. (A fixed
capacity would need no read, but tokens beyond it would be lost, or need a second pass in every evaluation.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.contract import mark_rows
from models.dydit_block import DyDiTBlock, Routing, TokenRouter
from models.layers import AdaLNModulation, attention_heads, gelu, modulate, multiply_add
from models.masks import Mask

P = ParamSpec("P")
R = TypeVar("R")
Active = tuple[int, ...]  # heads or groups that are on, ascending

EPS = 1e-6  # of DiT's layer norms
# Tokens in a batch from which packing pays. For CUDA an estimate for XL on an H100: 40 us idle, 1/4 skipped.
PACK_FROM = {"cpu": 128, "cuda": 4096}


class Modulation(NamedTuple):
    """One of adaLN's two triples, (N, 1, D) each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class PairWeights(NamedTuple):
    """Weights of two linear maps, without the k channels between them that are off."""

    first: Tensor  # (k, D); (3 k, D) for [q | k | v]
    first_bias: Tensor  # (k,) or (3 k,)
    last: Tensor  # (D, k)
    last_bias: Tensor  # (D,)


class Width(NamedTuple):
    """Heads and channel groups of one evaluation."""

    heads: Tensor  # (1, L, H) float32 mask
    groups: Tensor  # the same
    active: tuple[tuple[Active, Active], ...]  # heads and groups that are on in each block


class BoundedCache:
    """Tensors made on demand, up to a number of bytes; the least recently used are dropped first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._kept: OrderedDict[Hashable, tuple[PairWeights, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], PairWeights]) -> PairWeights:
        """Return the tensors of a key, and make them if necessary; those larger than the limit are not kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        made = make()
        size = sum(tensor.nbytes for tensor in made)
        if size <= self.limit:
            while self.used + size > self.limit:
                self.used -= self._kept.popitem(last=False)[1][1]
            self._kept[key] = made, size
            self.used += size
        return made

    def __len__(self) -> int:
        return len(self._kept)


class RoutingPlan:
    """Routing of a schedule, and blocks that follow it; a snapshot of the network's weights.

    Args:
        blocks: Blocks of the network.
        embed: Timestep embedder, a number -> (1, D).
        times: Timesteps of the schedule; repeats are routed once.
        cache_bytes: Memory limit for copies of weights.
        compile_backend: Compiles the functions that run instead of blocks, for any number of heads, groups and tokens;
            None runs them as they are.

    Attributes:
        widths: Timestep -> heads and groups of its evaluation.
        cache: Copies of weights.
        pack_from: Number of tokens in a batch from which they are packed.
    """

    def __init__(
        self,
        blocks: Sequence[DyDiTBlock],
        embed: Callable[[float], Tensor],
        times: Iterable[float],
        cache_bytes: int,
        compile_backend: str | None,
    ) -> None:
        self.blocks, self.num_heads = blocks, blocks[0].attn.num_heads
        self.cache = BoundedCache(cache_bytes)
        device = blocks[0].attn.qkv.weight.device
        self.pack_from = PACK_FROM.get(device.type, PACK_FROM["cuda"])
        distinct = sorted(set(times))
        self.widths = dict(zip(distinct, self._route(embed, distinct), strict=True))
        patterns = {active for width in self.widths.values() for both in width.active for active in both}
        self._indices = {active: torch.tensor(active, dtype=torch.int64, device=device) for active in patterns}
        self.compiles = compile_backend is not None
        self._attend, self._mlp = _compiled(attend, compile_backend), _compiled(masked_mlp, compile_backend)
        self._packed_update = _compiled(packed_update, compile_backend)

    @torch.no_grad()
    def _route(self, embed: Callable[[float], Tensor], times: list[float]) -> Iterable[Width]:
        """Evaluate all width routers at all times, with one read to the host."""
        if not times:
            return
        e = torch.cat([embed(t) for t in times])  # (K, D)
        heads = torch.stack([block.attn_rate(e).values for block in self.blocks], dim=1)  # (K, L, H)
        groups = torch.stack([block.mlp_rate(e).values for block in self.blocks], dim=1)
        on = torch.stack([heads, groups], dim=2).tolist()  # (K, L, 2, H)
        for k, blocks in enumerate(on):
            active = tuple((_active(both[0]), _active(both[1])) for both in blocks)
            yield Width(heads[k : k + 1], groups[k : k + 1], active)

    def run_block(self, i: int, x: Tensor, c: Tensor, width: Width) -> tuple[Tensor, Routing]:
        """Compute the output of block i, as with masks, without what is off.

        Args:
            i: Index of the block.
            x: (N, T, D) tokens.
            c: (N, D) conditioning.
            width: Heads and groups of the timestep.

        Returns:
            Tokens (N, T, D), and masks (1, H), (1, H), (N, T).
        """
        block, (heads, groups) = self.blocks[i], width.active[i]
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        head_dim = block.attn.qkv.in_features // self.num_heads
        if self.compiles:
            mark_rows(x, c)
        attention = self._weights((i, "attn"), block.attn.qkv, block.attn.proj, heads, dtype)
        x, tokens, modulation = self._attend(x, c, block.adaLN_modulation, attention, block.token_selection, head_dim)
        mlp = self._weights((i, "mlp"), block.mlp.fc1, block.mlp.fc2, groups, dtype)
        x = self._run_mlp(x, tokens.on, modulation, mlp)
        return x, Routing(width.heads[:, i], width.groups[:, i], tokens.values)

    def _run_mlp(self, x: Tensor, tokens: Tensor, modulation: Modulation, weights: PairWeights) -> Tensor:
        """Apply the residual MLP to the tokens (N, T) that are on; may overwrite x (N, T, D)."""
        if self.compiles:
            mark_rows(x, tokens, modulation)
        if tokens.numel() < self.pack_from:
            return self._mlp(x, tokens, modulation, weights)
        rows = tokens.flatten().nonzero().squeeze(1)  # the one read, of their number
        if len(rows) == tokens.numel():
            return self._mlp(x, None, modulation, weights)
        if not len(rows):
            return x
        if self.compiles:
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        # The addition is not compiled: for an input that it writes into, the compiler copies all of it once more.
        x.view(-1, x.shape[-1]).index_add_(0, rows, self._packed_update(x, rows, modulation, weights))
        return x

    def _weights(
        self, key: tuple[int, str], first: nn.Linear, last: nn.Linear, active: Active, dtype: torch.dtype
    ) -> PairWeights:
        """Return the weights for these heads or channel groups, uncopied if all are on."""
        own = PairWeights(*(w.detach() for w in (first.weight, first.bias, last.weight, last.bias)))
        if len(active) == self.num_heads and own.first.dtype == dtype:
            return self._resizable(own)

        def make() -> PairWeights:
            index, rows = self._indices[active], (first.out_features // last.in_features, self.num_heads, -1)
            return self._resizable(
                PairWeights(
                    own.first.unflatten(0, rows).index_select(1, index).flatten(0, 2).to(dtype),
                    own.first_bias.unflatten(0, rows).index_select(1, index).flatten().to(dtype),
                    own.last.unflatten(1, (self.num_heads, -1)).index_select(1, index).flatten(1).to(dtype),
                    own.last_bias.to(dtype),
                )
            )

        return self.cache.get((*key, active, dtype), make)

    def _resizable(self, weights: PairWeights) -> PairWeights:
        """Mark the axes of what may be off, so that compiled code serves any number of heads or groups."""
        if self.compiles:
            for tensor, axis in ((weights.first, 0), (weights.first_bias, 0), (weights.last, 1)):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return weights


def _compiled(function: Callable[P, R], backend: str | None) -> Callable[P, R]:
    """Compile a function; return it as it is without a backend."""
    # All other axes are fixed: with free ones, a norm over an axis of unknown length takes a GPU twice the time.
    return function if backend is None else torch.compile(function, fullgraph=True, backend=backend)


def _active(mask: list[float]) -> Active:
    return tuple(place for place, on in enumerate(mask) if on)


# Parts of a block as functions, so that all blocks share the compiled code


def attend(
    x: Tensor, c: Tensor, adaln: AdaLNModulation, weights: PairWeights, router: TokenRouter, head_dim: int
) -> tuple[Tensor, Mask, Modulation]:
    """Run a block up to the decision on its tokens: modulation, attention of the heads that are on, token router.

    With no head on, the output map's bias remains.

    Args:
        x: (N, T, D) tokens.
        c: (N, D) conditioning.
        adaln: Makes both triples of the modulation.
        weights: Of attention.
        router: Decides on the tokens.
        head_dim: Channels of a head.

    Returns:
        Tokens (N, T, D), a new tensor; which of them go through the MLP, (N, T); and the MLP's modulation.
    """
    parts = adaln(c, x.dtype)
    modulation, num_heads = Modulation(*parts[:3]), weights.last.shape[1] // head_dim
    if num_heads == 0:
        x = multiply_add(x, modulation.gate, weights.last_bias)
    else:
        h = modulate(_normed(x), modulation.shift, modulation.scale)
        heads = attention_heads(functional.linear(h, weights.first, weights.first_bias), num_heads)
        x = multiply_add(x, modulation.gate, functional.linear(heads.flatten(2), weights.last, weights.last_bias))
    return x, router(x), Modulation(*parts[3:])


def masked_mlp(x: Tensor, tokens: Tensor | None, modulation: Modulation, weights: PairWeights) -> Tensor:
    """Add the gated MLP to the tokens that are on, (N, T) booleans (None: to all): (N, T, D) -> (N, T, D)."""
    update = _mlp(modulate(_normed(x), modulation.shift, modulation.scale), weights)
    if tokens is not None:
        update = update * tokens.unsqueeze(-1)
    return multiply_add(x, modulation.gate, update)


def packed_update(x: Tensor, rows: Tensor, modulation: Modulation, weights: PairWeights) -> Tensor:
    """Compute what the gated MLP adds to the rows (M,) of the flattened batch (N, T, D): (M, D) in its dtype."""
    image = rows // x.shape[1]
    shift, scale, gate = (part.squeeze(1).index_select(0, image) for part in modulation)
    h = torch.addcmul(shift, _normed(x.flatten(0, 1).index_select(0, rows)), 1 + scale)
    return (_mlp(h, weights) * gate).to(x.dtype)


def _normed(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=EPS)


def _mlp(x: Tensor, weights: PairWeights) -> Tensor:
    inner = gelu(functional.linear(x, weights.first, weights.first_bias))
    return functional.linear(inner, weights.last, weights.last_bias)
