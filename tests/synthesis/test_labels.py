"""Labels: balanced, random, listed, of some classes only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.synthesis.labels import choose_labels, spread
from dfcompress.synthesis.recipe import Synthesis, choose_recipe

CARD = ModelCard("net", 4, (3, 8, 8), (0.5,) * 3, (0.2,) * 3, class_names=("cat", "dog", "emu", "fox"))


def test_balanced_labels_go_round_over_batches():
    labels = choose_labels("balanced", (), CARD)
    both = torch.cat([labels.of_batch(0, 6, seed=0), labels.of_batch(1, 6, seed=0)])
    assert both.tolist() == [0, 1, 2, 3] * 3


@pytest.mark.parametrize("classes", [1, 2, 10, 200, 1000])
def test_a_spread_order_has_every_class_once(classes):
    assert sorted(spread(classes)) == list(range(classes))


def test_a_few_large_images_are_of_classes_from_all_over_the_list():
    """16 of 1,000 classes in order leave no gap of more than twice the mean; small images keep the order they had."""
    large = replace(CARD, classes=1000, input_size=(3, 224, 224), class_names=None)
    drawn = sorted(choose_labels("balanced", (), large).of_batch(3, 16, seed=0).tolist())
    assert max(after - before for before, after in zip(drawn, [*drawn[1:], 1000 + drawn[0]], strict=True)) <= 125
    small = replace(large, input_size=(3, 64, 64))
    assert choose_labels("balanced", (), small).of_batch(0, 4, seed=0).tolist() == [0, 1, 2, 3]


def test_classes_are_numbers_or_names():
    assert choose_labels("balanced", ("3", "dog"), CARD).of_batch(0, 4, seed=0).tolist() == [3, 1, 3, 1]


def test_random_labels_depend_on_seed_and_batch_and_stay_among_the_classes():
    labels = choose_labels("random", ("1", "2"), CARD)
    drawn = labels.of_batch(0, 200, seed=0)
    assert set(drawn.tolist()) == {1, 2}
    assert torch.equal(drawn, labels.of_batch(0, 200, seed=0))
    assert not torch.equal(drawn, labels.of_batch(1, 200, seed=0))
    assert not torch.equal(drawn, labels.of_batch(0, 200, seed=1))


def test_listed_labels_come_in_their_order(tmp_path):
    (tmp_path / "list.txt").write_text("3 fox\n0 dog 2\n")
    assert choose_labels(str(tmp_path / "list.txt"), (), CARD).of_batch(0, 5, seed=0).tolist() == [3, 3, 0, 1, 2]


def test_listed_names_may_have_spaces(tmp_path):
    card = replace(CARD, class_names=("great white shark", "hen", "tench", "cock"))
    (tmp_path / "list.txt").write_text("\ufeffhen\ngreat white shark\n3\n", encoding="utf-8")
    assert choose_labels(str(tmp_path / "list.txt"), (), card).of_batch(0, 3, seed=0).tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("how", "classes", "message"),
    [
        ("balanced", ("4",), "no class '4'"),
        ("balanced", ("cow",), "no class 'cow'"),
        ("nowhere.txt", (), "not a file that can be read"),
    ],
)
def test_what_is_no_class_is_refused(how, classes, message):
    with pytest.raises(BadInput, match=message):
        choose_labels(how, classes, CARD)


def test_recipes_without_labels_take_no_classes():
    with pytest.raises(BadInput, match="towards no class"):
        choose_recipe(Synthesis(recipe="bns", classes=("1",)), CARD, None)
