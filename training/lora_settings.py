"""Settings of low-rank updates (LoRA)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from runtime.settings import flag_name, setting


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank updates (--train-only lora).

    Raises:
        ValueError: Naming the flag and its value.
    """

    lora_rank: int = setting(8, "rank of the updates of --train-only lora")
    lora_layers: tuple[str, ...] | None = setting(
        None, "ends of the names of their layers, such as attn.qkv", shown="attention and MLPs of all blocks"
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.lora_rank < 1:
            raise ValueError(f"--lora-rank {self.lora_rank}: must be at least 1")

    def check(self, is_used: bool) -> None:
        """Raise a ValueError for a flag that is given without an effect."""
        for own in fields(self):
            value = getattr(self, own.name)
            if value != own.default and not is_used:
                shown = " ".join(value) if isinstance(value, tuple) else value
                raise ValueError(f"{flag_name(own.name)} {shown}: has no effect without --train-only lora")
