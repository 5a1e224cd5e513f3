"""Skip-Cache for transformers of diffusers, by hooks: the weights and the class stay as they are.

At most evaluations the blocks in the middle are left out, and the last ones run on the tokens that were kept when all
blocks ran last; time, conditioning and final layer are always computed. See docs/text.md.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffusion.caching import CLASS_TO_IMAGE, TEXT, CacheSchedule, SkipCacheRule

AMBIGUOUS = (
    "Skip-Cache: timestep {:g} came twice, so this may be two runs in turn: all blocks run until it rises; "
    "evaluate every step once, with the rows of guidance in one batch"
)
# Arguments of a transformer that change from step to step; all others are the same throughout a run.
CHANGING = ("hidden_states", "timestep", "controlnet_block_samples")


class Layout(NamedTuple):
    """Place of the blocks in a class of diffusers, and the published settings for it.

    Attributes:
        blocks: Names of its lists of blocks, which run in turn: the first of each, then the second of each, ...
        skips: Blocks of the second half read the output of the first half's, so that the first ones run always.
        schedule: Bounds of the interval.
        depth: Blocks that run at each end.
    """

    blocks: tuple[str, ...]
    skips: bool
    schedule: CacheSchedule
    depth: int


LAYOUTS = {
    "HunyuanDiT2DModel": Layout(("blocks",), True, TEXT, 1),
    "LatteTransformer3DModel": Layout(("transformer_blocks", "temporal_transformer_blocks"), False, TEXT, 1),
    "DiTTransformer2DModel": Layout(("transformer_blocks",), False, CLASS_TO_IMAGE, 4),
}


def enable_skip_cache(
    transformer: nn.Module,
    interval: int,
    t_high: float | None = None,
    t_low: float | None = None,
    depth: int | None = None,
) -> SkipCache:
    """Let a transformer of diffusers skip its middle blocks at most evaluations of a run.

    Args:
        transformer: `HunyuanDiT2DModel`, `LatteTransformer3DModel`, `DiTTransformer2DModel` or a subclass, such as
            `pipeline.transformer`, not compiled yet.
        interval: N: all blocks run at every N-th evaluation; 1 runs them always.
        t_high: They also run at and above this timestep; None for the published one.
        t_low: They also run at and below this timestep, except possibly for the first time; None for the published one.
        depth: Blocks (of Latte: pairs) that run at each end; of transformers without long skips those at the end alone.
            None for the published one.

    Returns:
        The handle: `remove()`, or the end of a `with` block, takes the hooks off again.

    Raises:
        ValueError: If the class is another one, a number is out of range, or hooks are there already.

    Source: arXiv 2411.17616, section 3; bounds of the released code.
    """
    layout = _layout_of(transformer)
    size = len(getattr(transformer, layout.blocks[0]))
    depth = min(layout.depth, max(1, size // 4)) if depth is None else depth
    if not 1 <= depth < size / 2:
        raise ValueError(
            f"depth {depth} must be at least 1 and less than half of the {size} blocks: others are left out"
        )
    high = layout.schedule.t_high if t_high is None else t_high
    low = layout.schedule.t_low if t_low is None else t_low
    return SkipCache(transformer, layout, _rule(interval, high, low), depth)


def parse_skip_cache(text: str) -> dict[str, int]:
    """Arguments of `enable_skip_cache` in the released code's notation, such as "N2-700-50".

    Raises:
        ValueError: For any other text.
    """
    match = re.fullmatch(r"N?(\d+)-(\d+)-(\d+)", text)
    if match is None:
        raise ValueError(f"{text!r} must be N-HIGH-LOW: an interval and two timesteps, such as N2-700-50")
    interval, high, low = map(int, match.groups())
    _rule(interval, high, low)
    return {"interval": interval, "t_high": high, "t_low": low}


def _rule(interval: int, high: float, low: float) -> SkipCacheRule:
    """The refresh rule of an interval and bounds; a ValueError for those that are none."""
    if not 0 <= low <= high <= 1000:
        raise ValueError(f"the bounds {high:g} and {low:g} must be timesteps, 1000 >= t_high >= t_low >= 0")
    return SkipCacheRule(interval, CacheSchedule(high, low, low_inclusive=True))


class _Evaluation(NamedTuple):
    """An evaluation, as far as the next one has to know it.

    Attributes:
        t: Its timestep.
        inputs: What must not change within a run.
        is_ambiguous: Its timestep was that of the evaluation before, or it followed such a one.
    """

    t: float
    inputs: _Inputs
    is_ambiguous: bool


class SkipCache:
    """Hooks on a transformer, from `enable_skip_cache`; a context manager that removes them at its end.

    A run ends, and the next evaluation runs all blocks, where the timestep does not fall, where the shape of the
    samples or any conditioning is another, and after an evaluation that failed or was in training mode. Where the same
    timestep comes twice, runs are interleaved or a sampler evaluates twice a step: all blocks run until it rises.

    Attributes:
        full: Number of evaluations that ran all blocks.
        reused: Number of evaluations that left blocks out.
    """

    def __init__(self, transformer: nn.Module, layout: Layout, rule: SkipCacheRule, depth: int) -> None:
        self.full = self.reused = 0
        self._rule, self._signature, self._warned = rule, inspect.signature(type(transformer).forward), False
        self.reset()
        lists = [list(getattr(transformer, name)) for name in layout.blocks]
        first, end = depth if layout.skips else 0, len(lists[0]) - depth
        self._blocks = [_Block(self, block, "leave_out") for blocks in lists for block in blocks[first:end]]
        self._blocks.append(_Block(self, lists[0][end], "enter"))
        self._handles = [
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, always_call=True),
        ]

    def reset(self) -> None:
        """End the run: the next evaluation runs all blocks, and nothing of the last one is kept."""
        self._last: _Evaluation | None = None
        self._now: _Evaluation | None = None  # the one that is running
        self._reuses = False
        self._tokens: Tensor | None = None

    def remove(self) -> None:
        """Take the hooks off the transformer; to do so twice is harmless."""
        self.reset()
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            block.restore()
        self._handles, self._blocks = [], []

    def __enter__(self) -> SkipCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @torch.compiler.disable
    def _begin(self, transformer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Choose the blocks that run, before an evaluation."""
        last, tokens = self._last, self._tokens
        self.reset()  # an evaluation that fails leaves nothing
        arguments = self._signature.bind(transformer, *args, **kwargs).arguments
        t = _timestep(arguments.get("timestep"))
        if not self._handles or transformer.training or t is None:
            return
        is_ambiguous = last is not None and (t == last.t or (last.is_ambiguous and t < last.t))
        if last is None or is_ambiguous or t > last.t or not last.inputs.equal(arguments):
            self._rule.restart()
            self._now = _Evaluation(t, _Inputs(arguments), is_ambiguous)
        else:
            self._now = last._replace(t=t)
        self._reuses = not self._rule.refresh(t)
        self._tokens = tokens if self._reuses else None
        if is_ambiguous and not self._warned:
            self._warned = True
            warnings.warn(AMBIGUOUS.format(t), stacklevel=2)

    @torch.compiler.disable
    def _end(self, transformer: nn.Module, args: object, output: object) -> None:
        """Keep what the next evaluation needs, after one that did not fail."""
        now, reused, tokens = self._now, self._reuses, self._tokens
        self.reset()
        if output is None:
            return
        self.full, self.reused = self.full + (not reused), self.reused + reused
        if now is not None and now.is_ambiguous:
            self._last = now
        elif now is not None and self._rule.kept and tokens is not None:
            self._last, self._tokens = now, tokens

    def enter(self, tokens: Tensor) -> Tensor:
        """Tokens for the first block of the end: the kept ones, or these, which are kept then."""
        if self._reuses and self._tokens is not None:
            return self._tokens
        if self._now is not None:
            self._tokens = tokens.detach()
        return tokens

    @property
    def reuses(self) -> bool:
        """True while an evaluation runs that leaves blocks out."""
        return self._reuses


class _Block:
    """A block with another `forward`, an attribute of the instance; bound methods, so that copies of the model work."""

    def __init__(self, cache: SkipCache, block: nn.Module, method: str) -> None:
        self._cache, self._module, self._method = cache, block, method
        self._previous = vars(block).get("forward")  # of another library's hook
        self._forward: Callable[..., Tensor] = block.forward
        block.forward = getattr(self, method)

    def leave_out(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the tokens as they are when state is reused."""
        return hidden_states if self._cache.reuses else self._forward(hidden_states, *args, **kwargs)

    def enter(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Run on the kept tokens when state is reused."""
        return self._forward(self._cache.enter(hidden_states), *args, **kwargs)

    def restore(self) -> None:
        """Give the block its own `forward` again; under another library's hook this one stays, without effect."""
        if vars(self._module).get("forward") == getattr(self, self._method):
            del self._module.forward
            if self._previous is not None:
                self._module.forward = self._previous


class _Inputs:
    """Copies of what an evaluation was given, apart from `CHANGING`: conditioning, masks, tables, and the shape."""

    def __init__(self, arguments: Mapping[str, object]) -> None:
        leaves, self._form = self._flatten(arguments)
        self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def equal(self, arguments: Mapping[str, object]) -> bool:
        """True for the same form and the same values."""
        leaves, form = self._flatten(arguments)
        return form == self._form and all(map(_equal, leaves, self._leaves))

    @staticmethod
    def _flatten(arguments: Mapping[str, object]) -> tuple[list[object], object]:
        samples = arguments["hidden_states"]
        assert isinstance(samples, Tensor)
        constant = {name: value for name, value in arguments.items() if name not in CHANGING and name != "self"}
        leaves, form = pytree.tree_flatten(constant)
        return leaves, (form, samples.shape, samples.dtype, samples.device)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _timestep(timestep: Tensor | float | None) -> float | None:
    """The timestep of all rows; None if rows have several, or it is not given."""
    if not isinstance(timestep, Tensor):
        return timestep
    values = timestep.unique().tolist()
    return float(values[0]) if len(values) == 1 else None


def _layout_of(transformer: nn.Module) -> Layout:
    """Layout of a transformer's class.

    Raises:
        ValueError: If it has none, is compiled, or has hooks.
    """
    if hasattr(transformer, "_orig_mod") or any(module._compiled_call_impl for module in transformer.modules()):
        raise ValueError("the transformer is compiled, which would ignore hooks: enable Skip-Cache before compiling it")
    name = next((cls.__name__ for cls in type(transformer).__mro__ if cls.__name__ in LAYOUTS), None)
    if name is None:
        raise ValueError(f"{type(transformer).__name__} is not one of {', '.join(LAYOUTS)}")
    hooks = transformer._forward_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), SkipCache) for hook in hooks):
        raise ValueError("the transformer has Skip-Cache already: remove() the first one")
    return LAYOUTS[name]
