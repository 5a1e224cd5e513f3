"""Comparison of two results: the points that it finds, the scores that it refuses, and files that are none."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from evaluator.__main__ import main
from evaluator.statistics import feature_statistics
from runtime.errors import run

SCORES = {"inception_score": 200.0, "fid": 2.27, "sfid": 4.6, "precision": 0.83, "recall": 0.57, "kid": 0.001}
BASE = {
    "format": 2,
    "scores": SCORES,
    "reference": {
        "path": "VIRTUAL.npz", "sha256": "a" * 64, "image_size": [256, 256], "images": 10_000, "statistics": "stored",
        "keys": ["arr_0", "mu", "sigma", "mu_s", "sigma_s"],
        "statistics_sha256": {"pool": "1" * 64, "spatial": "2" * 64},
    },
    "samples": {
        "path": "samples.npz", "sha256": "b" * 64, "image_size": [256, 256], "images": 50_000, "statistics": "computed",
        "keys": ["arr_0", "arr_1"],
    },
    "protocol": {
        "config": {"guidance": {"cfg_scale": 1.5}, "job": {"balanced_labels": False, "class_labels": None}},
        "checkpoint": {"sha256": "c" * 64}, "run": {"seconds": 3}, "versions": {"torch": "2"},
    },
    "config": {"pr_precision": "adm"},
    "network": {"backend": "torch", "weights_sha256": "d" * 64, "precision": "float32", "device": "cpu"},
    "versions": {"torch": "2.7"},
}  # fmt: skip
CLIPS = {
    "format": 2,
    "scores": {"fvd": 150.0},
    "reference": {"path": "ref.npz", "sha256": "a" * 64, "image_size": [64, 64], "clips_in_file": 3000, "frames": 46},
    "samples": {"path": "s.npz", "sha256": "b" * 64, "image_size": [64, 64], "clips_in_file": 2048, "frames": 16},
    "protocol": None,
    "video_network": {
        "weights_sha256": "d" * 64, "precision": "float32", "features": "I3D", "frames": 16, "resize": "bilinear",
        "covariance": "biased", "samples": {"clips": 2048}, "reference": {"clips": 2048, "frame_interval": 3},
    },
}  # fmt: skip
ALL, SAME, WITH_IMAGES = {*SCORES}, set[str](), {"precision", "recall", "kid"}

# where a value changes, the new one (None removes it), the scores that are refused, and words of the line
CHANGES = {
    "image size": ("samples.image_size", [512, 512], ALL, "image size: [256, 256] against [512, 512]"),
    "number of images": ("samples.images", 10_000, ALL - {"kid"}, "number of images: 50000 against 10000"),
    "reference": (
        "reference", BASE["reference"] | {"path": "jit.npz", "sha256": "e" * 64, "keys": ["mu", "sigma"],
                                          "statistics_sha256": {"pool": "3" * 64}},
        ALL - {"inception_score"},
        "reference: VIRTUAL.npz (keys: those of ADM's references; sha256 aaaaaaaaaaaa) against jit.npz (keys: those of "
        "JiT's references and of pytorch-fid; sha256 eeeeeeeeeeee)",
    ),
    "a copy of the statistics": ("reference.sha256", "e" * 64, WITH_IMAGES, "reference: VIRTUAL.npz"),
    "reference not recorded": ("reference.sha256", None, WITH_IMAGES, "sha256 not recorded"),
    "images of the reference": ("reference.images", 5000, {"precision", "recall"}, "images of the reference: 10000"),
    "weights": ("network.weights_sha256", "e" * 64, ALL, "weights of the network: dddddddddddd against eeeeeeeeeeee"),
    "weights not recorded": ("network.weights_sha256", None, ALL, "dddddddddddd against not recorded"),
    "precision": ("network.precision", "bfloat16", ALL, "precision of the network: float32 against bfloat16"),
    "distances": ("config.pr_precision", "float32", {"precision", "recall"}, "--pr-precision: adm against float32"),
    "statistics of samples": ("samples.statistics", "stored", {"fid", "sfid"}, "statistics of the samples: computed"),
    "compression": ("samples.formats", {"JPEG": 50_000}, ALL, "compression of the samples: none against JPEG"),
    "no compression": ("samples.formats", {"PNG": 50_000}, SAME, ""),
    "balanced labels": ("protocol.config.job.balanced_labels", True, ALL, "labels of the samples: random against bala"),
    "some classes": ("protocol.config.job.class_labels", [3], ALL, "labels of the samples: random against random, of"),
    "labels not recorded": ("protocol", None, SAME, "labels of the samples: random against not recorded"),
    "guidance": (
        "protocol.config.guidance.cfg_scale", 4.0, SAME, "samples made with other settings: guidance.cfg_scale: 1.5 aga"
    ),
    "checkpoint": ("protocol.checkpoint.sha256", "f" * 64, SAME, "checkpoint.sha256: cccccccccccc against ffff"),
    "device": ("network.device", "cuda", SAME, "also differs, by rounding: device: cpu against cuda"),
    "version": ("versions.torch", "2.9", SAME, "also differs, by rounding: torch: 2.7 against 2.9"),
    "seconds": ("protocol.run.seconds", 4, SAME, ""),
    "path": ("samples.path", "other.npz", SAME, ""),
}  # fmt: skip
CLIP_CHANGES = {
    "interval": (
        "video_network.reference.frame_interval",
        1,
        'clips of the reference: {"clips": 2048, "frame_interval',
    ),
    "clips": (
        "video_network.samples.clips",
        512,
        'samples of the video network: {"clips": 2048} against {"clips"',
    ),
    "weights": ("video_network.weights_sha256", "e" * 64, "weights of the video network: dddddddddddd against eeeee"),
    "size": ("samples.image_size", [128, 128], "image size: [64, 64] against [128, 128]"),
    "reference": (
        "reference.sha256",
        "e" * 64,
        "reference: ref.npz (sha256 aaaaaaaaaaaa) against ref.npz (sha256 eee",
    ),
}


def changed(document, path, value):
    document = copy.deepcopy(document)
    *above, name = path.split(".")
    place = document
    for each in above:
        place = place[each]
    if value is None and path != "protocol" and path.split(".")[-1] != "class_labels":
        del place[name]
    else:
        place[name] = value
    return document


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Compares two documents; returns status, standard output, and standard error."""
    monkeypatch.chdir(tmp_path)

    def compare(a, b):
        for name, document in (("a", a), ("b", b)):
            text = document if isinstance(document, str) else json.dumps(document)
            Path(f"{name}.scores.json").write_text(text)
        status = run(main, "evaluator", ["compare", "a.scores.json", "b.scores.json"])
        return status, *capsys.readouterr()

    return compare


def refused(out):
    return {line.split(":")[0] for line in out.splitlines() if "(not comparable: " in line}


@pytest.mark.parametrize("document", [BASE, CLIPS], ids=["images", "clips"])
def test_results_of_one_protocol_are_comparable(compare, document):
    status, out, err = compare(document, document)
    assert status == 0 and err == "" and "differs" not in out
    assert all(
        f"{name}: {value:.6f} against {value:.6f} (comparable)" in out for name, value in document["scores"].items()
    )


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_each_point_is_named_and_refuses_what_it_concerns(compare, name, turned):
    path, value, expected, words = CHANGES[name]
    pair = [BASE, changed(BASE, path, value)]
    status, out, err = compare(*(reversed(pair) if turned else pair))
    assert refused(out) == expected and status == (2 if expected else 0), out
    assert turned or words in out, out
    assert len([line for line in out.splitlines() if line.startswith("differs: ")]) <= 1
    if expected:
        names = ", ".join(each for each in SCORES if each in expected)
        assert err == f"evaluator: error: a.scores.json and b.scores.json: not comparable: {names}\n"
    else:
        assert err == ""


@pytest.mark.parametrize("name", CLIP_CHANGES)
def test_clips_have_points_of_their_own(compare, name):
    path, value, words = CLIP_CHANGES[name]
    status, out, _ = compare(CLIPS, changed(CLIPS, path, value))
    assert status == 2 and refused(out) == {"fvd"} and words in out, out


def test_points_of_metrics_that_are_not_in_both_are_left_out(compare):
    only_fid = BASE | {"scores": {"fid": 2.0}}
    status, out, _ = compare(only_fid, changed(BASE, "config.pr_precision", "float32"))
    assert status == 0 and "pr-precision" not in out
    status, _, err = compare(only_fid, BASE | {"scores": {"kid": 0.1}})
    assert status == 2 and "no score is in both; evaluate both with the same --metrics" in err


def test_results_of_earlier_versions_are_compared_by_what_they_say(compare):
    old = copy.deepcopy(BASE) | {"format": 1, "remarks": []}
    for name in ("keys", "statistics_sha256"):
        old["reference"].pop(name)
    old["samples"].pop("keys")
    assert compare(old, BASE)[0] == 0
    status, out, _ = compare(changed(old, "reference.sha256", "e" * 64), BASE)
    assert status == 2 and refused(out) == ALL - {"inception_score"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.scores.json: cannot be read ("),
        ("[" * 100_000, "a.scores.json: cannot be read (it is nested too deeply)"),
        ("[]", "a.scores.json: is no result of the evaluator; give a .scores.json"),
        ({"config": {}}, "a.scores.json: is no result of the evaluator"),
        (BASE | {"scores": {"fid": "low"}}, "a.scores.json: scores.fid is no number"),
    ],
)
def test_what_is_no_result_is_one_line(compare, content, message):
    status, out, err = compare(content, BASE)
    assert status == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_a_file_that_is_missing(compare, capsys):
    assert run(main, "evaluator", ["compare", "a.scores.json", "no.json"]) == 2
    assert "a.scores.json: cannot be read (No such file or directory)" in capsys.readouterr().err
    assert run(main, "evaluator", ["compare", "a.scores.json"]) == 2
    assert "the following arguments are required: second" in capsys.readouterr().err


def test_the_digest_of_statistics_is_that_of_their_numbers():
    rows = np.random.RandomState(0).normal(size=(20, 3))
    one, same, other = feature_statistics(rows), feature_statistics(rows.copy()), feature_statistics(rows * 1.0000001)
    assert one.sha256() == same.sha256() != other.sha256()
