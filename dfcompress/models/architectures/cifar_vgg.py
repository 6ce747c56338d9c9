"""VGG with BatchNorm for 32×32 images: the convolutions of Simonyan & Zisserman 2014 and one linear layer."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from dfcompress.models.architecture import Architecture

LAYERS: dict[int, tuple[int | str, ...]] = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
}


class CifarVGG(nn.Module):
    """3×3 convolutions, each with BatchNorm and ReLU; "M" is a 2×2 max-pool."""

    def __init__(self, depth: int, classes: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = channels
        for layer in LAYERS[depth]:
            if isinstance(layer, int):
                layers += [nn.Conv2d(width, layer, 3, padding=1), nn.BatchNorm2d(layer), nn.ReLU()]
                width = layer
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)`."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


ARCHITECTURES = [Architecture(name=f"cifar_vgg{depth}_bn", make=partial(CifarVGG, depth), size=32) for depth in LAYERS]
