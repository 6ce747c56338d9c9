"""Images are resized, cut and recoloured to the input of a network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from image_files import CIFAR, read
from PIL import Image
from torchvision import transforms

from dfcompress.data.fitted import fit
from dfcompress.data.real import open_images
from dfcompress.errors import BadInput
from dfcompress.models.card import CIFAR_MEAN, CIFAR_STD, ModelCard


def test_images_of_the_right_size_stay_as_they_are():
    images = torch.rand(2, 3, 224, 224)
    assert torch.equal(fit(images, (3, 224, 224)), images)


def test_large_inputs_are_cut_from_the_centre_of_an_8_7_times_larger_image():
    """A 256x512 image: the shorter side becomes 256, the columns 144..368 remain."""
    columns = torch.arange(512.0).expand(1, 1, 256, 512)
    fitted = fit(columns, (1, 224, 224))
    assert torch.allclose(fitted[0, 0, 0], torch.arange(144.0, 368.0))


def test_a_photo_is_prepared_as_torchvision_prepares_it_to_one_step_of_a_byte(tmp_path, cifar10_test_file):
    with np.load(cifar10_test_file) as arrays:
        photo = Image.fromarray(arrays["images"][0].transpose(1, 2, 0)).resize((500, 375), Image.Resampling.BICUBIC)
    (tmp_path / "cat").mkdir()
    photo.save(tmp_path / "cat" / "photo.png")
    card = ModelCard("any", 1, (3, 224, 224), CIFAR_MEAN, CIFAR_STD)
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])(photo)
    assert (read(tmp_path, card)[0][0] - expected).abs().max() < 1.01 / 255


def test_small_inputs_take_the_whole_image():
    wide = torch.tensor([0.0, 1.0]).repeat_interleave(32).expand(1, 1, 32, 64)
    assert torch.allclose(fit(wide, (1, 32, 32))[0, 0, 0, [0, 31]], torch.tensor([0.0, 1.0]))


def test_colour_becomes_grey_by_luma():
    red_green_blue = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4)
    assert torch.allclose(fit(red_green_blue, (1, 4, 4))[:, 0, 0, 0], torch.tensor([0.299, 0.587, 0.114]))


@pytest.mark.parametrize(("channels", "wanted"), [(3, 4), (3, 2)])
def test_colours_that_no_rule_leads_to_are_refused_before_any_work(channels, wanted, tmp_path):
    images = np.zeros((4, channels, 32, 32), np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(4))
    with pytest.raises(BadInput, match=f"Images of {channels} channels cannot be shown to a model of {wanted}"):
        open_images(tmp_path / "images.npz", replace(CIFAR, input_size=(wanted, 32, 32)))
