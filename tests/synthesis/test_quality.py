"""Every warning is given for images that deserve it, and for no others."""

from __future__ import annotations

import pytest
import torch

from dfcompress.data.real import open_images
from dfcompress.models.checkpoint import load
from dfcompress.synthesis.quality import QualityCheck
from dfcompress.synthesis.recipe import choose
from dfcompress.synthesis.synthesizer import SynthesizedBatch


@pytest.fixture(scope="module")
def teacher(resnet20_file):
    return load(resnet20_file).frozen()


def batch(images, labels):
    return SynthesizedBatch(images, labels, {}, [], 0.0)


SETTINGS = choose("deepinversion").settings


def examine(teacher, images, labels, recipe="deepinversion"):
    return QualityCheck(choose(recipe).recipe, teacher).examine(batch(images, labels))


@pytest.fixture(scope="module")
def real(teacher, cifar10_train_file):
    return next(open_images(cifar10_train_file, teacher.card).batches(200))


def test_real_images_raise_no_warning(teacher, real):
    health = examine(teacher, *real)
    assert health.warnings(SETTINGS) == {}
    assert health.teacher_top1 > 0.9
    assert health.bn_divergence < 0.1 < health.noise_divergence


def test_a_batch_in_chunks_is_judged_as_a_whole(teacher, real):
    recipe = choose("deepinversion", None).recipe
    whole, parts = (QualityCheck(recipe, teacher, chunk=chunk).examine(batch(*real)) for chunk in (None, 24))
    assert parts.bn_divergence == pytest.approx(whole.bn_divergence, rel=1e-4)
    assert parts.noise_divergence == pytest.approx(whole.noise_divergence, rel=1e-4)
    assert (parts.teacher_top1, parts.variety) == (whole.teacher_top1, whole.variety)


def test_wrong_labels_are_told(teacher, real):
    (warning,) = examine(teacher, real[0], (real[1] + 1) % 10).warnings(SETTINGS).values()
    assert "as intended" in warning
    assert "--set ce" in warning


def test_a_generators_images_need_not_be_sure_of_their_class(teacher, real):
    images, labels = real
    told = {
        recipe: examine(teacher, images, (labels + 1) % 10, recipe).warnings(choose(recipe).settings)
        for recipe in ("deepinversion", "fast-generator")
    }
    assert "labels" in told["deepinversion"]
    assert "labels" not in told["fast-generator"]


def test_noise_is_told_by_its_statistics(teacher):
    images = teacher.denormalise(2 * torch.randn(200, 3, 32, 32))
    labels = teacher(images).argmax(1)
    (warning,) = examine(teacher, images, labels).warnings(SETTINGS).values()
    assert "no nearer" in warning
    assert "--set bn" in warning


def test_one_image_again_and_again_is_told(teacher, real):
    images = real[0][:1].expand(50, -1, -1, -1) + 0.01 * torch.randn(50, 3, 32, 32)
    labels = teacher(images).argmax(1)
    assert "nearly the same" in examine(teacher, images, labels).warnings(SETTINGS)["variety"]


def test_label_free_recipes_have_no_label_checks(teacher, real):
    health = examine(teacher, real[0], (real[1] + 1) % 10, recipe="bns")
    assert health.teacher_top1 is None
    assert health.warnings(SETTINGS) == {}


def test_recipes_without_statistics_are_not_measured_by_them(teacher, real):
    assert examine(teacher, *real, recipe="deepdream").bn_divergence is None
