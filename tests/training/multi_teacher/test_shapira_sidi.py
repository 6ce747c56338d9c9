"""Shapira and Sidi 2020: the loss and the training, beside what is written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_teachers import BLOCKS, LOGITS, images, teacher, values_of
from torch import nn

from dfcompress.data.pool import ImagePool
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.training.class_map import join_classes
from dfcompress.training.loop import PARTIAL, Trainer
from dfcompress.training.multi_teacher.shapira_sidi import ShapiraSidi, paper_training

EAGER = Compute(device="cpu", precision="fp32", compile="off")


def test_its_values_are_cross_entropy_with_the_own_teachers_best_class():
    blocks = ShapiraSidi([teacher(), teacher()], BLOCKS)
    found = values_of(blocks)
    assert found["block/1"] == pytest.approx(-LOGITS[0].log_softmax(0)[0].item(), rel=1e-5)
    assert found["block/2"] == pytest.approx(-LOGITS[1].log_softmax(0)[1].item(), rel=1e-5)
    assert (found["agreement/1"], found["agreement/2"]) == (1.0, 0.0)
    assert blocks.weights.tolist() == [1, 1, 0, 0]


def test_the_papers_training_is_plain_sgd_on_a_pass_of_each_teachers_images():
    """Momentum 0.9 without Nesterov, decay of all parameters, one BatchNorm pass a mini-batch, the norm cut at 0.5."""
    size, teachers = (1, 4, 4), [teacher(name=str(number), seed=number) for number in range(3)]
    sets = [images(number, size, 24) for number in range(3)]
    training = replace(paper_training(24, 3), batch_size=24, steps=10)

    def fresh():
        torch.manual_seed(9)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        return Classifier(network, ModelCard("tiny", 6, size, (0.5,), (0.25,)))

    student, plain = fresh(), fresh().train()
    pool = ImagePool(*sets, augmentation=training.augmentation, batch_size=24, seed=EAGER.seed)
    Trainer(student, ShapiraSidi(teachers, join_classes(teachers)), training, compute=EAGER).fit(pool)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (step // 2)
        loss = torch.zeros(())
        for number, shown in enumerate(pool.batch(step).images.split(8)):
            loss += nn.functional.cross_entropy(plain(shown), teachers[number](shown).argmax(1) + 2 * number)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    for (name, got), wanted in zip(student.state_dict().items(), plain.state_dict().values(), strict=True):
        assert (got - wanted).abs().max() < 1e-6, name


def test_the_papers_settings():
    training = paper_training(4096, 2)
    assert (training.steps, training.batch_size, training.lr) == (125 * 64, 128, 0.05)
    assert [training.rate(epoch * 64) for epoch in (0, 24, 25, 50)] == [0.05, 0.05, 0.025, 0.0125]
    assert training.augmentation == type(training.augmentation)()


def test_a_state_of_version_0_1_is_gone_on_with(tmp_path):
    """It called the module `own`, had no source, and for this method two more buffers and two more values of 0."""
    teachers = [teacher(seed=1), teacher(seed=2)]
    training = replace(paper_training(64, 2), steps=12)
    pool = training.pool(images(1, (1, 4, 4)), images(2, (1, 4, 4)), seed=0)

    def trainer(folder):
        blocks = ShapiraSidi(teachers, join_classes(teachers))
        return Trainer(teacher(classes=4, seed=5), blocks, training, compute=EAGER, folder=folder)

    whole, resumed = trainer(None), trainer(tmp_path)
    whole.fit(pool)
    with trainer(tmp_path).ready(pool) as steps:
        for _ in range(5):
            steps.take()
        steps.save(tmp_path / PARTIAL)
    state = torch.load(tmp_path / PARTIAL, weights_only=True)
    del state["source"]
    state["own"] = state.pop("module") | {"fixed": torch.zeros(6), "followed": torch.zeros(2)}
    state["values"] = torch.cat([torch.zeros(5, 2), state["values"]], 1)
    torch.save(state, tmp_path / PARTIAL)
    assert resumed.fit(pool).losses.keys() == {"block/1", "block/2", "agreement/1", "agreement/2"}
    for name, value in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], value), name
