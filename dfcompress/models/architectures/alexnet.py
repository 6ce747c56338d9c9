"""AlexNet with half the convolution filters, the student of Lopes et al. 2017; the full one is torchvision's."""

from __future__ import annotations

from torch import nn

from dfcompress.models.architecture import Architecture


class HalfAlexNet(nn.Sequential):
    """torchvision's AlexNet, its tensor names too, with 32-96-192-128-128 filters; images `(N, C, 224, 224)`."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(32, 96, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 192, 3, padding=1), nn.ReLU(),
            nn.Conv2d(192, 128, 3, padding=1), nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(128 * 36, 4096), nn.ReLU(),
            nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes),
        )  # fmt: skip


ARCHITECTURES = [Architecture("alexnet_half", HalfAlexNet, 224)]
