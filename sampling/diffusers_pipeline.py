"""Our text-to-video network as the transformer of diffusers' LattePipeline, with Skip-Cache.

network, _ = load_network("Latte-skip")
pipeline = LattePipeline.from_pretrained("maxin-cn/Latte-1", transformer=LatteTransformer(network, cache_interval=2))
frames = pipeline("a dog in the snow").frames
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.caching import CacheSchedule, SkipCacheRule, check_keeps_state
from models.latte_t2v import CACHE_BOUNDS, LatteT2V


class _Kept(NamedTuple):
    """State of an evaluation, and what the next one must have in common with it to reuse that."""

    t: float
    shape: torch.Size
    text: Tensor
    state: Tensor


class LatteTransformer(nn.Module):
    """A LatteT2V with the interface of diffusers' LatteTransformer3DModel.

    Args:
        network: In evaluation mode, on the pipeline's device and in its dtype.
        cache_interval: Skip-Cache's interval N, for a network that keeps state; None computes all blocks always.
        cache_bounds: Its bounds; None for the published ones.

    Attributes:
        config: What the pipeline asks of a config: `in_channels` and `sample_size`.

    Raises:
        ValueError: If the network keeps no state to reuse, or the interval is below 1.
    """

    def __init__(
        self, network: LatteT2V, cache_interval: int | None = None, cache_bounds: CacheSchedule | None = None
    ) -> None:
        super().__init__()
        if cache_interval is not None:
            check_keeps_state(network)
        self.network = network
        self.config = SimpleNamespace(in_channels=network.sample_shape[-3], sample_size=network.sample_shape[-1])
        bounds = CacheSchedule(*CACHE_BOUNDS) if cache_bounds is None else cache_bounds
        self._rule = None if cache_interval is None else SkipCacheRule(cache_interval, bounds)
        self._kept: _Kept | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> SimpleNamespace | tuple[Tensor]:
        """Evaluate the network at clips (N, C, F, H, W), timesteps (N,) and texts (N, L, K).

        Args:
            hidden_states: The clips.
            timestep: The timesteps, all the same where state is reused.
            encoder_hidden_states: The texts.
            encoder_attention_mask: (N, L) of 1 for words that are attended to, 0 for others; the pipeline gives none.
            enable_temporal_attentions: Must be the network's `temporal_blocks`.
            return_dict: Return an object with `sample` instead of a tuple.

        Returns:
            (N, 2 C, F, H, W): noise and variance values.

        Raises:
            ValueError: If the network was loaded with temporal blocks and they are to be left out, or the reverse.
        """
        if enable_temporal_attentions != self.network.config.temporal_blocks:
            wanted = enable_temporal_attentions
            raise ValueError(f"enable_temporal_attentions={wanted}: load the network with temporal_blocks={wanted}")
        state = self._state(hidden_states, timestep, encoder_hidden_states)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.to(hidden_states.dtype)
        clips = hidden_states.transpose(1, 2)
        out = self.network(clips, timestep, text=encoder_hidden_states, text_mask=mask, state=state)
        if self._rule is not None and self._rule.kept:
            self._kept = _Kept(float(timestep[0]), hidden_states.shape, encoder_hidden_states, out.state)
        sample = out.sample.transpose(1, 2)
        return SimpleNamespace(sample=sample) if return_dict else (sample,)

    def _state(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor | None:
        """State for an evaluation; None for a refresh. A run ends where time does not fall, or text or shape differ."""
        kept, self._kept = self._kept, None  # an evaluation that fails leaves nothing
        if self._rule is None:
            return None
        t = float(timestep[0])
        if kept is None or t >= kept.t or x.shape != kept.shape or not _equal(text, kept.text):
            self._rule.restart()
        return None if self._rule.refresh(t) or kept is None else kept.state


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))
