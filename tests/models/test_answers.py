"""A network's answer is logits, is understood, or is refused with what helps."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dfcompress.data.real import open_images
from dfcompress.errors import BadInput
from dfcompress.models.answers import FIELD, LOGARITHMS, LOGITS, SOFTMAX, answers_with
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier, load
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.training.objectives import Prediction, kd
from dfcompress.training.student import make_student

sys.path.insert(0, str(Path(__file__).parent))
import factories

SIZE = (3, 16, 16)
CARD = ModelCard("net", 10, SIZE, (0.5,) * 3, (0.25,) * 3)
UNDERSTOOD = {
    "plain": LOGITS,
    "log_softmax": LOGITS,
    "softmax_module": SOFTMAX,
    "softmax": LOGARITHMS,
    "softmax_in_evaluation": LOGARITHMS,
    "traced": LOGARITHMS,
    "logits_field": FIELD,
    "softmax_field": LOGARITHMS,
}


def spec(name: str) -> str:
    return f"{factories.__file__}:{name}"


def written(name: str, folder: Path, *, scale: float = 1.0) -> Path:
    """A file of that factory's network, whose logits are `scale` times as far apart."""
    torch.manual_seed(0)
    network = factories.seen(getattr(factories, name)())
    with torch.no_grad():
        network.fc.weight *= scale
    torch.save(network.state_dict(), folder / "net.pt")
    return folder / "net.pt"


@pytest.mark.parametrize(("name", "answers"), UNDERSTOOD.items())
def test_logits_are_taken_wherever_they_are(name, answers, tmp_path):
    path = written(name, tmp_path, scale=20)
    classifier = load(path, arch=spec(name), input_size=SIZE)
    assert answers_with(classifier.network) == answers
    reference = load(path, arch=spec("plain"), input_size=SIZE)
    images = torch.rand(8, *SIZE)
    torch.testing.assert_close(
        classifier(images).log_softmax(1), reference(images).log_softmax(1), rtol=1e-4, atol=1e-4
    )
    assert classifier.network.state_dict().keys() == reference.network.state_dict().keys()


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_copy_and_a_saved_result_answer_the_same(name, tmp_path):
    classifier = load(written(name, tmp_path), arch=spec(name), input_size=SIZE)
    save(classifier, tmp_path / "out")
    again = load(tmp_path / "out", arch=spec(name))
    images = torch.rand(4, *SIZE)
    assert torch.equal(copy.deepcopy(classifier)(images), classifier(images))
    assert torch.equal(again(images), classifier(images))
    assert copy.deepcopy(again)(images).exp().sum(1).allclose(classifier(images).exp().sum(1))


@pytest.mark.parametrize("name", ["softmax", "softmax_in_evaluation", "logits_field"])
def test_the_change_compiles_in_one_graph(name, tmp_path):
    classifier = load(written(name, tmp_path), arch=spec(name), input_size=SIZE)
    compiled = torch.compile(classifier, fullgraph=True, backend="eager")
    images = torch.rand(4, *SIZE)
    torch.testing.assert_close(compiled(images), classifier(images))


def test_probabilities_of_nothing_have_finite_logarithms_and_gradients(tmp_path):
    classifier = load(written("softmax", tmp_path, scale=1e4), arch=spec("softmax"), input_size=SIZE)
    images = torch.rand(4, *SIZE, requires_grad=True)
    logits = classifier(images)
    assert logits.isfinite().all()
    assert logits.min() < -80
    F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)).backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("name", ["softmax", "softmax_in_evaluation", "softmax_module"])
def test_a_student_that_ends_in_softmax_learns_from_logits_in_both_modes(name):
    card = ModelCard("net", 10, SIZE, (0.5,) * 3, (0.25,) * 3)
    student, _ = make_student(spec(name), card, seed=0)
    plain, _ = make_student(spec("plain"), card, seed=0)
    images = torch.rand(8, *SIZE)
    for mode in (False, True):
        given, expected = (each.train(mode)(images).log_softmax(1) for each in (student, plain))
        torch.testing.assert_close(given, expected)


def test_a_classifier_made_in_python_keeps_its_softmax_and_a_copy_is_used():
    network = factories.seen(factories.softmax())
    given = Classifier(network, ModelCard("net", 10, SIZE, (0.5,) * 3, (0.25,) * 3))
    used = as_classifier(given)
    images = torch.rand(4, *SIZE)
    assert type(network) is factories.Softmax
    torch.testing.assert_close(used(images).exp(), given(images))


@pytest.mark.parametrize("name", ["one", "sigmoid"])
def test_one_column_is_loaded_and_refused_where_classes_are_needed(name, tmp_path):
    classifier = load(written(name, tmp_path), arch=spec(name), input_size=SIZE)
    assert classifier.card.classes == 1
    with pytest.raises(BadInput, match="answers with one column, and two or more classes are needed") as refused:
        as_classifier(classifier)
    assert "torch.cat([0 * z, z], 1)" in refused.value.remedy
    z = torch.randn(5, 1)
    assert torch.cat([0 * z, z], 1).softmax(1)[:, 1:].allclose(z.sigmoid())


@pytest.mark.parametrize("name", ["labels", "labels_module"])
def test_several_labels_per_image_are_loaded_and_refused_as_exclusive_classes(name, tmp_path):
    classifier = load(written(name, tmp_path), arch=spec(name), input_size=SIZE)
    with pytest.raises(BadInput, match=r"values in \[0, 1\] that do not add up to 1, as a network of several labels"):
        as_classifier(classifier)
    with pytest.raises(BadInput, match="several labels"):
        make_student(spec(name), classifier.card, seed=0)


def test_logits_that_happen_to_be_in_0_to_1_are_no_labels():
    network = factories.seen(factories.plain())
    with torch.no_grad():
        network.fc.weight *= 1e-3
        network.fc.bias.fill_(0.5)
    given = Classifier(network, CARD).frozen()
    assert ((given(torch.rand(4, *SIZE)) - 0.5).abs() < 0.5).all()
    images = torch.rand(4, *SIZE)
    assert torch.equal(as_classifier(given)(images), given(images))


def test_a_network_that_is_random_in_evaluation_is_refused(tmp_path):
    torch.save(factories.restless().state_dict(), tmp_path / "net.pt")
    for use in (
        lambda: load(tmp_path / "net.pt", arch=spec("restless"), input_size=SIZE),
        lambda: as_classifier(Classifier(factories.seen(factories.restless()), CARD)),
    ):
        with pytest.raises(BadInput, match="answers the same image differently each time") as refused:
            use()
        assert "training=self.training" in refused.value.remedy


@pytest.mark.parametrize(
    ("name", "what"), [("other_fields", "answers with a dict of out, aux"), ("pair", "answers with a tuple of 2")]
)
def test_an_answer_of_another_form_names_what_the_factory_must_return(name, what, tmp_path):
    path = written(name, tmp_path)
    with pytest.raises(BadInput, match=what) as refused:
        load(path, arch=spec(name), input_size=SIZE)
    assert refused.value.remedy == (
        "Let the --arch factory return a network that answers with logits (N, classes) alone."
    )
    assert load(path, arch=spec("plain"), input_size=SIZE).card.classes == 10


DEMO = Path(__file__).resolve().parents[2] / "dfcompress" / "demo_files"


def test_a_trained_teacher_teaches_the_same_with_and_without_its_softmax(tmp_path):
    """kd and its gradient, from the demonstration's teacher: most of its probabilities are next to 0 or 1."""
    plain = load(DEMO)
    torch.save(plain.network.state_dict(), tmp_path / "net.pt")
    softmax = load(
        tmp_path / "net.pt", arch=spec("demo_softmax"), input_size=(1, 32, 32), mean=plain.card.mean, std=plain.card.std
    )
    assert answers_with(softmax.network) == LOGARITHMS
    images, _ = next(open_images(DEMO, plain.card).batches(64))
    results = []
    for teacher in (plain, softmax):
        student = make_student("lenet5_half", plain.card, seed=0)[0]
        loss = kd(4.0).value(Prediction(student(images)), Prediction(teacher(images)))
        loss.backward()
        results.append((loss.detach(), student.network.fc3.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)
    assert results[0][0] > 0.1
