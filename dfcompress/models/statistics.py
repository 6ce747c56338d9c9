"""The statistics of its training data that a network holds: mean and variance of a layer's input.

BatchNorms keep them, and so do foreign layers that normalise their input by running statistics. A `KnownStatistics`
layer is inserted wherever the model's owner released an activation record.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress import console
from dfcompress.errors import BadInput, listed
from dfcompress.models.batchnorms import EPS, eps_of, normalises_its_input
from dfcompress.models.classifier import Classifier

# Share of eps below which a variance counts as dead. At a thousandth of eps, a channel's standard deviation after
# BatchNorm is 3 % of its value without eps. The released EfficientNet-Lite0 has 130 variances of exactly 0; its next
# larger variance is 0.09 of eps.
DEAD = 1e-3
SHOWN = 3


class KnownStatistics(nn.Module):
    """An identity layer whose input had the mean `mean` and the variance `var`, each `(C,)`, on the training data.

    `axis` is the input's channel axis.
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
        """Return `features` unchanged."""
        return features


def statistics_layers(network: nn.Module) -> list[nn.Module]:
    """The layers whose input has known statistics, in order of definition."""
    return [module for module in network.modules() if _knows_its_input(module)]


def named_statistics_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers whose input has known statistics, by name, in order of definition."""
    known = set(statistics_layers(network))
    return {name: module for name, module in network.named_modules() if module in known}


def _knows_its_input(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return module.running_var is not None
    return isinstance(module, KnownStatistics) or normalises_its_input(module)


def unused_statistics(network: nn.Module) -> list[str]:
    """The names of the modules whose running statistics are not statistics of their input."""
    used = statistics_layers(network)
    return [
        name or "the network"
        for name, module in network.named_modules()
        if "running_var" in dict(module.named_buffers(recurse=False)) and module not in used
    ]


def dead_channels(network: nn.Module) -> int:
    """The number of channels, in layers with known statistics, whose variance on the training data is negligible: less
    than `DEAD` times the layer's eps.
    """
    layers = statistics_layers(network)
    return sum(int((layer.get_buffer("running_var") < DEAD * eps_of(layer)).sum()) for layer in layers)


def require_variances(network: nn.Module, where: str) -> None:
    """Raise `BadInput`, naming the layer, if a running variance is negative; `where` names the file or model."""
    for name, module in network.named_modules():
        variance = dict(module.named_buffers(recurse=False)).get("running_var")
        if variance is not None and (variance < 0).any():
            raise BadInput(
                f"{where}: {name or 'the network'} has a running variance of {float(variance.min()):g}.",
                "No variance is below 0: the file is damaged, or its tensors are another network's.",
            )


def why_no_statistics(network: nn.Module) -> str | None:
    """Why no images can be made from a network's statistics, or None if they can."""
    known = statistics_layers(network)
    if not known and (unused := unused_statistics(network)):
        return f"the running statistics of {listed(unused, SHOWN)} are not those of a BatchNorm's input"
    batchnorms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if not known and not batchnorms:
        return "it has no BatchNorm layer, so it carries no statistics of its training data"
    if not all(module.running_var is not None for module in batchnorms):
        return "its BatchNorm layers keep no running statistics"
    if not any(_was_trained(layer) for layer in known):
        return "its BatchNorm layers were never trained: running means are all 0 and variances all 1"
    return None


def _was_trained(layer: nn.Module) -> bool:
    return bool(layer.get_buffer("running_mean").any() or (layer.get_buffer("running_var") != 1).any())


def require_statistics(classifier: Classifier) -> None:
    """Raise `BadInput`, with the reason, if a classifier holds no statistics from which images can be made.

    A notice names the modules whose running statistics are not used.
    """
    why = why_no_statistics(classifier.network)
    if why:
        raise BadInput(
            f"No images can be made from {classifier.name}: {why}.",
            "Use a trained model with BatchNorm, or one whose owner released a record: --records FILE.",
        )
    if unused := unused_statistics(classifier.network):
        console.notice(
            f"The running statistics of {listed(unused, SHOWN)} are not those of a BatchNorm's input: not used."
        )
