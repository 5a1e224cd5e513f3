"""Devices: CUDA, Apple's GPUs (MPS) and CPUs, and what MPS does not compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from runtime.errors import UserError

BF16_UNITS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"}  # features of x86 and Arm
DeviceName = Literal["cuda", "mps", "cpu"]


def choose_device(name: str | None) -> torch.device:
    """Device of a single process: "cuda", "mps", "cpu", or None for CUDA if there is one, else the CPU.

    Raises:
        UserError: If one is asked for that is absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device; use --device cpu, or check the driver")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch finds no Apple GPU; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def cpu_fields() -> dict[str, str]:
    """Fields that Linux lists of a processor, such as "model name" and "flags" ("features" on Arm); none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def slow_bf16(device: torch.device | str, flag: str = "--precision") -> str | None:
    """Return a warning of a flag if bf16 makes this device slower, as it does a CPU without its units; None if not."""
    if torch.device(device).type != "cpu":
        return None
    fields = cpu_fields()
    features = {*fields.get("flags", "").split(), *fields.get("features", "").split()}
    if not features or features & BF16_UNITS:
        return None
    return f"{flag} bf16: this CPU has no units for bf16 and takes several times as long with it; use {flag} fp32"


def float64_device(device: torch.device | str) -> torch.device:
    """Device of random numbers and float64 sums: the CPU for MPS, which has no float64, else the device itself."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def check_mps(device: str | None, flags: Mapping[str, bool]) -> None:
    """Check that a job on MPS has no setting that is not possible there.

    Args:
        device: Value of --device.
        flags: True for each such setting that is given, by its flag.

    Raises:
        ValueError: Naming the first of them.
    """
    for flag, is_given in flags.items():
        if device == "mps" and is_given:
            raise ValueError(f"{flag}: not with --device mps, which computes in float32 and compiles nothing")
