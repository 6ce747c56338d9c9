"""The optimizers of students, computed by torch, or by NVIDIA apex where a test on this machine shows that it works.

Every setting is passed, because the defaults of apex differ: its FusedAdam is AdamW without decay, and its FusedLAMB
clips the gradient's norm at 1. Its FusedSGD skips bf16 parameters silently, so it is never used.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dfcompress import console
from dfcompress.errors import BadInput, first_line
from dfcompress.machine.device import has_cuda, is_cuda
from dfcompress.training import OptimizerBackend, OptimizerName

FUSED = get_args(OptimizerName)[1:]  # The optimizers that apex can compute: all but SGD.

BETAS = (0.9, 0.999)
EPS = {"adam": 1e-8, "adamw": 1e-8, "lamb": 1e-6}

ROUNDING = 1e-5  # Largest relative difference after three steps at which apex and torch count as equal.
# The errors that apex raises if it was built without extensions, or for another torch, CUDA or GPU.
APEX_FAILURES = (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError)
BUILD = (
    "Build it from NVIDIA's repository with its C++ and CUDA extensions, in this environment (--no-build-isolation) "
    "and for this GPU (TORCH_CUDA_ARCH_LIST), or use --optimizer-backend torch."
)


class Lamb(Optimizer):
    """LAMB (You et al. 2020): Adam whose step for each tensor is scaled by φ = ‖w‖ / ‖u‖; computed for all tensors of a
    group at once.

    m = β₁m + (1 − β₁)g, v = β₂v + (1 − β₂)g², u = m̂ / (√v̂ + ε) + λw, w ← w − lr·φ·u.
    Tensors without weight decay λ (by default biases and BatchNorms) are not scaled (φ = 1), as in the authors' code.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS["lamb"],
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step on all parameters that have a gradient; `closure` is not used."""
        for group in self.param_groups:
            if weights := [weight for weight in group["params"] if weight.grad is not None]:
                group["step"] += 1
                self._update(group, weights, [weight.grad for weight in weights])

    def _update(self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor]) -> None:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        for weight in weights:
            self.state[weight] = self.state[weight] or {name: torch.zeros_like(weight) for name in ("mean", "square")}
        means, squares = ([self.state[weight][name] for weight in weights] for name in ("mean", "square"))
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        updates = torch._foreach_div(means, 1 - beta1 ** group["step"])
        roots = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2 ** group["step"]))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(updates, roots)
        if decay:
            torch._foreach_add_(updates, weights, alpha=decay)
            norms = zip(torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True)
            ratios = [torch.where((weight > 0) & (update > 0), weight / update, 1.0) for weight, update in norms]
            updates = tuple(update * ratio for update, ratio in zip(updates, ratios, strict=True))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def choose_backend(name: OptimizerName, backend: OptimizerBackend, device: torch.device) -> Literal["torch", "apex"]:
    """The library that computes an optimizer. `auto` chooses apex only for LAMB, which torch has not fused, only on
    CUDA, and only if `probe` finds that apex works.

    Students are trained in fp32 with bf16 products, for which torch's own fused kernels compute SGD and Adam.
    Raises `BadInput` where `apex` is requested and cannot be used; the message names the remedy.
    """
    if backend == "torch" or (backend == "auto" and (not is_cuda(device) or name != "lamb")):
        return "torch"
    if name not in FUSED:
        raise BadInput(f"--optimizer {name} has no apex form: FusedSGD skips bf16 parameters silently.", "Use auto.")
    if not is_cuda(device):
        raise BadInput("--optimizer-backend apex computes on CUDA alone.", "Use auto, or a CUDA device.")
    found = probe(device)
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
    """Make the optimizer over parameter groups, each with its own `weight_decay`; `momentum` and `nesterov` are for SGD
    alone.

    Where all parameters are on CUDA, torch's SGD, Adam and AdamW use its fused kernels.
    """
    groups = list(groups)
    fused = all(is_cuda(weight.device) for group in groups for weight in group["params"])
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, fused=fused)
    settings: dict[str, Any] = {"lr": lr, "betas": BETAS, "eps": EPS[name], "weight_decay": 0.0}
    if backend == "apex":
        return _of_apex(name, groups, settings)
    if name == "lamb":
        return Lamb(groups, **settings)
    return (torch.optim.Adam if name == "adam" else torch.optim.AdamW)(groups, **settings, fused=fused)


def _of_apex(name: OptimizerName, groups: list[dict[str, Any]], settings: dict[str, Any]) -> Optimizer:
    from apex import optimizers as apex

    if name == "lamb":
        optimizer: Optimizer = apex.FusedLAMB(groups, **settings, max_grad_norm=math.inf)
    else:
        optimizer = apex.FusedAdam(groups, **settings, adam_w_mode=name == "adamw")
    optimizer.register_step_pre_hook(_match_layouts)
    return optimizer


def _match_layouts(optimizer: Optimizer, *_: Any) -> None:
    """Give each gradient the strides of its weight: apex reads memory in order and ignores strides, so a gradient in
    another layout would be applied to the wrong weights.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and weight.grad.stride() != weight.stride():
                weight.grad = torch.empty_like(weight).copy_(weight.grad)


class State(Enum):
    """The states that apex can be in on a machine."""

    ABSENT = "absent"
    WRONG_PACKAGE = "wrong package"
    NO_GPU = "no GPU"
    BROKEN = "broken"
    READY = "ready"


@dataclass(frozen=True)
class Apex:
    """The state of apex on this machine, a half sentence that says what was `found`, and a sentence with the remedy."""

    state: State
    found: str
    remedy: str = ""


@cache
def probe(device: torch.device) -> Apex:
    """Find out whether apex can be used on `device` of this process. It counts as usable if its steps agree with
    torch's; the result is cached.

    The package of the same name in package indexes is an unrelated web toolkit; none of its code is executed.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Apex(State.ABSENT, "apex is not installed", BUILD)
    if not any((Path(place) / "optimizers").is_dir() for place in spec.submodule_search_locations or []):
        found = f"the installed package apex ({spec.origin}) is not NVIDIA's"
        return Apex(State.WRONG_PACKAGE, found, f"Uninstall it: pip uninstall apex. {BUILD}")
    if not has_cuda():
        return Apex(State.NO_GPU, "there is no CUDA device", "Use --optimizer-backend torch.")
    try:
        difference = max(_difference(name, device) for name in FUSED)
    except APEX_FAILURES as error:
        return Apex(State.BROKEN, f"apex fails: {type(error).__name__}: {first_line(error)}", BUILD)
    if not difference <= ROUNDING:
        return Apex(State.BROKEN, f"apex and torch differ by {difference:.1g} after three steps", BUILD)
    return Apex(State.READY, "apex agrees with torch")


def _difference(name: OptimizerName, device: torch.device) -> float:
    """The largest difference between apex's and torch's weights after three steps, relative to the largest weight."""
    shapes, random = ((8, 4, 3, 3), (16,)), torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=random) for shape in shapes]
    steps = [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(3)]
    ends = []
    for backend in ("torch", "apex"):
        weights = [nn.Parameter(start.clone().to(device)) for start in starts]
        groups = [{"params": [weight], "weight_decay": 0.1 * (weight.dim() > 1)} for weight in weights]
        optimizer = make_optimizer(name, groups, backend=backend, lr=0.01, momentum=0.0)
        for gradients in steps:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone().to(device)
            optimizer.step()
        ends.append(torch.cat([weight.detach().flatten() for weight in weights]))
    return float((ends[0] - ends[1]).abs().max() / ends[0].abs().max())
