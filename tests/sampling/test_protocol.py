"""Descriptions of what samples are from."""

from dataclasses import replace
from pathlib import Path

from models.loading import resolve_checkpoint
from sampling.protocol import describe_checkpoint
from tests.digits_checkpoints import save_digits_checkpoint


def test_weights_of_the_hub_are_named_by_repository_and_commit(tmp_path: Path) -> None:
    info, _ = resolve_checkpoint(save_digits_checkpoint(tmp_path / "a.safetensors", "DiT-digits/2"))
    described = describe_checkpoint(info, "1234")
    assert described["file"] == "a.safetensors" and "revision" not in described
    described = describe_checkpoint(
        replace(info, path=Path("models--me--digits/abcd"), repository="me/digits@abcd"), "12"
    )
    assert (described["file"], described["revision"]) == ("me/digits", "abcd")
