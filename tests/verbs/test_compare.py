"""Models beside each other: the demo teacher and a copy whose last layer forgot a little, on images of digits."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dfcompress.cli import run
from dfcompress.data.arrays import read_idx
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.errors import BadInput
from dfcompress.evaluation.metrics import bn_divergence
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import save
from dfcompress.verbs._comparison import Comparison
from dfcompress.verbs.compare import compare
from dfcompress.verbs.evaluate import evaluate

DEMO = Path(str(resources.files("dfcompress") / "demo_files"))
IMAGES = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`digits.npz`; `odd.npz`, the same with its first 4 pictures turned to noise and without labels; and `worse`, a
    model that seldom says 3.
    """
    folder = tmp_path_factory.mktemp("compare")
    digits = read_idx(DEMO)
    images, labels = digits.images[:IMAGES].numpy(), digits.labels[:IMAGES].numpy()
    np.savez(folder / "digits.npz", images=images, labels=labels)
    odd = images.copy()
    odd[:4] = np.random.default_rng(0).integers(0, 256, odd[:4].shape)
    np.savez(folder / "odd.npz", images=odd)
    worse = load(DEMO)
    last = [module for module in worse.network.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.bias.data[3] -= 12.0
    save(worse, folder / "worse")
    return folder


@pytest.fixture(scope="module")
def found(folder) -> Comparison:
    digits = folder / "digits.npz"
    sets = [digits, folder / "odd.npz", "random", f"fgsm:{digits}"]
    return compare([DEMO, folder / "worse"], sets=sets, own=digits, outliers=4, device="cpu", batch_size=150)


def test_counts_are_those_of_evaluate_and_divergences_those_of_invert(found, folder):
    digits = str(folder / "digits.npz")
    scores = evaluate([DEMO, folder / "worse"], data=digits, device="cpu").results
    results = found.on(digits)
    assert [(each.correct, each.images) for each in results] == [(each.correct, each.total) for each in scores]
    assert found.differences[0].agreement == pytest.approx(scores[1].agreement)
    digits_images = torch.from_numpy(np.load(digits)["images"]).float() / 255
    fitted = F.interpolate(digits_images, (32, 32), mode="bilinear", antialias=True)
    expected = bn_divergence(load(DEMO), [(fitted, torch.zeros(IMAGES))])
    assert [each.bn_divergence for each in results] == pytest.approx([expected] * 2, rel=1e-4)


def test_own_data_is_the_most_alike_and_noise_the_least(found, folder):
    ratios = [each.divergence_ratio for each in found.results if each.checkpoint == str(DEMO)]
    assert ratios[0] == 1
    assert ratios[2] > 20 > ratios[3] > 1
    assert found.on("random")[0].images == 1024


def test_a_model_that_lost_a_class_is_worse_by_more_than_noise(found, folder):
    one = found.differences[0]
    threes = found.on(one.set)[0].class_images[3]
    assert one.gained < one.lost == round(-one.difference * IMAGES) + one.gained
    assert one.lost > threes / 3
    assert one.interval[0] < one.difference < one.interval[1] < 0
    assert one.p_value < 0.05
    assert not one.within_noise
    assert {move.before for move in one.moves} == {3}
    assert all(change.before == 3 != change.after for change in one.changes)
    assert len(one.changes) == one.changed == sum(move.images for move in one.moves)
    before, after = (each.class_accuracy[3] for each in found.on(one.set))
    assert one.tail_degradation[-1] == pytest.approx((before - after) / before)


def test_a_model_is_within_noise_of_itself(folder):
    same = copy.deepcopy(load(DEMO))
    found = compare([load(DEMO), same], sets=[folder / "digits.npz"], device="cpu").differences[0]
    assert (found.changed, found.p_value, found.within_noise) == (0, 1.0, True)
    assert found.reference != found.checkpoint


def test_images_without_labels_have_answers_and_no_counts(found, folder):
    one = found.on(str(folder / "odd.npz"))[0]
    assert (one.correct, one.top1, one.class_images, one.calibration_error) == (None, None, None, None)
    assert sum(one.soft) == pytest.approx(1)
    assert sum(one.hard) == pytest.approx(1)
    difference = next(each for each in found.differences if each.set == one.set)
    assert difference.p_value is difference.within_noise is difference.tail_degradation is None
    assert difference.changes[0].label is None


def test_the_images_furthest_out_are_those_that_were_put_there(found, folder):
    for one in found.on(str(folder / "odd.npz")):
        assert {outlier.image for outlier in one.outliers} == {"0", "1", "2", "3"}
        scores = [outlier.score for outlier in one.outliers]
        assert scores == sorted(scores, reverse=True)


def test_classes_are_ordered_for_the_tail_by_the_set_that_is_named(found, folder):
    digits = str(folder / "digits.npz")
    by_noise = compare([DEMO, folder / "worse"], sets=[digits, "random"], tail_by="random", device="cpu")
    soft = by_noise.on("random")[0].soft
    place = sorted(range(10), key=soft.__getitem__).index(3)
    curve = by_noise.differences[0].tail_degradation
    assert curve[place] > 0
    assert curve[:place] == [0] * place


def test_labels_of_another_models_own_data_do_not_count_and_its_answers_are_not_compared(folder, capsys):
    digits, odd = str(folder / "digits.npz"), f"images:{folder / 'digits.npz'}"
    line = ["compare", DEMO, folder / "worse", "--sets", digits, odd, "--own", digits, odd, "--json", "--device", "cpu"]
    assert run(list(map(str, line))) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert values["differences"] == []
    assert [model["compared"] for model in values["models"]] == [True, False]
    assert "their answers are not compared" in captured.err


def test_tables_and_files_hold_what_was_found(folder, tmp_path, capsys):
    line = ["compare", DEMO, folder / "worse", "--sets", folder / "digits.npz", "random", "--csv", tmp_path / "tables"]
    line += ["--by-class", "--outliers", "1", "--device", "cpu", "--own", folder / "digits.npz"]
    assert run(list(map(str, line))) == 0
    out = capsys.readouterr().out
    assert "worse" in next(row for row in out.splitlines() if f"/{IMAGES}" in row and row.startswith("2"))
    assert "(1.0)" in out
    tables = (tmp_path / "tables").iterdir()
    files = {path.stem: list(csv.DictReader(path.read_text().splitlines())) for path in tables}
    assert set(files) == {"results", "classes", "differences", "moves", "tail", "changes", "outliers"}
    assert len(files["classes"]) == 2 * 2 * 10
    assert len(files["changes"]) == sum(int(row["changed"]) for row in files["differences"])
    again = run(list(map(str, line)))
    assert again == 2
    assert "is not a new or empty folder" in capsys.readouterr().err
    assert run(["compare", str(DEMO), "--sets", "random", "--csv", str(tmp_path / "nowhere" / "tables")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_sets_of_a_run_are_one_and_must_be_finished(folder, tmp_path):
    digits, card = read_idx(DEMO), load(DEMO).card.to_json()
    for number, name in enumerate(("synthetic", "synthetic-bns")):
        synthetic = SyntheticSet.create(tmp_path / name, {"card": card, "shards": [5]})
        rows = slice(5 * number, 5 * number + 5)
        images = F.interpolate(digits.images[rows].float(), (32, 32), mode="bilinear", antialias=True)
        synthetic.write_shard(0, images.round().byte(), digits.labels[rows])
    (one,) = compare([DEMO], sets=[tmp_path], outliers=10, device="cpu").results
    assert (one.images, one.correct) == (10, 10)
    names = {f"{part}/{number}" for part in ("synthetic", "synthetic-bns") for number in range(5)}
    assert {outlier.image for outlier in one.outliers} == names
    synthetic.shard_path(0).unlink()
    with pytest.raises(BadInput, match="synthetic-bns is not complete"):
        compare([DEMO], sets=[tmp_path], device="cpu")


def test_compared_models_see_the_same_images_with_the_same_labels_or_with_none(tmp_path):
    """Two of the ten class folders that the unnamed model needs, and a picture beside them; then all ten."""

    def named(*names: str) -> Classifier:
        model = load(DEMO)
        return Classifier(model.network, replace(model.card, class_names=names or None)).frozen()

    for place in ("3/a.png", "7/b.png", "c.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("L", (28, 28)).save(tmp_path / place)
    found = compare([named(*"0123456789"), named()], sets=tmp_path, outliers=3, device="cpu")
    assert [(one.images, one.correct) for one in found.results] == [(3, None)] * 2
    assert {each.image for each in found.results[0].outliers} == {str(file) for file in tmp_path.rglob("*.png")}
    for digit in "01245689":
        (tmp_path / digit).mkdir()
    assert [one.correct for one in compare([named(*"0123456789"), named()], sets=tmp_path).results] == [0, 0]
    with pytest.raises(BadInput, match="one of them has no class names"):
        compare([named(*"9876543210"), named()], sets=tmp_path)


def test_images_of_several_parts_are_named_by_their_part_when_they_are_fitted_too(tmp_path):
    """The card of the sets has images of 28 pixels, that of the model of 32."""
    card = replace(load(DEMO).card, input_size=(1, 28, 28)).to_json()
    for name in ("synthetic", "synthetic-bns"):
        SyntheticSet.create(tmp_path / name, {"card": card, "shards": [2]}).write_shard(
            0, torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
        )
    outliers = compare(DEMO, sets=tmp_path, outliers=4, device="cpu").results[0].outliers
    assert {each.image for each in outliers} == {
        f"synthetic{part}/{number}" for part in ("", "-bns") for number in "01"
    }


def test_a_model_that_cannot_be_attacked_is_refused_before_anything_runs(folder, monkeypatch):
    hard = load(DEMO)
    hard.network.register_forward_hook(lambda module, images, logits: logits.detach())
    monkeypatch.setattr("dfcompress.verbs.compare.observe", lambda *_, **__: pytest.fail("a model ran"))
    with pytest.raises(BadInput, match="passes no gradient"):
        compare([DEMO, hard], sets=[folder / "digits.npz", f"fgsm:{folder / 'digits.npz'}"], device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": []}, "No set of images"),
        ({"sets": ["absent.npz"]}, "absent.npz does not exist"),
        ({"sets": ["fgsm:random"]}, "attacks noise"),
        ({"sets": ["random"], "own": "digits"}, "--own digits is not one of the sets: random"),
        ({"sets": ["random"], "own": ["random"] * 3}, "--own names 3 sets for 1 models"),
        ({"sets": ["random"], "tail_by": "digits"}, "--tail-by digits is not one"),
        ({"sets": ["random"], "epsilon": 0.0}, "--epsilon must be above 0; it is 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message):
    with pytest.raises(BadInput, match=message):
        compare([DEMO], **options)


def test_a_model_without_batchnorm_has_no_divergence(lenet, folder):
    found = compare([lenet], sets=[folder / "digits.npz"], own=folder / "digits.npz", outliers=2, device="cpu")
    assert "no BatchNorm layer" in found.models[0].no_divergence
    one = found.results[0]
    assert (one.bn_divergence, one.divergence_ratio, one.outliers) == (None, None, [])
    assert one.images == IMAGES
