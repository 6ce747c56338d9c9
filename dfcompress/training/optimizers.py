"""The optimisers a student can be trained with, and who computes them: torch, or NVIDIA apex where it is proven here.

Every setting is passed, because defaults differ: apex's FusedAdam is AdamW without decay, its FusedLAMB cuts the
gradient's norm at 1, its FusedSGD skips bf16 parameters silently (so it is never taken).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dfcompress import console
from dfcompress.device import is_cuda
from dfcompress.errors import BadInput
from dfcompress.training import OptimizerBackend, OptimizerName
from dfcompress.training.apex_probe import State, probe

BETAS = {"adam": (0.9, 0.999), "adamw": (0.9, 0.999), "lamb": (0.9, 0.999), "novograd": (0.95, 0.98)}
EPS = {"adam": 1e-8, "adamw": 1e-8, "lamb": 1e-6, "novograd": 1e-8}


class _OfMoments(Optimizer):
    """An optimiser of two moments of the gradient, that steps all tensors of a group at once."""

    betas: tuple[float, float]
    eps: float

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        betas, eps = betas or self.betas, self.eps if eps is None else eps
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step with the gradients that are there; `closure` is not used."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                group["step"] += 1
                self._update(group, weights, [weight.grad for weight in weights])

    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        raise NotImplementedError

    def _kept(self, weights: list[Tensor], name: str) -> list[Tensor]:
        """A moment of every weight, 0 before the first step."""
        for weight in weights:
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros_like(weight)
        return [self.state[weight][name] for weight in weights]


class Lamb(_OfMoments):
    """LAMB (You et al. 2020): Adam whose step for each tensor is scaled by φ = ‖w‖ / ‖update‖.

    m = β₁m + (1 − β₁)g, v = β₂v + (1 − β₂)g², u = m̂ / (√v̂ + ε) + λw, w ← w − lr·φ·u.
    Tensors without weight decay λ are not scaled (φ = 1), as in the authors' code: those are biases and BatchNorms.
    """

    betas, eps = BETAS["lamb"], EPS["lamb"]

    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        means = self._kept(weights, "mean")
        squares = self._kept(weights, "square")
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        updates = torch._foreach_div(means, 1 - beta1 ** group["step"])
        roots = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2 ** group["step"]))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(updates, roots)
        if decay:
            torch._foreach_add_(updates, weights, alpha=decay)
            ratios = _trust_ratios(weights, updates)
            updates = tuple(update * ratio for update, ratio in zip(updates, ratios, strict=True))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


class NovoGrad(_OfMoments):
    """NovoGrad (Ginsburg et al. 2019): the second moment is one number a tensor, the norm of its gradient.

    v = β₂v + (1 − β₂)‖g‖² (first v = ‖g‖²), m = β₁m + (1 − β₁)g, w ← w − lr·(m̂ / (√v̂ + ε) + λw).
    As apex computes it, and unlike the paper: both moments are corrected for their bias, and the gradient is
    normalised, and decay added, after the mean is taken.
    """

    betas, eps = BETAS["novograd"], EPS["novograd"]

    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        squares = [norm.square() for norm in torch._foreach_norm(gradients)]
        for weight, square in zip(weights, squares, strict=True):
            self.state[weight].setdefault("square", square)
        moments = [self.state[weight]["square"] for weight in weights]
        torch._foreach_lerp_(moments, squares, 1 - beta2)
        means = self._kept(weights, "mean")
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        roots = torch._foreach_sqrt(torch._foreach_div(moments, 1 - beta2 ** group["step"]))
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(torch._foreach_div(means, 1 - beta1 ** group["step"]), roots)
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def _trust_ratios(weights: list[Tensor], updates: tuple[Tensor, ...]) -> list[Tensor]:
    """‖w‖ / ‖update‖, or 1 where either is 0."""
    pairs = zip(torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True)
    return [torch.where((own > 0) & (other > 0), own / other, 1.0) for own, other in pairs]


def choose_backend(name: OptimizerName, backend: OptimizerBackend, device: torch.device) -> Literal["torch", "apex"]:
    """Who computes: `auto` takes apex only where it has what torch has not, and is proven to work on this machine.

    That is fused LAMB and NovoGrad; students are trained in fp32 with bf16 products, where torch's own fused kernels
    serve SGD and Adam.
    Raises `BadInput` where `apex` is asked for and cannot be used, saying what to do in that very case.
    """
    if backend == "torch" or (backend == "auto" and (not is_cuda(device) or name not in ("lamb", "novograd"))):
        return "torch"
    if backend == "apex" and name == "sgd":
        raise BadInput("--optimizer sgd has no apex form: FusedSGD skips bf16 parameters silently.", "Leave apex out.")
    if not is_cuda(device):
        raise BadInput("--optimizer-backend apex computes on CUDA alone.", "Use auto, or a CUDA device.")
    found = probe(disagreement, device)
    if found.state is State.READY:
        return "apex"
    if backend == "apex":
        raise BadInput(f"--optimizer-backend apex: {found.found}.", found.remedy)
    if found.state is not State.ABSENT:
        console.notice(f"Not using apex: {found.found}. {found.remedy}")
    return "torch"


def make_optimizer(
    name: OptimizerName,
    groups: Iterable[dict[str, Any]],
    *,
    backend: Literal["torch", "apex"],
    lr: float,
    momentum: float,
    nesterov: bool = True,
) -> Optimizer:
    """The optimiser over parameter groups, each with its own `weight_decay`; `momentum` is SGD's, `nesterov` its form.

    fp32 parameters on CUDA are updated by torch's fused kernels.
    """
    groups = list(groups)
    if backend == "apex":
        return _apex(name, groups, lr)
    fused = all(is_cuda(weight.device) for group in groups for weight in group["params"])
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, fused=fused)
    settings: dict[str, Any] = {"lr": lr, "betas": BETAS[name], "eps": EPS[name]}
    if name in ("adam", "adamw"):
        family = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return family(groups, **settings, weight_decay=0.0, fused=fused)
    return (Lamb if name == "lamb" else NovoGrad)(groups, **settings)


def _apex(name: OptimizerName, groups: list[dict[str, Any]], lr: float) -> Optimizer:
    from apex import optimizers as apex

    settings: dict[str, Any] = {"lr": lr, "betas": BETAS[name], "eps": EPS[name], "weight_decay": 0.0}
    optimizer: Optimizer
    if name == "lamb":
        optimizer = apex.FusedLAMB(groups, **settings, max_grad_norm=math.inf)
    elif name == "novograd":
        optimizer = apex.FusedNovoGrad(groups, **settings)
    else:
        optimizer = apex.FusedAdam(groups, **settings, adam_w_mode=name == "adamw")
    optimizer.register_step_pre_hook(_match_layouts)
    return optimizer


def _match_layouts(optimizer: Optimizer, *_: Any) -> None:
    """Apex walks through memory and does not look at strides: a gradient laid out otherwise would be a wrong one."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and weight.grad.stride() != weight.stride():
                weight.grad = torch.empty_like(weight).copy_(weight.grad)


def disagreement(device: torch.device) -> float:
    """The largest difference, relative to the largest weight, between apex and torch after three steps."""
    names: tuple[OptimizerName, ...] = ("adam", "adamw", "lamb", "novograd")
    return max(_difference(name, device) for name in names)


def _difference(name: OptimizerName, device: torch.device) -> float:
    shapes, random = ((8, 4, 3, 3), (16,)), torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=random) for shape in shapes]
    steps = [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(3)]
    ends = []
    backends: tuple[Literal["torch", "apex"], ...] = ("torch", "apex")
    for backend in backends:
        weights = [nn.Parameter(start.clone().to(device)) for start in starts]
        groups = [{"params": [weight], "weight_decay": 0.1 * (weight.dim() > 1)} for weight in weights]
        optimizer = make_optimizer(name, groups, backend=backend, lr=0.01, momentum=0.0)
        for gradients in steps:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone().to(device)
            optimizer.step()
        ends.append(torch.cat([weight.detach().flatten() for weight in weights]))
    return float((ends[0] - ends[1]).abs().max() / ends[0].abs().max())
