"""What a network remembers of its training data: statistics of what goes into a layer.

BatchNorms remember them by themselves; a `KnownStatistics` is put where the model's owner recorded them.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.errors import BadInput
from dfcompress.models.classifier import Classifier


class KnownStatistics(nn.Module):
    """Passes its input on; what goes through it had this mean and variance `(C,)` on the training data.

    The channels are `axis` of the input.
    """

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
