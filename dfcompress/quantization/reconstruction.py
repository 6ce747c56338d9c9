"""Block reconstruction of a quantized network, unit by unit: rounding and input steps are learnt so that each unit's
output stays close to the float network's output.

Learnt rounding is AdaRound (Nagel et al. 2020), the units are blocks (BRECQ, Li et al. 2021), and random activations
stay in float while the rounding is learnt (QDrop, Wei et al. 2022), as in GENIE (Jeon et al. 2023), which also uses
synthetic images.
The `Trainer` trains one student by its logits on whole images. Reconstruction solves many small problems in sequence,
on features, so it has a loop of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dfcompress import console
from dfcompress.arguments import require_fields
from dfcompress.data.synthetic_set import as_float
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.machine.compiling import Replayed
from dfcompress.machine.device import current, is_cuda
from dfcompress.machine.memory import free_bytes
from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier, count_runs, evaluating, images_a_pass
from dfcompress.models.fake_quantizers import QuantizedLayer, in_float, quantized_layers
from dfcompress.models.grids import InputGrid, WeightGrid, per_channel
from dfcompress.models.hooks import hooked_inputs, hooked_outputs
from dfcompress.randomness import generator, seed_of
from dfcompress.run import Clock, save_state
from dfcompress.schedules import cosine

# The features around a unit are in memory for at most `IMAGES` images, and for fewer if they would take more than
# `FEATURES` bytes or more than the share `ROOM` of the free memory. The rest is for the learning of the unit.
IMAGES = 1024
FEATURES = 2**32
ROOM = 0.3
LARGEST_UNIT = 4
PASSED = 256  # Largest number of images in a forward pass.
Side = Literal["input", "output"]
GAMMA, ZETA = -0.1, 1.1  # γ and ζ stretch the rectified sigmoid so that it reaches 0 and 1 (AdaRound, eq. 23).
BETA = (20.0, 2.0)  # The first and the last β of the rounding penalty.


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Settings of the reconstruction: `steps` training steps for each unit, on batches of `batch_size` images.

    Adam learns the rounding at learning rate `lr`, and the step sizes of activations at `input_lr`. `rounding` weighs
    the penalty that pushes weights to integers; the penalty begins after the share `warmup` of the steps. `drop` is the
    share of activations left in float.
    """

    steps: int = 1000
    lr: float = 0.01
    batch_size: int = 32
    input_lr: float = 1e-4
    rounding: float = 0.01
    warmup: float = 0.2
    drop: float = 0.5

    def __post_init__(self) -> None:
        """Raise `BadInput` for invalid settings."""
        require_fields(self)
        if self.batch_size < 1 or not 0 < self.lr < math.inf or not 0 <= self.warmup < 1 or not 0 <= self.drop < 1:
            raise BadInput(f"{self} is not possible.", "Use at least one image, a rate above 0 and shares below 1.")


@dataclass(frozen=True)
class Reconstructed:
    """The result of a finished reconstruction: the number of units, the steps of all units together, the seconds over
    all invocations, and by unit the mean squared error of its output as a share of the output's variance.
    """

    units: int
    steps: int
    seconds: float
    losses: dict[str, float]


def reconstruct(
    student: Classifier,
    teacher: Classifier,
    images: Tensor,
    settings: Reconstruction,
    *,
    seed: int,
    state: Path | None,
    capture: bool = False,
) -> Reconstructed:
    """Learn the rounding of the calibrated `student`'s weights, unit by unit, and freeze it.

    `teacher` is the same network in float, on the same device; `images` are stored images `(N, C, H, W)`. Finished
    units are saved to the file `state`; if it exists, the reconstruction resumes from it, to the same bits. Every
    process reconstructs all units. The number of images depends on the memory that is free at the beginning. With
    `capture`, on a GPU, each unit's steps are replayed as a CUDA graph.
    """
    images = images[torch.randperm(len(images), generator=generator("reconstruction", seed))[:IMAGES]]
    names = units_of(student)
    clock, losses = Clock(), {}
    room = world().broadcast(min(FEATURES, int(ROOM * free_bytes(teacher.mean.device))))
    if state and state.exists():
        saved = torch.load(state, weights_only=True, map_location="cpu")
        clock.go_on_from(saved["seconds"])
        losses, room = saved["losses"], saved.get("room", FEATURES)
        for name, values in saved["layers"].items():
            _restore(quantized_layers(student.network)[name], values)
    with console.progress("reconstruction", len(names)) as progress, current(teacher.mean.device):
        for number, name in enumerate(names):
            if name in losses:
                continue
            losses[name] = _reconstruct_unit(
                student,
                teacher,
                name,
                images,
                settings,
                seed=seed_of("reconstruction", seed, number),
                room=room,
                capture=capture,
            )
            progress.update(number + 1, error=losses[name])
            if state and world().is_main:
                layers = {
                    each: _state(layer) for each, layer in quantized_layers(student.network).items() if layer.is_frozen
                }
                save_state(state, {"seconds": clock.seconds, "losses": losses, "layers": layers, "room": room})
    return Reconstructed(len(names), settings.steps * len(names), clock.seconds, losses)


def units_of(classifier: Classifier) -> list[str]:
    """The names of the units, which are reconstructed one after the other, in execution order.

    A unit is the largest module of its branch of the network that holds at most four quantized layers, runs once, and
    maps one tensor to one tensor, each with one row for each image: a residual block, for example. A plain container is
    no unit, but its children may be. Layers that run several times, or whose rows are windows or entries of a table,
    belong to no unit.
    """
    names = [name for name, module in classifier.network.named_modules() if _quantized_in(module)]
    runs, by_image = count_runs(classifier, names), _by_image(classifier, names)
    units = set(_units_in("", classifier.network, {name for name in by_image if runs[name] == 1}))
    return [name for name in runs if name in units]


def _units_in(name: str, module: nn.Module, possible: Collection[str]) -> Iterator[str]:
    layers = _quantized_in(module)
    container = not name or type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if name in possible and (isinstance(module, QuantizedLayer) or (not container and 0 < layers <= LARGEST_UNIT)):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _units_in(f"{name}.{child_name}" if name else child_name, child, possible)


@torch.no_grad()
def _by_image(classifier: Classifier, names: Sequence[str]) -> set[str]:
    """The modules whose input and output have one row for each image, found by a pass of three images."""
    rows: dict[str, set[int]] = {name: set() for name in names}

    def note(name: str, features: Tensor) -> None:
        rows[name].add(len(features) if features.dim() > 1 else 0)

    images = torch.zeros(3, *classifier.card.input_size, device=classifier.mean.device)
    before, after = hooked_inputs(classifier.network, names, note), hooked_outputs(classifier.network, names, note)
    with evaluating(classifier), before, after:
        classifier(images)
    return {name for name, counts in rows.items() if counts == {len(images)}}


def _quantized_in(module: nn.Module) -> int:
    return sum(isinstance(each, QuantizedLayer) for each in module.modules())


def _reconstruct_unit(
    student: Classifier,
    teacher: Classifier,
    name: str,
    images: Tensor,
    settings: Reconstruction,
    *,
    seed: int,
    room: int,
    capture: bool,
) -> float:
    """Learn one unit's rounding and input steps, and freeze them. The result is the mean squared error of the unit's
    output as a share of the output's variance.
    """
    unit = student.network.get_submodule(name)
    images = images[: images_that_fit(teacher, name, room=room)]
    (student_inputs,) = _features(student, name, images, "input")
    teacher_inputs, teacher_outputs = _features(teacher, name, images, "input", "output")
    roundings = {path: SoftRounding(layer) for path, layer in unit.named_modules() if isinstance(layer, QuantizedLayer)}
    _learn(unit, roundings, student_inputs, teacher_inputs, teacher_outputs, settings, seed=seed, capture=capture)
    for rounding in roundings.values():
        rounding.harden()
    del teacher_inputs
    error = 0.0
    with torch.no_grad(), exact_fp32(), evaluating(unit):
        for inputs, outputs in zip(student_inputs.split(PASSED), teacher_outputs.split(PASSED), strict=True):
            error += (unit(inputs) - outputs).square().sum().item()
    return error / teacher_outputs.numel() / max(teacher_outputs.var().item(), 1e-12)


def _learn(
    unit: nn.Module,
    roundings: Mapping[str, SoftRounding],
    student_inputs: Tensor,
    teacher_inputs: Tensor,
    teacher_outputs: Tensor,
    settings: Reconstruction,
    *,
    seed: int,
    capture: bool,
) -> None:
    """Train the `roundings` of a unit's layers, by name, so that its output comes close to `teacher_outputs`. The
    features `(N, ...)` are those of both networks for the same images.
    """
    steps = [rounding.step for rounding in roundings.values() if rounding.step is not None]
    groups = [{"params": [each.V for each in roundings.values()], "lr": settings.lr}]
    groups += [{"params": steps, "lr": settings.input_lr}] if steps else []
    optimizer = torch.optim.Adam(groups, fused=True)
    random = torch.Generator(device=student_inputs.device).manual_seed(seed)
    channels = teacher_outputs.shape[1] if teacher_outputs.dim() == 4 else teacher_outputs.shape[-1]

    def partly(whole: Tensor, other: Tensor) -> Tensor:
        """Random elements of `whole`, a share of `drop`, and the other elements of `other`."""
        chosen = torch.rand(whole.shape, generator=random, device=random.device) < settings.drop
        # The same numbers as by `where`, which is slow on a CPU if the mask is random, and so is its gradient.
        return torch.lerp(other, whole, chosen.float())

    def quantize_partly(path: str, activations: Tensor) -> Tensor:
        return partly(activations, roundings[path].quantized_input(activations))

    def find_gradients(some: Tensor, beta: float | Tensor | None = None) -> Tensor:
        """Compute the gradients of the loss on the images `some`, with the rounding penalty if there is a β."""
        optimizer.zero_grad()
        upward = {path: rounding.h() for path, rounding in roundings.items()}
        weights = {f"{path}.weight".lstrip("."): roundings[path].weight(h) for path, h in upward.items()}
        output = functional_call(unit, weights, (partly(teacher_inputs[some], student_inputs[some]),))
        # The sum over channels, and the mean over images and pixels, as in BRECQ.
        loss: Tensor = (output - teacher_outputs[some]).square().mean() * channels
        if beta is not None:
            loss = loss + settings.rounding * sum(penalty(h, beta) for h in upward.values())
        loss.backward()
        return loss.detach()

    replayed = Replayed(random) if capture else None
    with exact_fp32(), evaluating(unit), in_float(unit), hooked_inputs(unit, roundings, quantize_partly):
        for step in range(settings.steps):
            some = torch.randint(len(student_inputs), (settings.batch_size,), generator=random, device=random.device)
            given: tuple[Any, ...] = (some,)
            if step >= settings.warmup * settings.steps:
                beta = _beta(step, settings)
                # A replayed step reads β in the device's memory. A CPU is faster with a number.
                given = some, torch.full((), beta, device=some.device) if is_cuda(some.device) else beta
            if replayed:
                replayed(find_gradients, *given)
            else:
                find_gradients(*given)
            optimizer.step()


def _beta(step: int, settings: Reconstruction) -> float:
    """β of a step, which falls along a cosine from the end of the warm-up."""
    first, last = BETA
    progress = (step / settings.steps - settings.warmup) / (1 - settings.warmup)
    return cosine(progress, 1.0, first=first, last=last)


class SoftRounding:
    """The rounding of one layer while it is learnt: the weight is s·(⌊W / s⌋ + h(V)), where V is a parameter of the
    weight's shape and h(V) lies in [0, 1] (AdaRound, eq. 22). The step of the layer's input grid is a parameter too.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer, self.grid = layer, layer.grid_now()
        self.scale = per_channel(self.grid.scale, layer.weight)
        self.lowest, self.highest = self.grid.multiples(layer.weight)
        scaled = layer.weight.detach() / self.scale
        self.floor = scaled.floor()
        # h(V) begins at the fraction W / s − ⌊W / s⌋, so that the weight begins at its float value.
        self.V = nn.Parameter(-torch.log((ZETA - GAMMA) / (scaled - self.floor - GAMMA) - 1))
        self.step = layer.input_grid.as_step(layer.weight.device) if layer.input_grid else None

    def quantized_input(self, activations: Tensor) -> Tensor:
        """The layer's input, quantized with the current step."""
        grid = self.layer.input_grid
        return activations if grid is None else grid.quantized(activations, step=self.step)

    def weight(self, h: Tensor) -> Tensor:
        """The weight of h(V), which lies between two neighbouring values of the grid."""
        return (self.floor + h).clamp(self.lowest, self.highest) * self.scale

    def h(self) -> Tensor:
        """The rectified sigmoid h(V) = clip(σ(V)·(ζ − γ) + γ, 0, 1) (eq. 23)."""
        return (self.V.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    @torch.no_grad()
    def harden(self) -> None:
        """Freeze the layer at the learnt integers, and its input grid at the learnt step."""
        self.layer.set_integer_weight(self.grid.nearest(self.floor + (self.V > 0)), self.grid)
        if self.layer.input_grid and self.step is not None:
            self.layer.input_grid = self.layer.input_grid.with_step(self.step)


def penalty(h: Tensor, beta: float | Tensor) -> Tensor:
    """The rounding penalty Σ (1 − |2·h(V) − 1|^β), 0 where every h(V) is 0 or 1 (AdaRound, eq. 24)."""
    return (1 - (2 * h - 1).abs() ** beta).sum()


def images_that_fit(classifier: Classifier, name: str, *, room: int) -> int:
    """The number of images whose features around the unit `name` fit into `room` bytes: the unit's input in the float
    and in the quantized network, and its output. At least 1.
    """
    image = torch.zeros(1, *classifier.card.input_size, dtype=torch.uint8)
    inputs, outputs = _features(classifier, name, image, "input", "output")
    return max(1, room // (2 * inputs.nbytes + outputs.nbytes))


class _EnoughError(Exception):
    """The rest of a forward pass is not needed."""


@torch.no_grad()
def _features(classifier: Classifier, name: str, images: Tensor, *sides: Side) -> list[Tensor]:
    """The inputs or outputs of a module, or both (`sides`), for all stored `images`; no tensor is in memory twice."""
    found: dict[Side, Tensor] = {}
    done = 0

    def keep(side: Side, some: Tensor) -> None:
        # Features are copied at once, because a block that begins with an in-place layer overwrites its own input.
        if side in sides:
            if side not in found:
                found[side] = some.new_empty(len(images), *some.shape[1:])
            found[side][done : done + len(some)] = some
        if side == sides[-1]:
            raise _EnoughError

    network, parts = classifier.network, images.split(min(PASSED, images_a_pass(classifier)))
    before = hooked_inputs(network, [name], lambda _, some: keep("input", some))
    after = hooked_outputs(network, [name], lambda _, some: keep("output", some))
    with exact_fp32(), evaluating(classifier), before, after:
        for some in parts:
            with suppress(_EnoughError):
                classifier(as_float(some.to(classifier.mean.device)))
            done += len(some)
    return [found[side] for side in sides]


def _state(layer: QuantizedLayer) -> dict[str, Any]:
    integers, grid = layer.integer_weight()
    inputs = asdict(layer.input_grid) if layer.input_grid else None
    return {"integers": integers, "weight_grid": asdict(grid), "input_grid": inputs}


def _restore(layer: QuantizedLayer, values: dict[str, Any]) -> None:
    layer.set_integer_weight(values["integers"], WeightGrid(**values["weight_grid"]))
    layer.input_grid = InputGrid(**values["input_grid"]) if values["input_grid"] else None
