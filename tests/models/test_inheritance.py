"""Students that are shallower forms of their teachers begin with the teachers' layers."""

from __future__ import annotations

import pytest
import torch

from dfcompress.models.card import ModelCard
from dfcompress.models.inheritance import inherited
from dfcompress.models.student import make_student

CARD = ModelCard("cifar_resnet44", 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)


def network(name, seed=0):
    return make_student(name, CARD, seed=seed)[0]


def test_a_shallower_resnet_takes_the_first_the_last_and_the_middle_block():
    teacher, student = network("cifar_resnet44"), network("cifar_resnet20", seed=1)
    taken = inherited(student, teacher)
    assert set(taken) == set(student.network.state_dict())
    for block, theirs in ((0, 0), (1, 3), (2, 6)):
        name = "layer2.{}.conv2.weight"
        assert torch.equal(taken[name.format(block)], teacher.network.get_parameter(name.format(theirs)))
    assert torch.equal(taken["conv1.weight"], teacher.network.get_parameter("conv1.weight"))
    student.network.load_state_dict(taken)


@pytest.mark.parametrize(
    ("teacher", "student", "is_shallower"),
    [
        ("resnet34", "resnet18", True),
        ("wrn40_2", "wrn16_2", True),
        ("cifar_resnet44", "cifar_resnet44", False),
        ("cifar_resnet20", "cifar_resnet44", False),
        ("cifar_resnet44", "half:cifar_resnet44", False),
        ("cifar_resnet44", "resnet18", False),
        ("wrn40_2", "wrn16_1", False),
    ],
)
def test_only_a_shallower_form_of_the_teacher_inherits(teacher, student, is_shallower):
    assert (inherited(network(student), network(teacher)) is not None) == is_shallower
