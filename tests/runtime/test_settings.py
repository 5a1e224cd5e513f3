"""Settings of programs and of the owners that names choose: flags, help, config files, and messages about mistakes."""

import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import sample
import sample_ddp
import sampling.config
import training.config
from models import list_models
from runtime.command_line import parse, parse_config
from runtime.documents import differences, document, flag_of, free_settings, to_dict
from runtime.errors import UserError, run
from runtime.migrate import run_config
from runtime.releases import ALIASES
from runtime.settings import Kind, choose_owners, flag_name, places, positional, setting
from tests import format1
from training.config import TrainSettings
from training.setup import set_up


@dataclass(frozen=True)
class Example:
    steps: int = setting(10, "number of steps")
    rate: float | None = setting(None, "a rate")
    fast: bool = setting(False, "be quick, 100 %")
    kind: str = setting("a", "which", ("a", "b"))
    betas: tuple[float, float] = setting((0.9, 0.999), "two numbers")
    labels: tuple[int, ...] | None = setting(None, "some numbers", shown="all of them")
    size: int | None = setting(4, "a number, or auto")
    out: Path | None = setting(None, "a file")
    names: tuple[str, ...] = setting((), "words")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: must be at least 1")


def example(*argv: str) -> Example:
    return parse_config(Example, argv, program="x", doc="y")


def config_file(folder: Path, content: object) -> tuple[str, str]:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return "--config", str(path)


# ----------------------------------------------------------------------------------------------------------------------
# A program without owners


def test_defaults_come_from_the_dataclass():
    assert example() == Example()


def test_every_kind_of_field_can_be_typed():
    typed = example(
        *"--steps 3 --rate 0.5 --fast --kind b --betas 0.8 0.9 --labels 1 2 3 --out a/b.json".split(),
    )
    assert typed == Example(3, 0.5, True, "b", (0.8, 0.9), (1, 2, 3), out=Path("a/b.json"))
    assert not example("--no-fast").fast


def test_an_optional_number_may_be_left_to_the_program(tmp_path):
    assert example("--size", "7").size == 7 and example("--size", "auto").size is None
    assert example(*config_file(tmp_path, to_dict(example("--size", "auto")))).size is None
    with pytest.raises(UserError, match="argument --size: invalid int value: 'many'"):
        example("--size", "many")
    with pytest.raises(UserError, match="argument --steps: invalid int value: 'auto'"):
        example("--steps", "auto")


def test_a_config_given_back_is_the_same_config(tmp_path):
    config = Example(3, 0.5, True, "b", (0.8, 0.9), (1, 2), out=Path("a"))
    file = config_file(tmp_path, to_dict(config))
    assert example(*file) == config
    assert example(*file, "--steps", "7").steps == 7
    assert example(*config_file(tmp_path, {"config": to_dict(config), "scores": {}})) == config  # a result's JSON


def shown_help(capsys, call, *argv):
    with pytest.raises(SystemExit) as stop:
        call(*argv, "--help")
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_states_defaults(capsys):
    shown = shown_help(capsys, example)
    assert "(default: 10)" in shown and "(default: 0.9 0.999)" in shown and "100 %" in shown
    assert "words (default: none)" in shown and "(default: )" not in shown
    assert "be quick, 100 % (default: no)" in shown and "some numbers (default: all of them)" in shown
    assert shown.startswith("usage: x [FLAGS] y general: ")


def test_arguments_by_place(capsys):
    @dataclass(frozen=True)
    class Files:
        first: Path = positional("a file")
        count: int = setting(2, "a number")

    def files(*argv):
        return parse_config(Files, argv, program="x", doc="y")

    assert files("a", "--count", "3") == Files(Path("a"), 3)
    with pytest.raises(UserError, match="the following arguments are required: first"):
        files()
    assert shown_help(capsys, files).startswith("usage: x FIRST [FLAGS] y general: ")


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
    with pytest.raises(UserError, match=words):
        example(*argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "one JSON object"),
        ('{"stepz": 1}', "unknown setting 'stepz'"),
        ('{"steps": "many"}', "steps = 'many': expected int"),
        ('{"steps": true}', "steps = True: expected int"),
        ('{"steps": null}', "steps = None: expected int"),
        ('{"steps": {"name": 1}}', "steps = {'name': 1}: expected int"),
        ('{"betas": [1]}', "expected 2 values"),
        ('{"betas": 1}', "betas = 1: expected 2 values in a list"),
        ('{"labels": "1 2"}', "labels = '1 2': expected values in a list"),
        ('{"labels": ["1"]}', "labels = '1': expected int"),
        ('{"kind": "c"}', "choose from a, b"),
        ('{"kind": ["a"]}', "choose from a, b"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_setting(tmp_path, text, words):
    file = config_file(tmp_path, text)
    with pytest.raises(UserError) as error:
        example(*file)
    assert file[1] in str(error.value) and words in str(error.value)


def test_flag_name():
    assert flag_name("global_batch_size") == "--global-batch-size"


# ----------------------------------------------------------------------------------------------------------------------
# Owners


@dataclass(frozen=True, kw_only=True)
class Square:
    side: float = setting(1.0, "length of a side")
    turned: bool = setting(False, "stands on a corner")
    shape: tuple[int, int] = (2, 2)  # decided by the data

    def __post_init__(self) -> None:
        if self.side <= 0:
            raise ValueError("must be positive")


@dataclass(frozen=True, kw_only=True)
class Circle:
    radius: float = setting(2.0, "distance from the centre", was={"--half-width": None, "--unit": 1.0})
    fill: Literal["none", "red"] = setting("none", "colour", flag="--circle-fill", sampling=True)


@dataclass(frozen=True, kw_only=True)
class Paper:
    width: int = setting(100, "width of the paper", free=True)
    margin: int | None = setting(None, "width of the margin", was={"--border": None, "--no-border": 0})


@dataclass(frozen=True, kw_only=True)
class Picture:
    figure: str = setting("square of 3", "what is shown")
    pen: str | None = setting(None, "how it is drawn", ("thin", "thick"), shown="the figure's")
    paper: Paper = field(default_factory=Paper)

    def __post_init__(self) -> None:
        if self.paper.margin is not None and 2 * self.paper.margin >= self.paper.width:
            raise ValueError(f"--margin {self.paper.margin}: too wide")


@dataclass(frozen=True, kw_only=True)
class Thin:
    pass


@dataclass(frozen=True, kw_only=True)
class Thick:
    points: int = setting(3, "width of the pen")


FIGURES = {"square of 3": {"side": 3.0}, "square of 4": {"side": 4.0}, "circle": {}}


def figure_of(name: str) -> str:
    if name not in FIGURES:
        raise ValueError(f"no figure {name!r}")
    return name.split()[0]


KINDS = (
    Kind("figure", {"square": Square, "circle": Circle}, figure_of, named=FIGURES.__getitem__),
    Kind("pen", {"thin": Thin, "thick": Thick}, follows=("figure", {"square": "thin", "circle": "thick"}.get)),
)
DOC = """Show a figure.

    x --figure circle --radius 3
    x --pen thick

More about it.
"""


def picture(*argv, kinds=KINDS, **options):
    return parse(Picture, argv, program="x", doc=DOC, kinds=kinds, **options)


def test_each_owner_is_built_from_its_flags():
    given = picture("--figure", "square of 4", "--turned", "--radius", "5", "--width", "7", "--points", "9")
    assert given.general == Picture(figure="square of 4", paper=Paper(width=7))
    assert given.build("figure", "square", **FIGURES["square of 4"]) == Square(side=4.0, turned=True)
    assert given.build("figure", "square", side=4.0, shape=(3, 5)) == Square(side=4.0, turned=True, shape=(3, 5))
    assert given.build("figure", "circle") == Circle(radius=5.0)
    assert given.build("pen", "thick") == Thick(points=9) and given.build("pen", "thin") == Thin()
    assert given.fields("figure", "square") == {"turned": True}


def test_values_that_an_owner_refuses_are_reported_with_their_flags():
    with pytest.raises(UserError, match="^--side -1.0 --no-turned: must be positive$"):
        picture("--side", "-1", "--no-turned").build("figure", "square")


@pytest.mark.parametrize(
    ("argv", "used", "words"),
    [
        (
            ["--radius", "5"],
            {"figure": "square"},
            "--radius 5.0: is a setting of the figure circle; this run uses square",
        ),
        (["--turned"], {"figure": "circle"}, "--turned: is a setting of the figure square; this run uses circle"),
        (["--no-turned"], {"figure": "circle"}, "--no-turned: is a setting"),
        (["--points", "9"], {"figure": "circle", "pen": "thin"}, "--points 9: is a setting of the pen thick"),
    ],
)
def test_a_flag_of_another_owner_is_an_error_that_names_it(argv, used, words):
    given = picture(*argv)
    with pytest.raises(UserError) as error:
        given.check_owners(**used)
    assert str(error.value).startswith(words)
    given.check_owners(**({} if used == {"figure": "square"} else {"pen": "thick"}))


def test_owners_are_chosen_by_name_or_follow():
    assert choose_owners(KINDS, {"figure": "square of 3"}) == {"figure": "square", "pen": "thin"}
    assert choose_owners(KINDS, {"figure": "circle", "pen": None}) == {"figure": "circle", "pen": "thick"}
    assert choose_owners(KINDS, {"figure": "circle", "pen": "thin"}) == {"figure": "circle", "pen": "thin"}
    assert choose_owners(KINDS, {}) == {}
    with pytest.raises(UserError, match="--figure cube: no figure 'cube'"):
        choose_owners(KINDS, {"figure": "cube"})
    with pytest.raises(UserError, match="--pen brush: unknown; choose from thin, thick"):
        choose_owners(KINDS, {"pen": "brush"})


def test_former_flags_are_accepted_with_a_warning(capsys, monkeypatch):
    given = picture("--half-width", "4", "--border", "3")
    assert given.build("figure", "circle").radius == 4 and given.general.paper.margin == 3
    assert capsys.readouterr().err.splitlines() == [
        "x: warning: --half-width is now --radius; the old name goes with the next version",
        "x: warning: --border is now --margin; the old name goes with the next version",
    ]
    given = picture("--unit", "--no-border")
    assert given.build("figure", "circle").radius == 1 and given.general.paper.margin == 0
    assert "--unit is now --radius 1.0;" in capsys.readouterr().err
    assert picture("--half-width", "4", "--radius", "5").build("figure", "circle").radius == 5
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    picture("--border", "3")
    assert capsys.readouterr().err == "", "one rank says it"


def test_help_is_general_and_lists_the_owners(capsys):
    shown = shown_help(capsys, picture)
    assert shown.startswith("usage: x [FLAGS] Show a figure. general: ") and "More about it" not in shown
    assert "paper: --width INT width of the paper (default: 100)" in shown
    assert "--figure NAME square, circle --pen NAME thick examples:" in shown  # thin has no settings
    assert shown.endswith("examples: x --figure circle --radius 3 x --pen thick")
    assert "--radius FLOAT" not in shown and "--border" not in shown


def test_help_with_a_name_shows_the_owner_s_settings_and_those_that_follow(capsys):
    shown = shown_help(capsys, picture, "--figure", "square of 4")
    assert "figure square: --side FLOAT length of a side (default: 4.0)" in shown and "--points" not in shown
    assert "settings of owners" not in shown, "the pen follows"
    shown = shown_help(capsys, picture, "--figure", "circle", "--side", "wrong")
    assert "figure circle: --radius FLOAT distance from the centre (default: 2.0) --circle-fill" in shown
    assert "pen thick: --points INT width of the pen (default: 3)" in shown
    assert "--points" not in shown_help(capsys, picture, "--figure", "circle", "--pen", "thin")
    with pytest.raises(UserError, match="--figure cube: no figure 'cube'"):
        picture("--help", "--figure", "cube")


def test_nested_json_given_back_is_the_same_config(tmp_path):
    argv = ["--figure", "circle", "--radius", "5", "--circle-fill", "red", "--width", "7", "--points", "9"]
    first = picture(*argv)
    circle, pen = first.build("figure", "circle"), first.build("pen", "thick")
    written = document(first.general, figure=("circle", circle), pen=("thick", pen))
    assert written == {
        "figure": {"name": "circle", "radius": 5.0, "fill": "red"},
        "pen": {"name": "thick", "points": 9},
        "paper": {"width": 7, "margin": None},
    }
    second = picture(*config_file(tmp_path, written | {"format": 2, "version": "0.2", "script": "x"}))
    assert second.general == Picture(figure="circle", pen="thick", paper=Paper(width=7))
    assert second.build("figure", "circle") == circle and second.build("pen", "thick") == pen
    third = picture(*config_file(tmp_path, written), "--radius", "6", "--margin", "1", "--pen", "thin")
    assert third.build("figure", "circle") == Circle(radius=6.0, fill="red")
    assert third.general == Picture(figure="circle", pen="thin", paper=Paper(width=7, margin=1))
    assert third.name_in_file("pen") == "thick" and third.name_in_file("nothing") is None


def test_a_section_of_another_owner_is_not_used(tmp_path):
    given = picture(*config_file(tmp_path, {"figure": {"name": "circle", "radius": 5}}), "--figure", "square of 3")
    assert given.build("figure", "square") == Square()


def test_the_size_of_another_model_is_not_taken_from_the_file(tmp_path):
    """A resolved file states all settings; those that its own model's name implies do not move to another model."""
    written = document(Picture(), figure=("square of 4", Square(side=4.0, turned=True)))
    for figure, side in (("square of 4", 4.0), ("square of 3", 3.0)):
        given = picture(*config_file(tmp_path, written), "--figure", figure)
        assert given.build("figure", "square", **FIGURES[figure]) == Square(side=side, turned=True)
    changed = document(Picture(), figure=("square of 4", Square(side=5.0)))
    given = picture(*config_file(tmp_path, changed), "--figure", "square of 3")
    assert given.build("figure", "square", side=3.0) == Square(side=5.0), "the file says so"


def test_a_section_of_the_data_s_settings_is_ignored(tmp_path):
    given = picture(*config_file(tmp_path, {"figure": {"name": "square of 3", "side": 2, "shape": [5, 5]}}))
    assert given.build("figure", "square") == Square(side=2.0)


def test_sections_without_a_name_and_names_without_a_section(tmp_path):
    given = picture(*config_file(tmp_path, {"figure": {"radius": 5}, "pen": "thick"}), "--figure", "circle")
    assert given.build("figure", "circle").radius == 5 and given.general.pen == "thick"
    assert picture(*config_file(tmp_path, {"figure": None, "paper": {}})).general == Picture()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"figure": 3}, "figure = 3: expected a name, or an object with one"),
        ({"figure": {"name": 3}}, "figure.name = 3: expected str"),
        ({"pen": {"name": "brush"}}, "pen.name = 'brush': choose from thin, thick"),
        ({"paper": {"weight": 3}}, "unknown setting 'paper.weight'"),
        ({"paper": 3}, "unknown setting 'paper'"),
        ({"paper": {"width": "3"}}, "paper.width = '3': expected int"),
        ({"ink": {"colour": "red"}}, "unknown setting 'ink'"),
        ({"script": "y"}, "settings of y, not of x"),
    ],
)
def test_a_mistake_in_a_nested_file_names_section_and_field(tmp_path, content, words):
    file = config_file(tmp_path, content)
    with pytest.raises(UserError) as error:
        picture(*file)
    assert file[1] in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "cube"}, "--config: figure.name: no figure 'cube'"),
        ({"radio": 3}, "--config: unknown setting 'figure.radio' of circle"),
        ({"radius": "3"}, "--config: figure.radius = '3': expected float"),
        ({"fill": "green"}, "--config: figure.fill = 'green': choose from none, red"),
    ],
)
def test_a_mistake_in_an_owner_s_section(tmp_path, section, words):
    given = picture(*config_file(tmp_path, {"figure": {"name": "circle", **section}}))
    with pytest.raises(UserError) as error:
        given.build("figure", "circle")
    assert str(error.value) == words


def test_sampling_offers_only_settings_that_do_not_change_weights(tmp_path):
    kinds = (Kind("figure", {"square": Square, "circle": Circle}, figure_of, sampling=True),)
    assert picture("--circle-fill", "red", kinds=kinds).fields("figure", "circle") == {"fill": "red"}
    for argv, close in (("--step 5", "--steps"), ("--fats", "--fast"), ("--size 5 --bettas=1", "--betas")):
        with pytest.raises(UserError, match=rf"unrecognized arguments: .* \(close to it: {close}; see --help\)"):
            example(*argv.split())
    with pytest.raises(UserError, match="unrecognized arguments: --radius 5"):
        picture("--radius", "5", kinds=kinds)


def test_places_in_json_and_flags_of_places():
    known = places(Picture, KINDS)
    assert known["--width"].path == ("paper", "width") and known["--width"].kind is None
    assert known["--radius"].path == ("figure", "radius") and known["--radius"].kind == "figure"
    assert known["--half-width"] == known["--radius"] and known["--unit"].stands_for == 1.0
    assert flag_of(Picture, KINDS, "paper.width") == "--width"
    assert flag_of(Picture, KINDS, "figure.fill") == "--circle-fill"
    assert flag_of(Picture, KINDS, "figure.name") == "--figure"
    assert flag_of(Picture, KINDS, "no.such") == "no.such"
    assert free_settings(Picture) == {"paper.width"}


def test_differences_name_what_changed():
    then = {"figure": {"name": "circle", "radius": 5.0}, "paper": {"width": 7, "margin": None}, "old": 1}
    now = {"figure": {"name": "circle", "radius": 6.0}, "paper": {"width": 8, "margin": None, "colour": "white"}}
    assert differences(then, then) == []
    assert differences(then, now, free_settings(Picture), lambda key: flag_of(Picture, KINDS, key)) == [
        "--radius was 5.0, now 6.0",
        "paper.colour was None, now 'white'",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Official names that stand for a model and a setting


def sampling_settings(*argv):
    return sampling.config.parse_settings(sample.SampleSettings, argv, sample.PROGRAM, "y")


def model_and_interval(*argv):
    general = sampling_settings(*argv).general
    return general.model, general.caching.cache_interval


def test_official_names_stand_for_a_model_and_an_interval():
    assert model_and_interval("--model", "DiT-skip") == ("Skip-DiT-XL/2", None)
    for n in (2, 3, 4, 5, 6):
        assert model_and_interval("--model", f"DiT-cache-{n}") == ("Skip-DiT-XL/2", n)
    assert model_and_interval("--model", "Latte-skip") == ("Skip-Latte-XL/2", None)
    assert model_and_interval("--model", "Latte-skip-cache") == ("Skip-Latte-XL/2", 2)
    for n in (2, 3, 4, 5, 6):
        assert model_and_interval("--model", f"Latte-skip-cache-{n}") == ("Skip-Latte-XL/2", n)
    assert len(ALIASES) == 13 and all(row["--model"] in list_models() for row in ALIASES.values())


@pytest.mark.parametrize("model", ["DiT-XL/2", "DiT-cache-7"])
def test_other_settings_are_left_alone(model):
    assert model_and_interval("--model", model, "--seed", "3") == (model, None)
    assert model_and_interval("--ckpt", "a.pt") == (None, None)


def test_an_alias_may_be_repeated_by_its_flag_or_come_from_a_file(tmp_path):
    assert model_and_interval("--model", "DiT-cache-3", "--cache-interval", "3") == ("Skip-DiT-XL/2", 3)
    assert model_and_interval("--model", "DiT-skip", "--cache-interval", "5") == ("Skip-DiT-XL/2", 5)
    for content in ({"model": "DiT-cache-4", "cache_interval": None}, {"model": {"name": "DiT-cache-4"}}):
        file = config_file(tmp_path, content)
        assert model_and_interval(*file) == ("Skip-DiT-XL/2", 4)
        assert sampling_settings(*file).fields("model", "Skip-DiT") == {}
        with pytest.raises(UserError, match="--cache-interval 3: contradicts --model DiT-cache-4, which means 4"):
            model_and_interval(*file, "--cache-interval", "3")


def test_an_alias_that_contradicts_a_flag_is_refused():
    with pytest.raises(UserError, match="--cache-interval 3: contradicts --model DiT-cache-2, which means 2"):
        model_and_interval("--model", "DiT-cache-2", "--cache-interval", "3")


def test_an_alias_whose_setting_has_no_effect_is_refused():
    with pytest.raises(UserError, match="--model DiT-cache-2: means --cache-interval 2, which has no effect here"):
        training.config.parse_settings(["--model", "DiT-cache-2"])
    assert training.config.parse_settings(["--model", "DiT-skip"]).general.model == "Skip-DiT-XL/2"


# ----------------------------------------------------------------------------------------------------------------------
# The real programs


PROGRAMS = {
    TrainSettings: training.config.KINDS,
    sample.SampleSettings: sampling.config.KINDS,
    sample_ddp.SampleDDPSettings: sampling.config.KINDS,
}


def base_type(hint):
    """A flag's type without None and without its choices, which owners may differ in."""
    if typing.get_origin(hint) is Literal:
        return str
    inner = [part for part in typing.get_args(hint) if part is not type(None)]
    return base_type(inner[0]) if type(None) in typing.get_args(hint) else hint


def test_one_flag_has_one_meaning():
    """Owners agree in type and help; programs in type, and in help but where a program's own text is better."""
    own_text = {"--model", "--global-seed", "--class-labels", "--output"}
    types, helps = {}, {}
    for cls, kinds in PROGRAMS.items():
        flags = [(None, flag) for flag in fields_of(cls)]
        flags += [(kind, flag) for kind in kinds for owner in kind.owners for flag in kind.flags(owner).values()]
        for kind, flag in flags:
            types.setdefault(flag.name, set()).add(base_type(flag.hint))
            if kind is not None or flag.name not in own_text:
                helps.setdefault(flag.name, set()).add(flag.field.metadata["help"])
    del types["--class-labels"]  # sample.py takes names, too
    assert {name: found for name, found in types.items() if len(found) > 1} == {}
    assert {name: found for name, found in helps.items() if len(found) > 1} == {}


def fields_of(cls):
    """General settings of a program as flags."""
    return Kind("general", {"": cls}).flags("").values()


@pytest.mark.parametrize("cls", PROGRAMS, ids=lambda cls: cls.__name__)
def test_former_names_are_no_present_ones_and_stand_for_one_flag(cls):
    kinds = PROGRAMS[cls]
    flags = [*fields_of(cls), *(f for kind in kinds for owner in kind.owners for f in kind.flags(owner).values())]
    former = {(old, flag.name) for flag in flags for old in flag.field.metadata["was"]}
    assert len({old for old, _ in former}) == len(former)
    assert not {old for old, _ in former} & {flag.name for flag in flags}
    assert places(cls, kinds).keys() == {flag.name for flag in flags} | {old for old, _ in former}


def test_help_of_training_general_and_with_a_model_and_a_process(capsys):
    shown = shown_help(capsys, lambda *argv: training.config.parse_settings(argv, "Train."))
    for words in (
        "--global-batch-size INT",
        "data: --data-path PATH",
        "--model NAME DiT, DyDiT, DDT",
        "--process NAME",
    ):
        assert words in shown
    assert "--hidden-size" not in shown and "--flow-shift" not in shown and "--adam-betas" not in shown
    argv = ("--model", "DiT-S/2", "--process", "flow")
    shown = shown_help(capsys, lambda *argv: training.config.parse_settings(argv, "Train."), *argv)
    assert "model DiT:" in shown and "--hidden-size INT width of the tokens (default: 384)" in shown
    assert "process flow:" in shown and "--flow-shift FLOAT" in shown and "--noise-schedule" not in shown
    assert "--optimizer NAME adamw" in shown and "--process NAME" not in shown


def test_a_flag_of_another_process_and_of_another_model_names_them():
    with pytest.raises(UserError, match=r"--flow-shift 2.0: is a setting of the process flow; this run uses gaussian"):
        prepare("--dataset", "digits", "--model", "DiT-debug/2", "--flow-shift", "2")
    with pytest.raises(UserError, match=r"--flops-target 0.5: is a setting of the loss dydit; this run uses diffusion"):
        prepare("--dataset", "digits", "--model", "DiT-debug/2", "--flops-target", "0.5")
    with pytest.raises(UserError, match=r"--encoder-depth 2: is a setting of the model DDT; this run uses DiT"):
        prepare("--dataset", "digits", "--model", "DiT-debug/2", "--encoder-depth", "2")


def prepare(*argv):
    import torch

    return set_up(training.config.parse_settings(argv), torch.device("cpu"))


def test_nested_json_of_training_given_back_is_the_same(tmp_path):
    argv = "--dataset digits --model DDT-debug/2 --flow-shift 2 --adam-betas 0.8 0.9 --device cpu --max-steps 3"
    first = prepare(*argv.split()).document()
    assert first["format"] == 2 and first["process"] == first["process"] | {"name": "flow", "shift": 2.0}
    second = prepare(*config_file(tmp_path, first)).document()
    assert second == first
    changed = prepare(*config_file(tmp_path, first), "--flow-shift", "3").document()
    assert differences(first, changed) == ["process.shift was 2.0, now 3.0"]


def test_another_model_than_that_of_the_file_has_its_own_size(tmp_path):
    file = config_file(
        tmp_path, prepare("--dataset", "digits", "--model", "DiT-debug/2", "--patch-size", "4").document()
    )
    model = prepare(*file, "--model", "DiT-digits/2").document()["model"]
    assert (model["hidden_size"], model["learn_sigma"], model["patch_size"]) == (96, False, 4)


@pytest.mark.parametrize("name", [name for name in format1.manifest()["runs"] if name != "dit-latents"])
def test_flat_json_of_format_1_is_migrated(name, tmp_path):
    """The run of a migrated config is the one that its command line gives today, former flags translated."""
    flat = json.loads(format1.config_path(name).read_text())
    assert not any(isinstance(value, dict) for value in flat.values())
    from_file = prepare("--config", str(format1.config_path(name))).document()
    by_flags = prepare(*format1.manifest()["runs"][name]["argv"].split()).document()
    assert from_file == by_flags
    nested = run_config(flat, TrainSettings, training.config.KINDS, training.config.PROGRAM)
    assert run_config(nested, TrainSettings, training.config.KINDS, training.config.PROGRAM) == nested


@pytest.mark.parametrize("version", [1, 2])
def test_the_settings_of_a_training_run_are_answered_with_its_checkpoint(version, tmp_path, capsys):
    setup = prepare("--dataset", "digits", "--model", "DiT-debug/2")
    file = config_file(tmp_path, setup.document() if version == 2 else format1.config_path("dit").read_text())
    assert run(sample.main, sample.PROGRAM, [*file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"--config {file[1]}: settings of train.py, not of sample.py; give its checkpoint: --ckpt {tmp_path}/ch" in line
    )
    with pytest.raises(UserError, match="unknown setting 'data'"):
        example(*config_file(tmp_path, {"data": to_dict(setup.config.data)}))
