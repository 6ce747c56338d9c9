"""What must hold for every recipe in the folder."""

from __future__ import annotations

import copy
import importlib
import inspect
from dataclasses import replace

import pytest
import torch

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.evaluation.metrics import bn_divergence
from dfcompress.machine.execution import Execution
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.recorder import LOGITS
from dfcompress.synthesis.losses import Want
from dfcompress.synthesis.recipe import choose
from dfcompress.synthesis.recipes import recipe_names
from dfcompress.synthesis.records.accumulator import RecordSettings
from dfcompress.synthesis.records.gaussian import GaussianAccumulator, GaussianSampler
from dfcompress.synthesis.records.record_file import Description, Record
from dfcompress.synthesis.synthesizer import Synthesizer


def module_of(name):
    return importlib.import_module(f"dfcompress.synthesis.recipes.{name.replace('-', '_')}")


CASES = [(name, preset) for name in recipe_names() for preset in module_of(name).PRESETS]


def a_record(teacher):
    """Logits of made-up images, made ready to draw from."""
    accumulator = GaussianAccumulator({LOGITS: torch.zeros(1, 10)}, RecordSettings(kind="top-layer"), 10)
    accumulator.update([20 * torch.randn(200, 10)], torch.arange(200) % 10, torch.arange(200))
    about = Description("top-layer", (LOGITS,), 200, (20,) * 10, "", **accumulator.details())
    return GaussianSampler(Record(about, accumulator.tensors()), teacher)


def another(teacher):
    """A student that answers otherwise: the teacher with its last layer turned."""
    student = copy.deepcopy(teacher)
    student.network.fc.weight.data = student.network.fc.weight.data.roll(1, 0)
    return student


def test_no_published_method_is_missing():
    published = {"activation-records", "adaptive-deepinversion", "bns", "bns-inception", "deepdream", "deepinversion"}
    published |= {"cmi", "dafl", "dfq", "ifhe", "zskt"}
    assert published | {"gaussian", "inception", "psaq-vit"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_its_paper_and_explains_itself(name):
    module = module_of(name)
    assert module.PAPER
    assert len(module.__doc__.splitlines()) > 3
    function = getattr(module, name.replace("-", "_"))
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in inspect.signature(function).parameters.values())


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_a_few_steps_of_every_preset_lower_its_objective(name, preset, resnet20_file):
    overrides = {"batch_size": 8} | ({"steps": 12} if name != "gaussian" else {})
    settings = choose(name, preset).settings
    overrides |= {"half_steps": 6} if settings.get("half_steps") else {}
    overrides |= {"warmup": 0} if "warmup" in settings else {}
    overrides |= {"width": 8} if "width" in settings else {}
    overrides |= {"remembered": 16} if "remembered" in settings else {}
    recipe = choose(name, preset, overrides).recipe
    teacher = load(resnet20_file)
    student = another(teacher) if Want.STUDENT in recipe.wants else None
    execution = Execution("cpu", "fp32", False, 1, "")
    sampler = a_record(teacher) if Want.TARGETS in recipe.wants else None
    batch = Synthesizer(recipe, teacher, execution, student=student, sampler=sampler).batch(0, torch.arange(8))
    assert batch.images.shape == (8, 3, 32, 32)
    assert batch.images.isfinite().all()
    if batch.history:
        totals = [sum(loss.weight * point[loss.name] for loss in recipe.losses) for point in batch.history]
        assert totals[-1] < totals[0] - 0.1 * abs(totals[0])


def test_gaussian_images_are_standard_normal_where_the_network_sees_them(resnet20_file):
    teacher = load(resnet20_file)
    recipe = choose("gaussian").recipe
    batch = Synthesizer(recipe, teacher, Execution("cpu", "fp32", False, 1, "")).batch(0, torch.zeros(256).long())
    seen = teacher.normalise(batch.images)
    assert seen.mean().item() == pytest.approx(0.0, abs=0.01)
    assert seen.std().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(batch.labels, teacher(batch.images).argmax(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deepinvrsion",), "Did you mean 'deepinversion'"),
        (("deepinversion", "fast-cifar"), "Did you mean 'fast-cifar10'"),
        (("deepinversion", None, {"stps": "10"}), "Did you mean 'steps'"),
        (("deepinversion", None, {"steps": "many"}), "not a value of type int"),
        (("deepinversion", None, {"lr": "-1"}), "negative"),
        (("deepinversion", None, {"flip": "perhaps"}), "not a value of type bool"),
        (("gaussian", None, {"steps": "3"}), "no recipe setting of gaussian called 'steps'"),
    ],
)
def test_a_wrong_name_or_value_is_refused_with_a_suggestion(arguments, message):
    with pytest.raises(BadInput, match=message):
        choose(*arguments)


def test_text_from_the_command_line_takes_the_type_of_the_default():
    settings = choose("deepinversion", "paper-cifar10", {"bn": "1", "flip": "true", "steps": "7"}).settings
    assert (settings["bn"], settings["flip"], settings["steps"]) == (1.0, True, 7)


def test_the_paper_preset_is_the_published_one():
    settings = choose("deepinversion", "paper-cifar10").settings
    published = {"bn": 10.0, "tv": 2.5e-5, "lr": 0.05, "steps": 2000, "batch_size": 256, "jitter": 2, "flip": False}
    assert {name: settings[name] for name in published} == published


CARD = ModelCard("net", 1000, (3, 224, 224), (0.5,) * 3, (0.25,) * 3)
GREY = replace(CARD, input_size=(1, 28, 28), mean=(0.5,), std=(0.25,))


@pytest.mark.parametrize("name", sorted({*recipe_names()} - {"gaussian", "activation-records", "psaq-vit"}))
def test_every_recipe_of_pixels_takes_settings_for_large_images_by_itself(name, capsys, monkeypatch):
    monkeypatch.setattr(console, "_verbosity", console.NORMAL)
    assert choose(name, card=CARD).preset == "fast-imagenet"
    assert choose(name, card=replace(CARD, input_size=(3, 64, 64))).preset == "fast-cifar10"
    grey = choose(name, card=GREY)
    assert grey.preset == "fast-mnist"
    assert not grey.settings.get("flip", False)  # A mirrored character is another one.
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("preset", "size"), [("fast-cifar10", 224), ("fast-imagenet", 32)])
def test_settings_for_images_of_another_size_are_taken_with_a_notice(preset, size, capsys, monkeypatch):
    monkeypatch.setattr(console, "_verbosity", console.NORMAL)
    assert choose("deepinversion", preset, card=replace(CARD, input_size=(3, size, size))).preset == preset
    assert f"the model takes {size} × {size}" in capsys.readouterr().err


def test_the_papers_weight_of_statistics_brings_them_near_in_a_few_steps(resnet20_file):
    """J_KL of ten images after 20 steps is 0.078; with the statistics weighted 1 it is 0.234."""
    teacher = load(resnet20_file)
    recipe = choose("bns-inception", "paper-cifar10", {"steps": 20, "batch_size": 10}).recipe
    made = Synthesizer(recipe, teacher, Execution("cpu", "fp32", False, 1, "")).batch(0, torch.arange(10))
    assert bn_divergence(teacher, [(made.images, made.labels)]) < 0.12


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ({}, [60, 60, 40]),
        ({"steps": "2"}, [3, 3, 2]),
        ({"steps": 400}, [600, 600, 400]),
        ({"steps": 2, "half_steps": 5}, [60, 5, 2]),
        ({"steps": 0}, []),
    ],
)
def test_steps_on_smaller_images_keep_their_proportion_to_steps(overrides, steps):
    choice = choose("bns-inception", "fast-imagenet", overrides)
    assert [phase.steps for phase in choice.recipe.phases if phase.steps] == steps
