"""The features that two networks are compared by."""

from __future__ import annotations

import torch

from dfcompress.models.card import ModelCard
from dfcompress.models.stages import StageOutputs, stages_of
from dfcompress.models.student import make_student

CARD = ModelCard("cifar_resnet50", 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)


def test_what_is_heard_of_a_bottleneck_is_of_the_stages_size():
    """Its blocks run one ReLU at several sizes."""
    classifier, _ = make_student("cifar_resnet50", CARD, seed=0)
    stages = stages_of(classifier)
    assert [size[0] for size in stages] == [32, 16, 8, 4]
    modules = [stage.module for stage in stages.values()]
    with StageOutputs(classifier.network, modules) as heard, torch.no_grad():
        classifier(torch.rand(1, *CARD.input_size))
        outputs = heard.taken()
    for (size, stage), output in zip(stages.items(), outputs, strict=True):
        assert output.shape[1:] == (stage.channels, *size)
