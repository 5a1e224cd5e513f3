"""Running the project's scripts as a user does: in a process of their own, alone or under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_script(
    script: str | Path, *argv: str, ranks: int = 1, folder: Path, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs a script of the repository root in `folder`, on the CPU with one thread a process; waits for its end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    launcher += ["--max-restarts", str(restarts)] if restarts else []
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
