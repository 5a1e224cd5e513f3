import hashlib
import json

import numpy as np
import pytest

from data.array_images import array_digest
from data.digits import load_digits
from evaluator.__main__ import main as evaluator
from runtime.errors import run
from scripts import digits_report


@pytest.fixture
def samples(tmp_path):
    """Real held-out digits in the place of samples: they must meet every goal that does not count them."""
    images, labels = load_digits("test")
    np.savez(tmp_path / "samples.npz", images, labels)
    return tmp_path / "samples.npz"


def report(*argv):
    return run(digits_report.main, "digits_report.py", list(map(str, argv)))


def test_real_digits_are_recognised(samples, tmp_path, capsys):
    assert report("--samples", samples, "--output-dir", tmp_path / "out") == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert scores["accuracy"] > 0.98 and scores["nearest_ratio"] == 1
    assert scores["frechet_distance"] == pytest.approx(scores["frechet_distance_of_test"], rel=1e-5)
    shown = " ".join(capsys.readouterr().out.split())
    assert "| recognised by an independent classifier | 0.992 | >= 0.97 | met | 0.992 |" in shown
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["digits.png", "scores.json"]


def test_scores_have_the_form_of_the_evaluators_with_their_protocol(samples, tmp_path, capsys):
    """Read by `evaluator compare`, which finds what differs."""
    documents = []
    for name, count in (("few", 40), ("all", 500)):
        with np.load(samples) as file:
            np.savez(tmp_path / f"{name}.npz", file["arr_0"][:count], file["arr_1"][:count])
        if name == "all":
            (tmp_path / "all.json").write_text('{"config": {"num_sampling_steps": "25"}}')
        assert report("--samples", tmp_path / f"{name}.npz", "--output-dir", tmp_path / name) == 0
        documents.append(json.loads((tmp_path / name / "scores.json").read_text()))
    few, everything = documents
    assert everything["protocol"] == {"config": {"num_sampling_steps": "25"}} and few["protocol"] is None
    digest = hashlib.sha256((tmp_path / "all.npz").read_bytes()).hexdigest()
    assert everything["samples"]["sha256"] == digest and everything["samples"]["images"] == 500
    assert everything["reference"]["sha256"] == array_digest(*load_digits("train"))
    assert everything["scores"].keys() == everything["meanings"].keys()
    assert len(everything["warnings"]) == 1 and "not FID" in everything["warnings"][0]
    assert few["warnings"][1].startswith("40 samples are too few") and "settings" in few["warnings"][2]
    capsys.readouterr()
    assert run(evaluator, "evaluator", ["compare", *(str(tmp_path / name / "scores.json") for name in ("few", "all"))])
    shown = capsys.readouterr()
    assert "frechet_distance: " in shown.out and "(not comparable: number of images)" in shown.out
    assert "nearest_ratio" in shown.err
    same = str(tmp_path / "all" / "scores.json")
    assert run(evaluator, "evaluator", ["compare", same, same]) == 0 and "not comparable" not in capsys.readouterr().out


def test_copies_of_one_digit_miss_the_goals(tmp_path, capsys):
    images, labels = load_digits("train")
    np.savez(tmp_path / "samples.npz", np.repeat(images[:10], 30, axis=0), np.repeat(labels[:10], 30))
    with pytest.raises(SystemExit) as stop:
        report("--samples", tmp_path / "samples.npz", "--output-dir", tmp_path / "out", "--check")
    assert stop.value.code == 1
    assert capsys.readouterr().out.count("MISSED") == 3  # all but the accuracy


def test_clothes_have_their_own_goals_and_picture(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    splits = [(generator.integers(0, 256, (20, 28, 28, 1), dtype=np.uint8), np.arange(20) % 10) for _ in range(2)]
    monkeypatch.setattr(digits_report, "load_small", lambda name, split, path: splits[split == "test"])
    np.savez(tmp_path / "samples.npz", *splits[0])
    assert report("--samples", tmp_path / "samples.npz", "--data-path", tmp_path, "--output-dir", tmp_path / "out") == 0
    assert "recall of the test split" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fashion.png", "scores.json"]
    monkeypatch.undo()
    assert report("--samples", tmp_path / "samples.npz", "--data-path", tmp_path, "--output-dir", tmp_path / "out") == 2
    assert "--data-path: " in capsys.readouterr().err


def test_loss_curve_is_drawn_from_the_run(samples, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    assert report("--samples", samples, "--output-dir", tmp_path / "out", "--run", tmp_path / "run") == 0
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000


def write(path, **arrays):
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (None, "No such file"),
        ({"images": np.zeros((4, 8, 8, 1), np.uint8)}, "lacks arr_0"),
        ({"arr_0": np.zeros((4, 8, 8, 1), np.uint8)}, "lacks arr_1"),
        ({"arr_0": np.zeros((4, 8, 8, 1)), "arr_1": np.zeros(4, np.int64)}, "uint8"),
        ({"arr_0": np.zeros((4, 9, 9, 1), np.uint8), "arr_1": np.zeros(4, np.int64)}, "(N, 8, 8, 1)"),
        ({"arr_0": np.zeros((4, 8, 8, 1), np.uint8), "arr_1": np.full(4, 11)}, "[0, 10)"),
        ({"arr_0": np.array([{}], dtype=object), "arr_1": np.zeros(1)}, "not a readable .npz"),
    ],
)
def test_a_wrong_sample_file_is_one_line_and_status_2(arrays, words, tmp_path, capsys):
    path = tmp_path / "samples.npz"
    if arrays is not None:
        write(path, **arrays)
    assert report("--samples", path, "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("digits_report.py: error: ") and error.count("\n") == 1 and words in error


def test_a_truncated_sample_file_is_named(samples, tmp_path, capsys):
    samples.write_bytes(samples.read_bytes()[:5000])
    assert report("--samples", samples, "--output-dir", tmp_path / "out") == 2
    assert f"--samples {samples}: not a readable .npz" in capsys.readouterr().err


def test_a_run_without_metrics_is_named(samples, tmp_path, capsys):
    assert report("--samples", samples, "--run", tmp_path / "nothing") == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
