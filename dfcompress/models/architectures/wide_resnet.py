"""Wide ResNets for small images (Zagoruyko & Komodakis 2016): pre-activation blocks, depth 6n+4, widened k times."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.models.architecture import Architecture


class WideBlock(nn.Module):
    """BatchNorm and ReLU before each 3×3 convolution; a 1×1 convolution where the width changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if channels != channels_in else None

    def forward(self, features: Tensor) -> Tensor:
        """Features `(N, channels, H / stride, W / stride)`."""
        active = F.relu(self.bn1(features))
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return residual + (features if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    """`blocks` blocks, the first with the stride."""

    def __init__(self, channels_in: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = WideBlock(channels_in, channels, stride)
        self.layer = nn.Sequential(first, *(WideBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, features: Tensor) -> Tensor:
        """Features of the stage."""
        features = self.layer(features)
        return features


class WideResNet(nn.Module):
    """Three stages of 16k, 32k and 64k channels."""

    def __init__(self, depth: int, width: int, classes: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.block1 = WideStage(16, 16 * width, blocks, 1)
        self.block2 = WideStage(16 * width, 32 * width, blocks, 2)
        self.block3 = WideStage(32 * width, 64 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)`."""
        features = self.block3(self.block2(self.block1(self.conv1(images))))
        logits: Tensor = self.fc(F.relu(self.bn1(features)).mean((2, 3)))
        return logits


ARCHITECTURES = [
    Architecture(name=f"wrn{depth}_{width}", make=partial(WideResNet, depth, width), size=32)
    for depth, width in ((40, 2), (40, 1), (16, 2), (16, 1), (28, 10))
]
