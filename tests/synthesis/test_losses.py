"""Each loss equals the value worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dfcompress.errors import BadInput
from dfcompress.models.recorder import moments_of
from dfcompress.models.trace import LayerMoments, Moments, Target, Trace
from dfcompress.synthesis.images import Pixels
from dfcompress.synthesis.losses import (
    activation_distance,
    bn_distance,
    bn_divergence,
    class_cross_entropy,
    competition,
    image_norm,
    inception,
    patch_similarity,
    pixel_divergence,
    smoothness,
    total_variation,
    usual_variation,
)
from dfcompress.synthesis.recipe import Recipe, choose


def trace(images=None, logits=None, labels=None, moments=None, student_logits=None):
    return Trace(images, labels, logits, moments, student_logits=student_logits)


def recorded(outputs, targets):
    """Of layers called 0, 1 and so on."""
    by_layer = (dict(zip("012", values, strict=False)) for values in (outputs, targets))
    return Trace(None, None, None, **dict(zip(("outputs", "targets"), by_layer, strict=True)))


def moments(*layers):
    """Of layers that each give their mean errors, variances and running variances."""
    mean_error, var, running_var = (
        torch.tensor([value for layer in kind for value in layer]) for kind in zip(*layers, strict=True)
    )
    sizes = tuple(len(layer[0]) for layer in layers)
    return Moments(mean_error, var, running_var, torch.zeros(sum(sizes)), sizes)


TWO_LAYERS = moments(([3.0, 4.0], [1.0, 1.0], [1.0, 1.0]), ([0.0], [3.0], [1.0]))


def test_cross_entropy_of_even_logits_is_the_logarithm_of_the_classes():
    value = class_cross_entropy().value(trace(logits=torch.zeros(2, 4), labels=torch.tensor([0, 3])))
    assert value.item() == pytest.approx(math.log(4))


def test_bn_distance_sums_unsquared_norms_over_layers():
    assert bn_distance().value(trace(moments=TWO_LAYERS)).item() == pytest.approx(5.0 + 0.0 + 0.0 + 2.0)


def test_the_first_layer_of_bn_distance_can_weigh_more():
    assert bn_distance(first=10.0).value(trace(moments=TWO_LAYERS)).item() == pytest.approx(50.0 + 2.0)


def test_bn_divergence_is_the_mean_over_layers_and_the_input():
    """KL(N(1, 4) ‖ N(0, 1)) = ½(1 + 4 − 1 − ln 4) at the layer, KL(N(0, 1) ‖ N(0, 1)) = 0 at the input."""
    images = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    value = bn_divergence().value(trace(images=images, moments=moments(([1.0], [4.0], [1.0]))))
    assert value.item() == pytest.approx((0.5 * (4 - math.log(4)) + 0.0) / 2, abs=1e-6)


def test_inception_is_the_mean_of_the_intended_logits_exponentials():
    logits, labels = torch.tensor([[200.0, 0.0], [0.0, -100.0]]), torch.tensor([0, 1])
    value = inception(scale=100.0).value(trace(logits=logits, labels=labels))
    assert value.item() == pytest.approx((math.exp(-2) + math.exp(1)) / 2)


def test_smoothness_is_the_mean_squared_difference_to_the_smoothed_image():
    """A line 0 1 0 in a 3×3 kernel of weights a b a: the middle loses (1 − b)², its neighbours gain a²."""
    a, b = math.exp(-0.5), 1.0
    a, b = a / (2 * a + b), b / (2 * a + b)
    image = torch.zeros(1, 1, 5, 5)
    image[..., 2] = 1
    value = smoothness(kernel=3, sigma=1.0).value(trace(images=image))
    assert value.item() == pytest.approx(((1 - b) ** 2 + 2 * a**2) / 5, rel=1e-5)


def test_competition_is_one_minus_the_jensen_shannon_divergence():
    same = torch.tensor([[2.0, -1.0, 0.5]])
    assert competition(3.0).value(trace(logits=same, student_logits=same)).item() == pytest.approx(1.0)
    apart = competition(1.0).value(trace(logits=torch.tensor([[50.0, 0]]), student_logits=torch.tensor([[0, 50.0]])))
    assert apart.item() == pytest.approx(1 - math.log(2), abs=1e-5)
    p, q = torch.tensor([0.8, 0.2]), torch.tensor([0.3, 0.7])
    middle = (p + q) / 2
    by_hand = 0.5 * (p * (p / middle).log()).sum() + 0.5 * (q * (q / middle).log()).sum()
    value = competition(1.0).value(trace(logits=p.log()[None], student_logits=q.log()[None]))
    assert value.item() == pytest.approx(1 - by_hand.item(), abs=1e-6)


def test_competition_moves_images_even_where_student_and_teacher_are_certain():
    """The released code clamps probabilities until the gradient is gone; ours is taken from log-softmax."""
    logits = torch.tensor([[9.0, 0.0, 0.0]], requires_grad=True)
    competition(1.0).value(trace(logits=logits, student_logits=torch.tensor([[8.0, 0.0, 0.0]]))).backward()
    assert logits.grad.abs().max() > 1e-6


def test_total_variation_is_the_norm_over_the_whole_batch_in_four_directions():
    image = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).expand(2, 1, 2, 2)
    right, down = math.sqrt(2 * (1 + 4)), math.sqrt(2 * (4 + 9))
    diagonals = math.sqrt(2 * 16) + math.sqrt(2 * 1)
    assert total_variation().value(trace(images=image)).item() == pytest.approx(right + down + diagonals)


def test_image_norm_runs_over_the_whole_batch():
    assert image_norm().value(trace(images=torch.ones(4, 1, 2, 2))).item() == pytest.approx(4.0)
    assert image_norm(each=True).value(trace(images=torch.ones(4, 1, 2, 2))).item() == pytest.approx(2.0)


def test_a_weight_multiplies_and_keeps_the_name():
    loss = 2.0 * (3.0 * image_norm())
    assert (loss.name, loss.weight) == ("image_norm", 6.0)


def test_two_losses_of_one_name_are_refused():
    with pytest.raises(BadInput, match="Two losses of a recipe have the name 'bn_distance'"):
        Recipe(images=Pixels(), batch_size=1, losses=[bn_distance(), 0.5 * bn_distance()])


def test_divergence_is_the_kl_between_gaussians():
    """KL(N(1, 4) ‖ N(0, 1)) = ½(4 + 1 − 1 − ln 4)."""
    assert moments(([1.0], [4.0], [1.0])).divergences().item() == pytest.approx(0.5 * (4 + 1 - 1 - math.log(4)))


def test_divergence_of_equal_moments_is_zero():
    assert moments(([0.0] * 3, [2.0] * 3, [2.0] * 3)).divergences().item() == pytest.approx(0.0, abs=1e-6)


def test_activation_distance_sums_means_of_squared_differences_behind_the_relu():
    outputs = [torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[8.0], [0.0]])]
    targets = [
        Target(torch.tensor([[3.0, -1.0], [-1.0, 4.0]]), torch.tensor(1.0)),
        Target(torch.tensor([[0.0], [4.0]]), torch.tensor(0.25)),
    ]
    first, second = (4 + 0 + 9 + 0) / 4, (4 + 1) / 2
    value = activation_distance().value(recorded(outputs, targets))
    assert value.item() == pytest.approx(first + second)
    later = activation_distance(later=0.1).value(recorded(outputs, targets))
    assert later.item() == pytest.approx(first + 0.1 * second)
    leaking = activation_distance(1.0).value(recorded(outputs, targets))
    assert leaking.item() == pytest.approx((4 + 1 + 16 + 0) / 4 + second)


def test_the_published_spectral_loss_is_the_sum_over_all_units_without_relu():
    """Lopes 2017, 3.1.3: Σ_i (s̄_i − s_i)², here the mean of two images; a mean per layer would weigh the last unit
    twice.
    """
    outputs = [torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[8.0], [0.0]])]
    targets = [
        Target(torch.tensor([[3.0, -1.0], [-1.0, 4.0]]), torch.tensor(1.0)),
        Target(torch.tensor([[5.0], [-4.0]]), torch.tensor(1.0)),
    ]
    recipe = choose("activation-records", "paper-spectral").recipe
    (loss,) = recipe.losses
    value = loss.weight * loss.value(recorded(outputs, targets))
    assert value.item() == pytest.approx(((4 + 1 + 9) + (16 + 0 + 16)) / 2)


def test_a_unit_that_is_off_moves_only_with_a_leak():
    for leak, moves in ((0.0, False), (0.1, True)):
        output = torch.tensor([[-1.0]], requires_grad=True)
        target = Target(torch.tensor([[2.0]]), torch.tensor(1.0))
        value = activation_distance(leak).value(recorded([output], [target]))
        assert bool(torch.autograd.grad(value, output)[0].abs() > 0) == moves


def test_pixel_divergence_looks_at_every_image_alone():
    standard = torch.tensor([-1.0, 1.0, -1.0, 1.0]).view(1, 1, 2, 2)
    assert pixel_divergence().value(trace(images=standard)).item() == pytest.approx(0.0, abs=1e-6)
    black_and_white = torch.cat([standard * 0.1 - 1, standard * 0.1 + 1])
    expected = -math.log(0.1) - 0.5 * (1 - 0.01 - 1)
    assert pixel_divergence().value(trace(images=black_and_white)).item() == pytest.approx(expected, rel=1e-4)


def layer_by_layer(images, layers, first):
    """BN distance and J_KL of layers' records, each layer on its own, from the formulas."""
    distances, divergences = [], []
    at_input = moments_of(images, torch.zeros(3), torch.ones(3))
    for layer in (at_input, *layers):
        mean_error = layer.mean_error.mean(0)
        var = layer.square_error.mean(0) - mean_error**2
        distances.append(mean_error.norm() + (var - layer.running_var).norm())
        measured, expected = var.clamp_min(0) + 1e-8 + layer.lack, layer.running_var + layer.lack
        kl = 0.5 * (expected.log() - measured.log()) - 0.5 * (1 - (measured + mean_error**2) / expected)
        divergences.append(kl.mean())
    return first * distances[1] + sum(distances[2:]), torch.stack(divergences).mean()


@pytest.mark.parametrize("sizes", [(5,), (16, 16), (3, 64, 1, 17)])
def test_all_layers_in_one_pass_are_each_layer_on_its_own(sizes):
    random = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 4, 4, generator=random, dtype=torch.float64).requires_grad_(True)
    errors = [torch.randn(6, size, generator=random, dtype=torch.float64).requires_grad_(True) for size in sizes]
    layers = []
    for number, error in enumerate(errors):
        running_var = torch.rand(error.shape[1], generator=random, dtype=torch.float64)
        running_var[0] *= number % 2  # A dead channel in every other layer.
        layers.append(LayerMoments(error, error**2 + 0.1, running_var, (1e-3 - running_var).clamp_min(0)))
    batch = Trace(images, torch.zeros(6), torch.zeros(6, 2), Moments.of(layers))
    expected = layer_by_layer(images, layers, first=10.0)
    for loss, wanted in zip((bn_distance(first=10.0), bn_divergence()), expected, strict=True):
        value = loss.value(batch)
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=0)
        leaves = errors if loss.name == "bn_distance" else [images, *errors]
        gradients, right = (torch.autograd.grad(each, leaves, retain_graph=True) for each in (value, wanted))
        for gradient, own in zip(gradients, right, strict=True):
            torch.testing.assert_close(gradient, own, rtol=1e-6, atol=1e-9)


def test_a_layer_that_fits_exactly_has_a_gradient_of_zero():
    """The norm of nothing has no slope, and not a slope of 0/0."""
    error = torch.zeros(2, 3, requires_grad=True)
    layer = LayerMoments(error, error**2 + 1, torch.ones(3), torch.zeros(3))
    value = bn_distance().value(trace(moments=Moments.of([layer, layer])))
    assert torch.autograd.grad(value, error)[0].abs().max() == 0


@pytest.mark.parametrize(("kernel", "size"), [(1, (4, 5)), (3, (2, 7)), (5, (9, 6)), (7, (4, 4))])
def test_borders_are_reflected_as_pad_does_and_so_is_the_gradient(kernel, size):
    """Of a gradient that differs from pixel to pixel; `F.pad`'s own backward is atomic on CUDA."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images.requires_grad_(True)
    offsets = torch.arange(kernel) - kernel // 2
    line = (-(offsets**2) / 2).exp()
    filters = torch.outer(line, line).div(line.sum() ** 2).expand(3, 1, kernel, kernel).double()
    padded = F.pad(images, (kernel // 2,) * 4, mode="reflect")
    expected = (images - F.conv2d(padded, filters, groups=3)).square().mean()
    single = images.float().detach().requires_grad_(True)
    value = smoothness(kernel).value(trace(images=single))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-12)
    (gradient,), (right,) = torch.autograd.grad(value, single), torch.autograd.grad(expected, images)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-7)


def test_no_operation_of_a_loss_on_images_has_an_atomic_gradient():
    """Reflecting and gathering are summed in any order on CUDA."""
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    found, waiting = set(), [smoothness().value(trace(images=images)).grad_fn]
    while waiting:
        node = waiting.pop()
        found.add(type(node).__name__)
        waiting += [before for before, _ in node.next_functions if before is not None]
    assert "ConvolutionBackward0" in found
    assert not [name for name in found if "Pad" in name or "Gather" in name or "Index" in name]


def similarities_of(features):
    directions = F.normalize(features, dim=2)
    return (directions @ directions.transpose(1, 2)).flatten(1)


def entropy_by_autograd(features, points, bandwidth):
    """Every step written out, for one block."""
    entropies = []
    for image in similarities_of(features):
        low, high = image.detach().min(), image.detach().max()
        places = torch.stack([low + (high - low) * step / (points - 1) for step in range(points)])
        gaussians = torch.distributions.Normal(image, bandwidth).log_prob(places[:, None]).exp()
        density = gaussians.mean(1) + 1e-4
        entropies.append(torch.trapezoid(-density * density.log(), places))
    return torch.stack(entropies).mean()


@pytest.mark.parametrize(("points", "bandwidth"), [(10, 0.01), (10, 0.2), (50, 0.05)])
def test_patch_similarity_is_the_entropy_of_a_kernel_density_and_so_is_its_gradient(points, bandwidth):
    random = torch.Generator().manual_seed(0)
    blocks = [torch.randn(2, count, 6, generator=random, dtype=torch.float64).requires_grad_() for count in (5, 9)]
    loss = patch_similarity(points, bandwidth)
    value = loss.value(Trace(None, None, None, patches=dict(zip("ab", blocks, strict=True))))
    expected = -sum(entropy_by_autograd(block, points, bandwidth) for block in blocks)
    torch.testing.assert_close(value, expected)
    for gradient, right in zip(torch.autograd.grad(value, blocks), torch.autograd.grad(expected, blocks), strict=True):
        torch.testing.assert_close(gradient, right)


def test_patches_that_differ_are_preferred_to_patches_that_are_alike():
    """One direction and noise around it, as a network gives for noise; and directions all around the circle."""
    alike = torch.tensor([1.0, 0.0]) + 0.01 * torch.randn(1, 16, 2, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(16) * math.pi / 8
    different = torch.stack([angles.cos(), angles.sin()], 1)[None]
    loss = patch_similarity(50, 0.05)
    values = [loss.value(Trace(None, None, None, patches={"a": patches})) for patches in (alike, different)]
    assert values[1] < values[0] - 0.3


@pytest.mark.parametrize("settings", [(1, 0.01), (10, 0.0)])
def test_a_density_of_no_width_or_of_one_point_is_refused(settings):
    with pytest.raises(BadInput):
        patch_similarity(*settings)


def test_the_usual_variation_is_a_distance_to_the_root_of_the_numbers():
    images = torch.randn(2, 3, 8, 8)
    found = total_variation().value(trace(images=images)).item()
    assert usual_variation(1.5).value(trace(images=images)).item() == pytest.approx(abs(found - 1.5 * math.sqrt(384)))
