"""The MNIST networks of Hinton et al. 2015, as Lopes et al. 2017 use them: 784-1200-1200-10, and 784-800-800-10."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.models.architecture import Architecture


class HintonMLP(nn.Module):
    """Two hidden ReLU layers; dropout of 0.2 on the input and 0.5 on hidden layers in training (Lopes' code)."""

    def __init__(self, hidden: int, classes: int, channels: int) -> None:
        super().__init__()
        self.drop_input, self.drop1, self.drop2 = nn.Dropout(0.2), nn.Dropout(0.5), nn.Dropout(0.5)
        self.fc1 = nn.Linear(784 * channels, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, C, 28, 28)`."""
        features = self.drop_input(images.flatten(1))
        features = self.drop1(F.relu(self.fc1(features)))
        features = self.drop2(F.relu(self.fc2(features)))
        logits: Tensor = self.fc3(features)
        return logits


ARCHITECTURES = [
    Architecture(name=name, make=partial(HintonMLP, hidden), size=28, channels=1)
    for name, hidden in (("hinton_mlp", 1200), ("hinton_mlp_small", 800))
]
