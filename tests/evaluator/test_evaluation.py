"""The evaluator's command from end to end on a narrow network, and everything a user can get wrong."""

import errno
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.inception_graph import synthetic_graph
from evaluator import evaluation
from evaluator.__main__ import main
from evaluator.features import CACHE_KEY, FileFeatures
from evaluator.inception.graph_def import read_graph
from evaluator.inception.network import load_network
from evaluator.inception.weights import inspect_weights
from evaluator.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from evaluator.scores import METRICS, Metric
from evaluator.statistics import feature_statistics
from runtime.errors import run
from runtime.tensor_file import write_tensors
from tests.inception_files import NARROW, make_images, write_graph, write_npz
from tests.processes import ROOT, run_ranks

LABELS = ["Inception Score", "FID", "sFID", "Precision", "Recall"]  # ADM's, in ADM's order
QUICK = ("--metrics", "is,fid,pr")  # sFID's 2,023 eigenvalues take a second


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory, and no weights from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIT_EVAL_INCEPTION", raising=False)
    return tmp_path


@pytest.fixture
def files(folder, pair):
    """Copies of the reference and the samples, so that results lie here."""
    for name, path in zip(("ref.npz", "samples.npz"), pair, strict=True):
        (folder / name).write_bytes(path.read_bytes())
    return folder


def evaluate(graph, *argv, reference="ref.npz", samples="samples.npz"):
    fixed = ["--weights", str(graph), "--cache-dir", "cache", "--device", "cpu"]
    return run(main, "evaluator", [reference, samples, *fixed, *argv])


def result(name="samples.scores.json"):
    return json.loads(Path(name).read_text())


def features(graph, path, count=None):
    with np.load(path) as file:
        return load_network(graph).features(file["arr_0"][:count])


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def test_five_numbers_in_adm_s_layout_and_a_json_with_the_whole_protocol(files, graph, capsys):
    protocol = {"config": {"sampler": "ddpm", "cfg_scale": 1.5, "global_seed": 0}, "run": {"seconds": 3}}
    (files / "samples.json").write_text(json.dumps(protocol))
    assert evaluate(graph) == 0
    out, err = capsys.readouterr()
    lines = [line.split(": ") for line in out.splitlines()]
    assert [label for label, _ in lines] == LABELS
    document = result()
    scores = document["scores"]
    assert list(scores) == ["inception_score", "fid", "sfid", "precision", "recall"]
    assert [float(value) for _, value in lines] == pytest.approx(list(scores.values()), abs=1e-6)

    reference, samples = features(graph, "ref.npz"), features(graph, "samples.npz")
    for name, kind in (("fid", "pool"), ("sfid", "spatial")):
        sides = (feature_statistics(getattr(side, kind)) for side in (reference, samples))
        assert scores[name] == pytest.approx(frechet_distance(*sides), rel=1e-4)
    probabilities = load_network(graph).probabilities(samples.pool)
    assert scores["inception_score"] == pytest.approx(inception_score(probabilities), rel=1e-6)
    assert (scores["precision"], scores["recall"]) == precision_recall(reference.pool, samples.pool)

    assert document["protocol"] == protocol
    for side, path, count in (("reference", "ref.npz", 14), ("samples", "samples.npz", 11)):
        described = document[side]
        assert described["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert (described["path"], described["images"], described["statistics"]) == (path, count, "computed")
        assert described["image_size"] == [32, 32]
    assert document["network"]["weights_sha256"] == hashlib.sha256(graph.read_bytes()).hexdigest()
    assert document["network"]["backend"] == "torch" and document["network"]["precision"] == "float32"
    assert document["versions"] == {
        "python": sys.version.split()[0], "numpy": np.__version__, "torch": torch.__version__
    }  # fmt: skip
    assert document["seconds"].keys() == {"weights", "reference", "samples", "metrics", "total"}
    assert document["config"]["pr_precision"] == "adm"
    assert len(document["warnings"]) == 2 and all(f"warning: {warning}\n" in err for warning in document["warnings"])
    assert "these scores are not comparable with published ones" in err and "here 11, in papers 50,000" in err


@pytest.fixture
def seen(monkeypatch):
    """Names of the files that the network is run on, as it is."""
    names = []
    real = evaluation.extract_features

    def watched(file, *args, **options):
        names.append(file.path.name)
        return real(file, *args, **options)

    monkeypatch.setattr(evaluation, "extract_features", watched)
    return names


def test_the_reference_s_features_are_cached(files, graph, capsys, seen):
    assert evaluate(graph, *QUICK) == 0
    first = result()["scores"]
    assert evaluate(graph, *QUICK) == 0
    assert seen == ["ref.npz", "samples.npz", "samples.npz"] and result()["scores"] == first
    write_npz(files / "ref.npz", make_images(14, seed=5))  # another reference of the same name
    assert evaluate(graph, *QUICK) == 0
    assert seen[3:] == ["ref.npz", "samples.npz"] and result()["scores"] != first


def spoil(change):
    """Puts other tensors into the only kept file."""
    (kept,) = Path("cache/features").iterdir()
    tensors = {name: tensor.clone() for name, tensor in load_file(kept).items()}  # not the file's own memory
    change(tensors)
    write_tensors(kept, tensors, {}, CACHE_KEY)


def shorten_pool(tensors):
    tensors["pool"] = tensors["pool"][:-1]


def narrow_pool(tensors):
    tensors["pool"] = tensors["pool"][:, 1:].contiguous()


def narrow_statistics(tensors):
    tensors["spatial_mean"] = tensors["spatial_mean"][1:]
    tensors["spatial_covariance"] = tensors["spatial_covariance"][1:, 1:].contiguous()


SPOILED = {
    "cut file": lambda: [each.write_bytes(each.read_bytes()[:100]) for each in Path("cache/features").iterdir()],
    "fewer rows": lambda: spoil(shorten_pool),
    "other network's pool": lambda: spoil(narrow_pool),
    "other network's statistics": lambda: spoil(narrow_statistics),
    "NaN": lambda: spoil(lambda tensors: tensors["pool"].fill_(torch.nan)),
    "float32 covariance": lambda: spoil(lambda tensors: tensors.update(spatial_covariance=torch.eye(2023))),
    "no covariance": lambda: spoil(lambda tensors: tensors.pop("spatial_covariance")),
}


def test_kept_features_that_cannot_be_right_are_made_again(files, graph, capsys, seen, monkeypatch):
    monkeypatch.setattr(evaluation, "compute_scores", lambda *args: {"FID": 1.0})  # eigenvalues take a second
    assert evaluate(graph, "--metrics", "sfid") == 0
    (kept,) = (files / "cache" / "features").iterdir()
    whole = {name: tensor.clone() for name, tensor in load_file(kept).items()}
    for name, change in SPOILED.items():
        change()
        seen.clear()
        assert evaluate(graph, "--metrics", "sfid") == 0
        assert seen == ["ref.npz", "samples.npz"], name
        assert all(torch.equal(value, whole[key]) for key, value in load_file(kept).items()), name
    seen.clear()
    assert evaluate(graph, "--metrics", "sfid") == 0
    assert seen == ["samples.npz"]


def test_features_are_kept_for_one_weight_file_backend_device_and_format(files, graph, capsys, monkeypatch):
    cpu, cuda, weights = torch.device("cpu"), torch.device("cuda", 1), inspect_weights(graph)
    other_weights = replace(weights, sha256="0" * 64)
    calls = [
        ("torch", "a" * 64, weights, cpu), ("torch", "b" * 64, weights, cpu), ("torch", "a" * 64, other_weights, cpu),
        ("tensorflow", "a" * 64, weights, cpu), ("torch", "a" * 64, weights, cuda),
    ]  # fmt: skip
    names = [evaluation.features_name(*call) for call in calls]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "CACHE_FORMAT", 99)
        names.append(evaluation.features_name(*calls[0]))
    assert len(set(names)) == 6

    assert evaluate(graph, *QUICK) == 0
    first = result()["scores"]
    write_graph(files / "other.pb", seed=1)
    assert evaluate("other.pb", *QUICK) == 0
    assert result()["scores"] != first and len(list((files / "cache" / "features").iterdir())) == 2


@pytest.mark.parametrize("in_the_way", ["the folder", "the file"])
def test_features_that_cannot_be_cached_are_a_warning(files, graph, capsys, in_the_way):
    assert evaluate(graph, *QUICK) == 0
    first = capsys.readouterr().out
    (kept,) = (files / "cache" / "features").iterdir()
    kept.unlink()
    if in_the_way == "the file":
        kept.mkdir()
    else:
        kept.parent.rmdir()
        kept.parent.touch()
    assert evaluate(graph, *QUICK) == 0
    out, err = capsys.readouterr()
    assert out == first and f"warning: {kept.relative_to(files)}: cannot keep features there (" in err


def test_a_prefix_of_the_samples(files, graph, capsys):
    assert evaluate(graph, *QUICK, "--num-samples", "7", "--json", "prefix.json") == 0
    with np.load("samples.npz") as file:
        write_npz(files / "seven.npz", file["arr_0"][:7])
    assert evaluate(graph, *QUICK, samples="seven.npz") == 0
    prefix, seven = result("prefix.json"), result("seven.scores.json")
    assert prefix["scores"] == pytest.approx(seven["scores"], rel=1e-6)
    assert (prefix["samples"]["images"], prefix["samples"]["images_in_file"]) == (7, 11)


def test_distances_in_float32_and_the_kernel_distance_by_flag(files, graph, capsys):
    assert evaluate(graph, "--metrics", "kid,pr", "--pr-precision", "float32") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["Precision", "Recall", "KID"]
    reference, samples = features(graph, "ref.npz").pool, features(graph, "samples.npz").pool
    scores = result()["scores"]
    assert (scores["precision"], scores["recall"]) == precision_recall(reference, samples, precision="float32")
    assert scores["kid"] == pytest.approx(kernel_distance(reference, samples), rel=1e-3)


def test_a_metric_is_a_function_and_a_row(files, graph, capsys, monkeypatch):
    def mean_distance(reference, samples, precision):
        return {"Mean Distance": float((reference.rows().mean(0) - samples.rows().mean(0)).norm())}

    monkeypatch.setitem(METRICS, "mean", Metric(mean_distance, images=2))
    assert evaluate(graph, "--metrics", "mean,is") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["Inception Score", "Mean Distance"]
    means = [features(graph, path).pool.mean(dim=0) for path in ("ref.npz", "samples.npz")]
    assert result()["scores"]["mean_distance"] == pytest.approx(float((means[0] - means[1]).norm()), rel=1e-4)
    np.savez("stats.npz", **stored(graph, "ref.npz"))
    assert evaluate(graph, "--metrics", "mean", reference="stats.npz") == 2
    assert "no images to use, but metric mean needs at least 2 in the reference" in capsys.readouterr().err


def test_a_result_is_a_config(files, graph, capsys):
    """Results of format 1 too: only the name of their warnings has changed."""
    assert evaluate(graph, "--metrics", "is", "--batch-size", "5", "--json", "first.json") == 0
    first = result("first.json")
    first |= {"format": 1, "remarks": first.pop("warnings")}
    Path("first.json").write_text(json.dumps(first))
    assert evaluate(graph, "--config", "first.json", "--json", "second.json") == 0
    second = result("second.json")
    assert second["format"] == 2 and second["scores"] == first["scores"]
    assert second["config"] == first["config"] | {"json": "second.json"}


def stored(graph, path, count=None):
    found = {}
    for kind, names in (("pool", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
        statistics = feature_statistics(getattr(features(graph, path, count), kind))
        found |= dict(zip(names, (statistics.mean.numpy(), statistics.covariance.numpy()), strict=True))
    return found


def test_stored_statistics_go_before_computed_ones(files, graph, capsys):
    assert evaluate(graph, *QUICK, "--json", "computed.json") == 0
    with np.load("ref.npz") as file:
        images = file["arr_0"]
    write_npz(files / "stats.npz", images[:6], **stored(graph, "ref.npz"))  # of all 14, beside 6 images
    write_npz(files / "six.npz", images[:6])
    assert evaluate(graph, *QUICK, "--json", "stored.json", reference="stats.npz") == 0
    assert evaluate(graph, *QUICK, "--json", "six.json", reference="six.npz") == 0
    computed, with_stored, six = (result(f"{name}.json") for name in ("computed", "stored", "six"))
    assert with_stored["scores"]["fid"] == pytest.approx(computed["scores"]["fid"], rel=1e-6)
    assert with_stored["scores"]["fid"] != pytest.approx(six["scores"]["fid"], rel=1e-2)
    for name in ("precision", "recall"):
        assert with_stored["scores"][name] == six["scores"][name]
    assert with_stored["reference"]["statistics"] == "stored in the file"


def test_statistics_alone_serve_as_a_reference_for_what_needs_no_images(files, graph, capsys):
    np.savez("stats.npz", **stored(graph, "ref.npz"))
    assert evaluate(graph, reference="stats.npz") == 2
    assert "stats.npz: no images to use, but metric pr needs at least 4 in the reference" in capsys.readouterr().err
    assert evaluate(graph, "--metrics", "is,fid", reference="stats.npz") == 0
    assert result()["reference"]["images"] == 0


def test_mean_and_covariance_alone_serve_for_fid(files, graph, capsys):
    """As pytorch-fid keeps them, on either side."""
    for path in ("ref", "samples"):
        np.savez(f"{path}-fid.npz", **{name: stored(graph, f"{path}.npz")[name] for name in ("mu", "sigma")})
    assert evaluate(graph, "--metrics", "fid", "--json", "images.json") == 0
    wanted = pytest.approx(result("images.json")["scores"]["fid"], rel=1e-4)
    capsys.readouterr()
    for reference, samples in (("ref-fid", "samples"), ("ref", "samples-fid"), ("ref-fid", "samples-fid")):
        assert evaluate(graph, "--metrics", "fid", reference=f"{reference}.npz", samples=f"{samples}.npz") == 0
        assert result(f"{samples}.scores.json")["scores"]["fid"] == wanted
        assert "has mu and sigma only, as JiT's reference, so it is not ADM's; distances" in capsys.readouterr().err
    for metric in ("sfid", "pr", "kid"):
        assert evaluate(graph, "--metrics", f"fid,{metric}", reference="ref-fid.npz") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"ref-fid.npz: no images to use, but metric {metric} needs at least" in line


def test_mean_and_covariance_beside_images_leave_the_rest_to_the_images(files, graph, capsys, monkeypatch):
    with np.load("ref.npz") as file:
        write_npz(files / "both.npz", file["arr_0"], mu=stored(graph, "ref.npz")["mu"], sigma=np.eye(128))
    sets = []
    monkeypatch.setattr(evaluation, "compute_scores", lambda names, *args: sets.extend(args[:2]) or {"FID": 1.0})
    assert evaluate(graph, "--metrics", "fid,sfid", reference="both.npz") == 0
    assert torch.equal(sets[0].statistics().covariance, torch.eye(128, dtype=torch.float64))
    assert sets[0].spatial_statistics.count == 14


def write_pngs(folder, images, mode="RGB", suffix="png", **options):
    for i, image in enumerate(images):
        path = Path(folder) / f"{i % 2}" / f"{i:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert(mode).save(path, **options)


def test_a_folder_of_png_is_the_npz_of_its_images_in_order(files, graph, capsys):
    with np.load("samples.npz") as file:
        images = file["arr_0"]
    write_pngs("v1.5", images)
    for name in ("._000.png", ".cache/a.jpg", "__MACOSX/a.png", "notes.txt"):
        path = Path("v1.5", name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no picture")
    assert evaluate(graph, *QUICK, "--batch-size", "4", samples="v1.5") == 0
    assert evaluate(graph, *QUICK, "--batch-size", "4") == 0
    folder, npz = result("v1.5.scores.json"), result()
    assert folder["scores"] == npz["scores"] and folder["samples"]["images"] == 11
    assert evaluate(graph, *QUICK, "--batch-size", "4", reference="samples.npz", samples="v1.5") == 0
    assert result("v1.5.scores.json")["scores"]["fid"] == pytest.approx(0, abs=1e-6)
    Image.fromarray(images[0]).save("v1.5/0/000.png")
    assert result("v1.5.scores.json")["samples"]["sha256"] == folder["samples"]["sha256"]


def test_a_png_that_is_cut_short_is_named(files, graph, capsys):
    write_pngs("a", make_images(6))
    path = files / "a" / "1" / "003.png"
    path.write_bytes(path.read_bytes()[:-300])
    assert evaluate(graph, *QUICK, samples="a") == 2
    assert "evaluator: error: a/1/003.png: damaged or cut short" in capsys.readouterr().err


def order(graph, capsys, reference, samples):
    assert evaluate(graph, "--metrics", "is", reference=reference, samples=samples) == 0
    return [line for line in capsys.readouterr().err.splitlines() if "reference comes first" in line or "same" in line]


def test_files_in_the_wrong_order_are_remarked(files, graph, capsys):
    assert order(graph, capsys, "ref.npz", "samples.npz") == []
    assert order(graph, capsys, "samples.npz", "./samples.npz") == [
        "warning: samples.npz: reference and samples are the same file"
    ]
    Path("ref.json").write_text("no JSON, and nothing of ours")
    Path("samples.json").write_text('{"config": {}}')
    assert order(graph, capsys, "ref.npz", "samples.npz") == []
    Path("ref.json").unlink()
    (line,) = order(graph, capsys, "samples.npz", "ref.npz")
    assert (
        line == "warning: samples.npz has the settings of a sampling job: the reference comes first, then the samples"
    )
    Path("ref.npz").rename("VIRTUAL_imagenet256_labeled.npz")
    (line,) = order(graph, capsys, "samples.npz", "VIRTUAL_imagenet256_labeled.npz")
    assert "VIRTUAL_imagenet256_labeled.npz has the name of a reference" in line
    with np.load("samples.npz") as file:
        write_npz(files / "with.npz", file["arr_0"], **GOOD)
    (line,) = order(graph, capsys, "samples.npz", "with.npz")
    assert "with.npz holds statistics, as references do" in line


def test_two_evaluations_that_share_a_cache_are_both_right(files, graph, capsys, monkeypatch):
    """The second runs from start to end while the first computes; then both keep the same features."""
    assert evaluate(graph, *QUICK, "--json", "alone.json") == 0
    (kept,) = (files / "cache" / "features").iterdir()
    content = kept.read_bytes()
    kept.unlink()
    (kept.parent / f".{kept.stem}.99999999.tmp.safetensors").write_bytes(b"left by a kill")
    real = evaluation.extract_features

    def interrupted(*args, **options):
        monkeypatch.setattr(evaluation, "extract_features", real)
        found = real(*args, **options)
        assert evaluate(graph, *QUICK, "--json", "second.json") == 0
        return found

    monkeypatch.setattr(evaluation, "extract_features", interrupted)
    assert evaluate(graph, *QUICK, "--json", "first.json") == 0
    assert {str(result(f"{name}.json")["scores"]) for name in ("alone", "first", "second")} == {
        str(result("alone.json")["scores"])
    }
    assert [path.name for path in kept.parent.iterdir()] == [kept.name] and kept.read_bytes() == content


def test_rounding_noise_of_float16_is_a_warning_with_the_exact_numbers(files, graph, capsys, monkeypatch):
    far = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)) / 20 + 11  # squared norms of 15,500

    def features(file, *args, **options):
        return FileFeatures(far[:14] if file.path.name == "ref.npz" else far[14:25], None)

    monkeypatch.setattr(evaluation, "extract_features", features)
    for path, flags, warned in (("a", (), True), ("b", ("--pr-precision", "float32"), False)):
        assert evaluate(graph, "--metrics", "pr", *flags, "--json", f"{path}.json") == 0
        assert ("precision and recall are rounding noise" in capsys.readouterr().err) == warned
    exact = result("b.json")["scores"]
    (line,) = (line for line in result("a.json")["warnings"] if "noise" in line)
    assert f"--pr-precision float32 gives Precision {exact['precision']:.4f}, Recall {exact['recall']:.4f}" in line


def test_statistics_of_the_samples_are_not_those_of_a_prefix(files, graph, capsys):
    with np.load("samples.npz") as file:
        write_npz(files / "with.npz", file["arr_0"], **stored(graph, "ref.npz"))
    for argv, wanted in (((), "stored in the file"), (("--num-samples", "8"), "computed")):
        assert evaluate(graph, "--metrics", "fid", *argv, samples="with.npz") == 0
        document = result("with.scores.json")
        assert document["samples"]["statistics"] == wanted
        assert (document["scores"]["fid"] < 1e-6) == (wanted != "computed")  # they are the reference's


def test_a_file_against_itself(files, graph, capsys):
    assert evaluate(graph, *QUICK, samples="ref.npz") == 0
    scores = result("ref.scores.json")["scores"]
    assert scores["fid"] == pytest.approx(0, abs=1e-6)
    assert (scores["precision"], scores["recall"]) == (1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# As a user runs it


def test_the_file_and_the_module_run_from_any_directory(files, graph):
    argv = ["ref.npz", "samples.npz", "--weights", str(graph), "--cache-dir", "cache", "--metrics", "is,pr"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    commands = {
        "file": ([str(ROOT / "evaluator" / "evaluator.py")], environment),
        "module": (["-m", "evaluator"], environment | {"PYTHONPATH": str(ROOT)}),
    }
    outputs = set()
    for words, variables in commands.values():
        command = [sys.executable, *words, *argv]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1 and outputs.pop().startswith("Inception Score: ")


def test_two_processes_give_the_scores_of_one(files, graph, capsys):
    flags = ("--batch-size", "3", *QUICK)
    assert evaluate(graph, *flags, "--json", "one.json") == 0
    argv = ("ref.npz", "samples.npz", "--weights", str(graph), "--cache-dir", "other", *flags, "--json", "two.json")
    done = run_ranks("evaluator/evaluator.py", *argv, ranks=2, folder=files)
    assert done.returncode == 0, done.stderr
    found = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert found == [label for label in LABELS if label != "sFID"]
    one, two = result("one.json"), result("two.json")
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-9) and two["network"]["world_size"] == 2


@pytest.mark.slow
def test_an_error_on_two_ranks_is_one_line_and_status_2(files, graph):
    argv = ("ref.npz", "gone.npz", "--weights", str(graph))
    done = run_ranks("evaluator/evaluator.py", *argv, ranks=2, folder=files)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "gone.npz" in line]
    assert lines == ["evaluator: error: gone.npz: there is no such file"]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as done:
        run(main, "evaluator", ["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    flags = "num-samples pr-precision weights offline cache-dir json batch-size".split()
    for word in ("ref_batch", "sample_batch", *(f"--{flag}" for flag in flags)):
        assert word in out


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def save(name, **arrays):
    np.savez(name, **arrays)


def cut(name):
    content = Path("ref.npz").read_bytes()
    Path(name).write_bytes(content[: len(content) // 2])


def other_resolution(name):
    save(name, arr_0=make_images(14, (64, 32)))


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
NAN_STATISTICS = {"mu": np.full(3, np.nan), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
OTHER_NETWORK = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}

# what is written before, the arguments, and the message
WRONG = {
    "wrong key": (lambda: save("a.npz", images=make_images(5)), {"samples": "a.npz"}, (), "a.npz: has no array arr_0"),
    "float images": (
        lambda: save("a.npz", arr_0=make_images(5) / 255), {"samples": "a.npz"}, (), "a.npz: arr_0 is float64",
    ),
    "grey images": (
        lambda: save("a.npz", arr_0=make_images(5)[..., :1]), {"samples": "a.npz"}, (),
        r"a.npz: arr_0 is of shape .*digits and Fashion-MNIST: scripts/digits_report.py",
    ),
    "truncated": (lambda: cut("a.npz"), {"reference": "a.npz"}, (), "a.npz: not an .npz file, or cut short"),
    "missing file": (lambda: None, {"reference": "a.npz"}, (), "a.npz: there is no such file"),
    "another resolution": (
        lambda: other_resolution("a.npz"), {"reference": "a.npz"}, (),
        "samples.npz: images of 32 x 32 pixels, but a.npz has 64 x 32",
    ),
    "too few images for neighbours": (
        lambda: save("a.npz", arr_0=make_images(3)), {"samples": "a.npz"}, (),
        "a.npz: 3 images to use, but metric pr needs at least 4 in the samples",
    ),
    "too few images for a covariance": (
        lambda: save("a.npz", arr_0=make_images(1)), {"reference": "a.npz"}, ("--metrics", "fid"),
        "a.npz: 1 images to use, but metric fid needs at least 2 in the reference",
    ),
    "a prefix that is too long": (lambda: None, {}, ("--num-samples", "12"), "--num-samples 12: samples.npz has 11"),
    "a prefix that is too short": (lambda: None, {}, ("--num-samples", "3"), "samples.npz: 3 images to use, but"),
    "no samples": (lambda: None, {}, ("--num-samples", "0"), "--num-samples 0: must be at least 1"),
    "no batch": (lambda: None, {}, ("--batch-size", "-1"), "--batch-size -1: must be at least 1"),
    "unknown metric": (lambda: None, {}, ("--metrics", "fid,vfid"), "--metrics fid,vfid: choose from is, fid"),
    "no metric": (lambda: None, {}, ("--metrics", ","), "--metrics ,: choose from"),
    "unknown backend": (lambda: None, {}, ("--backend", "jax"), "backend: invalid choice"),
    "NaN in statistics": (
        lambda: save("a.npz", arr_0=make_images(5), **NAN_STATISTICS), {"reference": "a.npz"}, (),
        "a.npz: its statistics cannot be used .*NaN",
    ),
    "statistics of another network": (
        lambda: save("a.npz", **OTHER_NETWORK), {"reference": "a.npz"}, ("--metrics", "fid"),
        "samples.npz against a.npz: the two sets have different numbers of features: 3 and 128",
    ),
    "protocol that is no JSON": (
        lambda: Path("samples.json").write_text("{sampler"), {}, (), "samples.json: cannot read the settings of the",
    ),
    "NaN in the protocol": (
        lambda: Path("samples.json").write_text('{"loss": NaN}'), {}, (), r"samples.json: .* \(NaN is no finite number",
    ),
    "infinity in the protocol": (
        lambda: Path("samples.json").write_text('[1, -Infinity]'), {}, (), r"samples.json: .* \(-Infinity is no finite",
    ),
    "1e999 in the protocol": (
        lambda: Path("samples.json").write_text('[1.5, 1e999]'), {}, (), r"samples.json: .* \(1e999 is no finite",
    ),
    "result over the samples": (lambda: None, {}, ("--json", "samples.npz"), "--json samples.npz: the evaluation"),
    "result over the protocol": (lambda: None, {}, ("--json", "./samples.json"), "the evaluation reads this file"),
    "result over another file": (
        lambda: Path("samples.scores.json").write_text('{"scores": "of a game"}'), {}, (),
        "sample_batch samples.scores.json: exists, and is no result of the evaluator; move it",
    ),
    "result over text": (
        lambda: Path("a.json").write_text("notes"), {}, ("--json", "a.json"), "--json a.json: exists, and is no result",
    ),
    "a folder of PNG and JPEG": (
        lambda: (write_pngs("a", make_images(5)), write_pngs("a", make_images(1), suffix="jpg")), {"samples": "a"}, (),
        "a/0/000.png: is PNG, but the first image is JPEG; one format is needed",
    ),
    "text named PNG": (
        lambda: (write_pngs("a", make_images(5)), Path("a/0/000.png").write_text("<html>")), {"reference": "a"}, (),
        "a/0/000.png: cannot be read: not an image of a known format; replace or remove it",
    ),
    "a strip of an image": (
        lambda: (write_pngs("a", make_images(5)), Image.new("RGB", (404, 4)).save("a/x.png")), {"reference": "a"}, (),
        "a/x.png: cannot be read: 404 x 4 pixels; a side may be at most 100 times the other",
    ),
    "photos that cannot be read": (
        lambda: (Path("a").mkdir(), Path("a/x.heic").touch()), {"reference": "a"}, (), "a: a folder without images: 1",
    ),
    "PNG of mixed sizes": (
        lambda: (write_pngs("a", make_images(1)), Image.new("RGB", (32, 16)).save("a/0/001.png")), {"samples": "a"}, (),
        "a/0/001.png: 32 x 16 pixels, but the first image has 32 x 32",
    ),
    "grey PNG": (
        lambda: write_pngs("a", make_images(5), "L"), {"samples": "a"}, (), "a/0/000.png: is in mode L; expected 8-bit",
    ),
    "PNG with alpha": (
        lambda: write_pngs("a", make_images(5), "RGBA"), {"samples": "a"}, (), "a/0/000.png: is in mode RGBA; exp",
    ),
    "PNG with a transparent colour": (
        lambda: write_pngs("a", make_images(5), transparency=(0, 0, 0)), {"samples": "a"}, (), "a/0/000.png: has tr",
    ),
    "an empty folder": (lambda: Path("a").mkdir(), {"samples": "a"}, (), "a: a folder without images; JPEG, PNG"),
    "an unfinished sampling job": (
        lambda: Path("a.partial").mkdir(), {"samples": "a.partial"}, (), "a folder without images; .*; run the samp",
    ),
    "result in a file": (lambda: None, {}, ("--json", "ref.npz/a.json"), "--json ref.npz/a.json: cannot write there"),
    "cache in a file": (lambda: None, {}, ("--cache-dir", "ref.npz"), r"--cache-dir ref.npz: cannot write there"),
    "missing weights": (lambda: None, {}, ("--weights", "no.pb"), "--weights no.pb: there is no such file; get it"),
    "weights that are no graph": (
        lambda: Path("a.pb").write_text("<html>not found</html>"), {}, ("--weights", "a.pb"),
        "a.pb: not a frozen TensorFlow graph, or damaged",
    ),
    "weights of another network": (
        lambda: Path("a.pb").write_bytes(b"\x0a\x0d\x0a\x04Relu\x12\x05Relu6"), {}, ("--weights", "a.pb"),
        "a.pb: it has no node pool_3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_line_and_status_2_before_any_work(files, graph, capsys, monkeypatch, name):
    prepare, paths, argv, message = WRONG[name]
    prepare()
    before = sorted(path.name for path in files.iterdir())
    if name != "statistics of another network":  # which shows only when both are known
        monkeypatch.setattr(evaluation, "extract_features", lambda *args, **options: pytest.fail("work began"))
    assert evaluate(graph, *argv, **paths) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("samples:", "reference:"))]
    assert out == "" and len(lines) == 1 and re.match(f"evaluator: error: .*{message}", lines[0]), err
    assert [each for each in sorted(path.name for path in files.iterdir()) if each != "cache"] == before


def test_weights_nowhere_and_no_network(files, capsys, monkeypatch):
    assert run(main, "evaluator", ["ref.npz", "samples.npz", "--offline", "--cache-dir", "cache"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: --offline: classify_image_graph_def.pb is neither here nor in cache; get it from http" in line
    assert not (files / "samples.scores.json").exists()


def test_both_files_must_be_named(capsys):
    assert run(main, "evaluator", ["ref.npz"]) == 2
    assert "evaluator: error: the following arguments are required: sample_batch" in capsys.readouterr().err


def test_weights_with_nan_leave_no_result(files, capsys):
    content = synthetic_graph(divisor=NARROW)
    (files / "good.pb").write_bytes(content)
    beta = read_graph(files / "good.pb")["mixed_10/conv/batchnorm/beta"].array().tobytes()
    assert content.count(beta) == 1
    (files / "nan.pb").write_bytes(content.replace(beta, np.full(len(beta) // 4, np.nan, np.float32).tobytes()))
    assert evaluate("nan.pb", *QUICK) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluator"))
    assert "ref.npz: features of 14 image(s) are NaN or infinite, first of image 0; are the weights damaged?" in line
    assert not (files / "samples.scores.json").exists() and not list((files / "cache").rglob("*.safetensors"))


def test_samples_damaged_in_the_middle_leave_no_result(files, graph, capsys):
    path = write_npz(files / "a.npz", make_images(40), compressed=True)
    content = bytearray(path.read_bytes())
    content[60_000:60_040] = bytes(40)
    path.write_bytes(content)
    assert evaluate(graph, *QUICK, samples="a.npz") == 2
    assert "evaluator: error: a.npz: its images are damaged or cut short" in capsys.readouterr().err
    assert not (files / "a.scores.json").exists()


def damage_stored_pixels(name):
    with np.load(name) as file:
        pixels = file["arr_0"].tobytes()
    content = bytearray(Path(name).read_bytes())
    content[content.index(pixels) + 20_000] ^= 1
    Path(name).write_bytes(content)


@pytest.mark.parametrize("name", ["ref.npz", "samples.npz"])
def test_damaged_stored_pixels_leave_no_result(files, graph, capsys, name):
    damage_stored_pixels(name)
    assert evaluate(graph, *QUICK) == 2
    out, err = capsys.readouterr()
    assert f"evaluator: error: {name}: its images are damaged: arr_0 has the CRC-32" in err
    assert out == "" and not (files / "samples.scores.json").exists()
    assert (files / "cache").exists() == (name == "samples.npz")  # the reference's features are good


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ref.npz", "samples.npz"])
def test_damage_that_main_finds_ends_all_processes(files, graph, name):
    damage_stored_pixels(name)
    argv = ("ref.npz", "samples.npz", "--weights", str(graph), "--cache-dir", "cache", *QUICK)
    done = run_ranks("evaluator/evaluator.py", *argv, ranks=2, folder=files)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("evaluator:"))
    assert f"error: {name}: its images are damaged" in line and done.stdout == ""
    assert done.returncode == 2 and not (files / "samples.scores.json").exists()


def test_scores_are_not_lost_with_the_file(files, graph, capsys, monkeypatch):
    def full(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    assert evaluate(graph, *QUICK) == 2
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == [label for label in LABELS if label != "sFID"]
    assert err.splitlines()[-1] == "evaluator: error: samples.scores.json: cannot write it (No space left on device)"
    assert "written" not in err and not list(files.glob("*scores*")) + list(files.glob(".*"))


def test_a_score_that_is_no_number_is_printed_and_one_line(files, graph, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "compute_scores", lambda *args: {"FID": math.inf})
    assert evaluate(graph, *QUICK) == 2
    out, err = capsys.readouterr()
    assert out == "FID: inf\n" and not (files / "samples.scores.json").exists()
    assert err.splitlines()[-1].startswith("evaluator: error: samples.scores.json: cannot write it (Out of range")


def test_tensorflow_where_there_is_none(files, graph, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert evaluate(graph, "--backend", "tensorflow") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--backend tensorflow: TensorFlow is not installed here; bash scripts/setup_tensorflow.sh" in line
