"""A convolution that pads by its input's size becomes torch's own for images of the card's size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.plain_layers import plain_kind
from dfcompress.models.static_padding import fix_padding


class Same(nn.Conv2d):
    """TensorFlow's "same" padding, as timm's `Conv2dSame` computes it."""

    def forward(self, input: Tensor) -> Tensor:
        pads = []
        for size, taps, step in reversed([*zip(input.shape[2:], self.kernel_size, self.stride, strict=True)]):
            missing = max((-(-size // step) - 1) * step + taps - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(input, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Doubling(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def classifier_of(layer: nn.Module, size: int) -> Classifier:
    torch.manual_seed(0)
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(network, ModelCard("test", 4, (3, size, size), (0.4,) * 3, (0.3,) * 3)).frozen()


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize(("taps", "stride"), [(3, 2), (5, 2), (1, 2), (3, 1), (2, 3)])
def test_the_answer_stays_and_the_layer_is_plain(size, taps, stride):
    classifier = classifier_of(Same(3, 4, taps, stride), size)
    images = torch.rand(2, 3, size, size)
    expected, names = classifier(images), list(classifier.state_dict())
    fixed = fix_padding(classifier)
    torch.testing.assert_close(classifier(images), expected)
    assert plain_kind(classifier.network[0]) is nn.Conv2d
    assert list(classifier.state_dict()) == names
    assert fixed in (["0"], [])  # Where nothing is missing it was plain before.


def test_what_computes_something_else_stays():
    classifier = classifier_of(Doubling(3, 4, 3), 8)
    assert fix_padding(classifier) == []
    assert type(classifier.network[0]) is Doubling
