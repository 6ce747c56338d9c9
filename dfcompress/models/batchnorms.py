"""Layers of other classes that compute a BatchNorm: their outputs decide, not their names.

Examples are torch's SyncBatchNorm, torchvision's FrozenBatchNorm2d, and modules that call `F.batch_norm` on their own
buffers, with or without modules after it (timm's FrozenBatchNormAct2d).
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
EPS = 1e-5  # torch's default, for layers without an `eps`.
_CLOSE = 1e-4  # Greatest difference, as a share of a channel's largest output; rounding differs by 1e-6 of it.


class BatchNormThen(_BatchNorm):
    """A BatchNorm for inputs of any rank that passes its normalised input through its children, one after the other."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept inputs of any rank."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise features `(N, C, ...)` and pass them through the children."""
        features = super().forward(input)
        for child in self.children():
            features = child(features)
        return features


@torch.no_grad()
def plain_batchnorms(classifier: Classifier) -> None:
    """Replace every layer that computes a BatchNorm in evaluation mode by an ordinary one, in place.

    The new layer has the same tensors under the same names, so that all later code treats it as a BatchNorm. One pass
    of `classifier` shows the rank of each layer's input.
    """
    named = dict(classifier.network.named_modules(remove_duplicate=False))
    ranks = _ranks(classifier)
    plain = {module: made for module, rank in ranks.items() if (made := _as_plain(module, rank)) is not None}
    for name, module in named.items():
        if module in plain and name:
            classifier.network.set_submodule(name, plain[module])


def normalises_its_input(module: nn.Module) -> bool:
    """Whether a module normalises its input by its running statistics, whatever it computes afterwards.

    Then the output stays the same if input and running mean are shifted by the same amount, and changes if only the
    running mean is shifted.
    False for InstanceNorms: they keep averages over images, which are not the variance over all images.
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
    """The number that a layer with known statistics adds to a variance before dividing by its root."""
    eps = getattr(layer, "eps", EPS)
    return float(eps) if isinstance(eps, int | float) else EPS


def _running_statistics(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance `(C,)` of a module that has both as its own buffers, else (None, None)."""
    buffers = dict(module.named_buffers(recurse=False))
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if mean is None or var is None or mean.dim() != 1 or mean.shape != var.shape:
        return None, None
    return mean, var


def _has_only_batchnorms_tensors(module: nn.Module) -> bool:
    mean, _ = _running_statistics(module)
    if mean is None or type(module) in (*BATCHNORMS, BatchNormThen) or isinstance(module, _InstanceNorm):
        return False
    # A BatchNorm with children needs no replacement: `after_normalising` handles it.
    if is_altered(module) or (isinstance(module, _BatchNorm) and [*module.children()]):
        return False
    tensors = _own_tensors(module)
    if not tensors.keys() <= {*NORMALISING, COUNTER} or ("weight" in tensors) != ("bias" in tensors):
        return False
    return all(tensor.shape == mean.shape for name, tensor in tensors.items() if name != COUNTER)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors by name, without its children's."""
    names = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


def _ranks(classifier: Classifier) -> dict[nn.Module, int]:
    """The rank of the input of each candidate that runs."""
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
    """The BatchNorm, with the children of `module`, that has the same output as `module`; None if there is none."""
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
    # Also tried with small variances and weights of 1: a large variance hides a wrong eps, a weight of 0 everything.
    tried: tuple[dict[str, Tensor], ...] = ({}, _bare(module, max(eps, EPS)))
    return plain if all(_answer_alike(plain, module, instead, rank) for instead in tried) else None


def _eps_to_try(module: nn.Module, rank: int) -> float:
    """The `eps` attribute of a module, else the eps computed from its output for input 1 and variance 0."""
    if hasattr(module, "eps"):
        return eps_of(module)
    bare = _bare(module, 0)
    answer = _answer(module, torch.ones_like(_sample(bare["running_mean"], bare["running_var"], rank)), **bare)
    if answer is None or not answer.median() > 0:
        return EPS
    found = float(answer.median()) ** -2
    return float(f"{found:.5g}")  # Rounded, because the measurement in fp32 has rounding errors.


def _bare(module: nn.Module, var: float) -> dict[str, Tensor]:
    """Replacements of a module's tensors: mean and bias 0, weights 1, and all variances `var`."""
    values = {"running_mean": 0, "running_var": var, "weight": 1, "bias": 0}
    tensors = _own_tensors(module)
    return {name: torch.full_like(tensors[name], value) for name, value in values.items() if name in tensors}


def _answer_alike(plain: nn.Module, module: nn.Module, instead: dict[str, Tensor], rank: int) -> bool:
    tensors = _own_tensors(module) | instead
    features = _sample(tensors["running_mean"], tensors["running_var"], rank)
    answer = _answer(plain, features, **instead)
    return answer is not None and _alike(answer, _answer(module, features, **instead))


def _sample(mean: Tensor, var: Tensor, rank: int) -> Tensor:
    """Features `(2, C, 3, ...)` spread around the running mean, the same in each call."""
    shape = (2, len(mean), *[3] * (rank - 2))
    places = torch.arange(torch.Size(shape).numel(), device=mean.device).view(shape)
    spread = (places * 0.618034) % 1 * 4 - 2  # Multiples of the golden ratio modulo 1 are spread evenly.
    return _per_channel(mean, rank) + spread * _per_channel((var.clamp_min(0) + 1).sqrt(), rank)


def _per_channel(values: Tensor, rank: int) -> Tensor:
    return values.view(1, -1, *[1] * (rank - 2))


@torch.no_grad()
def _answer(module: nn.Module, features: Tensor, **instead: Tensor) -> Tensor | None:
    """The output of a foreign module for features, with some buffers replaced; None if it raises."""
    with evaluating(module):
        try:
            answer = functional_call(module, instead, (features.clone(),))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
            return None
    return answer if isinstance(answer, Tensor) else None


def _alike(one: Tensor, other: Tensor | None) -> bool:
    """Whether all channels agree to rounding; each by its own scale, for dead channels have much larger outputs."""
    if other is None or one.shape != other.shape or one.dim() < 2:
        return False
    loudest = [0, *range(2, one.dim())]
    return bool(((one - other).abs().amax(loudest) <= _CLOSE * one.abs().amax(loudest)).all())
