"""FID and Inception Score while training, with a narrow network of random weights in the place of the real one."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.pixels import to_uint8
from data.small import load_moving_digits
from evaluator.inception.network import load_network
from evaluator.metrics import feature_statistics, frechet_distance, inception_score
from evaluator.small import MOVING_DIGITS, compute_features
from tests import runs
from tests.inception_files import make_images, write_graph, write_npz
from tests.networks import randomise
from tests.processes import run_ranks
from tests.runs import CPU, metrics, open_setup, start
from training import scores
from training.optimization import EMA
from training.scores import moving_digits_scores
from training.validation import Validation


def statistics(folder, name="ref.npz", size=16, **changed):
    """A reference of stored statistics alone, as the narrow network sees 200 images."""
    found = feature_statistics(load_network(folder / "graph.pb").features(make_images(200, (size, size))).pool)
    arrays = {"mu": found.mean.numpy(), "sigma": found.covariance.numpy(), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(folder / name, **{**arrays, **changed})
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two folders of noise, references good and bad, and the network's weights."""
    folder = tmp_path_factory.mktemp("place")
    write_graph(folder / "graph.pb")
    statistics(folder)
    statistics(folder, "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    write_npz(folder / "images.npz", make_images(2, (16, 16)))
    with np.load(folder / "ref.npz") as ref:
        write_npz(folder / "large.npz", make_images(2, (32, 32)), **ref)
    for label in "ab":
        (folder / "data" / label).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(make_images(1, (20, 20), seed=i)[0]).save(folder / "data" / label / f"{i}.png")
    return folder


@pytest.fixture
def flags(place, monkeypatch):
    """Flags of a run in that folder."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("DIT_EVAL_INCEPTION", str(place / "graph.pb"))
    argv = "--data-path data --model DiT-debug/2 --vae none --image-size 16 --num-classes 2 --device cpu"
    argv += " --num-workers 0 --global-batch-size 2 --eval-every 2 --eval-samples 36 --eval-steps 2"
    return argv.split()


def test_scores_are_those_of_the_samples(flags, place):
    setup = open_setup(*flags, "--eval-reference", "ref.npz")
    randomise(setup.network)
    validation = Validation(setup, setup.validation, EMA(setup.network, 0.9).network, CPU)
    pictures, scores = validation.sample_and_score(setup.validation.sampler)
    samples = validation.sample(setup.validation.sampler, {"y": torch.arange(36) % 2})
    images = torch.cat([to_uint8(pixels) for _, pixels in samples])[:36]
    network = load_network(place / "graph.pb")
    pool = network.features(images.numpy()).pool
    assert scores == {
        "fid": pytest.approx(frechet_distance(statistics(place), feature_statistics(pool)), rel=1e-4),
        "inception_score": pytest.approx(inception_score(network.probabilities(pool)), rel=1e-5),
    }
    assert pictures.shape == (36, 16, 16, 3) and scores["fid"] > 0


def test_a_run_logs_them_and_two_processes_say_the_same(flags, place, tmp_path):
    argv = [*flags, "--eval-reference", "ref.npz", "--max-steps", "2"]
    assert start(tmp_path, *argv) == 0
    done = run_ranks("train.py", *argv, "--results-dir", str(tmp_path), folder=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("these scores are not comparable with published ones") == 1
    one, two = (metrics(tmp_path, number)[-1] for number in range(2))
    assert {"step", "fid", "inception_score"} == one.keys() and two == pytest.approx(one, rel=1e-3)


def test_scores_of_moving_digits_see_digit_direction_and_the_order_of_frames(monkeypatch):
    # one training clip in seven, of all digits and motions, is enough to tell these apart
    reference, _ = compute_features(load_moving_digits("train")[0][::7], MOVING_DIGITS)
    monkeypatch.setattr(scores, "_features_of_training", lambda: reference)
    clips, found = load_moving_digits("test")
    rows = np.random.default_rng(0).permutation(len(clips))[:400]
    clips, labels = torch.from_numpy(clips[rows]), torch.from_numpy(found[rows, 0] * 4 + found[rows, 1])
    real = moving_digits_scores(clips, labels)
    assert min(real["accuracy"], real["direction"]) > 0.9
    backwards = moving_digits_scores(clips.flip(1), labels)
    assert backwards["direction"] < 0.1 and backwards["accuracy"] > 0.8
    assert moving_digits_scores(clips, (labels + 4) % 40)["accuracy"] < 0.1
    disordered = moving_digits_scores(clips[:, [3, 6, 1, 4, 0, 7, 2, 5]], None)
    assert disordered.keys() == {"frechet_distance"}
    assert disordered["frechet_distance"] > 5 * real["frechet_distance"]


@pytest.mark.parametrize("classes", [40, 0])
def test_moving_digits_are_scored_while_training(classes, tmp_path, monkeypatch):
    if not classes:  # the other run has the whole reference
        monkeypatch.setattr(scores, "_features_of_training", lambda: np.eye(64, dtype=np.float32))
    argv = "--dataset moving-digits --model Latte-digits/4 --depth 2 --hidden-size 16 --process flow --device cpu"
    argv += (
        f" --num-workers 0 --global-batch-size 2 --max-steps 1 --eval-every 1 --eval-images 8 --num-classes {classes}"
    )
    assert start(tmp_path, *argv.split(), *"--eval-samples 5 --eval-steps 2 --joint-images 1".split()) == 0
    last = metrics(tmp_path)[-1]
    assert last["frechet_distance"] > 0
    assert {name for name in ("accuracy", "direction") if 0 <= last.get(name, -1) <= 1} == (
        {"accuracy", "direction"} if classes else set()
    )


def test_moving_digits_of_another_size_have_no_scores():
    argv = [*runs.MOVING_DIGITS, *"--model Latte-debug/2 --num-classes 40 --eval-every 1".split()]
    setup = open_setup(*argv)
    assert setup.validation.scorer is None and "have no scores" in " ".join(setup.warnings())


def test_nothing_is_scored_without_a_reference(flags):
    assert open_setup(*flags).validation.scorer is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--eval-reference none.npz", "none.npz: there is no such file"),
        ("--eval-reference images.npz", "--eval-reference images.npz: holds no mu and sigma"),
        ("--eval-reference large.npz", "--eval-reference large.npz: its images are of (32, 32) pixels"),
        ("--eval-reference narrow.npz", "--eval-reference narrow.npz: its mu has 5 numbers, the network 128 features"),
        ("--eval-reference ref.npz --eval-samples 1", "--eval-samples 1: FID needs at least 2"),
        ("--eval-reference ref.npz --in-channels 1", "--eval-reference ref.npz: is for RGB images"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(argv, words, flags, tmp_path, capsys):
    assert start(tmp_path, *flags, *argv.split()) == 2
    assert words in runs.the_error(capsys)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_nowhere_are_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIT_EVAL_INCEPTION", "gone.pb")
    assert start(tmp_path, *flags, "--eval-reference", "ref.npz") == 2
    assert "DIT_EVAL_INCEPTION gone.pb: there is no such file" in runs.the_error(capsys)
    monkeypatch.delenv("DIT_EVAL_INCEPTION")
    assert start(tmp_path, *"--dataset digits --eval-reference ref.npz --eval-every 1".split()) == 2
    assert "is for RGB images" in runs.the_error(capsys)
