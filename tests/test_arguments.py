"""A wrong argument is refused by name before any work, in a sentence that says what it must be."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import dfcompress
from dfcompress.arguments import require_types
from dfcompress.errors import BadInput

VERBS = [name for name, home in dfcompress._HOME.items() if home.startswith("verbs.") and name.islower()]
ARGUMENTS = [
    (verb, parameter.name)
    for verb in VERBS
    for parameter in inspect.signature(getattr(dfcompress, verb)).parameters.values()
    if "Classifier" not in parameter.annotation
]


@pytest.mark.parametrize(("verb", "argument"), ARGUMENTS)
def test_every_verb_refuses_every_argument_of_another_type(verb, argument):
    with pytest.raises(BadInput, match=rf"^{argument}=\{{1, 2\}} is not a valid argument of {verb}\. Give .+\.$"):
        getattr(dfcompress, verb)(**{argument: {1, 2}})


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("evaluate", {"data": None}, "data=None is not a valid argument of evaluate. Give a string or a path."),
        (
            "evaluate",
            {"data": "test.npz", "batch_size": 0},
            "batch_size=0 is not a valid argument of evaluate. Give a whole number from 1 up.",
        ),
        ("distill", {"student": 5}, "student=5 is not a valid argument of distill. Give a string or None."),
        (
            "distill",
            {"synthesis": {"images": 8}},
            "synthesis={'images': 8} is not a valid argument of distill. Give a Synthesis.",
        ),
        (
            "distill",
            {"probe_images": -3},
            "probe_images=-3 is not a valid argument of distill. Give a whole number from 0 up.",
        ),
        (
            "distill",
            {"objectives": {"kd": "much"}},
            "objectives={'kd': 'much'} is not a valid argument of distill. Give a dict of numbers or None.",
        ),
        (
            "extend",
            {"new_data": "birds", "class_names": ["owl", "crow"]},
            "class_names=['owl', 'crow'] is not a valid argument of extend. Give a string, a path or None.",
        ),
        (
            "extend",
            {"new_data": "birds", "eval_data": 5},
            "eval_data=5 is not a valid argument of extend. Give a string, a path or a list of strings or paths.",
        ),
        ("record", {"data": "x", "settings": 5}, "record. Give a RecordSettings or a dict."),
        ("record", {"data": "x", "seed": "a"}, "seed='a' is not a valid argument of record. Give a whole number."),
        ("record", {"data": "x", "seed": -1}, "record. Give a whole number from 0 up."),
        ("invert", {"output": 5}, "output=5 is not a valid argument of invert. Give a string, a path or None."),
        ("quantize", {"bits": 8}, "bits=8 is not a valid argument of quantize. Give a string."),
        ("quantize", {"export": 5}, "Give 'onnxruntime', 'tensorrt', 'openvino' or None."),
        ("quantize", {"resume": "no"}, "resume='no' is not a valid argument of quantize. Give True or False."),
    ],
)
def test_what_is_said_of_a_wrong_argument(verb, arguments, said):
    with pytest.raises(BadInput) as caught:
        getattr(dfcompress, verb)("model.pt", **arguments)
    assert str(caught.value).endswith(said)


def test_a_plan_refuses_what_its_verb_does():
    with pytest.raises(BadInput, match="student=5 is not a valid argument of distill"):
        dfcompress.distill.plan("model.pt", student=5)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("Compute", {"seed": "a"}, "seed='a' is not a valid argument of Compute. Give a whole number."),
        ("Compute", {"device": 0}, "device=0 is not a valid argument of Compute. Give a string."),
        ("Synthesis", {"images": "8"}, "images='8' is not a valid argument of Synthesis. Give a whole number or None."),
        ("Synthesis", {"groups": 1.5}, "groups=1.5 is not a valid argument of Synthesis. Give a whole number or"),
        ("Training", {"steps": "many", "lr": 0.1, "batch_size": 8}, "steps='many' is not a valid argument of"),
        ("Augmentation", {"shift": 0.5}, "shift=0.5 is not a valid argument of Augmentation. Give a whole number."),
        ("Calibration", {"signed": 1}, "signed=1 is not a valid argument of Calibration. Give True or False."),
        ("Reconstruction", {"steps": "9"}, "steps='9' is not a valid argument of Reconstruction. Give a whole number."),
        ("Gates", {"max_drop": "1"}, "max_drop='1' is not a valid argument of Gates. Give a number or None."),
        ("RecordSettings", {"layers": "conv1"}, "layers='conv1' is not a valid argument of RecordSettings."),
    ],
)
def test_settings_refuse_a_value_of_another_type(kind, values, said):
    with pytest.raises(BadInput) as caught:
        getattr(dfcompress, kind)(**values)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, float),
        (np.int64(3), int),
        (np.float32(0.5), float),
        (Path("x"), str | Path),
        (("a", Path("b")), str | Path | Sequence[str | Path]),
        ([0.5, 1], tuple[float, ...]),
        ({"kd": 1}, Mapping[str, float] | None),
        ({"steps": object()}, Mapping[str, Any]),
        ("auto", Literal["auto"] | None),
    ],
)
def test_a_value_of_the_annotated_type_is_taken(value, hint):
    require_types({"value": value}, {"value": hint}, "verb")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (1, bool),
        (0.5, int),
        ("abc", Sequence[str]),
        (["a", 1], Sequence[str]),
        (None, str),
        ("autoo", Literal["auto"] | None),
    ],
)
def test_a_value_that_only_resembles_the_type_is_refused(value, hint):
    with pytest.raises(BadInput, match="is not a valid argument of verb"):
        require_types({"value": value}, {"value": hint}, "verb")


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(BadInput) as caught:
        require_types({"data": list(range(1000))}, {"data": str}, "verb")
    assert len(str(caught.value)) < 120


def test_a_name_that_is_no_argument_is_python_s_own_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'studnet'"):
        dfcompress.distill("model.pt", studnet="half")
