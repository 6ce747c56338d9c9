"""What the options take: every list is a registry's, and former names still work."""

from __future__ import annotations

import re
from typing import Any, get_args, get_type_hints

import click
import pytest

from dfcompress import console
from dfcompress.cli import root
from dfcompress.commands import _help
from dfcompress.commands.compare import _repeated
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.quantization.calibration import ASYMMETRIC, Calibration
from dfcompress.quantization.observers import range_rules
from dfcompress.synthesis.recipes import recipe_names
from dfcompress.synthesis.records.accumulator import RecordSettings
from dfcompress.training.class_incremental import METHODS
from dfcompress.training.objectives import make_objectives
from dfcompress.training.optimizers import make_optimizer
from dfcompress.training.settings import Training
from dfcompress.verbs._quantize_defaults import CALIBRATIONS, FINETUNING
from dfcompress.verbs.export import export
from dfcompress.verbs.quantize import quantize


def option(command: str, spelling: str) -> click.Option:
    """An option as the command line finds it."""
    found = root.get_command(click.Context(root), command)
    return next(each for each in found.params if isinstance(each, click.Option) and spelling in each.opts)


def parsed(*words: str) -> dict[str, Any]:
    """The parameters of a command by the words after `dfcompress`; nothing runs."""
    command = root.get_command(click.Context(root), words[0])
    context = click.Context(root, info_name="dfcompress")
    return command.make_context(words[0], list(words[1:]), parent=context).params


# Spelling: what the help lists, and the names that the code behind it has an entry for.
REGISTRIES = [
    ("quantize", "--calibrate", range_rules()),
    ("quantize", "--weight-ranges", range_rules()),
    ("quantize", "--weight-grid", ASYMMETRIC),
    ("quantize", "--method", CALIBRATIONS),
    ("quantize", "--finetune", FINETUNING),
    ("extend", "--method", METHODS),
]
# Spelling: where the Python API states the type of what the option gives.
TYPES = [
    ("quantize", "--weight-grid", Calibration, "weight_grid"),
    ("quantize", "--finetune", quantize, "finetune"),
    ("quantize", "--method", quantize, "method"),
    ("export", "--target", export, "target"),
    ("distill", "--optimizer", Training, "optimizer"),
    ("distill", "--optimizer-backend", Training, "backend"),
    ("distill", "--precision", Compute, "precision"),
    ("distill", "--compile", Compute, "compile"),
]


def listed(command: str, spelling: str) -> set[str]:
    """The names that an option's help page shows, of its choices or of its sentence."""
    found = option(command, spelling)
    if isinstance(found.type, click.Choice):
        return set(found.type.choices)
    return set(re.split(r", | or ", found.help.rpartition(": ")[2].rstrip(".")))


@pytest.mark.parametrize(("command", "spelling", "registry"), REGISTRIES)
def test_an_option_takes_the_names_that_have_an_entry(command, spelling, registry):
    assert listed(command, spelling) == set(registry)


@pytest.mark.parametrize(("command", "spelling", "where", "name"), TYPES)
def test_an_option_takes_the_names_that_the_python_api_takes(command, spelling, where, name):
    hint = get_type_hints(where)[name]
    names = [each for part in (hint, *get_args(hint)) for each in get_args(part) or [part] if isinstance(each, str)]
    assert listed(command, spelling) == set(names)


def test_every_objective_and_optimizer_in_the_help_can_be_built():
    from torch import nn

    for name in listed("distill", "--objective"):
        objectives = make_objectives({"kd": 1, name: 1}, temperature=4.0, pairs=[], seed=0)
        assert objectives[-1].name == name
    for name in listed("distill", "--optimizer"):
        groups = [{"params": [nn.Parameter(nn.Linear(1, 1).weight)], "weight_decay": 0.0}]
        assert make_optimizer(name, groups, backend="torch", lr=0.1, momentum=0.9)
    assert listed("invert", "--recipe") == set(recipe_names())
    for kind in listed("record", "--kind"):
        assert RecordSettings(kind=kind).kind == kind


FORMER = [
    ("distill", "--mix", "--second-recipe", "none"),
    ("merge", "--unseen", "--probe-images", "7"),
    ("record", "--keep", "--coefficients", "0.3"),
    ("record", "--pooled", "--class-independent", None),
]


@pytest.mark.parametrize(("command", "former", "present", "value"), FORMER)
def test_a_former_name_gives_what_the_present_one_gives_and_says_so_once(
    command, former, present, value, capsys, monkeypatch, tmp_path
):
    console.configure(console.NORMAL)
    line = [command, "net.pt", *(["--data", "train"] if command == "record" else [])]
    given = [] if value is None else [value]
    expected = parsed(*line, present, *given)
    assert expected != parsed(*line)
    assert capsys.readouterr().err == ""
    notice = f"{former} is now called {present}; the old name will be removed in the next version.\n"

    assert parsed(*line, former, *given) == expected
    assert capsys.readouterr().err == notice
    parsed(*line, former, *given, "-q")
    assert capsys.readouterr().err == ""
    console.configure(console.NORMAL)

    configuration = tmp_path / "c.toml"
    configuration.write_text(f"[{command}]\n{former.strip('-')} = {'true' if value is None else repr(value)}\n")
    assert parsed(*line, "--config", str(configuration)) == expected
    assert capsys.readouterr().err == notice

    monkeypatch.setenv(f"DFCOMPRESS_{former.strip('-').upper()}", value or "1")
    assert parsed(*line) == expected
    assert capsys.readouterr().err == notice
    monkeypatch.undo()


@pytest.mark.parametrize(("command", "former", "present", "value"), FORMER)
def test_help_shows_the_present_name_alone(command, former, present, value):
    found = root.get_command(click.Context(root), command)
    context = click.Context(found)
    context.meta[_help.SHOW_ALL] = True
    page = found.get_help(context)
    assert present in page
    assert re.search(rf"{former}\b", page) is None


def test_both_names_in_one_place_are_refused():
    with pytest.raises(BadInput, match="--mix and --second-recipe are the same option"):
        parsed("distill", "net.pt", "--mix", "none", "--second-recipe", "bns")


def test_the_command_line_beats_the_environment_beats_the_file_by_either_name(monkeypatch, tmp_path):
    configuration = tmp_path / "c.toml"
    configuration.write_text("probe_images = 3\n")
    line = ["distill", "net.pt", "--config", str(configuration)]
    assert parsed(*line)["probe_images"] == 3
    monkeypatch.setenv("DFCOMPRESS_UNSEEN", "5")
    assert parsed(*line)["probe_images"] == 5
    monkeypatch.setenv("DFCOMPRESS_PROBE_IMAGES", "6")
    monkeypatch.delenv("DFCOMPRESS_UNSEEN")
    assert parsed(*line, "--unseen", "7")["probe_images"] == 7
    configuration.write_text("unseen = 4\n")
    assert parsed(*line)["probe_images"] == 6


def test_a_wrong_value_under_a_former_name_is_refused():
    with pytest.raises(click.BadParameter, match="nonsense"):
        parsed("distill", "net.pt", "--mix", "nonsense")
    with pytest.raises(BadInput, match="--coefficients"):
        RecordSettings(coefficients=0.0)


@pytest.mark.parametrize(
    ("words", "sets", "own"),
    [
        ("a.pt b.pt --sets x y z --json", ["x", "y", "z"], []),
        ("a.pt b.pt --json --sets x y --own x --sets z", ["x", "y", "z"], ["x"]),
        ("--sets=x y --own=y x a.pt", None, None),
        ("--sets x --outliers 3 a.pt b.pt --own x x", ["x"], ["x", "x"]),
        ("--sets x y -q a.pt b.pt", ["x", "y"], []),
        ("a.pt b.pt", [], []),
    ],
)
def test_sets_take_all_words_up_to_the_next_option(words, sets, own, monkeypatch):
    command = root.get_command(click.Context(root), "compare")
    needed = next(parameter for parameter in command.params if parameter.name == "sets")
    monkeypatch.setattr(needed, "required", False)
    if sets is None:
        with pytest.raises(click.UsageError, match=r"(?i)models"):
            command.make_context("compare", words.split())
        return
    given = command.make_context("compare", words.split()).params
    assert [str(model) for model in given["models"]] == ["a.pt", "b.pt"]
    assert (list(given["sets"]), list(given["own"])) == (sets, own)


def test_words_of_other_options_stay_as_they_are():
    assert list(_repeated(["m", "--csv", "out", "--sets", "a", "b", "-q"])) == (
        ["m", "--csv", "out", "--sets", "a", "--sets", "b", "-q"]
    )
