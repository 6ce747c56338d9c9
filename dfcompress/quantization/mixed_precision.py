"""Mixed precision: the sensitivity of each layer, which is the change of the predictions when this layer alone is
quantized, and the choice of bits by sensitivities.
"""

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
from dfcompress.models.classifier import Classifier, evaluating, images_a_pass, multiply_accumulates
from dfcompress.models.fake_quantizers import FLOAT_BITS, freeze, in_float, input_grids, quantize_layers
from dfcompress.models.grids import WIDTHS, InputGrid, Scheme
from dfcompress.models.saving import saved_bytes, state_bytes
from dfcompress.quantization.bits import Bits, RequestedBits
from dfcompress.quantization.ranges import fit_weights

# The most and the fewest images on which sensitivities are measured, in one pass for each layer, and the limit of the
# pixels of all images, which decides between them.
MOST, FEWEST = 128, 16
PIXELS = 2**19
# Multiply-accumulates of all passes for sensitivities that are only reported. 16 images in 104 layers of WideResNet-101
# are 38e12, half an hour on one core.
WORK = 4e12
LONGEST_SCALE = 0.00012345678901234567  # Has as many digits as a scale in fp32 can have.


def images_to_measure_on(teacher: Classifier, requested: Mapping[str, RequestedBits], available: int) -> int:
    """The number of images on which sensitivities are measured, never more than the `available` ones: 128, or for
    images of more than 64 x 64 pixels fewer, but at least 16. Where no bits depend on the sensitivities, `WORK` limits
    the number of images further, but not below 2.
    """
    _, height, width = teacher.card.input_size
    count = min(available, MOST, max(FEWEST, PIXELS // (height * width)))
    if _free(requested):
        return count
    return min(count, max(2, int(WORK // (multiply_accumulates(teacher) * max(1, len(requested))))))


@torch.no_grad()
def sensitivities(quantized: Classifier, images: Tensor, layers: Sequence[str]) -> dict[str, float]:
    """The sensitivity of each of `layers` in nats: KL(float ‖ quantized) of the predictions when this layer alone is
    quantized, mean over `images` `(N, C, H, W)` in [0, 1]. Logits are converted to fp64, because the divergence of a
    confident network is smaller than the rounding of fp32.
    """
    found = {}
    with exact_fp32(), evaluating(quantized):
        parts = images.split(images_a_pass(quantized))
        with in_float(quantized.network):
            float_answers = torch.cat([quantized(some) for some in parts]).double().log_softmax(1)
        with console.progress("layers' sensitivities", len(layers)) as progress:
            for number, layer in enumerate(layers, 1):
                with in_float(quantized.network, but=layer):
                    answers = torch.cat([quantized(some) for some in parts]).double().log_softmax(1)
                found[layer] = F.kl_div(answers, float_answers, log_target=True, reduction="batchmean").item()
                progress.update(number)
    return found


def require_reachable(
    teacher: Classifier, requested: Mapping[str, RequestedBits], size_ratio: float | None, scheme: Scheme
) -> None:
    """Raise `BadInput` where bits are to be chosen and `size_ratio` is missing, outside (0, 1) or out of reach, and
    where it is given although no bits are to be chosen.
    """
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
    """The bits of every layer: the requested bits, and for layers without requested bits of weights the bits with the
    least sum of sensitivities at which the file has at most `size_ratio` of the bytes of the teacher's fp32 tensors.

    Sensitivities at 2 to 8 bits are measured on `images` `(N, C, H, W)` in [0, 1]; we assume that they add up. The
    choice is optimal to the solver's tolerance (a knapsack with one width for each layer, by `scipy.optimize.milp`).
    `scheme` states the kinds of grids, which affect both the file's size and the sensitivities.
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
    """The layers whose bits of weights are to be chosen."""
    return [name for name, each in requested.items() if each.weights is None]


def with_widths(requested: Mapping[str, RequestedBits], widths: Mapping[str, int]) -> dict[str, Bits]:
    """The bits of all layers; weights have the requested bits, else the bits in `widths`, else the fewest (2)."""
    return {
        name: Bits(each.weights or widths.get(name, WIDTHS[0]), each.activations) for name, each in requested.items()
    }


def _weight_bytes(weight: Tensor, bits: int, scheme: Scheme) -> int:
    """The bytes that the integers of a weight take, with its zero points if it has an asymmetric grid."""
    return packing.packed_bytes(weight.numel(), bits) + (len(weight) if bits in scheme.asymmetric else 0)


def _file_bytes(teacher: Classifier, bits: Mapping[str, Bits], scheme: Scheme) -> int:
    """The bytes of the teacher's file at these bits, up to the number of digits of some values in its metadata."""
    return saved_bytes(uncalibrated(teacher, bits, scheme))


def uncalibrated(teacher: Classifier, bits: Mapping[str, Bits], scheme: Scheme) -> Classifier:
    """A frozen copy of the teacher at these bits, with arbitrary input grids: its tensors have the right shapes and
    types, but its predictions are meaningless.
    """
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
    """The index of the chosen width for each row of `costs` and `sizes` `(layers, widths)`: the sum of the chosen costs
    is minimal, and the sum of the chosen sizes is at most `room`.
    """
    layers, widths = costs.shape
    one_each = np.kron(np.eye(layers), np.ones(widths))
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.reshape(1, -1), -np.inf, room)]
    worth = costs.ravel() / max(costs.max(), 1e-12)  # The solver's tolerances are absolute.
    solution = milp(
        worth, integrality=np.ones(costs.size), bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0}
    )
    return [int(place) for place in solution.x.reshape(layers, widths).argmax(1)]


def _costs(teacher: Classifier, layers: Sequence[str], images: Tensor, scheme: Scheme) -> NDArray[np.float64]:
    """The sensitivity of every layer's weights at every width of `WIDTHS`, `(layers, widths)`."""
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
