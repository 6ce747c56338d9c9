"""Logit matching: terms equal to what is worked out by hand, and what is remembered of the teachers."""

from __future__ import annotations

import math

import pytest
import torch
from linear_teachers import BLOCKS, LOGITS, batch_of, images, teacher, values_of
from torch import nn

from dfcompress.machine.execution import Compute
from dfcompress.models.ood_score import OodScore
from dfcompress.training.class_map import ClassMap
from dfcompress.training.loop import PARTIAL, Trainer
from dfcompress.training.multi_teacher.logit_matching import LogitMatching
from dfcompress.training.settings import Training

EAGER = Compute(device="cpu", precision="fp32", compile="off")


def test_its_values_by_hand():
    found = values_of(LogitMatching([teacher(), teacher()], BLOCKS))
    # For teacher 1's (1, −1) and (−1, 1) the student has (1, 0) and (0.5, −1).
    assert found["logits/1"] == pytest.approx(((0 + 1) / 2 + (2.25 + 4) / 2) / 2)
    # For teacher 2's (−0.5, 0.5) and (2, −2) it has (0, 2) and (−1, 0).
    assert found["logits/2"] == pytest.approx(((0.25 + 2.25) / 2 + (9 + 4) / 2) / 2)
    share = LOGITS[0].softmax(0)[:2].sum()
    assert found["block/1"] == pytest.approx(-math.log(share), rel=1e-5)
    share = LOGITS[1].softmax(0)[1:].sum()
    assert found["block/2"] == pytest.approx(-math.log(share), rel=1e-5)
    assert (found["agreement/1"], found["agreement/2"]) == (1.0, 0.0)


def test_a_teachers_mean_logit_is_how_much_more_familiar_an_image_is_to_it():
    """Logits keep their differences; their means are ±16 times half the difference of the OOD scores, at most ±4."""
    teachers, shown = [remembering(0.0), remembering(0.2)], torch.randn(6, 1, 4, 4)
    matching, alone = LogitMatching(teachers, BLOCKS), [OodScore(each) for each in teachers]
    with matching.attached(teachers[0]), alone[0].attached(), alone[1].attached(), torch.no_grad():
        targets = matching.targets(batch_of(shown, torch.zeros(6)))
        scores = [each.taken() for each in alone]
        logits = [each(shown) for each in teachers]
    expected = (8 * (scores[1] - scores[0])).clamp(-4, 4)
    torch.testing.assert_close(targets[0].mean(1), expected)
    torch.testing.assert_close(targets[1].mean(1), -expected)
    assert (expected.abs() < 4).any()
    for target, own in zip(targets, logits, strict=True):
        torch.testing.assert_close(target - target.mean(1, keepdim=True), own - own.mean(1, keepdim=True))


def remembering(mean):
    """A teacher of two classes whose BatchNorm remembers that mean."""
    classifier = teacher()
    classifier.network.insert(0, nn.BatchNorm2d(1))
    classifier.network[0].running_mean.fill_(mean)
    classifier.network[0].running_var.fill_(0.9)
    return classifier.frozen()


def test_a_teacher_that_is_followed_worse_weighs_more():
    matching = LogitMatching([teacher(), teacher()], BLOCKS)
    before = matching.weights
    for _ in range(50):
        matching.update(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.9, 0.2]))
    after = matching.weights
    assert torch.equal(before[:2], torch.full((2,), 0.5))
    assert after[1] > 1.5 * after[0]
    assert after[:2].sum().item() == pytest.approx(1.0)


def test_what_is_remembered_of_the_teachers_survives_a_resume(tmp_path):
    blocks = ClassMap((torch.tensor([0, 1]), torch.tensor([2, 3])), 4)
    sets = images(1, (1, 4, 4)), images(2, (1, 4, 4))
    training = Training(steps=20, lr=0.1, batch_size=16)

    def trainer(folder):
        student, matching = teacher(classes=4, seed=5), LogitMatching([teacher(seed=1), teacher(seed=2)], blocks)
        return Trainer(student, matching, training, compute=EAGER, folder=folder)

    def fitted(folder):
        fitting = trainer(folder)
        fitting.fit(training.pool(*sets, seed=0))
        return fitting.student.state_dict()

    with trainer(tmp_path).ready(training.pool(*sets, seed=0)) as steps:
        for _ in range(7):
            steps.take()
        steps.save(tmp_path / PARTIAL)
    whole, resumed = fitted(None), fitted(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
