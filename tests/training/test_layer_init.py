"""Students that are shallower forms of their teachers begin with the teachers' layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dfcompress.models.card import ModelCard
from dfcompress.training.layer_init import init_from_teacher
from dfcompress.training.student import make_student

CARD = ModelCard("cifar_resnet44", 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)


def network(name, seed=0):
    return make_student(name, CARD, seed=seed)[0]


def test_a_shallower_resnet_takes_the_first_the_last_and_the_middle_block():
    teacher, student = network("cifar_resnet44"), network("cifar_resnet20", seed=1)
    assert init_from_teacher(student, teacher)
    for block, theirs in ((0, 0), (1, 3), (2, 6)):
        name = "layer2.{}.conv2.weight"
        own, given = (
            student.network.get_parameter(name.format(block)),
            teacher.network.get_parameter(name.format(theirs)),
        )
        assert torch.equal(own, given)
    assert torch.equal(student.network.get_parameter("conv1.weight"), teacher.network.get_parameter("conv1.weight"))


@pytest.mark.parametrize(
    ("teacher", "student", "inherits"),
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
def test_only_a_student_of_the_teachers_form_inherits(teacher, student, inherits):
    assert init_from_teacher(network(student), network(teacher)) == inherits


def test_outputs_of_another_order_are_put_in_their_places():
    teacher, student = network("cifar_resnet20"), network("cifar_resnet20", seed=1)
    assert init_from_teacher(student, teacher, torch.arange(9, -1, -1))
    assert torch.equal(student.network.fc.weight.flip(0), teacher.network.fc.weight)


def test_a_deeper_student_inherits_nothing():
    assert not init_from_teacher(network("cifar_resnet44"), network("cifar_resnet20"), torch.arange(10))


def test_a_student_of_more_classes_takes_the_outputs_that_the_teacher_has():
    teacher, student = network("cifar_resnet20"), make_student("cifar_resnet20", replace(CARD, classes=13), seed=1)[0]
    before = student.network.fc.weight.detach().clone()
    assert not init_from_teacher(student, teacher)
    assert torch.equal(student.network.fc.weight, before)
    outputs = torch.arange(2, 12)
    assert init_from_teacher(student, teacher, outputs)
    assert torch.equal(student.network.fc.weight[2:12], teacher.network.fc.weight)
    assert torch.equal(student.network.fc.weight[[0, 1, 12]], before[[0, 1, 12]])
