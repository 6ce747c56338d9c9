"""Noise, and images under attack, against what they are by definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfcompress.data.batches import UNLABELLED
from dfcompress.errors import BadInput
from dfcompress.evaluation.probes import attacked, noise
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier

CARD = ModelCard("linear", 2, (1, 1, 3), (0.5,), (0.25,))


@pytest.fixture
def linear() -> Classifier:
    """Class 1 where the first pixel is brighter than the second; the third counts for nothing."""
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[-100.0, 100.0, 0.0], [100.0, -100.0, 0.0]])
    return Classifier(nn.Sequential(nn.Flatten(), layer), CARD).frozen()


def test_noise_is_normal_in_the_space_that_the_network_sees_and_the_same_each_time(linear):
    batches = [images for images, _ in noise(linear, 2500, 1000)]
    seen = linear.normalise(torch.cat(batches))
    assert [len(images) for images in batches] == [1000, 1000, 500]
    assert float(seen.mean()) == pytest.approx(0, abs=0.03)
    assert float(seen.std()) == pytest.approx(1, abs=0.03)
    assert torch.equal(batches[0], next(noise(linear, 2500, 1000))[0])


def test_an_attack_moves_each_pixel_by_epsilon_deviations_towards_a_wrong_answer(linear):
    images = torch.tensor([[0.5, 0.3, 0.5], [0.99, 0.0, 0.2]]).view(2, 1, 1, 3)  # Logits are up to 792 apart.
    labels = torch.tensor([0, 1])
    ((moved, given),) = attacked(linear, [(images, labels)], 0.1)
    step = 0.1 * 0.25
    expected = torch.tensor([[0.5 + step, 0.3 - step, 0.5], [0.99 - step, 0.0 + step, 0.2]])
    assert torch.equal(given, labels)
    assert torch.allclose(moved.flatten(1), expected)
    bright = torch.tensor([[1.0, 0.0, 1.0]]).view(1, 1, 1, 3)
    assert torch.equal(next(attacked(linear, [(bright, torch.tensor([0]))], 0.1))[0], bright)  # In [0, 1].


def test_without_labels_an_attack_leads_away_from_the_answer(linear):
    images = torch.tensor([[0.5, 0.3, 0.5]]).view(1, 1, 1, 3)
    attacks = [next(attacked(linear, [(images, torch.tensor([label]))], 0.1))[0] for label in (1, UNLABELLED)]
    assert torch.equal(*attacks)


def test_a_network_without_a_gradient_is_refused(linear):
    class Rounded(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (images.flatten(1)[:, :2] > 0).float().detach()

    with pytest.raises(BadInput, match="no gradient"):
        next(attacked(Classifier(Rounded(), CARD), [(torch.rand(1, 1, 1, 3), torch.tensor([0]))], 0.1))
