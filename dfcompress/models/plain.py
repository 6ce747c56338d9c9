"""Replace the forms that weights have only for training by plain weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from dfcompress.models.classifier import evaluating


def make_plain(network: nn.Module) -> nn.Module:
    """Give the network plain weights, in place, and return it; its outputs in evaluation mode change by rounding only.

    Weight normalisation, spectral normalisation (both as hooks and as parametrizations), every other parametrization,
    and the masks of torch's pruning are replaced by the weights that they compute.
    """
    # Spectral normalisation takes a step of its power iteration at each use in training mode.
    with evaluating(network):
        for module in [*network.modules()]:
            for hook in [*_hooks(module)]:
                _remove(module, hook)
            if parametrize.is_parametrized(module):
                module.__class__ = _own_class(type(module))
                for name in list(module.parametrizations):  # type: ignore[arg-type]  # a ModuleDict
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return network


def _hooks(module: nn.Module) -> Iterator[object]:
    """The hooks that compute a weight of the module before each pass."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm | prune.BasePruningMethod):
            yield hook


def _own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A copy of a parametrized module's class.

    torch makes one class per parametrized module, which copies of the module share, and deletes the weight's property
    from the class when the parametrization is removed.
    """
    content = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, kind.__bases__, content)


def _remove(module: nn.Module, hook: object) -> None:
    if isinstance(hook, WeightNorm):
        remove_weight_norm(module, hook.name)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(module, hook.name)
        # torch's own removal leaves this hook, which requires `weight_orig` in every state dict.
        for key, wrapped in list(module._load_state_dict_pre_hooks.items()):
            if isinstance(getattr(wrapped, "hook", wrapped), SpectralNormLoadStateDictPreHook):
                del module._load_state_dict_pre_hooks[key]
    elif isinstance(hook, prune.BasePruningMethod):
        prune.remove(module, hook._tensor_name)
