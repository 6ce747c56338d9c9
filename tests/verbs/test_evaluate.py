"""The released checkpoints' counts on real test images, the gate, and what the demo ships."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfcompress.data.real import open_images
from dfcompress.errors import BadInput, GateNotMet
from dfcompress.models.checkpoint import load
from dfcompress.verbs.evaluate import Evaluation, Score, as_share, evaluate

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
A_SCORE = Score(checkpoint="a", correct=1, total=1, top1=1.0, standard_error=0.0, top5=None, agreement=None)
DEMO = Path(str(resources.files("dfcompress") / "demo_files"))


@pytest.fixture(scope="module")
def both(resnet20_file, resnet44_file, cifar10_test_file) -> Evaluation:
    return evaluate([resnet20_file, resnet44_file], data=cifar10_test_file, device="cpu")


def test_released_checkpoints_get_their_known_counts(both):
    assert [(row.correct, row.total) for row in both.results] == [(776, 846), (793, 846)]
    assert [row.top1 for row in both.results] == [776 / 846, 793 / 846]


def test_agreement_is_with_the_first_checkpoint(both):
    first, second = both.results
    assert first.agreement == 1.0
    assert round(second.agreement * 846) == 791


def test_top5_counts_labels_among_the_five_best(both):
    assert [round(row.top5 * 846) for row in both.results] == [844, 845]


def test_results_are_plain_json_with_the_fields_that_stay(both, resnet20_file):
    row = json.loads(json.dumps(both.to_json()))["results"][0]
    assert list(row) == ["checkpoint", "correct", "total", "top1", "standard_error", "top5", "agreement"]
    assert row["checkpoint"] == str(resnet20_file)
    assert Evaluation.from_json(both.to_json()) == both


@pytest.fixture(scope="module")
def first_100(tmp_path_factory, cifar10_test_file) -> Path:
    """The first 100 test images, of which ResNet-20 gets 94 right."""
    path = tmp_path_factory.mktemp("first") / "100.npz"
    with np.load(cifar10_test_file) as arrays:
        np.savez(path, images=arrays["images"][:100], labels=arrays["labels"][:100])
    return path


def test_the_batch_size_changes_no_count(resnet20_file, first_100):
    whole, parts = (
        evaluate([resnet20_file], data=first_100, device="cpu", batch_size=size).results[0] for size in (100, 60)
    )
    assert whole == parts


def test_every_kind_of_source_gives_the_same_counts(tmp_path, resnet20_file, first_100):
    with np.load(first_100) as arrays:
        images, labels = arrays["images"].transpose(0, 2, 3, 1), arrays["labels"]
    np.savez(tmp_path / "nhwc.npz", images=images, labels=labels)
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "pictures" / CIFAR10[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    sources = [first_100, tmp_path / "nhwc.npz", tmp_path / "pictures"]
    counts = [evaluate([resnet20_file], data=source, device="cpu").results[0].correct for source in sources]
    assert counts == [94, 94, 94]


def test_a_loaded_classifier_is_taken_as_well(resnet20_file, first_100):
    loaded = load(resnet20_file)
    row = evaluate(loaded, data=first_100, device="cpu").results[0]
    assert (row.checkpoint, row.correct) == (str(resnet20_file), 94)


@pytest.mark.parametrize("fail_under", [0.95, 95])
def test_a_gate_that_is_not_met_is_raised_after_the_counts(fail_under, resnet20_file, first_100):
    evaluation = evaluate([resnet20_file], data=first_100, device="cpu", fail_under=fail_under)
    assert evaluation.results[0].correct == 94
    with pytest.raises(GateNotMet, match=r"right on 94\.00% of the images, below --fail-under 95\.00%") as raised:
        evaluation.check_gate()
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("fail_under", [0.94, 94])
def test_a_gate_that_is_just_met_passes(fail_under, resnet20_file, first_100):
    evaluate([resnet20_file], data=first_100, device="cpu", fail_under=fail_under).check_gate()


def test_a_gate_holds_for_every_checkpoint(both):
    Evaluation(both.results, fail_under=0.917).check_gate()
    with pytest.raises(GateNotMet, match="resnet20"):
        Evaluation(both.results, fail_under=0.93).check_gate()


def test_a_percentage_that_is_just_reached_passes():
    for correct in range(501, 1000):
        just = Evaluation([replace(A_SCORE, top1=correct / 1000)], fail_under=as_share(correct / 10))
        just.check_gate()
        with pytest.raises(GateNotMet):
            replace(just, fail_under=as_share((correct + 1) / 10)).check_gate()


@pytest.mark.parametrize("fail_under", [-0.1, 100.5, float("nan")])
def test_a_gate_that_is_no_accuracy_is_refused_before_anything_is_read(fail_under):
    with pytest.raises(BadInput, match=r"--fail-under must be an accuracy"):
        evaluate(["nowhere.pt"], data="nowhere", fail_under=fail_under)


def test_no_checkpoint_is_refused():
    with pytest.raises(BadInput, match="No checkpoint was given"):
        evaluate([], data="nowhere")


def test_different_numbers_of_classes_are_refused(resnet20_file, first_100):
    first, second = load(resnet20_file), load(resnet20_file)
    second.network.fc = torch.nn.Linear(64, 100)
    second.card = replace(second.card, classes=100)
    with pytest.raises(BadInput, match=r"has 10 classes, .* has 100"):
        evaluate([first, second], data=first_100)


@pytest.mark.parametrize(("names", "agreement"), [("9876543210", 1.0), ("abcdefghij", None)])
def test_answers_agree_by_the_names_of_classes(names, agreement, tmp_path):
    """The same network with its outputs in another order, and one whose classes are others."""
    demo = load(DEMO)
    demo.card = replace(demo.card, class_names=tuple("0123456789"))
    other = load(DEMO)
    with torch.no_grad():
        for parameter in (other.network.fc3.weight, other.network.fc3.bias):
            parameter.copy_(parameter.flip(0))
    other.card = replace(other.card, class_names=tuple(names))
    images, labels = next(iter(open_images(DEMO, demo.card).batches(100)))
    np.savez(tmp_path / "digits.npz", images=(255 * images).byte().numpy(), labels=labels.numpy())
    first, second = evaluate([demo, other], data=tmp_path / "digits.npz").results
    assert (first.agreement, second.agreement) == (1.0, agreement)


def test_the_demo_teacher_gets_its_count_on_the_shipped_test_images():
    row = evaluate([DEMO], data=DEMO, device="cpu").results[0]
    assert (row.correct, row.total) == (9951, 10_000)


def test_the_demo_files_take_at_most_2_million_bytes():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 2_000_000
