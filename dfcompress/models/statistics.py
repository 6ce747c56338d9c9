"""What a network remembers of its training data: statistics of what goes into a layer.

BatchNorms remember them by themselves; a `KnownStatistics` is put where the model's owner recorded them.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier

EPS = 1e-5  # torch's BatchNorm, for layers that state none.
# At a thousandth of eps a channel's deviation behind BatchNorm is 3 % of what it would be without. The released
# EfficientNet-Lite0 has 130 variances of exactly 0, and its next is 0.09 of eps.
DEAD = 1e-3


class KnownStatistics(nn.Module):
    """Passes its input on; what goes through it had this mean and variance `(C,)` on the training data.

    The channels are `axis` of the input.
    """

    eps = EPS
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, mean: Tensor, var: Tensor, *, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)

    def forward(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features


def statistics_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose input has known statistics, in order of definition."""
    return [
        module
        for module in network.modules()
        if isinstance(module, KnownStatistics) or (isinstance(module, _BatchNorm) and module.running_var is not None)
    ]


def eps_of(layer: nn.Module) -> float:
    """What a layer with known statistics adds to a variance before it divides by it."""
    return float(getattr(layer, "eps", EPS))


def dead_channels(network: nn.Module) -> int:
    """How many channels of layers with known statistics hardly moved on the training data: their variance is lost in
    the layer's eps.
    """
    layers = statistics_layers(network)
    return sum(int((layer.get_buffer("running_var") < DEAD * eps_of(layer)).sum()) for layer in layers)


def require_variances(network: nn.Module, where: str) -> None:
    """Raise `BadInput`, naming the layer, where a running variance is negative; `where` says what holds it."""
    for name, module in network.named_modules():
        variance = dict(module.named_buffers(recurse=False)).get("running_var")
        if variance is not None and (variance < 0).any():
            raise BadInput(
                f"{where}: {name or 'the network'} has a running variance of {float(variance.min()):g}.",
                "No variance is below 0: the file is damaged, or its tensors are another network's.",
            )


def why_no_statistics(network: nn.Module) -> str | None:
    """Why nothing can be made from the statistics a network knows, or None where it can."""
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm | KnownStatistics)]
    if not layers:
        return "it has no BatchNorm layer, so it carries no statistics of its training data"
    known = statistics_layers(network)
    if len(known) < len(layers):
        return "its BatchNorm layers keep no running statistics"
    if not any(_was_trained(layer) for layer in known):
        return "its BatchNorm layers were never trained: running means are all 0 and variances all 1"
    return None


def _was_trained(layer: nn.Module) -> bool:
    return bool(layer.get_buffer("running_mean").any() or (layer.get_buffer("running_var") != 1).any())


def require_statistics(classifier: Classifier) -> None:
    """Raise `BadInput`, saying why, where a classifier knows no statistics to make images from."""
    why = why_no_statistics(classifier.network)
    if why:
        raise BadInput(
            f"No images can be made from {classifier.name}: {why}.",
            "Use a trained model with BatchNorm, or one whose owner released a record: --records FILE.",
        )
