"""Layers that are BatchNorms in all but their class: what they answer decides, not what they are called.

Among them are torch's SyncBatchNorm, torchvision's FrozenBatchNorm2d, and modules that call `F.batch_norm` on buffers
of their own, with or without modules behind it (timm's FrozenBatchNormAct2d).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dfcompress.models.classifier import Classifier, evaluating, pass_once
from dfcompress.models.hooks import hooked_inputs
from dfcompress.models.plain_layers import BATCHNORMS, COUNTER, NORMALISING, is_altered

OF_RANK: dict[int, type[_BatchNorm]] = dict(enumerate((BATCHNORMS[0], *BATCHNORMS), start=2))
EPS = 1e-5  # torch's, for layers that state none.
_CLOSE = 1e-4  # Of a channel's largest output; rounding is 1e-6 of it.


class BatchNormThen(_BatchNorm):
    """A BatchNorm over any number of dimensions that hands what it has normalised to its children, one by one."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Its place decides."""

    def forward(self, input: Tensor) -> Tensor:
        """Features `(N, C, ...)`."""
        features = super().forward(input)
        for child in self.children():
            features = child(features)
        return features


@torch.no_grad()
def plain_batchnorms(classifier: Classifier) -> None:
    """Put an ordinary BatchNorm with the same tensors under the same names in the place of every layer that answers
    just as one does, in evaluation mode; so all that is done to BatchNorms is done to them.

    One pass of `classifier` tells over how many dimensions each of them works.
    """
    named = dict(classifier.network.named_modules(remove_duplicate=False))
    ranks = _ranks(classifier)
    plain = {module: made for module, rank in ranks.items() if (made := _as_plain(module, rank)) is not None}
    for name, module in named.items():
        if module in plain and name:
            classifier.network.set_submodule(name, plain[module])


def normalises_its_input(module: nn.Module) -> bool:
    """Whether a module's running statistics are those of its own input, whatever it does afterwards: then an input and
    a running mean that are both moved by as much give the same output, and one of them alone does not.

    InstanceNorms keep averages over images, which are not the variance over all of them.
    """
    mean, var = _running_statistics(module)
    if mean is None or var is None or isinstance(module, _InstanceNorm):
        return False
    moved = (var.clamp_min(0) + 1).sqrt()
    for rank in (4, 3, 2):
        features = _sample(mean, var, rank)
        still = _answer(module, features)
        both = _answer(module, features + _per_channel(moved, rank), running_mean=mean + moved)
        alone = _answer(module, features, running_mean=mean + moved)
        if still is not None and _alike(still, both):
            return not _alike(still, alone)
    return False


def eps_of(layer: nn.Module) -> float:
    """What a layer with known statistics adds to a variance before it divides by it."""
    eps = getattr(layer, "eps", EPS)
    return float(eps) if isinstance(eps, int | float) else EPS


def _running_statistics(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance `(C,)` where a module itself keeps both."""
    buffers = dict(module.named_buffers(recurse=False))
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if mean is None or var is None or mean.dim() != 1 or mean.shape != var.shape:
        return None, None
    return mean, var


def _has_only_batchnorms_tensors(module: nn.Module) -> bool:
    mean, _ = _running_statistics(module)
    if mean is None or type(module) in (*BATCHNORMS, BatchNormThen) or isinstance(module, _InstanceNorm):
        return False
    # A BatchNorm with children is understood as it is.
    if is_altered(module) or (isinstance(module, _BatchNorm) and [*module.children()]):
        return False
    tensors = _own_tensors(module)
    if not tensors.keys() <= {*NORMALISING, COUNTER} or ("weight" in tensors) != ("bias" in tensors):
        return False
    return all(tensor.shape == mean.shape for name, tensor in tensors.items() if name != COUNTER)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors by name, its children's left out."""
    names = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


def _ranks(classifier: Classifier) -> dict[nn.Module, int]:
    """How many dimensions the input of each candidate has that runs."""
    modules = dict(classifier.network.named_modules())
    candidates = [name for name, module in modules.items() if _has_only_batchnorms_tensors(module)]
    found: dict[nn.Module, int] = {}

    def note(name: str, features: object) -> None:
        if isinstance(features, Tensor):
            found[modules[name]] = features.dim()

    if candidates:
        with hooked_inputs(classifier.network, candidates, note):
            pass_once(classifier)
    return found


def _as_plain(module: nn.Module, rank: int) -> nn.Module | None:
    """The BatchNorm that answers as `module` does, children and all, or None where there is none."""
    if rank not in OF_RANK:
        return None
    tensors, children = _own_tensors(module), dict(module.named_children())
    eps = _eps_to_try(module, rank)
    kind = BatchNormThen if children else OF_RANK[rank]
    plain = kind(len(tensors["running_mean"]), eps=eps, affine="weight" in tensors)
    plain.momentum = getattr(module, "momentum", plain.momentum)
    plain.load_state_dict({**plain.state_dict(), **tensors})
    plain.to(tensors["running_mean"].device).train(module.training)
    plain.requires_grad_(any(parameter.requires_grad for parameter in module.parameters(recurse=False)))
    for name, child in children.items():
        plain.add_module(name, child)
    # A wrong eps hides behind a large variance, and anything behind a weight of 0.
    tried: tuple[dict[str, Tensor], ...] = ({}, _bare(module, max(eps, EPS)))
    return plain if all(_answer_alike(plain, module, instead, rank) for instead in tried) else None


def _eps_to_try(module: nn.Module, rank: int) -> float:
    """The eps that a module states, or else the one that shows where it divides 1 by a variance of 0."""
    if hasattr(module, "eps"):
        return eps_of(module)
    bare = _bare(module, 0)
    answer = _answer(module, torch.ones_like(_sample(bare["running_mean"], bare["running_var"], rank)), **bare)
    if answer is None or not answer.median() > 0:
        return EPS
    found = float(answer.median()) ** -2
    return float(f"{found:.5g}")  # Measured in fp32, whose rounding is not to be kept.


def _bare(module: nn.Module, var: float) -> dict[str, Tensor]:
    """A module's tensors where mean and bias are 0, weights 1, and all variances `var`."""
    values = {"running_mean": 0, "running_var": var, "weight": 1, "bias": 0}
    tensors = _own_tensors(module)
    return {name: torch.full_like(tensors[name], value) for name, value in values.items() if name in tensors}


def _answer_alike(plain: nn.Module, module: nn.Module, instead: dict[str, Tensor], rank: int) -> bool:
    tensors = _own_tensors(module) | instead
    features = _sample(tensors["running_mean"], tensors["running_var"], rank)
    answer = _answer(plain, features, **instead)
    return answer is not None and _alike(answer, _answer(module, features, **instead))


def _sample(mean: Tensor, var: Tensor, rank: int) -> Tensor:
    """Features `(2, C, 3, ...)` of all sizes around the running mean, the same each time."""
    shape = (2, len(mean), *[3] * (rank - 2))
    places = torch.arange(torch.Size(shape).numel(), device=mean.device).view(shape)
    spread = (places * 0.618034) % 1 * 4 - 2  # Multiples of the golden ratio are spread evenly.
    return _per_channel(mean, rank) + spread * _per_channel((var.clamp_min(0) + 1).sqrt(), rank)


def _per_channel(values: Tensor, rank: int) -> Tensor:
    return values.view(1, -1, *[1] * (rank - 2))


@torch.no_grad()
def _answer(module: nn.Module, features: Tensor, **instead: Tensor) -> Tensor | None:
    """What a stranger's module makes of features, with some buffers replaced; None where it does not take them."""
    with evaluating(module):
        try:
            answer = functional_call(module, instead, (features.clone(),))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
            return None
    return answer if isinstance(answer, Tensor) else None


def _alike(one: Tensor, other: Tensor | None) -> bool:
    """Whether every channel is the same to rounding: a dead one is much louder than its neighbours."""
    if other is None or one.shape != other.shape or one.dim() < 2:
        return False
    loudest = [0, *range(2, one.dim())]
    return bool(((one - other).abs().amax(loudest) <= _CLOSE * one.abs().amax(loudest)).all())
