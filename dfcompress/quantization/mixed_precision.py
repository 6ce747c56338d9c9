"""What each layer's bits cost: how far the answers move when it alone is quantized; and bits chosen by that."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor
from torch.nn import functional as F

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.machine.process import exact_fp32
from dfcompress.models import packing
from dfcompress.models.checkpoint import saved_bytes, state_bytes
from dfcompress.models.classifier import Classifier, evaluating, images_a_pass
from dfcompress.models.fake_quantizers import (
    FLOAT_BITS,
    WIDTHS,
    InputGrid,
    Scheme,
    freeze,
    in_float,
    input_grids,
    quantize_layers,
)
from dfcompress.quantization.bits import Bits, RequestedBits
from dfcompress.quantization.ranges import fit_weights

# Of the images that sensitivities are measured on, each in as many passes as there are layers.
MOST, FEWEST = 128, 16
PIXELS = 2**19
LONGEST_SCALE = 0.00012345678901234567  # As many digits as one of fp32 can have.


def images_to_measure_on(input_size: tuple[int, int, int], available: int) -> int:
    """How many images sensitivities are measured on: 128, or fewer where they have more than 64 x 64 pixels."""
    _, height, width = input_size
    return min(available, MOST, max(FEWEST, PIXELS // (height * width)))


@torch.no_grad()
def sensitivities(quantized: Classifier, images: Tensor, layers: Sequence[str]) -> dict[str, float]:
    """KL(float ‖ quantized) of the answers, mean over `images` `(N, C, H, W)` in [0, 1], where of the whole network one
    layer alone is quantized; in nats, by layer. From fp64 logits: what a sure network loses is below fp32's rounding.
    """
    found = {}
    with exact_fp32(), evaluating(quantized):
        parts = images.split(images_a_pass(quantized))
        with in_float(quantized.network):
            float_answers = torch.cat([quantized(some) for some in parts]).double().log_softmax(1)
        for layer in layers:
            with in_float(quantized.network, but=layer):
                answers = torch.cat([quantized(some) for some in parts]).double().log_softmax(1)
            found[layer] = F.kl_div(answers, float_answers, log_target=True, reduction="batchmean").item()
    return found


def require_reachable(
    teacher: Classifier, requested: Mapping[str, RequestedBits], size_ratio: float | None, scheme: Scheme
) -> None:
    """Raise `BadInput` where bits are to be chosen and `size_ratio` is missing or cannot be kept, or is not needed."""
    if not _free(requested):
        if size_ratio is not None:
            raise BadInput("--size-ratio chooses bits, and all are given.", "Use --bits auto.")
        return
    if size_ratio is not None and not 0 < size_ratio < 1:
        raise BadInput(f"--size-ratio {size_ratio:g} is not between 0 and 1.", "Use for instance --size-ratio 0.15.")
    if size_ratio is None:
        raise BadInput("--bits auto needs a share of the model's size.", "Add for instance --size-ratio 0.15.")
    least = _file_bytes(teacher, with_widths(requested, {}), scheme) / state_bytes(teacher.network)
    if least > size_ratio:
        raise BadInput(
            f"--size-ratio {size_ratio:g} cannot be kept: with {WIDTHS[0]}-bit weights the file is {least:.3f} of the "
            "model in fp32.",
            "Ask for more, or for fewer bits of the other layers.",
        )


def choose_bits(
    teacher: Classifier,
    requested: Mapping[str, RequestedBits],
    images: Tensor,
    *,
    size_ratio: float | None,
    scheme: Scheme,
) -> dict[str, Bits]:
    """The bits of every layer: the requested ones, and where there are none, those that keep the file within
    `size_ratio` of the teacher's tensors in fp32 at the least sum of sensitivities.

    Sensitivities of 2 to 8 bits are measured on `images`; that they add up is an assumption. The choice among them is
    the best there is to the solver's tolerance (a knapsack of one width a layer, by `scipy.optimize.milp`). The kinds
    of grids that `scheme` says tell in the file and in the sensitivities.
    """
    free = _free(requested)
    if not free or size_ratio is None:
        return with_widths(requested, {})
    weights = [teacher.network.get_parameter(f"{name}.weight") for name in free]
    sizes = np.array([[_weight_bytes(weight, width, scheme) for width in WIDTHS] for weight in weights])
    room = size_ratio * state_bytes(teacher.network) - _file_bytes(teacher, with_widths(requested, {}), scheme)
    chosen = _cheapest(_costs(teacher, free, images, scheme), sizes, room + sizes[:, 0].sum())
    return with_widths(requested, {name: WIDTHS[place] for name, place in zip(free, chosen, strict=True)})


def _free(requested: Mapping[str, RequestedBits]) -> list[str]:
    """The layers whose bits are to be chosen."""
    return [name for name, each in requested.items() if each.weights is None]


def with_widths(requested: Mapping[str, RequestedBits], widths: Mapping[str, int]) -> dict[str, Bits]:
    """Bits of all layers: as requested, else as chosen in `widths`, else the fewest there are."""
    return {
        name: Bits(each.weights or widths.get(name, WIDTHS[0]), each.activations) for name, each in requested.items()
    }


def _weight_bytes(weight: Tensor, bits: int, scheme: Scheme) -> int:
    """What the integers of a weight take, and their zero points where there are some."""
    return packing.packed_bytes(weight.numel(), bits) + (len(weight) if bits in scheme.asymmetric else 0)


def _file_bytes(teacher: Classifier, bits: Mapping[str, Bits], scheme: Scheme) -> int:
    """How large the teacher's file is at these bits, but for the length of a few numbers in its metadata."""
    return saved_bytes(uncalibrated(teacher, bits, scheme))


def uncalibrated(teacher: Classifier, bits: Mapping[str, Bits], scheme: Scheme) -> Classifier:
    """A copy of the teacher at these bits, frozen, with any grids: what it looks like, not what it answers."""
    trial = copy.deepcopy(teacher)
    quantize_layers(trial.network, bits, asymmetric=scheme.asymmetric)
    for shared in input_grids(trial.network):
        longest = 0 if scheme.signed else 2**shared.bits - 1
        grid = InputGrid(bits=shared.bits, scale=LONGEST_SCALE, zero_point=longest, signed=scheme.signed)
        for owner in shared.owners:
            owner.input_grid = grid
    freeze(trial.network)
    return trial


def _cheapest(costs: NDArray[np.float64], sizes: NDArray[np.int64], room: float) -> list[int]:
    """For each row the place of the width to take, so that the costs' sum is least and the sizes' fits the room."""
    layers, widths = costs.shape
    one_each = np.kron(np.eye(layers), np.ones(widths))
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.reshape(1, -1), -np.inf, room)]
    worth = costs.ravel() / max(costs.max(), 1e-12)  # The solver's tolerances are absolute.
    solution = milp(
        worth, integrality=np.ones(costs.size), bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0}
    )
    return [int(place) for place in solution.x.reshape(layers, widths).argmax(1)]


def _costs(teacher: Classifier, layers: Sequence[str], images: Tensor, scheme: Scheme) -> NDArray[np.float64]:
    """Sensitivity of every layer's weights at every width, `(layers, widths)`."""
    rows = []
    with console.progress("sensitivity", len(WIDTHS)) as progress:
        for done, width in enumerate(WIDTHS, 1):
            trial = copy.deepcopy(teacher)
            widths = dict.fromkeys(layers, (width, FLOAT_BITS))
            quantize_layers(trial.network, widths, asymmetric=scheme.asymmetric)
            fit_weights(trial, rule="mse")
            rows.append(list(sensitivities(trial, images, layers).values()))
            progress.update(done)
    return np.array(rows).T
