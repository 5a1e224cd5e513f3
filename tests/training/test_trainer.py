"""Runs that are stopped, killed, resumed, cut into micro-batches and spread over processes, and steps that go wrong."""

import hashlib
import shutil
import time

import pytest
import torch

from diffusion.loss import DiffusionLoss
from runtime.checkpoint import read_checkpoint
from runtime.groups import read_groups
from runtime.saver import BackgroundSaver
from tests import runs
from tests.processes import fork_script, run_ranks
from tests.runs import DIGITS, assert_same, checkpoint, losses, metrics, run_folder, state
from training import trainer
from training.interruption import INTERRUPTED_STATUS

BASE = [*DIGITS, *"--model DiT-digits/2 --global-batch-size 12 --lr 2e-3 --ema-decay 0.9 --keep-last 50".split()]


def start(results, *argv):
    return runs.start(results, *BASE, *argv)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    results = tmp_path_factory.mktemp("whole")
    assert start(results, "--max-steps", 12, "--ckpt-every", 1) == 0
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize("how", ["auto", "path"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(whole, tmp_path, how):
    assert start(tmp_path, "--max-steps", 7) == 0
    resume = "auto" if how == "auto" else checkpoint(tmp_path, 7)
    assert start(tmp_path, "--max-steps", 12, "--resume", resume) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["000-DiT-digits-2"], "it continues in its own folder"
    assert_same(state(checkpoint(tmp_path, 12)), state(checkpoint(whole, 12)))
    assert losses(tmp_path) == losses(whole)
    assert "changed with version" not in runs.log(tmp_path)


def test_an_average_every_few_steps_resumes_bit_by_bit_and_with_another_interval(tmp_path):
    every = ["--ema-every", 4, "--ema-ramp", "--depth", 1, "--ckpt-every", 1]
    assert start(tmp_path / "whole", *every, "--max-steps", 9) == 0
    assert start(tmp_path / "cut", *every, "--max-steps", 6) == 0
    one = ["--ema-every", 1, "--override", "ema-every", *every[2:], "--max-steps", 8]
    shutil.copytree(tmp_path / "cut", tmp_path / "one")
    assert start(tmp_path / "cut", *every, "--max-steps", 9, "--resume", "auto") == 0
    for step in (7, 8, 9):
        assert_same(state(checkpoint(tmp_path / "cut", step)), state(checkpoint(tmp_path / "whole", step)))
    assert start(tmp_path / "one", "--resume", "auto", *one) == 0
    sixth, seventh = (read_groups(checkpoint(tmp_path / "one", step), lambda present: present) for step in (6, 7))
    assert sixth[1]["averages"] == {"ema-0.9": {"decay": 0.9, "updates": 4}}
    assert seventh[1]["averages"] == {"ema-0.9": {"decay": 0.9}}
    share = (5 / 14) * (6 / 15) * (7 / 16)  # of updates 4 to 6, from 0
    for name, weight in seventh[0]["model"].items():
        expected = torch.lerp(sixth[0]["ema-0.9"][name].double(), weight.double(), 1 - share)
        torch.testing.assert_close(seventh[0]["ema-0.9"][name].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("saves", [1, 3])
def test_memory_of_the_first_save_is_prepared_once_the_optimizer_has_its_state(saves, tmp_path, monkeypatch):
    prepared, plain = [], BackgroundSaver.prepare

    def prepare(self, groups):
        prepared.append({name: len(tensors) for name, tensors in groups.items()})
        plain(self, groups)
        copies.append(self._preparing is not None)

    copies = []
    monkeypatch.setattr(BackgroundSaver, "prepare", prepare)
    assert start(tmp_path, "--max-steps", 3, "--depth", 1, "--ckpt-every", saves) == 0
    (counts,) = prepared
    groups, _ = read_groups(checkpoint(tmp_path, 3), lambda present: present)
    assert counts == {name: len(tensors) for name, tensors in groups.items()} and counts["optimizer"] > 10
    assert copies == [saves > 1], "after a save at the first step there is nothing to prepare"


def test_resume_with_flips_workers_and_a_stop_in_mid_epoch(tmp_path):
    """Of 1,297 images, 500 a step: the run is cut in its second epoch and ends in its third."""
    flips = ["--flip", "--num-workers", 2, "--global-batch-size", 500, "--depth", 1]
    assert start(tmp_path / "whole", *flips, "--max-steps", 6) == 0
    assert start(tmp_path / "cut", *flips, "--max-steps", 3) == 0
    assert start(tmp_path / "cut", *flips, "--max-steps", 6, "--resume", "auto") == 0
    assert_same(state(checkpoint(tmp_path / "cut", 6)), state(checkpoint(tmp_path / "whole", 6)))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_two_ranks_resume_bit_by_bit_and_one_rank_continues_alike(tmp_path, whole):
    def two(name, *argv):
        argv = [*BASE, "--results-dir", str(tmp_path / name), "--resume", "auto", *argv]
        done = run_ranks("train.py", *argv, folder=tmp_path)
        assert done.returncode == 0, done.stderr

    two("whole", "--max-steps", "8")
    two("cut", "--max-steps", "4")
    two("cut", "--max-steps", "8")
    assert_same(state(checkpoint(tmp_path / "cut", 8)), state(checkpoint(tmp_path / "whole", 8)))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert start(tmp_path / "cut", "--resume", "auto", "--max-steps", 12) == 0
    for step, loss in losses(whole).items():
        assert losses(tmp_path / "cut")[step] == pytest.approx(loss, rel=1e-5)


def test_auto_starts_a_new_run_where_there_is_nothing_or_something_else(tmp_path):
    assert start(tmp_path, "--max-steps", 2, "--resume", "auto") == 0
    assert "Nothing to resume in" in runs.log(tmp_path)
    assert start(tmp_path, "--max-steps", 2, "--resume", "auto", "--depth", 1) == 0, "another model"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000-DiT-digits-2", "001-DiT-digits-2"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            "--lr 0.003",
            "differs in --lr (0.002, 0.003); --override lr resumes all the same; leave out --resume",
        ),
        ("--global-seed 1 --grad-clip 1.0", "--global-seed (0, 1); --override"),
        ("--process flow", "differs in --process (gaussian, flow)"),
    ],
)
def test_auto_says_what_differs_in_a_run_of_this_model_and_data(argv, words, whole, capsys):
    before = sorted(whole.rglob("*"))
    assert start(whole, "--max-steps", 8, "--resume", "auto", *argv.split()) == 2
    error = runs.the_error(capsys)
    assert "--resume auto: nothing to resume: run 000-DiT-digits-2 " in error and words in error
    assert sorted(whole.rglob("*")) == before


def test_a_finished_run_stays_as_it_is(tmp_path):
    assert start(tmp_path, "--max-steps", 2) == 0
    before = checkpoint(tmp_path, 2).read_bytes()
    assert start(tmp_path, "--max-steps", 2, "--resume", "auto") == 0
    assert checkpoint(tmp_path, 2).read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--lr 1e-3", "--lr (0.002, 0.001); --override lr resumes all the same"),
        ("--model DiT-digits/2 --mlp-ratio 2", "--mlp-ratio (4.0, 2.0)"),
        ("--noise-schedule squaredcos_cap_v2", "--noise-schedule (linear, squaredcos_cap_v2)"),
        ("--process flow", "--process (gaussian, flow)"),
        ("--weight-decay 0.1", "--weight-decay (0.0, 0.1)"),
        ("--model DyDiT-digits/2", "--model (DiT-digits/2, DyDiT-digits/2)"),
        ("--precision bf16", "--precision (tf32, bf16)"),
    ],
)
def test_a_named_checkpoint_of_other_settings_is_refused_with_their_flags(argv, words, whole, tmp_path, capsys):
    assert start(tmp_path, "--resume", checkpoint(whole, 4), *argv.split()) == 2
    error = runs.the_error(capsys)
    assert "the run has other settings: " in error and words in error
    assert not list(tmp_path.iterdir())


def test_what_does_not_change_the_result_may_change_on_resume(tmp_path, whole):
    assert start(tmp_path, "--max-steps", 3) == 0
    free = "--max-steps 5 --log-every 2 --ckpt-every 3 --num-workers 1 --keep-last 1 --non-finite skip --grad-accum 2"
    free += " --grad-checkpointing --strict --eval-every 5 --eval-samples 0 --dist-timeout 60"
    assert start(tmp_path, "--resume", checkpoint(tmp_path, 3), *free.split()) == 0
    assert checkpoint(tmp_path, 5).exists() and "at step 3" in runs.log(tmp_path)
    theirs = state(checkpoint(whole, 5))
    for name, tensor in state(checkpoint(tmp_path, 5)).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-4)


def test_the_length_of_a_cosine_cannot_change_on_the_way(tmp_path, capsys):
    cosine = ["--lr-schedule", "cosine", "--max-steps"]
    assert start(tmp_path, *cosine, 4, "--ckpt-every", 2) == 0
    assert start(tmp_path, *cosine, 8, "--resume", checkpoint(tmp_path, 2)) == 2
    assert "--max-steps (4, 8)" in runs.the_error(capsys)
    before = state(checkpoint(tmp_path, 4))
    checkpoint(tmp_path, 4).unlink()
    assert start(tmp_path, *cosine, 4, "--resume", "auto") == 0
    assert_same(state(checkpoint(tmp_path, 4)), before)


def test_a_damaged_newest_checkpoint_is_skipped_by_auto_and_refused_by_name(whole, tmp_path, capsys):
    assert start(tmp_path, "--max-steps", 8, "--ckpt-every", 4) == 0
    newest = checkpoint(tmp_path, 8)
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1  # a flipped bit in the weights: the file's structure is intact
    newest.write_bytes(bytes(content))
    assert start(tmp_path, "--max-steps", 12, "--resume", newest) == 2
    assert "does not match its checksum" in runs.the_error(capsys)
    newest.write_bytes(bytes(content[:1000]))
    assert start(tmp_path, "--max-steps", 12, "--resume", "auto") == 0
    assert f"skipped: --resume {newest}" in capsys.readouterr().err
    assert_same(state(checkpoint(tmp_path, 12)), state(checkpoint(whole, 12)))


def test_a_checkpoint_without_all_weights_is_refused(whole, tmp_path, capsys):
    from runtime.groups import read_groups, save_checkpoint

    groups, meta = read_groups(checkpoint(whole, 4), lambda present: present)
    del groups["ema-0.9"]
    save_checkpoint(tmp_path / "0000004.safetensors", groups, meta)
    assert start(tmp_path, "--resume", tmp_path / "0000004.safetensors") == 2
    assert "as ema-0.9: the weights do not fit the model" in runs.the_error(capsys)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    assert start(tmp_path, "--max-steps", 7, "--ckpt-every", 2, "--keep-last", 2) == 0
    kept = sorted(p.name for p in (run_folder(tmp_path) / "checkpoints").iterdir())
    assert kept == ["0000006.safetensors", "0000007.safetensors"]


def launch(results, *argv):
    """Start train.py in a process of its own, ready to be killed."""
    results.mkdir(parents=True, exist_ok=True)
    argv = [*BASE, "--results-dir", str(results), *map(str, argv)]
    return fork_script("train.py", *argv, folder=results, output=results / "output")


def wait_for_step(results, step):
    """Return once the run has logged a step."""
    for _ in range(1200):
        found = [*results.glob("000-*/metrics.jsonl")]
        if found and f'"step": {step},' in found[0].read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def test_sigterm_saves_and_leaves_with_the_documented_status(tmp_path):
    process = launch(tmp_path, "--max-steps", 100_000)
    wait_for_step(tmp_path, 5)
    process.terminate()
    process.join(60)
    assert process.exitcode == INTERRUPTED_STATUS == 75
    assert "Stopped by a signal at step" in (tmp_path / "output.out").read_text()
    (saved,) = (run_folder(tmp_path) / "checkpoints").iterdir()
    stopped = int(saved.stem)
    assert start(tmp_path / "whole", "--max-steps", stopped) == 0
    assert_same(state(saved), state(checkpoint(tmp_path / "whole", stopped)))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_any_moment_do_not_change_the_end(tmp_path, kills):
    steps = 30 * kills
    argv = ["--max-steps", steps, "--ckpt-every", 5, "--resume", "auto", "--keep-last", 3]
    generator = torch.Generator().manual_seed(kills)
    for kill in range(kills):
        process = launch(tmp_path / "cut", *argv)
        # step 6 at the earliest: killed before its first checkpoint, a run has nothing to resume and starts again
        wait_for_step(tmp_path / "cut", 6 + 25 * kill + int(torch.randint(5, (), generator=generator)))
        time.sleep(0.05 * float(torch.rand((), generator=generator)))
        process.kill()
        process.join()
    assert start(tmp_path / "cut", *argv) == 0
    assert start(tmp_path / "whole", "--max-steps", steps) == 0
    assert_same(state(checkpoint(tmp_path / "cut", steps)), state(checkpoint(tmp_path / "whole", steps)))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------------------------------
# One step


def test_micro_batches_change_nothing_but_rounding(whole, tmp_path):
    assert start(tmp_path, "--max-steps", 12, "--grad-accum", 3) == 0
    for step, loss in losses(whole).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=1e-5)


def test_bf16_trains_close_to_float32_and_keeps_float32_weights(whole, tmp_path):
    assert start(tmp_path, "--max-steps", 12, "--precision", "bf16") == 0
    for step, loss in losses(whole).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=2e-2)
    assert losses(tmp_path) != losses(whole)
    assert {t.dtype for t in state(checkpoint(tmp_path, 12)).values()} == {torch.float32}


def test_clipping_bounds_the_step_and_the_log_tells_the_norm(tmp_path):
    assert start(tmp_path, "--max-steps", 1, "--grad-clip", 1e-3) == 0
    (line,) = metrics(tmp_path)
    assert line["grad_norm"] > 0.1
    moments = state(checkpoint(tmp_path, 1))
    total = sum(float((t / 0.1).square().sum()) for n, t in moments.items() if n.endswith("exp_avg"))
    assert total**0.5 == pytest.approx(1e-3, rel=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# Non-finite numbers


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of step 3 (the fourth) is NaN."""
    original = DiffusionLoss.forward

    def forward(self, batch, draws, step, shared):
        losses = original(self, batch, draws, step, shared)
        return {k: v * float("nan") if step == 3 else v for k, v in losses.items()}

    monkeypatch.setattr(DiffusionLoss, "forward", forward)


def test_a_non_finite_loss_is_fatal_and_never_enters_weights(poisoned, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        start(tmp_path, "--max-steps", 8, "--ckpt-every", 3)
    assert stop.value.code == 1
    assert "non-finite loss at step 4 on rank 0; 1 optimizer step skipped" in capsys.readouterr().out
    assert all(t.isfinite().all() for t in state(checkpoint(tmp_path, 3)).values())


def test_a_skipped_step_leaves_weights_and_moments_alone(poisoned, tmp_path, capsys):
    assert start(tmp_path, "--max-steps", 5, "--ckpt-every", 1, "--non-finite", "skip") == 0
    assert "non-finite loss at step 4 on rank 0" in capsys.readouterr().out
    before, skipped, after = (state(checkpoint(tmp_path, step)) for step in (3, 4, 5))
    for name, tensor in skipped.items():
        assert tensor.isfinite().all() and after[name].isfinite().all()
        if not name.startswith("ema-0.9/"):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(after["model/final_layer.linear.weight"], skipped["model/final_layer.linear.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# Starting from other weights


def test_init_from_takes_the_averaged_weights(whole, tmp_path):
    assert start(tmp_path, "--max-steps", 1, "--init-from", checkpoint(whole, 12), "--lr", 1e-12) == 0
    ours, theirs = state(checkpoint(tmp_path, 1)), state(checkpoint(whole, 12))
    names = [name.removeprefix("ema-0.9/") for name in theirs if name.startswith("ema-0.9/")]
    assert len(names) > 30
    for name in names:
        assert torch.allclose(ours[f"model/{name}"], theirs[f"ema-0.9/{name}"], atol=1e-6)


def test_another_file_of_other_code_under_the_name_of_init_from_is_another_start(whole, tmp_path, capsys):
    weights, path, results = read_checkpoint(checkpoint(whole, 12)).weights, tmp_path / "a.pt", tmp_path / "results"
    argv = ["--max-steps", 2, "--ckpt-every", 1, "--init-from", path, "--resume", "auto"]
    torch.save({"ema": weights}, path, _use_new_zipfile_serialization=False)
    assert start(results, *argv) == 0
    digest, first = hashlib.sha256(path.read_bytes()).hexdigest(), checkpoint(results, 1)
    notes = ["weights 'ema'", "unverified: the file has no checksums", f"SHA-256 {digest}, compared when the run"]
    assert all(f"--init-from: {note}" in runs.log(results) for note in notes)
    assert read_groups(first, lambda present: ["model"])[1]["start_sha256"] == digest

    torch.save({"ema": weights, "epoch": 1}, path)
    checkpoint(results, 2).unlink()
    assert start(results, *argv) == 2
    now, run = hashlib.sha256(path.read_bytes()).hexdigest(), run_folder(results).name
    assert runs.the_error(capsys) == (
        f"train.py: error: --resume auto: nothing to resume: run {run} differs in --init-from "
        f"(SHA-256 {digest[:12]}..., {now[:12]}...); --override init-from resumes all the same; "
        "leave out --resume for a new run\n"
    )
    assert start(results, *argv, "--override", "init-from") == 0
    assert "Changed since then: --init-from (SHA-256" in runs.log(results)
    assert read_groups(checkpoint(results, 2), lambda present: ["model"])[1]["start_sha256"] == digest
    path.unlink()
    checkpoint(results, 2).unlink()
    assert start(results, "--max-steps", 2, "--resume", first) == 0
    assert read_groups(checkpoint(results, 2), lambda present: ["model"])[1]["start_sha256"] == digest


def test_mistakes_are_one_line(whole, tmp_path, capsys):
    cases = {
        ("--resume", "nothing.safetensors"): "--resume nothing.safetensors: no such file",
        ("--init-from", "nothing.pt"): "--init-from nothing.pt: no such file",
        ("--init-from", str(checkpoint(whole, 12)), "--model", "DiT-debug/2", "--num-classes", "10"): "do not fit",
        ("--grad-accum", "5"): "--global-batch-size 12: not divisible by the 1 processes times 5 micro-batches",
        ("--grad-clip", "0"): "--grad-clip 0.0: must be positive",
        ("--keep-last", "0"): "--keep-last 0",
        ("--precision", "fp8"): "--precision",
    }
    for argv, words in cases.items():
        assert start(tmp_path, *argv) == 2
        assert words in runs.the_error(capsys)
    assert not list(tmp_path.iterdir())


def test_compile_without_a_compiler_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert start(tmp_path, "--compile") == 2
    assert "--compile: on a CPU it needs a C++ compiler" in capsys.readouterr().err


def test_meter_averages_over_steps():
    meter = trainer.LossMeter()
    meter.add({"loss": torch.tensor([1.0, 3.0])})
    meter.add({"loss": torch.tensor([4.0, 4.0])})
    assert meter.read()["loss"] == 3.0
    meter.add({"loss": torch.tensor([7.0])})
    assert meter.read()["loss"] == 7.0


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_train_alike(whole, tmp_path, recompute):
    torch._dynamo.reset()
    flags = ["--grad-checkpointing"] if recompute else []
    assert start(tmp_path, "--max-steps", 12, "--compile", *flags) == 0
    for step, loss in losses(whole).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=1e-4)
    assert state(checkpoint(tmp_path, 12)).keys() == state(checkpoint(whole, 12)).keys(), "the names stay the same"
