"""Counts, agreement and their error, against hand values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfcompress.errors import DfcompressError
from dfcompress.evaluation import metrics
from dfcompress.evaluation.metrics import (
    Predictions,
    bn_divergence,
    calibration_error,
    observe,
    predict,
    share_correct,
    standard_error,
)
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier


class Scores(nn.Module):
    """Answers with the first pixels of the image as logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def classifier(classes: int = 6) -> Classifier:
    return Classifier(Scores(), ModelCard("scores", classes, (1, 1, classes), (0.0,), (1.0,)))


def images(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


LADDER = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_counts_of_the_k_best_classes():
    given = predict(classifier(), [(images(LADDER, LADDER), torch.tensor([5, 4])), (images(LADDER), torch.tensor([0]))])
    assert given.classes.tolist() == [[5, 4, 3, 2, 1]] * 3
    assert (given.correct(), given.correct(2), given.correct(5), len(given)) == (1, 2, 2, 3)


def test_agreement_is_the_share_of_equal_first_answers():
    labels = torch.zeros(4, dtype=torch.int64)
    first = Predictions(torch.tensor([[0, 1], [1, 0], [2, 0], [3, 0]]), labels)
    second = Predictions(torch.tensor([[0, 2], [1, 3], [2, 1], [0, 3]]), labels)
    assert first.agreement(second) == 0.75


def test_an_answer_that_is_no_number_stops():
    with pytest.raises(DfcompressError, match="NaN or infinity"):
        predict(classifier(2), [(images([0.0, float("nan")]), torch.tensor([0]))])


def test_answers_and_statistics_in_parts_are_those_of_the_whole(resnet20_file, monkeypatch):
    classifier = load(resnet20_file)
    shown = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [(shown[:16], torch.zeros(16)), (shown[16:], torch.zeros(8))]
    whole, divergence = predict(classifier, batches), bn_divergence(classifier, batches)
    monkeypatch.setattr(metrics, "images_a_pass", lambda classifier: 5)
    passed = []
    classifier.network.register_forward_pre_hook(lambda network, args: passed.append(len(args[0])))
    assert torch.equal(predict(classifier, batches).classes[:, 0], whole.classes[:, 0])
    assert passed[-6:] == [5, 5, 5, 1, 5, 3]
    assert bn_divergence(classifier, batches) == pytest.approx(divergence, rel=1e-5)
    seen = observe(classifier, batches, scores=True)
    assert torch.equal(seen.classes, whole.classes[:, 0])
    assert seen.divergence == pytest.approx(divergence, rel=1e-5)
    assert float(seen.soft.sum()) == pytest.approx(1)
    assert float(seen.hard.sum()) == pytest.approx(1)
    assert seen.confidences.shape == seen.scores.shape == (24,)


def test_the_training_mode_is_given_back():
    network = classifier().train()
    predict(network, [(images(LADDER), torch.tensor([5]))])
    assert network.training


def test_the_share_correct_is_over_all_images():
    class Three:
        class_names = None

        def __len__(self) -> int:
            return 3

        def batches(self, batch_size: int):
            yield images(LADDER, LADDER), torch.tensor([5, 5])
            yield images(LADDER), torch.tensor([0])

    assert share_correct(classifier(), Three()) == 2 / 3


def test_the_standard_error_near_92_percent_of_846_is_0_9_points():
    assert standard_error(776, 846) == pytest.approx(0.0095, abs=5e-5)


def test_the_calibration_error_weighs_each_bin_by_its_images():
    confidences = torch.tensor([0.95, 0.95, 0.95, 0.5, 1.0])
    right = torch.tensor([True, True, False, True, True])
    # (14/15, 1]: 4 images of mean confidence 0.9625, 3 right; (7/15, 8/15]: one.
    assert calibration_error(confidences, right) == pytest.approx(4 / 5 * (0.9625 - 0.75) + 1 / 5 * 0.5)


def test_without_statistics_there_is_no_divergence_and_no_score():
    seen = observe(classifier(), [(images(LADDER), torch.tensor([5]))], scores=True)
    assert (seen.divergence, seen.scores) == (None, None)
