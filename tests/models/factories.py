"""Networks of users, as `--arch file.py:factory` names them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dfcompress.models.architectures.lenet import WIDTHS, LeNet5

SPEC = f"{__file__}:"


class Net(nn.Module):
    """Two convolutions with BatchNorm and a linear layer, for images of three channels; `last` changes the logits."""

    def __init__(self, classes: int = 10, last: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)
        self.last = last or nn.Identity()

    def logits(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images))))))
        return self.fc(features.mean((2, 3)))

    def forward(self, images: Tensor):
        return self.last(self.logits(images))


class HeadFirst(Net):
    """The last layer is defined before the last convolution, and a kernel of one channel before the first."""

    def __init__(self) -> None:
        super().__init__(7)
        conv2 = self.conv2
        del self.conv2
        self.conv2 = conv2
        self.register_buffer("blur", torch.ones(3, 1, 3, 3) / 9)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.conv2d(images, self.blur, padding=1, groups=3))


class Softmax(Net):
    """Ends in a softmax that is no module."""

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images).softmax(1)


class SoftmaxInEvaluation(Net):
    """Ends in softmax but for training."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.logits(images)
        return logits if self.training else F.softmax(logits, 1)


class Keyed(Net):
    """Answers with a dictionary."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(self.names, self.logits(images))


class KeyedSoftmax(Net):
    """Answers with a dictionary whose logits are probabilities."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits(images).softmax(1)}


class Labels(Net):
    """Several labels per image: a sigmoid that is no module, and a change of form after it."""

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images).sigmoid()[:, :, None].squeeze(2).clamp(1e-6, 1 - 1e-6)


class Restless(Net):
    """Drops features in evaluation mode, too."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.dropout(self.bn1(self.conv1(images)).mean((2, 3)), 0.2))


class Pair(Net):
    """Answers with two tensors."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits(images), images


def seen(network: nn.Module) -> nn.Module:
    """The network itself, whose BatchNorms have seen something."""
    with torch.no_grad():
        for _ in range(10):
            network.train()(torch.rand(8, 3, 16, 16))
    return network.eval()


def written(network: nn.Module, folder: Path) -> Path:
    torch.save(network.state_dict(), folder / "net.pt")
    return folder / "net.pt"


def _with(change, network: Net | None = None) -> Net:
    network = network or Net()
    network.conv2 = change(network.conv2)
    return network


def plain() -> Net:
    return Net()


def weight_norm_hook() -> Net:
    return _with(weight_norm)


def weight_norm_parametrization() -> Net:
    return _with(parametrizations.weight_norm)


def spectral_norm_hook() -> Net:
    return _with(spectral_norm)


def spectral_norm_parametrization() -> Net:
    return _with(parametrizations.spectral_norm)


def orthogonal() -> Net:
    network = Net()
    network.fc = parametrizations.orthogonal(network.fc)
    return network


def pruned() -> Net:
    return _with(lambda layer: prune.l1_unstructured(layer, "weight", 0.5))


def head_first() -> Net:
    return HeadFirst()


def sized(num_classes: int = 10) -> Net:
    return Net(num_classes)


def handing_on(**options) -> Net:
    return sized(**options)


class Within(nn.Module):
    """A network inside another module, under the names that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"module": Net()})

    def forward(self, images: Tensor) -> Tensor:
        return self.model["module"](images)


def within() -> nn.Module:
    return seen(Within())


def softmax() -> Net:
    return Softmax()


def softmax_in_evaluation() -> Net:
    return SoftmaxInEvaluation()


def softmax_module() -> Net:
    return Net(last=nn.Softmax(1))


def log_softmax() -> Net:
    return Net(last=nn.LogSoftmax(1))


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(Softmax())


def sigmoid() -> Net:
    return Net(1, nn.Sigmoid())


def labels() -> Net:
    return Labels()


def labels_module() -> Net:
    return Net(last=nn.Sigmoid())


def restless() -> Net:
    return Restless()


def softmax_field() -> Net:
    return KeyedSoftmax()


def one() -> Net:
    return Net(1)


def logits_field() -> Net:
    return Keyed("logits", "features")


def other_fields() -> Net:
    return Keyed("out", "aux")


def pair() -> Net:
    return Pair()


class LeNetSoftmax(LeNet5):
    """The network of the demonstration's teacher, ending in softmax."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(1)


def demo_softmax() -> nn.Module:
    return LeNetSoftmax(*WIDTHS["lenet5_bn"], 10, 1)


def tiny_vit() -> nn.Module:
    """timm's vision transformer for images of 64 pixels: 16 patches, two blocks, 10 classes."""
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=10)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10))
