"""The script that searches a solver, and sampling by what it found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sample_ddp
from diffusion import PREVIEW_SAMPLER, FlowMatching, create_diffusion, make_sampler
from diffusion.solver_search import SearchedSolver, teacher_path
from runtime.errors import run
from sampling.pipeline import Pipeline
from scripts import search_solver
from tests.diffusion.test_solver_search import denoise
from tests.digits_checkpoints import save_digits_checkpoint

FEW = "--evaluations 3 --teacher-evaluations 6 --batch-size 2 --device cpu".split()


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "a.safetensors"
    save_digits_checkpoint(path, "DiT-digits/2", "gaussian", 0)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_solver, "VALIDATION_IMAGES", 2)
    monkeypatch.setattr(search_solver, "VALIDATE_EVERY", 2)


def search(*argv: str | Path) -> int:
    return run(search_solver.main, "search_solver.py", [*FEW, *map(str, argv)])


def test_an_interrupted_search_ends_at_the_same_table(ckpt, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert search("--ckpt", ckpt, "--batches", "5", "--cfg-scale", "1.5", "--output", whole) == 0
    batch, made = search_solver.Search.batch, []

    def interrupted(self):
        made.append(1)
        if len(made) == 4:
            raise KeyboardInterrupt
        return batch(self)

    monkeypatch.setattr(search_solver.Search, "batch", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        if search("--ckpt", ckpt, "--batches", "5", "--cfg-scale", "1.5", "--output", parts):
            raise SystemExit
    monkeypatch.setattr(search_solver.Search, "batch", batch)
    assert not parts.exists() and parts.with_suffix(".search").exists()
    capsys.readouterr()
    assert search("--ckpt", ckpt, "--batches", "6", "--cfg-scale", "1.5", "--output", parts) == 2
    assert "a search with other settings; --overwrite starts anew" in capsys.readouterr().err
    assert search("--ckpt", ckpt, "--batches", "5", "--cfg-scale", "1.5", "--output", parts) == 0
    assert "after 2 of 5 batches" in capsys.readouterr().out
    assert parts.read_text() == whole.read_text() and not parts.with_suffix(".search").exists()
    protocol = json.loads(whole.read_text())["protocol"]
    assert protocol["cfg_scale"] == 1.5 and protocol["checkpoint"]["file"] == "a.safetensors"
    assert protocol["rmse_on_held_out_noise"]["best"] <= protocol["rmse_on_held_out_noise"]["first"]


def test_it_begins_at_the_order_that_is_closer_to_the_teacher(ckpt):
    pipeline = Pipeline.from_pretrained(ckpt, device="cpu")
    search = search_solver.Search(pipeline, search_solver.SearchSettings(ckpt=ckpt, evaluations=5, cfg_scale=1.0))
    solvers = [SearchedSolver(pipeline.process, 5, order, clip_denoised=True) for order in (2, 3)]
    distances = [search.distance(solver) for solver in solvers]
    assert search.first == min(distances) < max(distances)
    assert torch.equal(search.solver.earlier, solvers[distances.index(search.first)].earlier)


def test_sampling_follows_the_table_and_records_it(ckpt, tmp_path, capsys):
    table = tmp_path / "a-3.json"
    assert search("--ckpt", ckpt, "--batches", "2", "--output", table, "--grad-checkpointing") == 0
    output = tmp_path / "o.npz"
    argv = f"--ckpt {ckpt} --num-fid-samples 4 --device cpu --output {output} --solver-table {table}".split()
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 0
    document = json.loads(output.with_suffix(".json").read_text())
    assert document["config"]["num_sampling_steps"] == "3" and document["config"]["sampler"] is None
    document = json.loads(table.read_text())
    del document["crc32"]
    table.write_text(json.dumps(document).replace('"seed": 0', '"seed": 1'))
    assert run(sample_ddp.main, "sample_ddp.py", argv) == 2, "another table under the same name"
    capsys.readouterr()
    for more, message in [
        (["--num-sampling-steps", "4"], "a table of 3 evaluations, not 4"),
        (["--num-sampling-steps", "ddim3"], "--num-sampling-steps ddim3: a table has a number of evaluations"),
        (["--sampler", "ddim"], "takes the place of --sampler ddim"),
        (["--eta", "1"], "--eta"),
        (["--solver-table", "SiT-XL/2"], "searched for process 'flow'"),
        (["--solver-table", "DiT-XL/2"], "searched for another noise schedule"),
        (["--solver-table", str(ckpt)], "not a table of search_solver.py"),
    ]:
        assert run(sample_ddp.main, "sample_ddp.py", [*argv, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("process", [create_diffusion(learn_sigma=False), FlowMatching()], ids=lambda each: each.name)
def test_the_teacher_is_close_to_the_solution(process):
    # Data of deviation 0.5 around 0.3, whose ODE keeps every point at its quantile
    x = torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = process.alphas_cumprod_at(np.array([999.0]))[0] if process.name == "gaussian" else 0.0
    solution = 0.3 + 0.5 * (x - 0.3 * level**0.5) / (0.25 * level + 1 - level) ** 0.5
    errors = {}
    for name in (search_solver.TEACHERS[process.name], PREVIEW_SAMPLER[process.name]):
        end = teacher_path(denoise(process), make_sampler(name, process, "100"), x).points[-1]
        errors[name] = float((end - solution).square().mean().sqrt())
    teacher, first_order = errors.values()
    assert teacher < first_order / 5 and teacher < 2e-3, errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--evaluations", "1"], "--evaluations 1: must be at least 2"),
        (["--teacher-evaluations", "5"], "--teacher-evaluations 5: must be twice --evaluations"),
        (["--lr", "2"], "--lr 2.0: must be in (0, 1)"),
        (["--ckpt", "none.safetensors"], "none.safetensors"),
    ],
)
def test_mistakes_are_one_line(ckpt, tmp_path, capsys, argv, message):
    assert search("--ckpt", ckpt, "--output", tmp_path / "o.json", *argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
