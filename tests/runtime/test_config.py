import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from runtime.config import ALIASES, expand_alias, flag_name, parse_config, setting, to_dict

from runtime.errors import UserError
from training.config import TrainConfig


@dataclass(frozen=True)
class Example:
    steps: int = setting(10, "number of steps")
    rate: float | None = setting(None, "a rate")
    fast: bool = setting(False, "be quick, 100 %")
    kind: str = setting("a", "which", ("a", "b"))
    betas: tuple[float, float] = setting((0.9, 0.999), "two numbers")
    labels: tuple[int, ...] | None = setting(None, "some numbers")
    size: int | None = setting(4, "a number, or auto")
    out: Path | None = setting(None, "a file")
    names: tuple[str, ...] = setting((), "words (required)")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: must be at least 1")


def parse(*argv: str) -> Example:
    return parse_config(Example, argv, program="x", description="y")


def test_defaults_come_from_the_dataclass():
    assert parse() == Example()


def test_every_kind_of_field_can_be_typed():
    typed = parse(
        *"--steps 3 --rate 0.5 --fast --kind b --betas 0.8 0.9 --labels 1 2 3 --out a/b.json".split(),
    )
    assert typed == Example(3, 0.5, True, "b", (0.8, 0.9), (1, 2, 3), out=Path("a/b.json"))
    assert not parse("--no-fast").fast


def test_an_optional_number_may_be_left_to_the_program(tmp_path, capsys):
    assert parse("--size", "7").size == 7 and parse("--size", "auto").size is None
    (tmp_path / "config.json").write_text(json.dumps(to_dict(parse("--size", "auto"))))
    assert parse("--config", str(tmp_path / "config.json")).size is None
    with pytest.raises(UserError, match="argument --size: invalid int value: 'many'"):
        parse("--size", "many")
    with pytest.raises(UserError, match="argument --steps: invalid int value: 'auto'"):
        parse("--steps", "auto")


def test_a_config_given_back_is_the_same_config(tmp_path):
    config = Example(3, 0.5, True, "b", (0.8, 0.9), (1, 2), out=Path("a"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    assert parse("--config", str(path)) == config
    assert parse("--config", str(path), "--steps", "7").steps == 7


def test_help_states_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "(default: 10)" in shown and "(default: 0.9 0.999)" in shown and "100 %" in shown
    assert "words (required)" in shown and "(default: )" not in shown
    assert "(default: False)" in shown


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "x"], "--steps"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--kind", "c"], "choose from"),
        (["--step", "3"], "--step"),
        (["--betas", "1"], "--betas"),
        (["--config", "/nowhere.json"], "--config /nowhere.json: No such file"),
    ],
)
def test_a_mistake_names_the_flag(argv, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "one JSON object"),
        ('{"stepz": 1}', "unknown setting 'stepz'"),
        ('{"steps": "many"}', "steps = 'many': expected int"),
        ('{"steps": true}', "steps = True: expected int"),
        ('{"betas": [1]}', "expected 2 values"),
        ('{"kind": "c"}', "choose from a, b"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_setting(tmp_path, text, words):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", str(path))
    assert str(path) in str(error.value) and words in str(error.value)


@dataclass(frozen=True)
class Drawing:
    ckpt: Path | None = setting(None, "a checkpoint")


def test_the_settings_of_a_training_run_are_answered_with_its_checkpoint(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(TrainConfig())))
    wanted = f"--config {path}: settings of a training run; give its checkpoint: --ckpt {tmp_path}/checkpoints/"
    with pytest.raises(UserError, match=wanted):
        parse_config(Drawing, ["--config", str(path)], program="x", description="y")
    with pytest.raises(UserError, match="unknown setting 'data_path'"):
        parse("--config", str(path))


def test_flag_name():
    assert flag_name("global_batch_size") == "--global-batch-size"


@dataclass(frozen=True)
class Sampling:
    model: str | None = setting(None, "a name")
    cache_interval: int | None = setting(None, "an interval")


def sampling(*argv: str) -> Sampling:
    return parse_config(Sampling, argv, program="x", description="y")


def test_official_names_stand_for_a_model_and_an_interval():
    assert sampling("--model", "DiT-skip") == Sampling("Skip-DiT-XL/2", None)
    for n in (2, 3, 4, 5, 6):
        assert sampling("--model", f"DiT-cache-{n}") == Sampling("Skip-DiT-XL/2", n)
    assert len(ALIASES) == 6


def test_other_settings_are_left_alone():
    models = ("DiT-XL/2", ("DiT-skip",), None, "DiT-cache-7")
    for values in ({}, *({"model": model, "steps": 3} for model in models)):
        assert expand_alias(values, ["model"]) == values


def test_an_alias_may_be_repeated_by_its_flag_or_come_from_a_file(tmp_path):
    (tmp_path / "x.json").write_text('{"model": "DiT-cache-4", "cache_interval": null}')
    assert sampling("--model", "DiT-cache-3", "--cache-interval", "3") == Sampling("Skip-DiT-XL/2", 3)
    assert sampling("--model", "DiT-skip", "--cache-interval", "5") == Sampling("Skip-DiT-XL/2", 5)
    assert sampling("--config", str(tmp_path / "x.json")) == Sampling("Skip-DiT-XL/2", 4)


def test_an_alias_that_contradicts_a_flag_is_refused():
    with pytest.raises(UserError, match="--cache-interval 3: contradicts --model DiT-cache-2, which means 2"):
        sampling("--model", "DiT-cache-2", "--cache-interval", "3")


def test_an_alias_whose_setting_has_no_effect_is_refused():
    with pytest.raises(ValueError, match="--model DiT-cache-2: means --cache-interval 2, which has no effect here"):
        expand_alias({"model": "DiT-cache-2"}, ["model"])
    assert expand_alias({"model": "DiT-skip"}, ["model"]) == {"model": "Skip-DiT-XL/2"}
