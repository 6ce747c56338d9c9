"""The CIFAR-10 ResNets of He et al. 2015, section 4.2: 6n+2 layers, option-A shortcuts (no parameters)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.models.architecture import Architecture, Naming
from dfcompress.models.card import IMAGENET_MEAN, IMAGENET_STD


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut that subsamples and pads the missing channels with zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        """Features `(N, channels, H / stride, W / stride)`."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(features)))))
        shortcut = features[:, :, :: self.stride, :: self.stride]
        # Taken from the layers, because torch.fx cannot trace a branch that depends on a tensor's shape.
        if missing := _convolution(self.conv2).out_channels - _convolution(self.conv1).in_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, missing // 2, missing - missing // 2))
        return F.relu(residual + shortcut)


def _convolution(layer: nn.Module) -> nn.Conv2d:
    """The convolution itself, or the one inside a Sequential that adds recorded statistics after it."""
    inner = layer[0] if isinstance(layer, nn.Sequential) else layer
    assert isinstance(inner, nn.Conv2d)
    return inner


class CifarResNet(nn.Module):
    """`blocks` residual blocks in each of three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)`."""
        features = F.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


# The most common released checkpoints, of akamaster/pytorch_resnet_cifar10, are trained with ImageNet's mean and std.
RELEASED = Naming(renames=((r"^linear\.", "fc."),), mean=IMAGENET_MEAN, std=IMAGENET_STD)

ARCHITECTURES = [
    Architecture(
        name=f"cifar_resnet{depth}",
        make=partial(CifarResNet, (depth - 2) // 6),
        size=32,
        tensors=5 * (depth - 1) + 2,
        namings=(Naming(), RELEASED),
    )
    for depth in (20, 32, 44, 56, 110)
]
