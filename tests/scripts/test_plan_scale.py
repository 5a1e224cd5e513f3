"""The plan's tables against docs/scaling.md, which has each of them, and mistakes."""

import re

import pytest
import torch

from benchmarks import scaling
from models import create_model
from runtime.errors import run
from scripts.plan_scale import PlanSettings, main, tables
from tests.processes import ROOT

DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()


def test_the_document_has_every_table_that_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, "plan_scale.py", []) == 0
    printed = capsys.readouterr().out
    for title, table in tables(PlanSettings().gpus).items():
        assert f"## {title}\n\n{table}\n" in printed + "\n"
        (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENT, flags=re.M | re.S)
        assert table in section
        assert [line for line in section.splitlines() if line.startswith("|")] == table.splitlines()  # and no other


def test_numbers_in_sentences_are_the_scripts() -> None:
    recorded = scaling.recorded()
    rates = ", ".join(f"{rate:.1f}" for rate in list(recorded.images.values())[:2])
    assert f"sampling: {rates} and {recorded.images['DPM-Solver++-20']:.1f} guided images/s" in DOCUMENT
    assert f"{recorded.rate / 1e12:.0f} TFLOP/s" in DOCUMENT and f"{recorded.optimizer * 1e3:.1f} ms" in DOCUMENT
    assert f"{scaling.GPU_HOURS_TO_FAILURE:,.0f} hours" in DOCUMENT


def test_buckets_are_those_of_pytorch_and_of_the_document() -> None:
    with torch.device("meta"):
        gradients = [p for p in create_model("DiT-XL/2").parameters() if p.requires_grad][::-1]
    counts, lasts = [], []
    for cap in (25, 50, 100, 400):
        made, limits = scaling.buckets("XL/2", cap * 2**20), [scaling.FIRST_BUCKET, cap * 2**20]
        expected, _ = torch.distributed._compute_bucket_assignment_by_size(gradients, limits)
        assert made == [sum(gradients[i].nbytes for i in bucket) for bucket in expected]
        counts.append(str(len(made)))
        lasts.append(f"{made[-1] / 2**20:.0f}")
    text = " ".join(DOCUMENT.split())
    assert f"make {', '.join(counts[:-1])} and {counts[-1]} all-reduces" in text
    assert f"the last of which, {', '.join(lasts[:-1])} and {lasts[-1]} MiB," in text
    median = sorted(scaling.buckets("XL/2"))[len(scaling.buckets("XL/2")) // 2]
    milliseconds = 2 * 7 / 8 * median / (scaling.NVLINK * scaling.LINK_SHARE) * 1e3
    assert f"median, {median / 2**20:.0f} MiB, takes {milliseconds:.2f} ms in a node" in text


def test_other_numbers_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, "plan_scale.py", ["--gpus", "16"]) == 0
    assert "| FSDP     |   16 |" in capsys.readouterr().out


@pytest.mark.parametrize("gpus", ["0", "-8", "12"])
def test_parts_of_nodes_are_refused(gpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, "plan_scale.py", [f"--gpus={gpus}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--gpus {gpus}: must be a multiple of 8" in line
