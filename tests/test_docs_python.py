"""docs/python.md: its code is run as one program, and what it promises of the results is checked."""

import contextlib
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sampling.pipeline import Pipeline
from tests.processes import ROOT

TEXT = (ROOT / "docs" / "python.md").read_text()
PROGRAM = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, flags=re.S))


def test_the_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    names: dict[str, object] = {}
    torch.manual_seed(0)
    with contextlib.chdir(tmp_path):
        exec(compile(PROGRAM, "docs/python.md", "exec"), names)  # noqa: S102  (our own page)
        pipeline = Pipeline.from_pretrained(names["checkpoint"], device="cpu", num_sampling_steps=10)
    images = pipeline.sample([3, 3, 7], sampler="ddim", cfg_scale=2.0)
    assert np.array_equal(names["images"], images)
    kept = (names["pixels"][0, :, :, :4] + 1) * 127.5
    assert np.abs(names["inpainted"][0, :, :4, 0] - kept[0].numpy()).max() <= 1
    assert names["changed"].shape == names["image"].shape == (1, 1, 8, 8)
    assert names["rest"].times == names["run"].sampler.times[5:]
    assert names["better"].shape == (2, 1, 8, 8) and names["better"].isfinite().all()
    plain = names["both"](names["latents"], names["table"][0]._replace(scale=1.0, guided=False)).sample
    spread = names["rescaled"](names["latents"], names["table"][0]).sample.std(dim=(1, 2, 3))
    torch.testing.assert_close(spread, plain.std(dim=(1, 2, 3)))
    assert names["tokens"].shape[0] == 2 and names["tokens"].ndim == 3


@pytest.mark.parametrize(("module", "listed"), re.findall(r"`(\w+\.\w+)`: ((?:`\w+`(?:, )?)+)", TEXT))
def test_stable_names_exist(module: str, listed: str) -> None:
    assert all(hasattr(importlib.import_module(module), name) for name in re.findall(r"`(\w+)`", listed))
