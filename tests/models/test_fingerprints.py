"""The index of fingerprints: what it leaves out, and that its kept script still makes its lines."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
import torchvision.models

from dfcompress.models.architectures import named
from dfcompress.models.fingerprints import FILE, fitting_names, fitting_order, index, of_names, of_order

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import index_architectures

ROOT = Path(__file__).parents[2]
SHAPES = {"conv.weight": (8, 3, 3, 3), "bn.weight": (8,), "fc.weight": (10, 8), "fc.bias": (10,)}


def test_classes_and_channels_play_no_part_and_everything_else_does():
    def of(**changed: tuple[int, ...]) -> tuple[str, str]:
        shapes = {**SHAPES, **{name.replace("_", "."): shape for name, shape in changed.items()}}
        return of_names(shapes, ["fc.weight", "fc.bias"], ["conv.weight"]), of_order([*shapes.values()])

    assert of() == of(conv_weight=(8, 1, 3, 3), fc_weight=(1000, 8), fc_bias=(1000,))
    for changed in ({"conv_weight": (8, 3, 5, 5)}, {"bn_weight": (9,)}, {"more_weight": (1,)}):
        assert not {*of(**changed)} & {*of()}


def test_names_have_any_order_and_shapes_one():
    turned = dict(reversed(SHAPES.items()))
    assert of_names(turned, ["fc.weight"], []) == of_names(SHAPES, ["fc.weight"], [])
    assert of_order([*turned.values()]) != of_order([*SHAPES.values()])


def test_every_network_of_torchvision_is_listed_and_the_versions_are_noted():
    listed = {name for groups in index().by_names.values() for twins in groups for name in twins}
    assert {*torchvision.models.list_models(module=torchvision.models)} <= listed
    assert len([name for name in listed if name.startswith("timm:")]) > 1300
    assert {*index().versions} == {"timm", "torchvision"}


def test_the_index_is_small_and_part_of_an_installation():
    assert FILE.stat().st_size < 100_000
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "models/fingerprints.json" in settings["tool"]["setuptools"]["package-data"]["dfcompress"]


@pytest.mark.parametrize(
    "names",
    [
        ("resnet18", "timm:resnet18", "timm:resnetblur18"),
        ("timm:xcit_nano_12_p16_224", "timm:xcit_nano_12_p16_384"),
        ("timm:efficientnet_lite0", "timm:tf_efficientnet_lite0"),
        ("lenet5",),
    ],
)
def test_the_kept_script_makes_the_lines_that_are_shipped(names):
    every = [index_architectures.listed(name) for name in names]
    made = json.loads(index_architectures.written(every))
    shipped = json.loads(FILE.read_text())
    assert made["architectures"].items() <= shipped["architectures"].items()
    assert [each for each in made["heads"] if each not in shipped["heads"]] == []
    assert [each for each in made["stems"] if each not in shipped["stems"]] == []
    twins = [tuple(group.split()) for groups in made["architectures"].values() for group in groups]
    assert fitting_names(every[0].shapes) == fitting_order([*every[0].shapes.values()]) == twins


def test_a_network_without_classes_is_not_listed(monkeypatch):
    headless = {"conv.weight": (8, 3, 3, 3)}
    monkeypatch.setattr(index_architectures, "tensors_of", lambda architecture, classes, channels: headless)
    assert index_architectures.listed("lenet5") is None


def test_what_computes_differently_is_told_from_what_computes_the_same():
    assert index_architectures.compute_alike(named("timm:vit_tiny_patch16_224"), named("timm:deit_tiny_patch16_224"))
    assert not index_architectures.compute_alike(named("timm:mixnet_s"), named("timm:tf_mixnet_s"))
