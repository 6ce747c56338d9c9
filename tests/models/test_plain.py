"""Weights that are computed at every pass become plain ones: the network answers as before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier, load
from dfcompress.models.classifier import Classifier
from dfcompress.models.plain import make_plain
from dfcompress.models.saving import save
from dfcompress.training.student import make_student

sys.path.insert(0, str(Path(__file__).parent))
import factories

CARD = ModelCard("net", 10, (3, 16, 16), (0.5,) * 3, (0.25,) * 3)
FORMS = [
    "weight_norm_hook",
    "weight_norm_parametrization",
    "spectral_norm_hook",
    "spectral_norm_parametrization",
    "orthogonal",
    "pruned",
]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def spec(form: str) -> str:
    return f"{factories.__file__}:{form}"


def made(form: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return factories.seen(getattr(factories, form)())


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_computed_weights_is_loaded_plain_and_exact(form, tmp_path):
    network = made(form)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    assert network.state_dict().keys() != factories.plain().state_dict().keys()
    classifier = load(tmp_path / "net.pt", arch=spec(form), input_size=(3, 16, 16))
    assert classifier.network.state_dict().keys() == factories.plain().state_dict().keys()
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        expected = network(classifier.normalise(images))
    torch.testing.assert_close(classifier(images), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_plain_and_loads_through_the_same_factory(form, tmp_path):
    torch.save(made(form).state_dict(), tmp_path / "net.pt")
    classifier = load(tmp_path / "net.pt", arch=spec(form), input_size=(3, 16, 16))
    save(classifier, tmp_path / "out")
    again = load(tmp_path / "out", arch=spec(form))
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(again(images), classifier(images))


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_made_in_python_is_left_as_it_is_and_a_plain_copy_used(form):
    given = Classifier(made(form), CARD)
    used = as_classifier(given)
    assert is_plain(used.network)
    assert not is_plain(given.network)
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(used(images), given(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_student_has_plain_weights(form):
    student, _ = make_student(spec(form), CARD, seed=0)
    assert is_plain(student.network)


def test_spectral_normalisation_takes_no_step_of_its_iteration():
    network = made("spectral_norm_parametrization").train()
    vector = network.conv2.parametrizations.weight[0]._u.clone()
    with torch.no_grad():
        weight = network.eval().conv2.weight.clone()
    network.train()
    assert torch.equal(make_plain(network).conv2.weight, weight)
    assert network.training
    assert vector.shape == (8,)


def is_plain(network: torch.nn.Module) -> bool:
    return network.state_dict().keys() == made("plain").state_dict().keys()
