"""One small network for each layer that is out of the ordinary, as factories: `--arch tests/odd_networks.py:prelu`.

All take `(N, 3, 16, 16)` and have 4 classes; `NETWORKS` has them by name. `trained(name)` has BatchNorm statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import DenseNet
from torchvision.ops import FrozenBatchNorm2d

CLASSES, SIZE = 4, (3, 16, 16)


class Net(nn.Module):
    """Two convolutions with BatchNorm, and what is to be tried between them and behind them."""

    def __init__(
        self,
        between: nn.Module | None = None,
        *,
        behind: nn.Module | None = None,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act: Callable[[], nn.Module] = nn.ReLU,
        head: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), act())
        self.between = between or nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8), act())
        self.head = head(8, CLASSES)
        self.behind = behind or nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        return self.body(self.between(self.stem(images))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.behind(self.head(self.features(images)))


class Tokens(nn.Module):
    """Lets a module see `(N, positions, channels)`, and adds what it gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).transpose(1, 2)
        return features + self.module(tokens).transpose(1, 2).unflatten(2, features.shape[2:])


class RowsOfTokens(nn.Module):
    """A linear layer and a BatchNorm of one dimension that see every token as a row, as LeViT's do."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.mix(tokens)
        return self.norm(mixed.flatten(0, 1)).reshape_as(mixed)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention`, whose own linear layer is used and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attention(query=tokens, key=tokens, value=tokens, need_weights=False)[0]


class Sequence(nn.Module):
    """A convolution and a BatchNorm of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.conv(features.flatten(2))).unflatten(2, features.shape[2:])


class Auxiliary(Net):
    """Answers with a pair while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.features(images)
        return (self.head(features), self.auxiliary(features)) if self.training else self.head(features)


class HeadFirst(Net):
    """The head is defined before the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        stem, body = self.stem, self.body
        del self.stem, self.body
        self.stem, self.body = stem, body


class Blurred(Net):
    """A four-dimensional buffer at the root, as a blur kernel is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.full((8, 1, 3, 3), 1 / 9))

    def forward(self, images: Tensor) -> Tensor:
        blurred = F.conv2d(self.stem(images), self.kernel, padding=1, groups=8)
        return self.head(self.body(blurred).mean((2, 3)))


class Spare(Net):
    """A layer that is defined and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(50, 50)


class Scattered(nn.Module):
    """Adds features into an fp32 tensor: an operation that takes no mixture of types and is unknown to autocast."""

    def forward(self, features: Tensor) -> Tensor:
        whole = torch.zeros(features.shape, device=features.device)
        return whole.index_add(1, torch.arange(features.shape[1], device=features.device), features)


class InPlaceBlock(nn.Module):
    """Begins with an activation that writes into the block's input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.SiLU(inplace=True), nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def _normalised_weights(normalise: Callable[[nn.Module], nn.Module]) -> Net:
    network = Net(nn.Conv2d(8, 8, 3, padding=1))
    network.between = normalise(network.between)
    return network


def plain() -> nn.Module:
    return Net()


def attention() -> nn.Module:
    return Net(Tokens(SelfAttention()))


def transformer() -> nn.Module:
    return Net(Tokens(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))


def rows_of_tokens() -> nn.Module:
    return Net(Tokens(RowsOfTokens()))


def conv1d() -> nn.Module:
    return Net(Sequence())


def deconv() -> nn.Module:
    return Net(nn.ConvTranspose2d(8, 8, 4, 2, 1))


def prelu() -> nn.Module:
    return Net(act=lambda: nn.PReLU(8))


def weight_norm() -> nn.Module:
    return _normalised_weights(nn.utils.parametrizations.weight_norm)


def weight_norm_old() -> nn.Module:
    return _normalised_weights(nn.utils.weight_norm)


def spectral_norm() -> nn.Module:
    return _normalised_weights(nn.utils.parametrizations.spectral_norm)


def spectral_norm_old() -> nn.Module:
    return _normalised_weights(nn.utils.spectral_norm)


def auxiliary() -> nn.Module:
    return Auxiliary()


def dropout() -> nn.Module:
    return Net(nn.Dropout2d(0.25), head=lambda ins, outs: nn.Sequential(nn.Dropout(0.5), nn.Linear(ins, outs)))


def densenet() -> nn.Module:
    """torchvision's, with two layers in each of two blocks: BatchNorms that see several layers' outputs."""
    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=CLASSES)


def in_place() -> nn.Module:
    return Net(
        InPlaceBlock(),
        act=nn.Identity,
        head=lambda ins, outs: nn.Sequential(nn.Linear(ins, 8), nn.ReLU(inplace=True), nn.Linear(8, outs)),
    )


def frozen_batchnorm() -> nn.Module:
    return Net(norm=FrozenBatchNorm2d)


def sync_batchnorm() -> nn.Module:
    return Net(norm=nn.SyncBatchNorm)


def timm_subclasses() -> nn.Module:
    from timm.layers import BatchNormAct2d, Conv2dSame, Linear

    return Net(Conv2dSame(8, 8, 3, stride=2), norm=BatchNormAct2d, act=nn.Identity, head=Linear)


def scaled_weights() -> nn.Module:
    from timm.layers import ScaledStdConv2d

    return Net(ScaledStdConv2d(8, 8, 3))


def relu6() -> nn.Module:
    return Net(act=nn.ReLU6)


def softmax() -> nn.Module:
    return Net(behind=nn.Softmax(1))


def head_first() -> nn.Module:
    return HeadFirst()


def head_without_bias() -> nn.Module:
    return Net(head=partial(nn.Linear, bias=False))


def root_buffer() -> nn.Module:
    return Blurred()


def spare() -> nn.Module:
    return Spare()


def scattered() -> nn.Module:
    return Net(Scattered())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    factory.__name__: factory
    for factory in (
        plain,
        attention,
        transformer,
        rows_of_tokens,
        conv1d,
        deconv,
        prelu,
        weight_norm,
        weight_norm_old,
        spectral_norm,
        spectral_norm_old,
        auxiliary,
        dropout,
        densenet,
        in_place,
        frozen_batchnorm,
        sync_batchnorm,
        timm_subclasses,
        scaled_weights,
        relu6,
        softmax,
        head_first,
        head_without_bias,
        root_buffer,
        spare,
        scattered,
    )
}


def trained(name: str) -> nn.Module:
    """The network after some batches of noise in training mode, so that its BatchNorms know statistics; evaluating."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    return settled(network, SIZE)


def settled(network: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Let BatchNorms of any kind see noise of `size`, half of it brighter; evaluation mode afterwards."""
    statistics = {each: each.register_forward_pre_hook(_remember) for each in network.modules() if _is_frozen(each)}
    with torch.no_grad():
        for brightness in (0.0, 0.5) * 5:
            network.train()(torch.randn(8, *size) + brightness)
    for hook in statistics.values():
        hook.remove()
    return network.eval()


def _is_frozen(module: nn.Module) -> bool:
    return isinstance(module, FrozenBatchNorm2d)


def _remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """What a BatchNorm would have remembered before it was frozen."""
    variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
    module.running_mean.lerp_(mean, 0.3)
    module.running_var.lerp_(variance, 0.3)
