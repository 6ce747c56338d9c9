"""LeNet-5 (LeCun et al. 1998) as Lopes et al. 2017 use it: ReLU, 2×2 max-pool, 32×32 input, and its half.

`lenet5_half` halves the convolutions only, as their released code does; `lenet5_bn` adds a BatchNorm after every
convolution and every hidden linear layer, and its half halves those too (both are ours).
"""

from __future__ import annotations

from functools import partial

from torch import nn

from dfcompress.models.architecture import Architecture


class LeNet5(nn.Sequential):
    """Two 5×5 convolutions without padding, then two hidden linear layers; images `(N, C, 32, 32)`."""

    def __init__(self, widths: tuple[int, int, int, int], batchnorm: bool, classes: int, channels: int) -> None:
        first, second, third, fourth = widths
        super().__init__()
        self._convolution("1", channels, first, batchnorm)
        self._convolution("2", first, second, batchnorm)
        self.add_module("flatten", nn.Flatten())
        self._linear("1", 25 * second, third, batchnorm)
        self._linear("2", third, fourth, batchnorm)
        self.add_module("fc3", nn.Linear(fourth, classes))

    def _convolution(self, number: str, channels_in: int, channels: int, batchnorm: bool) -> None:
        self.add_module(f"conv{number}", nn.Conv2d(channels_in, channels, 5, bias=not batchnorm))
        if batchnorm:
            self.add_module(f"bn{number}", nn.BatchNorm2d(channels))
        self.add_module(f"relu{number}", nn.ReLU())
        self.add_module(f"pool{number}", nn.MaxPool2d(2))

    def _linear(self, number: str, features_in: int, features: int, batchnorm: bool) -> None:
        self.add_module(f"fc{number}", nn.Linear(features_in, features, bias=not batchnorm))
        if batchnorm:
            self.add_module(f"fc_bn{number}", nn.BatchNorm1d(features))
        self.add_module(f"fc_relu{number}", nn.ReLU())


WIDTHS = {
    "lenet5": ((6, 16, 120, 84), False),
    "lenet5_half": ((3, 8, 120, 84), False),
    "lenet5_bn": ((6, 16, 120, 84), True),
    "lenet5_bn_half": ((3, 8, 60, 42), True),
}
ARCHITECTURES = [
    Architecture(name=name, make=partial(LeNet5, widths, batchnorm), size=32, channels=1)
    for name, (widths, batchnorm) in WIDTHS.items()
]
