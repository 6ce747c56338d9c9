"""Settings by name: text becomes values of the right type, and what is unknown gets the nearest name."""

from __future__ import annotations

import pytest

from dfcompress.errors import BadInput
from dfcompress.settings import assignments, one_or_more, replace_settings
from dfcompress.verbs.distill import DISTILLATION


def test_text_is_converted_and_inner_fields_are_found():
    new = replace_settings(
        DISTILLATION, {"lr": "0.5", "mixup": "0", "milestones": "0.2,0.4", "flip": "false"}, "setting"
    )
    assert (new.lr, new.augmentation.mixup, new.milestones) == (0.5, 0.0, (0.2, 0.4))
    assert new.augmentation.flip is False
    assert new.augmentation.shift == DISTILLATION.augmentation.shift


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_deca": "1"}, "Did you mean 'weight_decay'"),
        ({"lr": "fast"}, "lr = 'fast'"),
        ({"milestones": "a,b"}, "milestones"),
        ({"schedule": "linear"}, "schedule='linear' is not a valid argument of Training"),
        ({"optimizer": "sdg"}, "optimizer='sdg' is not a valid argument of Training. Give 'sgd'"),
        ({"momentum": "1"}, "momentum must be a share from 0 to below 1; it is 1.0"),
        ({"cutout": "2"}, "shares below 1; they are 0.0 and 2.0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        replace_settings(DISTILLATION, changes, "setting of training called")


def test_assignments_name_their_option():
    assert assignments(["a=1", "b = x"], "--train-set") == {"a": "1", "b": "x"}
    with pytest.raises(BadInput, match=r"--train-set 'a' has no '='"):
        assignments(["a"], "--train-set")


def test_one_path_is_not_taken_for_its_letters():
    assert one_or_more("net.pt") == ["net.pt"]
    assert one_or_more(("a.pt", "b.pt")) == ["a.pt", "b.pt"]
