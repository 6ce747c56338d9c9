"""A widened classifier answers as before for the classes it had, and is rebuilt from its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from odd_networks import NETWORKS
from odd_networks import SIZE as ODD_SIZE
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.architectures import named
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.training.class_incremental.widening import make_expert, widen
from dfcompress.training.student import make_student

NAMES = tuple("abcdefg")
ODD = f"{Path(__file__).parents[2] / 'odd_networks.py'}:prelu"
SIZES = {ODD: ODD_SIZE, "torchvision:squeezenet1_1": (3, 64, 64), "half:lenet5_bn": (1, 32, 32)}


def classifier(architecture, classes=4):
    size = SIZES.get(architecture, (3, 32, 32))
    card = ModelCard(architecture, classes, size, (0.5,) * size[0], (0.25,) * size[0], NAMES[:classes])
    if architecture == ODD:
        return Classifier(NETWORKS["prelu"](), card).frozen()
    return make_student(architecture.removeprefix("torchvision:"), card, seed=1)[0].frozen()


@pytest.mark.parametrize("architecture", ["cifar_resnet20", "half:lenet5_bn", "torchvision:squeezenet1_1", ODD])
def test_old_outputs_stay_and_the_file_is_read_again(architecture, tmp_path):
    """Twice, for a widened model is widened again: built by name, of other widths, ending in a convolution, and by a
    factory that knows one number of classes alone.
    """
    old = classifier(architecture)
    arch = ODD if architecture == ODD else None
    images = torch.rand(3, *old.card.input_size)
    expected, model = old(images), old
    for count in (6, 7):
        model = widen(model, NAMES[:count], seed=0).frozen()
        assert torch.allclose(model(images)[:, :4], expected, atol=1e-5)
        save(model, tmp_path / str(count))
        read = load(tmp_path / str(count), arch=arch)
        assert (read.card.classes, read.card.class_names) == (count, NAMES[:count])
        assert torch.allclose(read(images), model(images), atol=1e-6)
        model = read


def test_new_rows_depend_on_the_seed_alone():
    old = classifier("cifar_resnet20")
    first, again, other = (widen(old, NAMES, seed=seed).network.fc.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first[:4], other[:4])
    assert not torch.equal(first[4:], other[4:])


def test_an_expert_has_the_body_and_outputs_of_its_own():
    old = classifier("cifar_resnet20")
    expert = make_expert(old, ("x", "y"), seed=0)
    assert (expert.card.classes, expert.card.class_names) == (2, ("x", "y"))
    assert expert(torch.rand(1, 3, 32, 32)).shape == (1, 2)
    assert torch.equal(expert.network.conv1.weight, old.network.conv1.weight)


class Mixed(nn.Module):
    """What it answers is no row of its last layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, images):
        return self.fc(images.flatten(1)).flip(1)


def test_a_last_layer_whose_rows_are_not_the_classes_is_refused():
    old = Classifier(Mixed(), ModelCard("mixed", 4, (3, 2, 2), (0.5,) * 3, (0.25,) * 3)).frozen()
    with pytest.raises(BadInput, match="fc, the last layer of mixed"):
        widen(old, NAMES, seed=0)


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.fc, self.aux = nn.Conv2d(3, 8, 3), nn.Linear(8, classes), AUXILIARY

    def forward(self, images):
        features = self.conv(images).mean((2, 3))
        logits = self.fc(features)
        return LAST(logits, dim=1)

def make(num_classes=4):
    return Net(num_classes)
"""


def from_factory(folder, *, auxiliary="nn.Linear(8, classes)", last="(lambda logits, dim: logits)"):
    """A file and the factory that it was saved from, with an auxiliary head for training."""
    arch = folder / "net.py"
    arch.write_text(FACTORY.replace("AUXILIARY", auxiliary).replace("LAST", last))
    network = named(f"{arch}:make").build(4, 3)
    torch.save(network.state_dict(), folder / "net.pt")
    return load(folder / "net.pt", arch=f"{arch}:make", input_size=(3, 32, 32))


def test_a_factory_that_widens_an_auxiliary_head_too_reads_the_result(tmp_path):
    old = from_factory(tmp_path)
    wider = widen(old, NAMES, seed=0).frozen()
    save(wider, tmp_path / "result")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load(tmp_path / "result", arch=old.card.architecture)(images), wider(images))


def test_a_factory_that_cannot_give_the_result_is_refused(tmp_path):
    """A parameter that is no layer's depends on the number of classes."""
    old = from_factory(tmp_path, auxiliary="nn.ParameterList([torch.zeros(classes)])")
    with pytest.raises(BadInput, match="cannot be built with 7 outputs of fc"):
        widen(old, NAMES, seed=0)


def test_a_network_that_ends_in_log_softmax_is_refused(tmp_path):
    old = from_factory(tmp_path, last="torch.nn.functional.log_softmax")
    with pytest.raises(BadInput, match="answers with log-probabilities"):
        widen(old, NAMES, seed=0)
