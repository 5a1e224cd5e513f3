"""The share of the first weights in an average of weights (EMA)."""

from __future__ import annotations

NOTICED = 0.05  # share of the first weights from which on samples show them
NONE = 1e-9


def first_share(decay: float, updates: int, *, ramp: bool = False, start: int = 0) -> float:
    """Share of the weights before the first of some updates in the average after them: the product of their decays.

    Args:
        decay: Weight of the past at each update.
        updates: Number of updates.
        ramp: The decay of update n is min(decay, (1 + n) / (10 + n)).
        start: Number n of the first of them.
    """
    if not ramp:
        return float(decay**updates)
    share = 1.0
    for n in range(start, start + updates):
        share *= min(decay, (1 + n) / (10 + n))
        if share < NONE:
            return 0.0
    return share


def average_warning(decay: float, updates: int, *, ramp: bool, from_weights: bool, when: str) -> str | None:
    """Warn of an average that still holds its first weights.

    Args:
        decay: Weight of the past at each update.
        updates: Number of updates.
        ramp: As for `first_share`.
        from_weights: The first weights were trained before.
        when: End of the sentence, such as "at the end".
    """
    share = first_share(decay, updates, ramp=ramp)
    if share <= NOTICED:
        return None
    first = "weights it started from" if from_weights else "untrained weights"
    return f"at --ema-decay {decay} the average still holds {share:.0%} of the {first} {when}"
