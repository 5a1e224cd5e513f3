import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.config import flag_name, parse_config, setting, to_dict
from runtime.errors import UserError


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


def test_flag_name():
    assert flag_name("global_batch_size") == "--global-batch-size"
